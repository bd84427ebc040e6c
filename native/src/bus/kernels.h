// The arithmetic of the exchange.
#pragma once

#include <cstddef>

namespace elasticmoe::bus {

// out[h] = sum over j < num_rows of weights[j] * rows[j][h], added in the order of j, for h < hidden. Zeros without
// rows.
void weighted_sum(float* out, const float* const* rows, const float* weights, size_t num_rows, size_t hidden);

}  // namespace elasticmoe::bus
