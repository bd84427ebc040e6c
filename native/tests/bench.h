// What benchmarks of kernels have in common.
#pragma once

#include <cstdint>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <vector>

namespace elasticmoe::bench {

inline constexpr int64_t kVector = 16;  // floats: compiled for the machine that it runs on
using Vector = float __attribute__((vector_size(kVector * 4)));

// Reads `nbytes`, each once, as fast as one thread can; returns something that depends on all.
inline float read_all(const char* from, int64_t nbytes) {
  Vector sums[8] = {};
  for (int64_t at = 0; at + 512 <= nbytes; at += 512) {
    __builtin_prefetch(from + at + 4096);
    for (int64_t line = 0; line < 8; ++line) {
      Vector v;
      std::memcpy(&v, from + at + line * 64, sizeof v);
      sums[line] += v;
    }
  }
  float total = 0;
  for (const Vector& sum : sums) total += sum[0];
  return total;
}

// Of this thread on a processor.
inline double seconds_of(const std::function<void()>& work) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double start = now();
  work();
  return now() - start;
}

// bfloat16 numbers between 0.5 and 1 of either sign: of no use but to be read.
inline std::vector<uint16_t> make_numbers(int64_t count) {
  std::mt19937 random(1);
  std::vector<uint16_t> numbers(static_cast<size_t>(count));
  for (uint16_t& number : numbers) {
    const uint32_t bits = random();
    number = static_cast<uint16_t>(0x3f00u | (bits & 0x7fu) | (bits & 0x8000u));
  }
  return numbers;
}

inline double fma_gflops() {
  constexpr int64_t kChains = 12, kRounds = 200'000;
  static volatile float factor = 0.999f;
  [[maybe_unused]] static volatile float kept;
  const double seconds = seconds_of([] {
    Vector sums[kChains] = {};
    const Vector x = factor - Vector{}, y = 0.5f - Vector{};
    for (int64_t round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kChains; ++i) {
        sums[i] = sums[i] * x + y;
        asm volatile("" : "+v"(sums[i]));
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kChains; ++i) kept = sums[i][0];
  });
  return 2.0 * kChains * kVector * kRounds / seconds * 1e-9;
}

inline std::vector<float> make_floats(int64_t count) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> floats(static_cast<size_t>(count));
  for (float& value : floats) value = normal(random);
  return floats;
}

}  // namespace elasticmoe::bench
