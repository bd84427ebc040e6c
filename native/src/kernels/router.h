// The choice of experts. Included only by isa.cpp.
#pragma once

#include <cmath>

#include "kernels/api.h"
#include "kernels/layers.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

// Whole numbers in the order of the floats they stand for, equal where those are: the greatest of many is found by
// comparing vectors. NaN is the least; what may not be chosen (any more) is less than that.
inline constexpr int32_t kTaken = INT32_MIN;
inline constexpr int32_t kNan = INT32_MIN + 1;

inline int32_t order_of(float value) {
  if (value != value) return kNan;
  const int32_t u = bits<int32_t>(value + 0.0f);  // of both zeros the one
  return u ^ ((u >> 31) & 0x7fffffff);
}

// Index of the first greatest. `count` is filled up to whole vectors with kTaken.
inline int64_t first_greatest(const int32_t* keys, int64_t count) {
  I32 most = I32{} + kTaken;
  for (int64_t i = 0; i < count; i += kLanes) {
    I32 v;
    std::memcpy(&v, keys + i, sizeof v);
    most = v > most ? v : most;
  }
  int32_t peak = most[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) peak = most[lane] > peak ? most[lane] : peak;
  int64_t i = 0;
  while (keys[i] != peak) ++i;
  return i;
}

inline float greatest_value(const float* x, int64_t count) {
  float most = x[0];
  for (int64_t i = 1; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

inline float sum_of_two_greatest(const float* x, int64_t count) {
  float most = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    second = x[i] > most ? most : x[i] > second ? x[i] : second;
    most = x[i] > most ? x[i] : most;
  }
  return most + second;
}

inline int64_t whole_vectors(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// Put kTaken in place of the keys of all groups but the best.
inline void keep_best_groups(const Router& a, const float* choice, int32_t* keys, int32_t* group_keys) {
  const int64_t size = a.num_experts / a.num_groups;
  for (int64_t g = 0; g < whole_vectors(a.num_groups); ++g) {
    if (g >= a.num_groups) {
      group_keys[g] = kTaken;
      continue;
    }
    const float* group = choice + g * size;
    group_keys[g] =
        order_of(a.scoring == Scoring::kSoftmax ? greatest_value(group, size) : sum_of_two_greatest(group, size));
  }
  for (int64_t i = 0; i < a.top_groups; ++i) group_keys[first_greatest(group_keys, a.num_groups)] = kTaken;
  for (int64_t g = 0; g < a.num_groups; ++g) {  // those that are left are not among the best
    if (group_keys[g] == kTaken) continue;
    for (int64_t i = 0; i < size; ++i) keys[g * size + i] = kTaken;
  }
}

// From a row's logits to scores, in place. Returns what weights are divided by where they need not sum to 1: the sum of
// a softmax is only divided by where it matters.
inline float score(const Router& a, float* logits) {
  if (a.scoring == Scoring::kSigmoid) {
    int64_t i = 0;
    for (; i + kLanes <= a.num_experts; i += kLanes) store(logits + i, 1.0f / (exp(-load(logits + i)) + 1.0f));
    for (; i < a.num_experts; ++i) logits[i] = sigmoid(logits[i]);
    return 1.0f;
  }
  exponentials(logits, a.num_experts, greatest_value(logits, a.num_experts), 1.0f, logits);
  float total = 0;
  for (int64_t i = 0; i < a.num_experts; ++i) total += logits[i];
  if (a.bias == nullptr) return total;
  for (int64_t i = 0; i < a.num_experts; ++i) logits[i] /= total;
  return 1.0f;
}

inline void router(const Router& a) {
  float* logits = scratch(Scratch::kWide, a.num_rows * a.num_experts);
  linear({a.x, a.num_rows, a.gate, Dtype::kFloat32, a.num_experts, a.hidden, logits, false, nullptr});
  const int64_t padded_experts = whole_vectors(a.num_experts);
  float* biased = scratch(Scratch::kScores, a.num_experts);
  int32_t* keys = reinterpret_cast<int32_t*>(scratch(Scratch::kSums, padded_experts + whole_vectors(a.num_groups)));
  for (int64_t row = 0; row < a.num_rows; ++row) {
    float* scores = logits + row * a.num_experts;
    const float total = score(a, scores);
    const float* choice = scores;
    if (a.bias != nullptr) {
      for (int64_t i = 0; i < a.num_experts; ++i) biased[i] = scores[i] + a.bias[i];
      choice = biased;
    }
    for (int64_t i = 0; i < padded_experts; ++i) keys[i] = i < a.num_experts ? order_of(choice[i]) : kTaken;
    if (a.num_groups > 1) keep_best_groups(a, choice, keys, keys + padded_experts);
    int32_t* ids = a.ids + row * a.top_k;
    float* weights = a.weights + row * a.top_k;
    float chosen = 0;
    for (int64_t k = 0; k < a.top_k; ++k) {
      const int64_t best = first_greatest(keys, a.num_experts);
      keys[best] = kTaken;
      ids[k] = static_cast<int32_t>(best);
      weights[k] = scores[best];
      chosen += scores[best];
    }
    if (a.scoring == Scoring::kSigmoid) chosen += 1e-20f;
    const float divisor = a.renormalize ? chosen : total;
    for (int64_t k = 0; k < a.top_k; ++k) weights[k] = weights[k] / divisor * a.scaling;
  }
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
