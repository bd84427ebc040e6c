// Tiles of AMX: what products of bfloat16 numbers are made of. Included only by isa.cpp, in the set that has them.
//
// A product of tiles takes bfloat16 on both sides and sums in float32. Where one side is float32 (activations, queries,
// probabilities) each number is cut into three of bfloat16 whose sum it is, so that nothing is rounded but the sums, as
// in the other sets.
#pragma once

#include <immintrin.h>

#include "kernels/simd.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

inline constexpr int64_t kTile = 16;          // rows of a tile, and its columns of float32
inline constexpr int64_t kPairs = 2 * kTile;  // its columns of bfloat16
inline constexpr int64_t kTileElements = kTile * kPairs;
inline constexpr int64_t kTerms = 3;  // of 8 bits each: all 24 of a float32

// What was written to memory is there before tiles are loaded from it: the instructions' intrinsics do not tell the
// compiler that they read (GCC's bind an address and no memory).
inline void settle() {
  asm volatile("" ::: "memory");
}

// Eight tiles of sixteen rows of 64 bytes each.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64 && kTile == 16);
inline constexpr TileConfig kTileConfig;

inline void begin_tiles() {
  settle();
  _tile_loadconfig(&kTileConfig);
}

// The next of the terms of 16 floats, as their upper halves; what is left stays in `rest`.
inline U32 next_term(F32& rest) {
  const U32 term = bits<U32>(rest) & 0xffff0000u;
  rest -= bits<F32>(term);
  return term;
}

// 16 floats rounded to bfloat16, to nearest with ties to even, as their upper halves; a NaN stays one.
inline U32 rounded_halves(F32 x) {
  const U32 u = bits<U32>(x), odd = (u >> 16) & 1u;
  const U32 rounded = (u + 0x7fffu + odd) & 0xffff0000u;
  return x == x ? rounded : ((u | 0x400000u) & 0xffff0000u);
}

// Lane i of the result: the upper halves of lanes 2 i and 2 i + 1 of a and b one after the other.
inline U32 join_halves(U32 a, U32 b) {
  constexpr auto kEven = [](int64_t i) { return 2 * i; };
  constexpr auto kOdd = [](int64_t i) { return 2 * i + 1; };
  const F32 even = shuffle<kEven>(bits<F32>(a), bits<F32>(b)), odd = shuffle<kOdd>(bits<F32>(a), bits<F32>(b));
  return (bits<U32>(even) >> 16) | bits<U32>(odd);
}

// A tile of [16, 16] numbers of 32 bits from rows to columns.
inline void transpose(F32 (&rows)[kTile]) {
  const auto exchange = [&]<int64_t kStep>() {
    constexpr auto kLow = [](int64_t i) { return i & kStep ? (i ^ kStep) + kTile : i; };
    constexpr auto kHigh = [](int64_t i) { return i & kStep ? i + kTile : i ^ kStep; };
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) {
      if (i & kStep) continue;
      const F32 a = rows[i], b = rows[i + kStep];
      rows[i] = shuffle<kLow>(a, b);
      rows[i + kStep] = shuffle<kHigh>(a, b);
    }
  };
  exchange.template operator()<1>();
  exchange.template operator()<2>();
  exchange.template operator()<4>();
  exchange.template operator()<8>();
}

inline void transpose(const float* from, float* to, int64_t to_stride) {
  F32 rows[kTile];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; ++i) rows[i] = load(from + i * kTile);
  transpose(rows);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; ++i) store(to + i * to_stride, rows[i]);
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
