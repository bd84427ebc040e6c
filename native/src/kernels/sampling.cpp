#include "kernels/sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace elasticmoe::kernels {
namespace {

struct Candidate {
  float weight;  // relative to the greatest, which has 1
  int32_t id;
};

bool before(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

double sum_of(const float* weights, int64_t count) {
  double sums[8] = {};  // independent, so that they overlap
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += static_cast<double>(weights[i + lane]);
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(weights[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Token whose share of [0, total) holds uniform × total, in the order of ids. Weights are summed by blocks.
int64_t draw_from(const float* weights, int64_t vocab, double uniform) {
  constexpr int64_t kBlock = 256;
  const int64_t num_blocks = (vocab + kBlock - 1) / kBlock;
  std::vector<double> sums(static_cast<size_t>(num_blocks));
  double total = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = block * kBlock;
    sums[static_cast<size_t>(block)] = sum_of(weights + begin, std::min(kBlock, vocab - begin));
    total += sums[static_cast<size_t>(block)];
  }
  double left = uniform * total;
  int64_t block = 0;
  while (block + 1 < num_blocks && left >= sums[static_cast<size_t>(block)]) left -= sums[static_cast<size_t>(block++)];
  int64_t last = -1;
  for (int64_t i = block * kBlock; i < vocab; ++i) {
    if (weights[i] <= 0) continue;
    last = i;
    left -= static_cast<double>(weights[i]);
    if (left < 0) return i;
  }
  // Rounding carried it past the end: the last token that has a share.
  for (int64_t i = vocab - 1; i >= 0 && last < 0; --i) {
    if (weights[i] > 0) last = i;
  }
  return last;
}

// How many of the greatest weights to keep: until there are `count` of them, or until they sum up to `sum`.
struct Enough {
  int64_t count;
  double sum;
};

// The last one to keep of `candidates`, by bisection. Reorders them.
Candidate find_last(std::vector<Candidate>& candidates, Enough enough) {
  auto begin = candidates.begin(), end = candidates.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    double sum = 0;
    for (auto it = begin; it != middle; ++it) sum += static_cast<double>(it->weight);
    if (middle - begin >= enough.count || sum >= enough.sum) {
      end = middle;
    } else {
      enough.count -= middle - begin;
      enough.sum -= sum;
      begin = middle;
    }
  }
  return *begin;
}

// Keep the greatest weights until there is enough of them; of equals the lower ids. The others become 0.
//
// Weights are in [0, 1]: their bits, as numbers, are in their order. The upper ones sort them into bins in one pass,
// and only the bin in which it becomes enough is looked into.
void keep_greatest(float* weights, int64_t vocab, Enough enough) {
  constexpr int kShift = 18;
  constexpr size_t kBins = (0x3f800000u >> kShift) + 1;
  const auto bin_of = [](float weight) { return std::bit_cast<uint32_t>(weight) >> kShift; };
  std::vector<int64_t> counts(kBins);
  std::vector<double> sums(kBins);
  for (int64_t i = 0; i < vocab; ++i) {
    if (weights[i] <= 0) continue;
    counts[bin_of(weights[i])] += 1;
    sums[bin_of(weights[i])] += static_cast<double>(weights[i]);
  }
  size_t bin = kBins - 1;
  while (bin > 0 && counts[bin] < enough.count && sums[bin] < enough.sum) {
    enough.count -= counts[bin];
    enough.sum -= sums[bin];
    --bin;
  }
  std::vector<Candidate> candidates;
  for (int64_t i = 0; i < vocab; ++i) {
    if (weights[i] > 0 && bin_of(weights[i]) == bin) candidates.push_back({weights[i], static_cast<int32_t>(i)});
  }
  if (candidates.empty()) return;
  const Candidate last = find_last(candidates, enough);
  for (int64_t i = 0; i < vocab; ++i) {
    const bool kept = weights[i] > last.weight || (weights[i] == last.weight && i <= last.id);
    weights[i] = kept ? weights[i] : 0.0f;
  }
}

}  // namespace

int64_t draw(const float* logits, int64_t vocab, const Draw& options) {
  const Kernels& k = kernels();
  const int64_t best = k.greatest(logits, vocab);
  if (best < 0) return -1;
  float* weights = scratch(Scratch::kWide, vocab);
  k.exponentials(logits, vocab, logits[best], 1.0f / options.temperature, weights);
  if (options.min_p > 0) {
    const float least = static_cast<float>(options.min_p);  // the greatest weight is 1
    for (int64_t i = 0; i < vocab; ++i) weights[i] = weights[i] >= least ? weights[i] : 0.0f;
  }
  if (options.top_k > 0 && options.top_k < vocab) {
    keep_greatest(weights, vocab, {options.top_k, std::numeric_limits<double>::infinity()});
  }
  if (options.top_p < 1) keep_greatest(weights, vocab, {vocab, options.top_p * sum_of(weights, vocab)});
  return draw_from(weights, vocab, options.uniform);
}

double log_total(const float* logits, int64_t vocab) {
  const Kernels& k = kernels();
  const int64_t best = k.greatest(logits, vocab);
  if (best < 0) return std::numeric_limits<double>::quiet_NaN();
  float* weights = scratch(Scratch::kWide, vocab);
  k.exponentials(logits, vocab, logits[best], 1.0f, weights);
  return static_cast<double>(logits[best]) + std::log(sum_of(weights, vocab));
}

std::vector<int32_t> top_tokens(const float* logits, int64_t vocab, int64_t count) {
  std::vector<Candidate> top;  // sorted
  const size_t most = static_cast<size_t>(std::min(count, vocab));
  for (int64_t i = 0; i < vocab && most > 0; ++i) {
    if (top.size() == most) {
      if (logits[i] <= top.back().weight) continue;
      top.pop_back();
    }
    const Candidate candidate{logits[i], static_cast<int32_t>(i)};
    top.insert(std::lower_bound(top.begin(), top.end(), candidate, before), candidate);
  }
  std::vector<int32_t> ids;
  for (const Candidate& candidate : top) ids.push_back(candidate.id);
  return ids;
}

void rope_table(const Parts& parts, const float* inv_freq, int64_t half, float amplitude, float* to) {
  for (int64_t part = 0; part < parts.num_parts; ++part) {
    int64_t position = parts.first_position(part);
    for (int64_t row = parts.row_starts[part]; row < parts.row_starts[part + 1]; ++row, ++position) {
      float* cosines = to + row * 2 * half;
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(position) * inv_freq[i];
        cosines[i] = std::cos(angle) * amplitude;
        cosines[half + i] = std::sin(angle) * amplitude;
      }
    }
  }
}

}  // namespace elasticmoe::kernels
