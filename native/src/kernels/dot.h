// Products of rows by vectors: out[m, n] = x[m] · w[n], the weight read in its stored dtype. Included only by isa.cpp.
//
// Every result is the sum of one vector of running sums, taken over k in order and then reduced in one fixed order,
// whatever the tile: so a row's result does not depend on how many rows are computed with it.
#pragma once

#include "kernels/simd.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

// Registers: kTileRows × kTileCols running sums, kTileCols weights, one x. (Eight rows and three columns, which need as
// many and widen each weight once for more rows, are a quarter slower: the rows do not fit into the first-level cache.)
#if defined(__AVX2__) && !defined(__AVX512F__)
inline constexpr int64_t kTileRows = 3;
#else
inline constexpr int64_t kTileRows = 6;
#endif
inline constexpr int64_t kTileCols = 4;
inline constexpr int64_t kLineBytes = 64;

// Columns of a tile with so many rows.
constexpr int64_t tile_cols(int64_t num_rows) {
  return num_rows == 1 ? 2 * kTileCols : kTileCols;
}

inline constexpr int64_t kPanelCols = 2 * kTileCols;  // or a multiple: whole tiles of any number of rows
// So far before it is needed weights are fetched: memory may take longer than one tile.
inline constexpr int64_t kTilesAhead = 2;

// What to fetch into the second-level cache while a tile is computed: `lines` cache lines from `from` for each kStep of
// k. The first level has no room for it beside the rows and the tile's own weights.
struct Ahead {
  const char* from = nullptr;
  int64_t lines = 0;
};

// Where what is fetched goes on behind a matrix: with `after`, where there is any, instead of what lies there.
struct Behind {
  const char* end = nullptr;
  const char* after = nullptr;

  const char* moved(const char* from, int64_t nbytes) const {
    const char* to = from + nbytes;
    return after == nullptr || from >= end || to < end ? to : after + (to - end);
  }
};

template <typename T, int64_t kPart, int64_t kRows, int64_t kCols>
inline void accumulate(F32 (&sums)[kRows][kCols], const float* x, const typename T::Element* w, int64_t w_stride) {
  F32 weights[kCols];
#pragma GCC unroll 8
  for (int64_t n = 0; n < kCols; ++n) weights[n] = T::template part<kPart>(w + n * w_stride);
#pragma GCC unroll 8
  for (int64_t m = 0; m < kRows; ++m) {
    const F32 value = load(x + (kPart * kRows + m) * kLanes);
#pragma GCC unroll 8
    for (int64_t n = 0; n < kCols; ++n) sums[m][n] = T::multiply_add(sums[m][n], weights[n], value);
  }
}

template <typename T, int64_t kRows, int64_t kCols>
inline void accumulate_all(F32 (&sums)[kRows][kCols], const float* x, const typename T::Element* w, int64_t w_stride) {
  accumulate<T, 0>(sums, x, w, w_stride);
  if constexpr (T::kParts == 2) accumulate<T, 1>(sums, x, w, w_stride);
}

template <int64_t kQuad>
inline void store_quad(F32 sums, float* out, bool add) {
  F32x4 result = quad<kQuad>(sums);
  if (add) {
    F32x4 before;
    std::memcpy(&before, out, sizeof before);
    result += before;
  }
  std::memcpy(out, &result, sizeof result);
}

