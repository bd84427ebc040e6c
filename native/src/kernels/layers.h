// Products with weights, norms and experts. Included only by isa.cpp.
#pragma once

#include <cmath>

#include "kernels/api.h"
#include "kernels/product.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

template <typename T>
void linear_as(const Linear& a) {
  float* packed = scratch(Scratch::kPacked, operand_floats<T>(a.num_rows, a.depth));
  const int64_t out_stride = a.out_stride == 0 ? a.num_cols : a.out_stride;
  make_operand<T>(a.x, a.x_stride == 0 ? a.depth : a.x_stride, a.num_rows, a.depth, packed);
  if (a.bias != nullptr) {
    for (int64_t row = 0; row < a.num_rows; ++row) {
      float* out = a.out + row * out_stride;
      for (int64_t i = 0; i < a.num_cols; ++i) out[i] = a.add ? out[i] + a.bias[i] : a.bias[i];
    }
  }
  product<T>(packed, a.num_rows, static_cast<const typename T::Element*>(a.w), a.num_cols, a.depth, a.out, out_stride,
             a.add || a.bias != nullptr, a.after);
}

// `product` for the way in which weights of that dtype are multiplied.
template <typename Product>
inline void by_dtype(Dtype dtype, Product product) {
  switch (dtype) {
    case Dtype::kFloat32:
      return product.template operator()<Float32>();
    case Dtype::kBfloat16:
      return product.template operator()<Bfloat16>();
    case Dtype::kRounded:
      return product.template operator()<Rounded>();
  }
}

inline void linear(const Linear& a) {
  by_dtype(a.dtype, [&]<typename T>() { linear_as<T>(a); });
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

// x = x / rms(x) * weight
inline void norm_in_place(float* x, int64_t count, const float* weight, float eps) {
  const float factor = rms_factor(x, count, eps);
  for (int64_t i = 0; i < count; ++i) x[i] = x[i] * factor * weight[i];
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

// to[i] = silu(gate[i]) * up[i]
inline void silu_product(const float* gate, const float* up, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 g = load(gate + i);
    store(to + i, g / (exp(-g) + 1.0f) * load(up + i));
  }
  for (; i < count; ++i) to[i] = gate[i] / (exp(splat(-gate[i]))[0] + 1.0f) * up[i];
}

inline float sigmoid(float x) {
  return 1.0f / (exp(splat(-x))[0] + 1.0f);
}

inline void activate(const Activate& a) {
  float* gates = a.gate == nullptr ? nullptr : scratch(Scratch::kScores, a.num_rows);
  if (a.gate != nullptr) {
    linear({a.rows, a.num_rows, a.gate, Dtype::kFloat32, 1, a.hidden, gates, false, nullptr});
  }
  for (int64_t row = 0; row < a.num_rows; ++row) {
    float* gate = a.wide + row * 2 * a.width;
    silu_product(gate, gate + a.width, a.width, gate);
    if (a.gate == nullptr) continue;
    const float share = sigmoid(gates[row]);
    for (int64_t i = 0; i < a.width; ++i) gate[i] *= share;
  }
}

template <typename T>
void experts_as(const Experts& a) {
  using Element = typename T::Element;
  const int64_t most = a.num_experts == 0 ? 0 : kRowsAtOnce;
  float* wide = scratch(Scratch::kWide, most * 2 * a.width);
  float* packed_wide = scratch(Scratch::kPackedWide, operand_floats<T>(most, a.width));
  const float* rows = a.rows;
  float* out = a.out;
  int64_t next = 0;  // expert that has rows
  const auto find_next = [&] {
    while (next < a.num_experts && a.counts[next] == 0) ++next;
  };
  find_next();
  while (next < a.num_experts) {
    const int64_t expert = next++;
    find_next();
    const void* after = next < a.num_experts ? a.w13 + next * a.w13_stride : a.after;
    const Element* w13 = reinterpret_cast<const Element*>(a.w13 + expert * a.w13_stride);
    const Element* w2 = reinterpret_cast<const Element*>(a.w2 + expert * a.w2_stride);
    for (int64_t left = a.counts[expert]; left > 0;) {
      const int64_t count = left < kRowsAtOnce ? left : kRowsAtOnce;
      float* packed = scratch(Scratch::kPacked, operand_floats<T>(count, a.hidden));
      make_operand<T>(rows, a.hidden, count, a.hidden, packed);
      product<T>(packed, count, w13, 2 * a.width, a.hidden, wide, 2 * a.width, false, w2);
      activate({wide, count, a.width, rows, a.hidden, a.gate});
      make_operand<T>(wide, 2 * a.width, count, a.width, packed_wide);
      product<T>(packed_wide, count, w2, a.hidden, a.width, out, a.hidden, a.add, left > count ? w13 : after);
      rows += count * a.hidden;
      out += count * a.hidden;
      left -= count;
    }
  }
}

inline void experts(const Experts& a) {
  by_dtype(a.dtype, [&]<typename T>() { experts_as<T>(a); });
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

template <typename T>
void embed_as(const Embed& a) {
  for (int64_t row = 0; row < a.num_rows; ++row) {
    float* out = a.out + row * a.hidden;
    const int64_t at = a.ids[row] - a.first;
    if (at < 0 || at >= a.num_held) {
      std::memset(out, 0, static_cast<size_t>(a.hidden) * sizeof *out);
      continue;
    }
    const typename T::Element* from = static_cast<const typename T::Element*>(a.table) + at * a.hidden;
    for (int64_t i = 0; i < a.hidden; ++i) out[i] = T::widen(from[i]) * a.factor;
  }
}

inline void embed(const Embed& a) {
  a.dtype == Dtype::kBfloat16 ? embed_as<Bfloat16>(a) : embed_as<Float32>(a);
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
