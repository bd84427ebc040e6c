// How a thread rounds, and whether it takes the smallest numbers for zero: a thread starts with its maker's mode, and a
// library may change that of the thread that loads it. Numbers that several threads compute must not tell who did.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace elasticmoe {

#if defined(__SSE__)
inline constexpr uint32_t kFloatExceptions = 0x3f;  // what has happened, which is no mode

inline uint32_t float_mode() {
  return _mm_getcsr() & ~kFloatExceptions;
}

inline void set_float_mode(uint32_t mode) {
  _mm_setcsr(mode);
}
#elif defined(__aarch64__)
// All of FPCR is mode: FZ and FZ16 take the smallest numbers for zero. What has happened is in FPSR.
inline uint32_t float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return static_cast<uint32_t>(mode);
}

inline void set_float_mode(uint32_t mode) {
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{mode}));
}
#else
inline uint32_t float_mode() {
  return 0;
}

inline void set_float_mode(uint32_t) {}
#endif

}  // namespace elasticmoe
