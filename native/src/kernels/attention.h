// Causal grouped-query attention over a paged KV cache. Included only by isa.cpp.
//
// Online softmax over tiles of keys whose boundaries depend on positions only. With the fixed order of `dot_tile` a
// row's result is the same bit by bit in a prompt's chunk of any size and in a decode step.
#pragma once

#include <cmath>

#include "kernels/api.h"
#include "kernels/dot.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

inline constexpr int64_t kKeys = 128;      // aim of a tile; at least one block
inline constexpr int64_t kQueryRows = 48;  // aim of a tile: queries × heads that share a kv head
inline constexpr int64_t kValueVectors = 4;

// sums[m] += sum over j of p[m, j] * v[j], for kSteps steps of columns. `ahead`: what to fetch meanwhile, as much as v.
template <typename T, int64_t kRows, int64_t kSteps>
void add_values(const float* p, int64_t p_stride, const typename T::Element* v, int64_t v_stride, int64_t count,
                float* sums, int64_t sums_stride, const char* ahead) {
  constexpr int64_t kVectors = kSteps * T::kParts;
  F32 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVectors; ++i) acc[m][i] = load(sums + m * sums_stride + i * kLanes);
  }
  for (int64_t j = 0; j < count; ++j, v += v_stride) {
    for (int64_t line = 0; line < kSteps; ++line) __builtin_prefetch(ahead + line * kLineBytes, 0, 2);
    ahead += v_stride * static_cast<int64_t>(sizeof *v);
    F32 values[kVectors];
#pragma GCC unroll 8
    for (int64_t step = 0; step < kSteps; ++step) {
      values[step * T::kParts] = T::template part<0>(v + step * T::kStep);
      if constexpr (T::kParts == 2) values[step * 2 + 1] = T::template part<1>(v + step * T::kStep);
    }
#pragma GCC unroll 8
    for (int64_t m = 0; m < kRows; ++m) {
      const F32 weight = splat(p[m * p_stride + j]);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kVectors; ++i) acc[m][i] += weight * values[i];
    }
  }
#pragma GCC unroll 8
  for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVectors; ++i) store(sums + m * sums_stride + i * kLanes, acc[m][i]);
  }
}

template <typename T, int64_t kRows>
void add_value_rows(const float* p, int64_t p_stride, const typename T::Element* v, int64_t count, int64_t dim,
                    float* sums, int64_t sums_stride, const char* ahead) {
  constexpr int64_t kSteps = kValueVectors / T::kParts;
  int64_t c = 0;
  for (; c + kSteps * T::kStep <= dim; c += kSteps * T::kStep) {
    add_values<T, kRows, kSteps>(p, p_stride, v + c, dim, count, sums + c, sums_stride,
                                 ahead + c * static_cast<int64_t>(sizeof *v));
  }
  for (; c + T::kStep <= dim; c += T::kStep) {
    add_values<T, kRows, 1>(p, p_stride, v + c, dim, count, sums + c, sums_stride,
                            ahead + c * static_cast<int64_t>(sizeof *v));
  }
  if (c == dim) return;
  for (int64_t j = 0; j < count; ++j) {
    typename T::Element tail[T::kStep] = {};
    std::memcpy(tail, v + j * dim + c, static_cast<size_t>(dim - c) * sizeof tail[0]);
    add_values<T, kRows, 1>(p + j, p_stride, tail, 0, 1, sums + c, sums_stride, ahead);
  }
}

