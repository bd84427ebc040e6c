// Kernels whose work the process's threads share (crew.h), where there is enough of it. Which thread computes what
// changes no bit: work is cut between columns, experts, heads and rows, whose results do not depend on one another.
#pragma once

#include "kernels/api.h"

namespace elasticmoe::kernels::shared {

void linear(const Linear& a);
void experts(const Experts& a);
void attention(const Attention& a);
void latent_attention(const LatentAttention& a);

}  // namespace elasticmoe::kernels::shared
