// Products of rows with bfloat16 weights on the tiles of AMX. Included only by isa.cpp, in the set that has them.
//
// Weights are the left-hand side, because they are read as they lie: sixteen of them, 32 elements each, are a tile.
// Rows are the right-hand side, kTerms columns each, one for each of the terms that their floats are cut into: with
// three of them a step with up to five rows needs one product for each tile of weights, and no more; with one, where
// floats are rounded to bfloat16, one with up to sixteen. A row's columns are summed up each by itself over k in order,
// then added in one order: its result does not depend on how many rows are computed with it.
#pragma once

#include "kernels/dot.h"
#include "kernels/tiles.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

template <int64_t kTerms>
inline constexpr int64_t kTiledRows = kTile / kTerms;  // in a tile; columns that are left are zeros
inline constexpr int64_t kTiledOuts = 4;               // tiles of weights that are computed with at once
// Packed rows that stay in the second-level cache while all weights pass by.
inline constexpr int64_t kTiledBytes = 1024 * 1024;
inline constexpr int64_t kLeastBlocks = 4, kMostBlocks = 16;

inline int64_t tiled_steps(int64_t depth) {
  return (depth + kPairs - 1) / kPairs;
}
template <int64_t kTerms>
int64_t tiled_blocks(int64_t num_rows) {
  return (num_rows + kTiledRows<kTerms> - 1) / kTiledRows<kTerms>;
}

// Floats that `tile_rows` writes.
template <int64_t kTerms>
int64_t tiled_floats(int64_t num_rows, int64_t depth) {
  return tiled_blocks<kTerms>(num_rows) * tiled_steps(depth) * kTileElements / 2;
}

// 32 elements of up to kTiledRows rows as a tile: [16 pairs of elements, 16 columns].
template <int64_t kTerms>
void tile_step(const float* x, int64_t x_stride, int64_t num_rows, int64_t left, float* to) {
  F32 columns[kTile] = {};
#pragma GCC unroll 16
  for (int64_t row = 0; row < kTiledRows<kTerms>; ++row) {
    if (row >= num_rows) continue;
    const float* from = x + row * x_stride;
    const uint32_t kept = left < kPairs ? (1u << left) - 1 : ~0u;
    F32 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), from);
    F32 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept >> kTile), from + kTile);
    if constexpr (kTerms == 1) {
      columns[row] = bits<F32>(join_halves(rounded_halves(a), rounded_halves(b)));
      continue;
    }
#pragma GCC unroll 3
    for (int64_t term = 0; term < kTerms; ++term) {
      const U32 a_term = next_term(a);
      columns[row * kTerms + term] = bits<F32>(join_halves(a_term, next_term(b)));
    }
  }
  transpose(columns);
#pragma GCC unroll 16
  for (int64_t pair = 0; pair < kTile; ++pair) store(to + pair * kTile, columns[pair]);
}

// Pack rows for `tile_product`: kTiledRows after kTiledRows, each of these step after step. `to`: aligned to 64 bytes.
template <int64_t kTerms>
void tile_rows(const float* x, int64_t x_stride, int64_t num_rows, int64_t depth, float* to) {
  constexpr int64_t kRows = kTiledRows<kTerms>;
  for (int64_t row = 0; row < num_rows; row += kRows) {
    const int64_t rows = num_rows - row < kRows ? num_rows - row : kRows;
    for (int64_t k = 0; k < depth; k += kPairs, to += kTileElements / 2) {
      tile_step<kTerms>(x + row * x_stride + k, x_stride, rows, depth - k, to);
    }
  }
}

