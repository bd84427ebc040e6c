// Choosing tokens from a row of logits, and positions' rotations. Plain C++: nothing here depends on the instruction
// set but through Kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/api.h"

namespace elasticmoe::kernels {

// Within these bounds no logits that are finite make a weight that is not, and the greatest logit has the weight 1.
inline constexpr double kTemperatureMin = 1e-6;
inline constexpr double kTemperatureMax = 1e6;

struct Draw {
  float temperature;  // in the bounds above
  int64_t top_k;      // 0: all
  double top_p;       // in [0, 1]; 1: all, 0: the greatest alone
  double min_p;       // in [0, 1]; 0: all
  double uniform;     // in [0, 1)
};

// The token that `uniform` falls on; -1 if a logit is not finite.
int64_t draw(const float* logits, int64_t vocab, const Draw& options);

// log of the sum of e^logit. NaN if a logit is not finite.
double log_total(const float* logits, int64_t vocab);

// The `count` greatest, best first; of equals the lower id first.
std::vector<int32_t> top_tokens(const float* logits, int64_t vocab, int64_t count);

// to[row] = cosines and sines of position × inv_freq[i], times `amplitude`; rows of `parts` in order. The product is
// rounded to float32, as the models were trained with.
void rope_table(const Parts& parts, const float* inv_freq, int64_t half, float amplitude, float* to);

}  // namespace elasticmoe::kernels
