// Causal latent attention over a paged cache of latents (docs/adr/0030-*). Included only by isa.cpp.
//
// A query is brought to the latents by its head's part of kv_b; then all heads read the same rows, so that heads are
// tiled as grouped attention tiles queries: a cached row is read once for a tile. What a query takes from the latents
// is brought to a value by the other part of kv_b. As in attention.h a row's bits depend on its position alone.
#pragma once

#include "kernels/attention.h"
#include "kernels/product.h"
#if defined(__AMX_BF16__)
#include "kernels/latent_tiles.h"
#endif

namespace elasticmoe::kernels::ELASTICMOE_ISA {

inline constexpr int64_t kLatentRows = 48;  // rows of a batch that kv_b is read once for; bounds the scratch memory

// sums[m] += sum over `count` keys from block `first` on of p[m, key] * latent[key], for kSteps steps of columns from
// `column`, of which `columns` are there if it is less than a step.
template <typename T, int64_t kRows, int64_t kSteps, bool kIsTail>
void add_latents(const float* p, int64_t p_stride, const HeadCache<T>& head, int64_t first, int64_t count,
                 int64_t column, int64_t columns, float* sums, int64_t sums_stride) {
  constexpr int64_t kVectors = kSteps * T::kParts;
  const int64_t width = head.cache.width, size = head.cache.block_size;
  typename T::Element tail[T::kStep] = {};
  F32 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVectors; ++i) acc[m][i] = load(sums + m * sums_stride + i * kLanes);
  }
  for (int64_t at = 0; at < count; at += size, ++first) {
    const typename T::Element* v = head.keys(first) + column;
    const int64_t end = count - at < size ? count : at + size;
    for (int64_t j = at; j < end; ++j, v += width) {
      const typename T::Element* from = v;
      if constexpr (kIsTail) {
        std::memcpy(tail, v, static_cast<size_t>(columns) * sizeof tail[0]);
        from = tail;
      }
      F32 values[kVectors];
#pragma GCC unroll 8
      for (int64_t step = 0; step < kSteps; ++step) {
        values[step * T::kParts] = T::template part<0>(from + step * T::kStep);
        if constexpr (T::kParts == 2) values[step * 2 + 1] = T::template part<1>(from + step * T::kStep);
      }
#pragma GCC unroll 8
      for (int64_t m = 0; m < kRows; ++m) {
        const F32 weight = splat(p[m * p_stride + j]);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kVectors; ++i) acc[m][i] += weight * values[i];
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVectors; ++i) store(sums + m * sums_stride + i * kLanes, acc[m][i]);
  }
}