// Sum up the vectors of a tile: kQuads rows and four columns at a time.
template <int64_t kRows, int64_t kCols>
inline void store_sums(const F32 (&sums)[kRows][kCols], float* out, int64_t out_stride, bool add) {
  if constexpr (kCols == 1) {
    for (int64_t m = 0; m < kRows; ++m) {
      const float result = sum(sums[m][0]);
      out[m * out_stride] = add ? out[m * out_stride] + result : result;
    }
  } else {
#pragma GCC unroll 8
    for (int64_t first = 0; first < kRows; first += kQuads) {
#pragma GCC unroll 2
      for (int64_t n = 0; n < kCols; n += 4) {
        F32 folded[4];
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) {
          F32 rows[kQuads];
#pragma GCC unroll 4
          for (int64_t q = 0; q < kQuads; ++q) rows[q] = sums[first + q < kRows ? first + q : kRows - 1][n + i];
          folded[i] = fold(rows);
        }
        const F32 results = sum_quads(folded[0], folded[1], folded[2], folded[3]);
        float* to = out + first * out_stride + n;
        store_quad<0>(results, to, add);
        if constexpr (kQuads > 1) {
          if (first + 1 < kRows) store_quad<1>(results, to + out_stride, add);
        }
        if constexpr (kQuads > 2) {
          if (first + 2 < kRows) store_quad<2>(results, to + 2 * out_stride, add);
          if (first + 3 < kRows) store_quad<3>(results, to + 3 * out_stride, add);
        }
      }
    }
  }
}

// One tile. x: packed, the rows' vectors of each place side by side. add: whether out is added to.
template <typename T, int64_t kRows, int64_t kCols>
void dot_tile(const float* x, const typename T::Element* w, int64_t w_stride, int64_t depth, float* out,
              int64_t out_stride, bool add, Ahead ahead) {
  using Element = typename T::Element;
  F32 sums[kRows][kCols] = {};
  int64_t k = 0;
  for (; k + T::kStep <= depth; k += T::kStep) {
    for (int64_t line = 0; line < ahead.lines; ++line) __builtin_prefetch(ahead.from + line * kLineBytes, 0, 2);
    ahead.from += ahead.lines * kLineBytes;
    accumulate_all<T>(sums, x + packed_floats<T>(k) * kRows, w + k, w_stride);
  }
  if (k < depth) {
    Element tail[kCols][T::kStep] = {};
    for (int64_t n = 0; n < kCols; ++n) {
      std::memcpy(tail[n], w + n * w_stride + k, static_cast<size_t>(depth - k) * sizeof(Element));
    }
    accumulate_all<T>(sums, x + packed_floats<T>(k) * kRows, tail[0], T::kStep);
  }
  store_sums(sums, out, out_stride, add);
}

// kRows <= kTileRows rows against `num_cols` weights.
template <typename T, int64_t kRows>
void dot_rows(const float* x, const typename T::Element* w, int64_t w_stride, int64_t num_cols, int64_t depth,
              float* out, int64_t out_stride, bool add, Ahead ahead, int64_t ahead_tile_bytes, const Behind& behind) {
  constexpr int64_t kCols = tile_cols(kRows);
  int64_t n = 0;
  for (; n + kCols <= num_cols; n += kCols) {
    dot_tile<T, kRows, kCols>(x, w + n * w_stride, w_stride, depth, out + n, out_stride, add, ahead);
    ahead.from = behind.moved(ahead.from, ahead_tile_bytes);
  }
  for (; n < num_cols; ++n) {
    dot_tile<T, kRows, 1>(x, w + n * w_stride, w_stride, depth, out + n, out_stride, add, {});
  }
}

template <typename T>
void dot_block(int64_t num_rows, const float* x, const typename T::Element* w, int64_t w_stride, int64_t num_cols,
               int64_t depth, float* out, int64_t out_stride, bool add, Ahead ahead, int64_t ahead_tile_bytes,
               const Behind& behind = {}) {
#define ELASTICMOE_ROWS(rows)                                                                                    \
  case rows:                                                                                                     \
    if constexpr (rows <= kTileRows) {                                                                           \
      dot_rows<T, rows>(x, w, w_stride, num_cols, depth, out, out_stride, add, ahead, ahead_tile_bytes, behind); \
    }                                                                                                            \
    break
  switch (num_rows) {
    ELASTICMOE_ROWS(1);
    ELASTICMOE_ROWS(2);
    ELASTICMOE_ROWS(3);
    ELASTICMOE_ROWS(4);
    ELASTICMOE_ROWS(5);
    ELASTICMOE_ROWS(6);
  }
#undef ELASTICMOE_ROWS
}

