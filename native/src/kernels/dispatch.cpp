// Which kernels to run on this machine, and their scratch memory.
#include <atomic>
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

namespace {

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels = built_kernels().sets[0];
  return kernels;
}

struct Buffer {
  float* data = nullptr;
  int64_t capacity = 0;

  ~Buffer() { std::free(data); }
};

}  // namespace

const Kernels& kernels() {
  return *current().load(std::memory_order_acquire);
}

bool use_instruction_set(std::string_view name) {
  const Built& built = built_kernels();
  for (int64_t i = 0; i < built.count; ++i) {
    if (name != built.sets[i]->name) continue;
    current().store(built.sets[i], std::memory_order_release);
    return true;
  }
  return false;
}

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