template <typename T, int64_t kSteps, bool kIsTail>
void add_latent_block(int64_t num_rows, const float* p, int64_t p_stride, const HeadCache<T>& head, int64_t first,
                      int64_t count, int64_t column, int64_t columns, float* sums, int64_t sums_stride) {
#define ELASTICMOE_ROWS(rows)                                                                                     \
  case rows:                                                                                                      \
    if constexpr (rows <= kTileRows) {                                                                            \
      add_latents<T, rows, kSteps, kIsTail>(p, p_stride, head, first, count, column, columns, sums, sums_stride); \
    }                                                                                                             \
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

// sums += probabilities × latents. Columns outermost: those of a tile's keys stay in the first-level cache meanwhile.
template <typename T>
void add_latents_of(const QueryTile& tile, const HeadCache<T>& head, int64_t rank, int64_t first, int64_t count) {
  constexpr int64_t kSteps = kValueVectors / T::kParts;
  for (int64_t column = 0; column < rank;) {
    const int64_t left = rank - column;
    const int64_t step = left >= kSteps * T::kStep ? kSteps * T::kStep : T::kStep;
    for (int64_t block = 0, row = 0; row < tile.num_rows; ++block) {
      const int64_t end = block_end(tile.num_rows, block);
      const float* p = tile.scores + row * tile.stride;
      float* sums = tile.sums + row * tile.sums_stride + column;
      if (step > T::kStep) {
        add_latent_block<T, kSteps, false>(end - row, p, tile.stride, head, first, count, column, step, sums,
                                           tile.sums_stride);
      } else if (left >= T::kStep) {
        add_latent_block<T, 1, false>(end - row, p, tile.stride, head, first, count, column, step, sums,
                                      tile.sums_stride);
      } else {
        add_latent_block<T, 1, true>(end - row, p, tile.stride, head, first, count, column, left, sums,
                                     tile.sums_stride);
      }
      row = end;
    }
    column += step;
  }
}

// Queries of the rows [begin, end) as they meet the cache: `to` [rows, q_heads, width].
template <typename T>
void absorb_keys(const LatentAttention& a, int64_t begin, int64_t end, float* to) {
  using Element = typename T::Element;
  const int64_t width = a.cache.width, turned = width - a.rank, q_dim = a.nope_dim + turned;
  const int64_t stride = padded<T>(a.rank), num_rows = end - begin, head_rows = a.nope_dim + a.v_dim;
  float* sums = scratch(Scratch::kSums, kTileRows * stride);
  for (int64_t head = 0; head < a.q_heads; ++head) {
    const Element* w = static_cast<const Element*>(a.kv_b) + head * head_rows * a.rank;
    const Element* next = head + 1 < a.q_heads ? w + head_rows * a.rank : w;
    for (int64_t block = 0, row = 0; row < num_rows; ++block) {
      const int64_t block_last = block_end(num_rows, block);
      std::memset(sums, 0, static_cast<size_t>((block_last - row) * stride) * sizeof(float));
      add_value_block<T>(block_last - row, a.q + ((begin + row) * a.q_heads + head) * q_dim, a.q_heads * q_dim, w,
                         a.nope_dim, a.rank, sums, stride, reinterpret_cast<const char*>(next));
      for (int64_t i = 0; row < block_last; ++i, ++row) {
        float* query = to + (row * a.q_heads + head) * width;
        unpack<T>(sums + i * stride, a.rank, 1.0f, query);
        std::memcpy(query + a.rank, a.q + ((begin + row) * a.q_heads + head) * q_dim + a.nope_dim,
                    static_cast<size_t>(turned) * sizeof(float));
      }
    }
  }
}

// From what the queries of the rows [begin, end) took from the latents, the first `rank` of `from` [rows, q_heads,
// width], to values.
template <typename T>
void absorb_values(const LatentAttention& a, int64_t begin, int64_t end, const float* from) {
  using Element = typename T::Element;
  const int64_t width = a.cache.width, num_rows = end - begin, head_rows = a.nope_dim + a.v_dim;
  float* packed = scratch(Scratch::kPacked, operand_floats<T>(num_rows, a.rank));
  for (int64_t head = 0; head < a.q_heads; ++head) {
    const Element* w = static_cast<const Element*>(a.kv_b) + (head * head_rows + a.nope_dim) * a.rank;
    make_operand<T>(from + head * width, a.q_heads * width, num_rows, a.rank, packed);
    product<T>(packed, num_rows, w, a.v_dim, a.rank, a.out + (begin * a.q_heads + head) * a.v_dim, a.q_heads * a.v_dim,
               false);
  }
}

// Rows [begin, end) of one part: their queries, [q_heads, width] each, become what they take from the latents.
template <typename T>
void attend_latents(const LatentAttention& a, int64_t part, int64_t begin, int64_t end, float* queries) {
  const int64_t width = a.cache.width, offset = a.cache.offset(a.layer, 0, 0);
  const int64_t together = a.q_heads < kQueryRows ? kQueryRows / a.q_heads : 1;
  const int64_t first_position = a.parts.first_position(part) + begin - a.parts.row_starts[part];
  const HeadCache<T> head{a.cache, a.parts.blocks + a.parts.block_starts[part], offset, offset};
  QueryTile tile = make_tile<T>(a.cache, a.q_heads, together * a.q_heads, a.rank);
  for (int64_t row = 0; row < end - begin; row += together) {
    const int64_t count = end - begin - row < together ? end - begin - row : together;
    float* of_tile = queries + row * a.q_heads * width;
    reset(tile, count * a.q_heads, first_position + row);
    pack_rows<T>(of_tile, width, tile.num_rows, width, tile.packed);
    attend<T>(tile, head, tile.first_position + count, a.scale, [&](int64_t first, int64_t keys, int64_t /*last*/) {
      add_latents_of<T>(tile, head, a.rank, first, keys);
    });
    for (int64_t i = 0; i < tile.num_rows; ++i) {
      unpack<T>(tile.sums + i * tile.sums_stride, a.rank, 1.0f / tile.totals[i], of_tile + i * width);
    }
  }
}

template <typename T>
void latent_attention_as(const LatentAttention& a) {
  const int64_t num_rows = a.parts.row_starts[a.parts.num_parts], query = a.q_heads * a.cache.width;
  float* turned = scratch(Scratch::kTurned, (num_rows < kLatentRows ? num_rows : kLatentRows) * query);
  int64_t part = 0;
  for (int64_t begin = 0; begin < num_rows; begin += kLatentRows) {
    const int64_t end = num_rows - begin < kLatentRows ? num_rows : begin + kLatentRows;
    absorb_keys<T>(a, begin, end, turned);
    for (int64_t row = begin; row < end;) {
      const int64_t part_end = a.parts.row_starts[part + 1], here = part_end < end ? part_end : end;
#if defined(__AMX_BF16__)
      if constexpr (T::kParts == 2) {
        attend_tiles(a, part, row, here, turned + (row - begin) * query);
      } else {
        attend_latents<T>(a, part, row, here, turned + (row - begin) * query);
      }
#else
      attend_latents<T>(a, part, row, here, turned + (row - begin) * query);
#endif
      row = here;
      if (row == part_end) ++part;
    }
    absorb_values<T>(a, begin, end, turned);
  }
}

inline void latent_attention(const LatentAttention& a) {
  a.cache.dtype == Dtype::kBfloat16 ? latent_attention_as<Bfloat16>(a) : latent_attention_as<Float32>(a);
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