// sums of tiles of weights 0 to kOuts - 1 and of tiles of rows 0 to kBlocks - 1, for one step. The tiles of sums are 0
// to 3, of the second rows from 2 on.
template <int64_t kOuts, int64_t kBlocks>
inline void add_step(const uint16_t* const (&w)[kOuts], size_t w_stride, const uint16_t* x, int64_t x_block) {
  static_assert(kBlocks == 1 ? kOuts <= kTiledOuts : kBlocks == 2 && kOuts <= 2);
  constexpr size_t kRowBytes = kPairs * 2;
  if constexpr (kBlocks == 1) {
    _tile_loadd(7, x, kRowBytes);
    _tile_loadd(4, w[0], w_stride);
    _tile_dpbf16ps(0, 4, 7);
    if constexpr (kOuts > 1) {
      _tile_loadd(5, w[1], w_stride);
      _tile_dpbf16ps(1, 5, 7);
    }
    if constexpr (kOuts > 2) {
      _tile_loadd(6, w[2], w_stride);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (kOuts > 3) {
      _tile_loadd(4, w[3], w_stride);
      _tile_dpbf16ps(3, 4, 7);
    }
  } else {
    _tile_loadd(4, w[0], w_stride);
    _tile_loadd(6, x, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x + x_block, kRowBytes);
    _tile_dpbf16ps(2, 4, 7);
    if constexpr (kOuts > 1) {
      _tile_loadd(5, w[1], w_stride);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// out[row, i] (+)= what the tile `sums` [16 weights, 16 columns] says of up to kTiledRows rows and sixteen weights.
template <int64_t kTerms>
void store_tiled(const float* sums, int64_t num_rows, int64_t num_outs, float* out, int64_t out_stride, bool add) {
  F32 columns[kTile];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; ++i) columns[i] = load(sums + i * kTile);
  transpose(columns);
  const auto kept = static_cast<__mmask16>((1u << num_outs) - 1);
#pragma GCC unroll 16
  for (int64_t row = 0; row < kTiledRows<kTerms>; ++row) {
    if (row >= num_rows) continue;
    float* to = out + row * out_stride;
    F32 total = columns[row * kTerms + kTerms - 1];  // the least first
#pragma GCC unroll 3
    for (int64_t term = kTerms - 2; term >= 0; --term) total += columns[row * kTerms + term];
    if (add) total += F32(_mm512_maskz_loadu_ps(kept, to));
    _mm512_mask_storeu_ps(to, kept, total);
  }
}

// What is multiplied: weights [num_outs, depth] from `w` on, and packed rows.
struct Tiled {
  const uint16_t* w;
  int64_t num_outs, depth;
  const uint16_t* x;
  int64_t num_rows;
  float* out;
  int64_t out_stride;
  bool add;
};

// One group of tiles: kOuts × 16 weights (fewer of the last tile have a result; all of them can be read), kBlocks ×
// kTiledRows rows. Whatever `ahead` says is fetched at each step.
template <int64_t kTerms, int64_t kOuts, int64_t kBlocks>
void multiply_tiles(const Tiled& a, Ahead& ahead) {
  const int64_t whole = a.depth / kPairs, left = a.depth % kPairs, block = tiled_steps(a.depth) * kTileElements;
  const auto stride = static_cast<size_t>(a.depth) * 2;
  const uint16_t* w[kOuts];
  for (int64_t i = 0; i < kOuts; ++i) w[i] = a.w + i * kTile * a.depth;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint16_t* x = a.x;
  for (int64_t step = 0; step < whole; ++step, x += kTileElements) {
    for (int64_t line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.from + line * kLineBytes, 0, 2);
    ahead.from += ahead.lines * kLineBytes;
    add_step<kOuts, kBlocks>(w, stride, x, block);
    for (int64_t i = 0; i < kOuts; ++i) w[i] += kPairs;
  }
  if (left > 0) {  // what follows a weight is another's
    alignas(64) uint16_t tails[kOuts][kTileElements] = {};
    for (int64_t i = 0; i < kOuts; ++i) {
      for (int64_t n = 0; n < kTile; ++n) {
        std::memcpy(tails[i] + n * kPairs, w[i] + n * a.depth, static_cast<size_t>(left) * sizeof(uint16_t));
      }
      w[i] = tails[i];
    }
    settle();
    add_step<kOuts, kBlocks>(w, kPairs * 2, x, block);
  }
  alignas(64) float sums[4][kTile * kTile];
  _tile_stored(0, sums[0], kTile * 4);
  _tile_stored(1, sums[1], kTile * 4);
  _tile_stored(2, sums[2], kTile * 4);
  _tile_stored(3, sums[3], kTile * 4);
  for (int64_t i = 0; i < kOuts; ++i) {
    const int64_t outs = a.num_outs - i * kTile;
    for (int64_t j = 0; j < kBlocks; ++j) {
      constexpr int64_t kRows = kTiledRows<kTerms>;
      const int64_t rows = a.num_rows - j * kRows;
      store_tiled<kTerms>(sums[j * 2 + i], rows < kRows ? rows : kRows, outs < kTile ? outs : kTile,
                          a.out + j * kRows * a.out_stride + i * kTile, a.out_stride, a.add);
    }
  }
}

// At most kTiledOuts tiles of weights against all rows: two tiles of rows at a time against two of weights, so that
// what is loaded is used twice, and the last one, if they are odd, against all.
template <int64_t kTerms>
void multiply_panel(const Tiled& a, Ahead ahead) {
  constexpr int64_t kRows = kTiledRows<kTerms>;
  const int64_t tiles = (a.num_outs + kTile - 1) / kTile, block = tiled_steps(a.depth) * kTileElements;
  const int64_t paired = a.num_rows <= kRows ? 0 : tiled_blocks<kTerms>(a.num_rows) / 2 * 2;
  const auto part = [&](int64_t tile, int64_t first) {
    Tiled of = a;
    of.w += tile * kTile * a.depth;
    of.num_outs -= tile * kTile;
    of.x += first * block;
    of.num_rows -= first * kRows;
    of.out += first * kRows * a.out_stride + tile * kTile;
    return of;
  };
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    for (int64_t first = 0; first < paired; first += 2) {
      tiles - tile > 1 ? multiply_tiles<kTerms, 2, 2>(part(tile, first), ahead)
                       : multiply_tiles<kTerms, 1, 2>(part(tile, first), ahead);
    }
  }
  if (paired * kRows >= a.num_rows) return;
  switch (tiles) {
    case 1:
      return multiply_tiles<kTerms, 1, 1>(part(0, paired), ahead);
    case 2:
      return multiply_tiles<kTerms, 2, 1>(part(0, paired), ahead);
    case 3:
      return multiply_tiles<kTerms, 3, 1>(part(0, paired), ahead);
    default:
      return multiply_tiles<kTerms, 4, 1>(part(0, paired), ahead);
  }
}

// out[m, n] (+)= x[m] · w[n] for x from `tile_rows` and contiguous w. `after`: as in Linear.
template <int64_t kTerms>
void tile_product(const float* x, int64_t num_rows, const uint16_t* w, int64_t num_cols, int64_t depth, float* out,
                  int64_t out_stride, bool add, const char* after) {
  constexpr int64_t kPanel = kTiledOuts * kTile, kRows = kTiledRows<kTerms>;
  const int64_t block_bytes = tiled_steps(depth) * kTileElements * 2;
  int64_t together = kTiledBytes / block_bytes / 2 * 2;  // tiles of rows
  together = together < kLeastBlocks ? kLeastBlocks : together > kMostBlocks ? kMostBlocks : together;
  const int64_t odd = num_cols % kTile;
  uint16_t* copy = nullptr;
  if (odd > 0) {  // sixteen rows are read of the last weights
    copy = reinterpret_cast<uint16_t*>(scratch(Scratch::kCopy, kTile * depth / 2));
    std::memset(copy, 0, static_cast<size_t>(kTile * depth) * sizeof *copy);
    std::memcpy(copy, w + (num_cols - odd) * depth, static_cast<size_t>(odd * depth) * sizeof *copy);
  }
  begin_tiles();
  for (int64_t row = 0; row < num_rows; row += together * kRows) {
    const int64_t rows = num_rows - row < together * kRows ? num_rows - row : together * kRows;
    const uint16_t* packed = reinterpret_cast<const uint16_t*>(x) + row / kRows * tiled_steps(depth) * kTileElements;
    const int64_t blocks = tiled_blocks<kTerms>(rows), passes = blocks / 2 * 2 + blocks % 2;
    for (int64_t n = 0; n < num_cols - odd; n += kPanel) {  // each fetches what the next one needs
      const int64_t outs = num_cols - odd - n < kPanel ? num_cols - odd - n : kPanel;
      const bool is_last = after != nullptr && n + outs == num_cols - odd && row + rows == num_rows;
      const char* next = is_last ? after : reinterpret_cast<const char*>(w + (n + outs) * depth);
      const Ahead ahead{next, (kPanel + passes - 1) / passes};
      multiply_panel<kTerms>({w + n * depth, outs, depth, packed, rows, out + row * out_stride + n, out_stride, add},
                             ahead);
    }
    if (odd > 0) {
      float* to = out + row * out_stride + num_cols - odd;
      multiply_panel<kTerms>({copy, odd, depth, packed, rows, to, out_stride, add}, {});
    }
  }
  _tile_release();
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
