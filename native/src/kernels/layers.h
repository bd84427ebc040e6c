// Norms, rotation, experts and router. Included only by isa.cpp.
#pragma once

#include <cmath>

#include "kernels/api.h"
#include "kernels/dot.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

template <typename T>
void linear_as(const Linear& a) {
  float* packed = scratch(Scratch::kPacked, a.num_rows * padded<T>(a.depth));
  pack_rows<T>(a.x, a.depth, a.num_rows, a.depth, packed);
  product<T>(packed, a.num_rows, static_cast<const typename T::Element*>(a.w), a.num_cols, a.depth, a.out, a.num_cols,
             a.add);
}

inline void linear(const Linear& a) {
  a.dtype == Dtype::kBfloat16 ? linear_as<Bfloat16>(a) : linear_as<Float32>(a);
}

// 1 / sqrt(mean of squares + eps)
inline float rms_factor(const float* x, int64_t count, float eps) {
  F32 squares = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < count; ++i) total += x[i] * x[i];
  return 1.0f / sqrtf(total / static_cast<float>(count) + eps);
}

inline void norm(const Norm& a) {
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const int64_t row = a.rows != nullptr ? a.rows[i] : i;
    float* x = a.x + row * a.hidden;
    float* out = a.out + i * a.hidden;
    const float* summed = x;
    if (a.delta != nullptr) {
      const float* delta = a.delta + row * a.hidden;
      float* to = a.rows != nullptr ? out : x;
      for (int64_t j = 0; j < a.hidden; ++j) to[j] = x[j] + delta[j];
      summed = to;
    }
    const float factor = rms_factor(summed, a.hidden, a.eps);
    for (int64_t j = 0; j < a.hidden; ++j) out[j] = summed[j] * factor * a.weight[j];
  }
}

// Norm (if there is one) and rotate one head in place.
inline void finish_head(float* head, int64_t half, const float* rope, const float* weight, float eps) {
  if (weight != nullptr) {
    const float factor = rms_factor(head, 2 * half, eps);
    for (int64_t i = 0; i < 2 * half; ++i) head[i] = head[i] * factor * weight[i];
  }
  const float* cosine = rope;
  const float* sine = rope + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

template <typename T>
void store_kv_as(const StoreKv& a) {
  using Element = typename T::Element;
  const int64_t dim = a.cache.head_dim, heads = a.cache.num_heads, size = a.cache.block_size;
  const int64_t width = (a.q_heads + 2 * heads) * dim;
  for (int64_t part = 0; part < a.parts.num_parts; ++part) {
    const int32_t* table = a.parts.blocks + a.parts.block_starts[part];
    int64_t position = a.parts.first_position(part);
    for (int64_t row = a.parts.row_starts[part]; row < a.parts.row_starts[part + 1]; ++row, ++position) {
      float* q = a.qkv + row * width;
      float* k = q + a.q_heads * dim;
      const float* v = k + heads * dim;
      const float* rope = a.rope + row * dim;
      for (int64_t head = 0; head < a.q_heads; ++head) finish_head(q + head * dim, dim / 2, rope, a.q_norm, a.eps);
      for (int64_t head = 0; head < heads; ++head) finish_head(k + head * dim, dim / 2, rope, a.k_norm, a.eps);
      char* block = a.cache.base + table[position / size] * a.cache.stride;
      Element* to = reinterpret_cast<Element*>(block) + (a.layer * 2 * heads * size + position % size) * dim;
      for (int64_t head = 0; head < heads; ++head) {
        Element* k_to = to + head * size * dim;
        Element* v_to = k_to + heads * size * dim;
        for (int64_t i = 0; i < dim; ++i) k_to[i] = T::narrow(k[head * dim + i]);
        for (int64_t i = 0; i < dim; ++i) v_to[i] = T::narrow(v[head * dim + i]);
      }
    }
  }
}

inline void store_kv(const StoreKv& a) {
  a.cache.dtype == Dtype::kBfloat16 ? store_kv_as<Bfloat16>(a) : store_kv_as<Float32>(a);
}

// to[i] = silu(gate[i]) * up[i]
inline void silu_product(const float* gate, const float* up, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 g = load(gate + i);
    store(to + i, g / (exp(-g) + 1.0f) * load(up + i));
  }
  for (; i < count; ++i) to[i] = gate[i] / (exp(splat(-gate[i]))[0] + 1.0f) * up[i];
}

inline constexpr int64_t kExpertRows = 384;  // computed at once; bounds the scratch memory

