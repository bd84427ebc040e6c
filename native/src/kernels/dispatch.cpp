// Which kernels to run on this machine, and their scratch memory.
#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
namespace avx512bf16 {
extern const Kernels kKernels;
}
namespace amx {
extern const Kernels kKernels;
}
#endif

namespace {

#if defined(__x86_64__)
// Whether there are tiles of bfloat16, and Linux lets this process use them: their eight kilobytes of state are a
// process's own only after it has asked. Children have what their parent asked for.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;  // of EDX
  constexpr long kRequest = 0x1023, kTileData = 18;           // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (~d & (kBfloat16 | kTile)) != 0) return false;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const Built& built_kernels() {
  static const Built built = [] {
    Built found{};
#if defined(__x86_64__)
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("fma");
    if (has_avx512 && has_tiles()) found.sets[found.count++] = &amx::kKernels;
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) found.sets[found.count++] = &avx512bf16::kKernels;
    if (has_avx512) found.sets[found.count++] = &avx512::kKernels;
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
