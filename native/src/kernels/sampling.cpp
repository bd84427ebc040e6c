#include "kernels/sampling.h"

#include <algorithm>
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

// Token whose share of [0, total) holds uniform × total, in the order of ids. Weights are summed by blocks.
int64_t draw_any(const float* weights, int64_t vocab, double uniform) {
  constexpr int64_t kBlock = 256;
  const int64_t num_blocks = (vocab + kBlock - 1) / kBlock;
  std::vector<double> sums(static_cast<size_t>(num_blocks));
  double total = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    double sum = 0;
    for (int64_t i = block * kBlock; i < std::min(vocab, (block + 1) * kBlock); ++i)
      sum += static_cast<double>(weights[i]);
    sums[static_cast<size_t>(block)] = sum;
    total += sum;
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
  for (int64_t i = vocab - 1; last < 0; --i) {
    if (weights[i] > 0) last = i;
  }
  return last;
}

int64_t draw_of(const std::vector<Candidate>& candidates, double uniform) {
  double total = 0;
  for (const Candidate& candidate : candidates) total += static_cast<double>(candidate.weight);
  double left = uniform * total;
  for (const Candidate& candidate : candidates) {
    left -= static_cast<double>(candidate.weight);
    if (left < 0) return candidate.id;
  }
  return candidates.back().id;
}

// The last of the `top_k` greatest. Reorders its argument.
Candidate cutoff_of_top_k(std::vector<Candidate>& candidates, int64_t top_k) {
  const auto last = candidates.begin() + (top_k - 1);
  std::nth_element(candidates.begin(), last, candidates.end(), before);
  return *last;
}

// The last of the fewest greatest whose sum reaches `top_p` of all, by bisection. Reorders its argument.
Candidate cutoff_of_top_p(std::vector<Candidate>& candidates, double top_p) {
  const auto sum = [](auto begin, auto end) {
    double total = 0;
    for (; begin != end; ++begin) total += static_cast<double>(begin->weight);
    return total;
  };
  auto begin = candidates.begin(), end = candidates.end();
  double left = top_p * sum(begin, end);
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    const double upper = sum(begin, middle);
    if (upper >= left) {
      end = middle;
    } else {
      left -= upper;
      begin = middle;
    }
  }
  return *begin;
}

// Drop what comes after `cutoff`; the order of the others stays that of their ids.
void keep_until(std::vector<Candidate>& candidates, const Candidate& cutoff) {
  std::erase_if(candidates, [&](const Candidate& candidate) { return before(cutoff, candidate); });
}

}  // namespace

int64_t draw(const float* logits, int64_t vocab, const Draw& options) {
  const Kernels& k = kernels();
  const int64_t best = k.greatest(logits, vocab);
  if (best < 0) return -1;
  float* weights = scratch(Scratch::kWide, vocab);
  k.exponentials(logits, vocab, logits[best], 1.0f / options.temperature, weights);
  const bool limits_k = options.top_k > 0 && options.top_k < vocab;
  if (!limits_k && options.top_p >= 1 && options.min_p <= 0) return draw_any(weights, vocab, options.uniform);
  std::vector<Candidate> candidates;
  for (int64_t i = 0; i < vocab; ++i) {
    if (weights[i] > 0 && static_cast<double>(weights[i]) >= options.min_p) {
      candidates.push_back({weights[i], static_cast<int32_t>(i)});
    }
  }
  if (limits_k && options.top_k < static_cast<int64_t>(candidates.size())) {
    std::vector<Candidate> work = candidates;
    keep_until(candidates, cutoff_of_top_k(work, options.top_k));
  }
  if (options.top_p < 1) {
    std::vector<Candidate> work = candidates;
    keep_until(candidates, cutoff_of_top_p(work, options.top_p));
  }
  return draw_of(candidates, options.uniform);
}

double log_total(const float* logits, int64_t vocab) {
  const Kernels& k = kernels();
  const int64_t best = k.greatest(logits, vocab);
  if (best < 0) return std::numeric_limits<double>::quiet_NaN();
  float* weights = scratch(Scratch::kWide, vocab);
  k.exponentials(logits, vocab, logits[best], 1.0f, weights);
  double total = 0;
  for (int64_t i = 0; i < vocab; ++i) total += static_cast<double>(weights[i]);
  return static_cast<double>(logits[best]) + std::log(total);
}

std::vector<int32_t> top_tokens(const float* logits, int64_t vocab, int64_t count) {
  std::vector<Candidate> top;  // sorted
  const size_t most = static_cast<size_t>(std::min(count, vocab));
  for (int64_t i = 0; i < vocab && most > 0; ++i) {
    const Candidate candidate{logits[i], static_cast<int32_t>(i)};
    if (top.size() == most && !before(candidate, top.back())) continue;
    if (top.size() == most) top.pop_back();
    top.insert(std::lower_bound(top.begin(), top.end(), candidate, before), candidate);
  }
  std::vector<int32_t> ids;
  for (const Candidate& candidate : top) ids.push_back(candidate.id);
  return ids;
}

void rope_table(const Parts& parts, const float* inv_freq, int64_t half, float* to) {
  for (int64_t part = 0; part < parts.num_parts; ++part) {
    int64_t position = parts.first_position(part);
    for (int64_t row = parts.row_starts[part]; row < parts.row_starts[part + 1]; ++row, ++position) {
      float* cosines = to + row * 2 * half;
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(position) * inv_freq[i];
        cosines[i] = std::cos(angle);
        cosines[half + i] = std::sin(angle);
      }
    }
  }
}

}  // namespace elasticmoe::kernels