template <typename T>
void experts_as(const Experts& a) {
  using Element = typename T::Element;
  const int64_t most = a.num_experts == 0 ? 0 : kExpertRows;
  float* packed = scratch(Scratch::kPacked, most * padded<T>(a.hidden));
  float* wide = scratch(Scratch::kWide, most * 2 * a.width);
  float* packed_wide = scratch(Scratch::kPackedWide, most * padded<T>(a.width));
  const float* rows = a.rows;
  float* out = a.out;
  for (int64_t expert = 0; expert < a.num_experts; ++expert) {
    const Element* w13 = reinterpret_cast<const Element*>(a.w13 + expert * a.w13_stride);
    const Element* w2 = reinterpret_cast<const Element*>(a.w2 + expert * a.w2_stride);
    for (int64_t left = a.counts[expert]; left > 0;) {
      const int64_t count = left < kExpertRows ? left : kExpertRows;
      pack_rows<T>(rows, a.hidden, count, a.hidden, packed);
      product<T>(packed, count, w13, 2 * a.width, a.hidden, wide, 2 * a.width, false);
      for (int64_t row = 0; row < count; ++row) {
        float* gate = wide + row * 2 * a.width;
        silu_product(gate, gate + a.width, a.width, gate);
      }
      pack_rows<T>(wide, 2 * a.width, count, a.width, packed_wide);
      product<T>(packed_wide, count, w2, a.hidden, a.width, out, a.hidden, false);
      rows += count * a.hidden;
      out += count * a.hidden;
      left -= count;
    }
  }
}

inline void experts(const Experts& a) {
  a.dtype == Dtype::kBfloat16 ? experts_as<Bfloat16>(a) : experts_as<Float32>(a);
}

inline float greatest_value(const float* x, int64_t count) {
  float most = x[0];
  for (int64_t i = 1; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

inline void exponentials(const float* x, int64_t count, float peak, float factor, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 v = (load(x + i) - peak) * factor;
    const F32 e = exp(v);
    store(out + i, v < -87.0f ? F32{} : e);
  }
  for (; i < count; ++i) {
    const float v = (x[i] - peak) * factor;
    out[i] = v < -87.0f ? 0.0f : exp(splat(v))[0];
  }
}

inline void router(const Router& a) {
  constexpr float kTaken = -1.0f;
  float* logits = scratch(Scratch::kWide, a.num_rows * a.num_experts);
  linear({a.x, a.num_rows, a.gate, Dtype::kFloat32, a.num_experts, a.hidden, logits, false});
  for (int64_t row = 0; row < a.num_rows; ++row) {
    float* p = logits + row * a.num_experts;
    exponentials(p, a.num_experts, greatest_value(p, a.num_experts), 1.0f, p);
    float total = 0;
    for (int64_t i = 0; i < a.num_experts; ++i) total += p[i];
    int32_t* ids = a.ids + row * a.top_k;
    float* weights = a.weights + row * a.top_k;
    float chosen = 0;
    for (int64_t k = 0; k < a.top_k; ++k) {
      int64_t best = -1;  // among the ones not taken yet, also where they are NaN: ids stay distinct
      for (int64_t i = 0; i < a.num_experts; ++i) {
        if (p[i] != kTaken && (best < 0 || p[i] > p[best])) best = i;
      }
      ids[k] = static_cast<int32_t>(best);
      weights[k] = p[best];
      chosen += p[best];
      p[best] = kTaken;
    }
    const float divisor = a.renormalize ? chosen : total;
    for (int64_t k = 0; k < a.top_k; ++k) weights[k] /= divisor;
  }
}

template <typename T>
void embed_as(const int32_t* ids, int64_t num_rows, const void* table, int64_t hidden, float* out) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const typename T::Element* from = static_cast<const typename T::Element*>(table) + ids[row] * hidden;
    for (int64_t i = 0; i < hidden; ++i) out[row * hidden + i] = T::widen(from[i]);
  }
}

inline void embed(const int32_t* ids, int64_t num_rows, const void* table, Dtype dtype, int64_t hidden, float* out) {
  dtype == Dtype::kBfloat16 ? embed_as<Bfloat16>(ids, num_rows, table, hidden, out)
                            : embed_as<Float32>(ids, num_rows, table, hidden, out);
}

inline int64_t greatest(const float* x, int64_t count) {
  F32 most = splat(-INFINITY), odd = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 v = load(x + i);
    odd += v - v;  // 0 where v is finite, else NaN
    most = max(v, most);
  }
  float peak = -INFINITY, wrong = sum(odd);
  for (int64_t lane = 0; lane < kLanes; ++lane) peak = most[lane] > peak ? most[lane] : peak;
  for (; i < count; ++i) {
    wrong += x[i] - x[i];
    peak = x[i] > peak ? x[i] : peak;
  }
  if (wrong != 0) return -1;  // true for NaN
  for (i = 0; x[i] != peak;) ++i;
  return i;
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