// Bytes of weights that stay in the second-level cache while all rows pass by: more for many rows, which are then read
// less often; few for few, because nothing is fetched ahead of the first panel.
inline int64_t panel_bytes(int64_t num_blocks) {
  constexpr int64_t kLeast = 64 * 1024, kMost = 256 * 1024, kPerBlock = 8 * 1024;
  const int64_t bytes = num_blocks * kPerBlock;
  return bytes < kLeast ? kLeast : bytes > kMost ? kMost : bytes;
}

// The rows are computed in blocks of nearly equal size.
inline int64_t num_row_blocks(int64_t num_rows) {
  return (num_rows + kTileRows - 1) / kTileRows;
}
inline int64_t block_end(int64_t num_rows, int64_t block) {
  return num_rows * (block + 1) / num_row_blocks(num_rows);
}

// Pack rows for `vector_product`: block after block. `row_at(i)` is the address of row i. `to` has room for num_rows ×
// packed_floats<T>(depth).
template <typename T, typename RowAt>
void pack_rows(RowAt row_at, int64_t num_rows, int64_t depth, float* to) {
  int64_t row = 0;
  for (int64_t block = 0; row < num_rows; ++block) {
    const int64_t begin = row, end = block_end(num_rows, block);
    for (; row < end; ++row) {
      pack<T>(row_at(row), depth, to + begin * packed_floats<T>(depth) + (row - begin) * kLanes,
              (end - begin) * kLanes);
    }
  }
}

template <typename T>
void pack_rows(const float* x, int64_t x_stride, int64_t num_rows, int64_t depth, float* to) {
  pack_rows<T>([=](int64_t row) { return x + row * x_stride; }, num_rows, depth, to);
}

// out[m, n] (+)= x[m] · w[n] for x from `pack_rows` and contiguous w. `after`: as in Linear.
template <typename T>
void vector_product(const float* x, int64_t num_rows, const typename T::Element* w, int64_t num_cols, int64_t depth,
                    float* out, int64_t out_stride, bool add, const char* after) {
  if (num_rows == 0) return;
  const char* w_end = reinterpret_cast<const char*>(w + num_cols * depth);
  const int64_t x_stride = packed_floats<T>(depth);
  const int64_t num_blocks = num_row_blocks(num_rows);
  const int64_t row_bytes = depth * static_cast<int64_t>(sizeof(typename T::Element));
  if (num_blocks == 1) {  // each tile fetches what is kTilesAhead tiles after it
    const int64_t cols = tile_cols(num_rows);
    const Behind behind{w_end, after};
    const char* from = behind.moved(reinterpret_cast<const char*>(w), kTilesAhead * cols * row_bytes);
    dot_block<T>(num_rows, x, w, depth, num_cols, depth, out, out_stride, add, {from, cols}, cols * row_bytes, behind);
    return;
  }
  int64_t panel = panel_bytes(num_blocks) / row_bytes / kPanelCols * kPanelCols;
  if (panel < kPanelCols) panel = kPanelCols;
  const int64_t lines = (kTileCols + num_blocks - 1) / num_blocks;
  for (int64_t n = 0; n < num_cols; n += panel) {
    const int64_t cols = num_cols - n < panel ? num_cols - n : panel;
    const char* next = reinterpret_cast<const char*>(w + (n + panel) * depth);
    if (after != nullptr && next >= w_end) next = after;
    int64_t row = 0, fetched = 0;  // bytes of the next panel: each tile fetches its share
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t end = block_end(num_rows, block);
      const Ahead ahead = fetched < panel * row_bytes ? Ahead{next + fetched, lines} : Ahead{};
      dot_block<T>(end - row, x + row * x_stride, w + n * depth, depth, cols, depth, out + row * out_stride + n,
                   out_stride, add, ahead, lines * row_bytes, {});
      fetched += cols / tile_cols(end - row) * lines * row_bytes;
      row = end;
    }
  }
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
