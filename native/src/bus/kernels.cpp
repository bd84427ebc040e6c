#include "bus/kernels.h"

namespace elasticmoe::bus {

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(ELASTICMOE_NO_TARGET_CLONES)
#define ELASTICMOE_SIMD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ELASTICMOE_SIMD_CLONES
#endif

ELASTICMOE_SIMD_CLONES
void weighted_sum(float* out, const float* const* rows, const float* weights, size_t num_rows, size_t hidden) {
  constexpr size_t kTile = 64;  // the accumulator stays in registers
  size_t h = 0;
  for (; h + kTile <= hidden; h += kTile) {
    float sum[kTile] = {};
    for (size_t j = 0; j < num_rows; ++j) {
      const float* row = rows[j] + h;
      const float weight = weights[j];
      for (size_t lane = 0; lane < kTile; ++lane) sum[lane] += weight * row[lane];
    }
    for (size_t lane = 0; lane < kTile; ++lane) out[h + lane] = sum[lane];
  }
  for (; h < hidden; ++h) {
    float sum = 0;
    for (size_t j = 0; j < num_rows; ++j) sum += weights[j] * rows[j][h];
    out[h] = sum;
  }
}

}  // namespace elasticmoe::bus
