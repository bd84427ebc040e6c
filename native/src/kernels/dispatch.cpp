// Which kernels to run on this machine, and their scratch memory.
#include <cstdlib>
#include <new>

#include "kernels/api.h"

namespace elasticmoe::kernels {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

const Built& built_kernels() {
  static const Built built = [] {
    Built found{};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
      found.sets[found.count++] = &avx512::kKernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.sets[found.count++] = &avx2::kKernels;
#endif
    found.sets[found.count++] = &baseline::kKernels;
    return found;
  }();
  return built;
}

const Kernels& kernels() { return *built_kernels().sets[0]; }

namespace {

struct Buffer {
  float* data = nullptr;
  int64_t capacity = 0;

  ~Buffer() { std::free(data); }
};

}  // namespace

float* scratch(Scratch purpose, int64_t count) {
  static thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
  constexpr int64_t kLine = 16;  // floats in 64 bytes
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  if (count > buffer.capacity) {
    const int64_t capacity = (count + kLine - 1) / kLine * kLine;
    std::free(buffer.data);
    buffer.capacity = 0;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(capacity) * sizeof(float)));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.capacity = capacity;
  }
  return buffer.data;
}

}  // namespace elasticmoe::kernels