template <typename T>
void add_value_block(int64_t num_rows, const float* p, int64_t p_stride, const typename T::Element* v, int64_t count,
                     int64_t dim, float* sums, int64_t sums_stride, const char* ahead) {
#define ELASTICMOE_ROWS(rows)                                                                                       \
  case rows:                                                                                                        \
    if constexpr (rows <= kTileRows) add_value_rows<T, rows>(p, p_stride, v, count, dim, sums, sums_stride, ahead); \
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

// The state of a tile of query rows. Scores become probabilities in place.
struct QueryTile {
  int64_t num_rows;
  int64_t per_query;  // rows of one query: the heads that share the kv head
  int64_t first_position;
  int64_t stride;  // between rows of scores
  int64_t sums_stride;
  float* packed;  // q
  float* scores;
  float* sums;    // of probabilities × values
  float* peaks;   // greatest score so far, by row
  float* totals;  // of probabilities, by row
};

// One tile of `count` keys from position `begin`: from scores to probabilities, with what was summed before rescaled.
inline void soften(const QueryTile& tile, int64_t begin, int64_t count, float scale) {
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    float* scores = tile.scores + row * tile.stride;
    int64_t visible = tile.first_position + row / tile.per_query + 1 - begin;
    visible = visible < 0 ? 0 : visible > count ? count : visible;
    const int64_t end = (visible + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = visible; j < end; ++j) scores[j] = -INFINITY;
    F32 most = splat(-INFINITY);
    for (int64_t j = 0; j < end; j += kLanes) {
      const F32 scaled = load(scores + j) * scale;
      store(scores + j, scaled);
      most = max(scaled, most);
    }
    float peak = tile.peaks[row];
    for (int64_t lane = 0; lane < kLanes; ++lane) peak = most[lane] > peak ? most[lane] : peak;
    if (peak > tile.peaks[row]) {
      const float factor = exp(splat(tile.peaks[row] - peak))[0];  // the first time there is nothing to rescale
      float* sums = tile.sums + row * tile.sums_stride;
      for (int64_t i = 0; i < tile.sums_stride; ++i) sums[i] *= factor;
      tile.totals[row] *= factor;
      tile.peaks[row] = peak;
    }
    F32 total = {};
    for (int64_t j = 0; j < end; j += kLanes) {
      const F32 shifted = load(scores + j) - peak;
      const F32 e = exp(shifted);
      const F32 p = shifted < -87.0f ? F32{} : e;
      store(scores + j, p);
      total += p;
    }
    tile.totals[row] += sum(total);
    for (int64_t j = end; j < count; ++j) scores[j] = 0;
  }
}

// One head's tokens in the blocks of a sequence.
template <typename T>
struct HeadCache {
  using Element = typename T::Element;
  const KvCache& cache;
  const int32_t* table;
  int64_t k_offset;  // elements from a block's start
  int64_t v_offset;

  const Element* keys(int64_t index) const { return block(index) + k_offset; }
  const Element* values(int64_t index) const { return block(index) + v_offset; }

 private:
  const Element* block(int64_t index) const {
    return reinterpret_cast<const Element*>(cache.base + table[index] * cache.stride);
  }
};

// Scores of `count` keys from block `first` on. While a block is computed the next one, up to block `last`, is fetched:
// blocks lie anywhere, so the hardware does not foresee them.
template <typename T>
void score_keys(const QueryTile& tile, const HeadCache<T>& head, int64_t first, int64_t count, int64_t last) {
  const int64_t dim = head.cache.width, size = head.cache.block_size;
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(typename T::Element));
  const int64_t num_row_tiles = num_row_blocks(tile.num_rows);
  for (int64_t at = 0; at < count; at += size) {
    const int64_t keys = count - at < size ? count - at : size;
    const int64_t index = first + at / size;
    Ahead ahead{reinterpret_cast<const char*>(head.keys(index < last ? index + 1 : last)), kTileCols};
    for (int64_t block = 0, row = 0; block < num_row_tiles; ++block) {
      const int64_t end = block_end(tile.num_rows, block);
      dot_block<T>(end - row, tile.packed + row * padded<T>(dim), head.keys(index), dim, keys, dim,
                   tile.scores + row * tile.stride + at, tile.stride, false, ahead, kTileCols * row_bytes);
      row = end;
      ahead = {};
    }
  }
}

// sums += probabilities × values, of `count` keys from block `first` on.
template <typename T>
void add_values_of(const QueryTile& tile, const HeadCache<T>& head, int64_t first, int64_t count, int64_t last) {
  const int64_t dim = head.cache.width, size = head.cache.block_size;
  const int64_t num_row_tiles = num_row_blocks(tile.num_rows);
  for (int64_t at = 0; at < count; at += size) {
    const int64_t keys = count - at < size ? count - at : size;
    const int64_t index = first + at / size;
    const char* ahead = reinterpret_cast<const char*>(head.values(index < last ? index + 1 : last));
    for (int64_t block = 0, row = 0; block < num_row_tiles; ++block) {
      const int64_t end = block_end(tile.num_rows, block);
      add_value_block<T>(end - row, tile.scores + row * tile.stride + at, tile.stride, head.values(index), keys, dim,
                         tile.sums + row * tile.sums_stride, tile.sums_stride, ahead);
      row = end;
    }
  }
}

