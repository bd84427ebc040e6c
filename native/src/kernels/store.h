// What is done to queries, keys and values before they are stored, and storing them. Included only by isa.cpp.
#pragma once

#include "kernels/api.h"
#include "kernels/layers.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

// Rotate the first `rope.dims` elements of `x` in place, as those of this row.
inline void rotate(float* x, const Rope& rope, int64_t row) {
  const int64_t half = rope.dims / 2;
  const float* cosine = rope.table + row * rope.dims;
  const float* sine = cosine + half;
  if (rope.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosine[i] - b * sine[i];
      x[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

// NaN stays NaN.
inline void clip(float* x, int64_t count, float most) {
  for (int64_t i = 0; i < count; ++i) x[i] = x[i] > most ? most : x[i] < -most ? -most : x[i];
}

// Norm `heads` heads together or each (if there is a norm).
inline void norm_heads(float* x, int64_t heads, int64_t dim, const float* weight, bool together, float eps) {
  if (weight == nullptr) return;
  if (together) {
    norm_in_place(x, heads * dim, weight, eps);
    return;
  }
  for (int64_t head = 0; head < heads; ++head) norm_in_place(x + head * dim, dim, weight, eps);
}

// Calls each(row, to): for every row of the batch, where plane 0 and head 0 of its position are in `layer`.
template <typename Element, typename Each>
void for_each_place(const KvCache& cache, const Parts& parts, int64_t layer, Each each) {
  const int64_t size = cache.block_size;
  for (int64_t part = 0; part < parts.num_parts; ++part) {
    const int32_t* table = parts.blocks + parts.block_starts[part];
    int64_t position = parts.first_position(part);
    for (int64_t row = parts.row_starts[part]; row < parts.row_starts[part + 1]; ++row, ++position) {
      Element* block = reinterpret_cast<Element*>(cache.base + table[position / size] * cache.stride);
      each(row, block + cache.offset(layer, 0, 0) + position % size * cache.width);
    }
  }
}

template <typename T>
void narrow_row(const float* from, int64_t count, typename T::Element* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = T::narrow(from[i]);
}

template <typename T>
void store_kv_as(const StoreKv& a) {
  const int64_t dim = a.cache.width, heads = a.cache.num_heads, size = a.cache.block_size;
  const int64_t row_width = (a.q_heads + 2 * heads) * dim;
  for_each_place<typename T::Element>(a.cache, a.parts, a.layer, [&](int64_t row, typename T::Element* to) {
    float* q = a.qkv + row * row_width;
    float* k = q + a.q_heads * dim;
    const float* v = k + heads * dim;
    norm_heads(q, a.q_heads, dim, a.q_norm, a.norms_token, a.eps);
    norm_heads(k, heads, dim, a.k_norm, a.norms_token, a.eps);
    if (a.clip > 0) clip(q, row_width, a.clip);
    for (int64_t head = 0; head < a.q_heads + heads; ++head) rotate(q + head * dim, a.rope, row);
    for (int64_t head = 0; head < heads; ++head) {
      typename T::Element* k_to = to + head * size * dim;
      narrow_row<T>(k + head * dim, dim, k_to);
      narrow_row<T>(v + head * dim, dim, k_to + heads * size * dim);
    }
  });
}

inline void store_kv(const StoreKv& a) {
  a.cache.dtype == Dtype::kBfloat16 ? store_kv_as<Bfloat16>(a) : store_kv_as<Float32>(a);
}

template <typename T>
void store_latent_as(const StoreLatent& a) {
  const int64_t width = a.cache.width, rank = width - a.rope.dims, q_dim = a.nope_dim + a.rope.dims;
  for_each_place<typename T::Element>(a.cache, a.parts, a.layer, [&](int64_t row, typename T::Element* to) {
    for (int64_t head = 0; head < a.q_heads; ++head) {
      rotate(a.q + (row * a.q_heads + head) * q_dim + a.nope_dim, a.rope, row);
    }
    float* kv = a.kv + row * width;
    norm_in_place(kv, rank, a.norm, a.eps);
    rotate(kv + rank, a.rope, row);
    narrow_row<T>(kv, width, to);
  });
}

inline void store_latent(const StoreLatent& a) {
  a.cache.dtype == Dtype::kBfloat16 ? store_latent_as<Bfloat16>(a) : store_latent_as<Float32>(a);
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