// All keys, tile after tile: scores, probabilities, and what `add` makes of them, called as add(first, count, last).
template <typename T, typename Add>
void attend(const QueryTile& tile, const HeadCache<T>& head, int64_t num_keys, float scale, Add add) {
  const int64_t size = head.cache.block_size;
  const int64_t blocks_per_tile = size < kKeys ? kKeys / size : 1;
  const int64_t last = (num_keys - 1) / size;
  for (int64_t first = 0; first * size < num_keys; first += blocks_per_tile) {
    const int64_t begin = first * size;
    const int64_t left = num_keys - begin, span = blocks_per_tile * size;
    const int64_t count = left < span ? left : span;
    score_keys<T>(tile, head, first, count, last);
    soften(tile, begin, count, scale);
    add(first, count, last);
  }
}

// A tile for `most_rows` rows of `num_values` values over this cache, in this thread's scratch memory.
template <typename T>
QueryTile make_tile(const KvCache& cache, int64_t per_query, int64_t most_rows, int64_t num_values) {
  const int64_t size = cache.block_size;
  QueryTile tile{};
  tile.per_query = per_query;
  tile.stride = ((size < kKeys ? kKeys / size * size : size) + kLanes - 1) / kLanes * kLanes;
  tile.sums_stride = padded<T>(num_values);
  tile.packed = scratch(Scratch::kPacked, most_rows * padded<T>(cache.width));
  tile.scores = scratch(Scratch::kScores, most_rows * tile.stride);
  tile.sums = scratch(Scratch::kSums, most_rows * (tile.sums_stride + 2));
  tile.peaks = tile.sums + most_rows * tile.sums_stride;
  tile.totals = tile.peaks + most_rows;
  return tile;
}

// Begin with `num_rows` rows, the first of a query at `first_position`.
inline void reset(QueryTile& tile, int64_t num_rows, int64_t first_position) {
  tile.num_rows = num_rows;
  tile.first_position = first_position;
  std::memset(tile.sums, 0, static_cast<size_t>(num_rows * tile.sums_stride) * sizeof(float));
  for (int64_t i = 0; i < num_rows; ++i) {
    tile.peaks[i] = -INFINITY;
    tile.totals[i] = 0;
  }
}

template <typename T>
void attention_as(const Attention& a) {
  const KvCache& cache = a.cache;
  const int64_t dim = cache.width, heads = cache.num_heads;
  const int64_t per_query = a.q_heads / heads, row_width = (a.q_heads + 2 * heads) * dim;
  const int64_t queries = per_query < kQueryRows ? kQueryRows / per_query : 1;
  QueryTile tile = make_tile<T>(cache, per_query, queries * per_query, dim);
  for (int64_t part = 0; part < a.parts.num_parts; ++part) {
    const int64_t begin = a.parts.row_starts[part], end = a.parts.row_starts[part + 1];
    const int64_t first_position = a.parts.first_position(part);
    for (int64_t h = a.first_head; h < (a.end_head == 0 ? heads : a.end_head); ++h) {
      const HeadCache<T> head{cache, a.parts.blocks + a.parts.block_starts[part], cache.offset(a.layer, 0, h),
                              cache.offset(a.layer, 1, h)};
      for (int64_t row = begin; row < end; row += queries) {
        const int64_t count = end - row < queries ? end - row : queries;
        const auto offset = [=](int64_t i) {
          return (row + i / per_query) * row_width + (h * per_query + i % per_query) * dim;
        };
        reset(tile, count * per_query, first_position + row - begin);
        pack_rows<T>([&](int64_t i) { return a.qkv + offset(i); }, tile.num_rows, dim, tile.packed);
        attend<T>(tile, head, tile.first_position + count, a.scale,
                  [&](int64_t first, int64_t keys, int64_t last) { add_values_of<T>(tile, head, first, keys, last); });
        for (int64_t i = 0; i < tile.num_rows; ++i) {
          float* out = a.out + (row + i / per_query) * a.q_heads * dim + (h * per_query + i % per_query) * dim;
          unpack<T>(tile.sums + i * tile.sums_stride, dim, 1.0f / tile.totals[i], out);
        }
      }
    }
  }
}

inline void attention(const Attention& a) {
  a.cache.dtype == Dtype::kBfloat16 ? attention_as<Bfloat16>(a) : attention_as<Float32>(a);
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
