// Latent attention on the tiles of AMX: sixteen rows of queries at a time against a bfloat16 cache, which is read as it
// is. Included only by isa.cpp, in the set that has them.
//
// A row's bits depend on its position alone: tiles of keys begin where positions say, and each sum has one fixed order.
#pragma once

#include "kernels/attention.h"
#include "kernels/tiles.h"

namespace elasticmoe::kernels::ELASTICMOE_ISA {

// Queries as right-hand sides: of each step of 32 elements the three terms, each a tile of [16 pairs, 16 rows].
inline void tile_queries(const float* from, int64_t from_stride, int64_t num_rows, int64_t width, uint16_t* to) {
  const int64_t steps = padded<Bfloat16>(width) / kPairs;
  std::memset(to, 0, static_cast<size_t>(steps * kTerms * kTileElements) * sizeof *to);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t step = 0; step < steps; ++step) {
      float elements[kPairs] = {};
      const int64_t left = width - step * kPairs;
      std::memcpy(elements, from + row * from_stride + step * kPairs,
                  static_cast<size_t>(left < kPairs ? left : kPairs) * sizeof(float));
      F32 a = load(elements), b = load(elements + kTile);
      for (int64_t term = 0; term < kTerms; ++term) {
        const U32 a_term = next_term(a);
        const U32 pairs = join_halves(a_term, next_term(b));
        uint16_t* column = to + (step * kTerms + term) * kTileElements + row * 2;
        for (int64_t pair = 0; pair < kTile; ++pair) {
          const uint32_t both = pairs[pair];
          std::memcpy(column + pair * kPairs, &both, sizeof both);
        }
      }
    }
  }
}

// Probabilities as left-hand sides: of each step of 32 keys the three terms, each a tile of [16 rows, 32 keys]. There
// is nothing beyond `count` keys.
inline void tile_probabilities(const float* from, int64_t from_stride, int64_t count, uint16_t* to) {
  for (int64_t first = 0; first < count; first += kPairs, to += kTerms * kTileElements) {
    const int64_t left = count - first;
    const uint32_t kept = left < kPairs ? (1u << left) - 1 : ~0u;
    for (int64_t row = 0; row < kTile; ++row) {
      const float* p = from + row * from_stride + first;
      F32 a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), p);
      F32 b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept >> kTile), p + kTile);
      for (int64_t term = 0; term < kTerms; ++term) {
        const U32 a_term = next_term(a);
        const U32 pairs = join_halves(a_term, next_term(b));
        std::memcpy(to + term * kTileElements + row * kPairs, &pairs, sizeof pairs);
      }
    }
  }
}

// A tile's keys: where they lie, if sixteen always lie together and rows are whole steps; else a copy, filled up with
// zeros.
struct KeyRows {
  const HeadCache<Bfloat16>* head;
  int64_t first, stride;
  const uint16_t* copy;  // null: none

  const uint16_t* at(int64_t key) const {
    const int64_t size = head->cache.block_size;
    return copy != nullptr ? copy + key * stride : head->keys(first + key / size) + key % size * stride;
  }
};

inline KeyRows key_rows(const HeadCache<Bfloat16>& head, int64_t first, int64_t count, uint16_t* copy) {
  const int64_t size = head.cache.block_size, width = head.cache.width, stride = padded<Bfloat16>(width);
  if (size % kTile == 0 && stride == width) return {&head, first, width, nullptr};
  const int64_t rows = (count + kTile - 1) / kTile * kTile;
  std::memset(copy, 0, static_cast<size_t>(rows * stride) * sizeof *copy);
  for (int64_t key = 0; key < count; ++key) {
    std::memcpy(copy + key * stride, head.keys(first + key / size) + key % size * width,
                static_cast<size_t>(width) * sizeof *copy);
  }
  return {&head, first, stride, copy};
}

// Makes right-hand sides of latents: of each step of 32 keys and 32 columns two tiles of [16 pairs of keys, 16
// columns]. The first has columns 0 to 3, 8 to 11, 16 to 19, 24 to 27 of them. There is nothing beyond `count` keys.
//
// The keys' rows are read here for the first time, one after the other, so that the hardware foresees them; and a pair
// of keys at a time, between the products of the tile before.
struct LatentTiles {
  KeyRows keys;
  int64_t count, columns;
  uint16_t* to;
  int64_t pair = 0;

  int64_t pairs() const { return (count + kPairs - 1) / kPairs * kTile; }

  void make_all() {
    while (pair < pairs()) make_pair();
  }

  void make_pair() {
    if (pair == pairs()) return;
    const int64_t key = 2 * pair;
    uint16_t* tiles = to + pair / kTile * columns * kPairs + pair % kTile * kPairs;
    ++pair;
    const __m512i nothing = _mm512_setzero_si512();
    const uint16_t* even = key < count ? keys.at(key) : nullptr;
    const uint16_t* odd = key + 1 < count ? keys.at(key + 1) : nullptr;
    for (int64_t column = 0; column < columns; column += kPairs, tiles += 2 * kTileElements) {
      const __m512i a = even != nullptr ? _mm512_loadu_si512(even + column) : nothing;
      const __m512i b = odd != nullptr ? _mm512_loadu_si512(odd + column) : nothing;
      _mm512_store_si512(tiles, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(tiles + kTileElements, _mm512_unpackhi_epi16(a, b));
    }
    for (int64_t column = columns; column < keys.stride; column += kPairs) {
      if (even != nullptr) __builtin_prefetch(even + column);
      if (odd != nullptr) __builtin_prefetch(odd + column);
    }
  }
};

// scores[row, key] of sixteen rows. Four tiles of keys at a time share what is loaded of the queries.
inline void score_tiles(const KeyRows& keys, int64_t count, const uint16_t* queries, int64_t steps, float* scores,
                        int64_t scores_stride, LatentTiles& next) {
  alignas(64) float sums[4][kTile * kTile];
  const size_t stride = static_cast<size_t>(keys.stride) * 2;
  settle();
  for (int64_t first = 0; first < count; first += 4 * kTile) {
    const int64_t left = (count - first + kTile - 1) / kTile;
    const uint16_t* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = keys.at(first + (i < left ? i : 0) * kTile);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      const uint16_t* q = queries + step * kTerms * kTileElements;
      _tile_loadd(4, q, kPairs * 2);
      _tile_loadd(5, q + kTileElements, kPairs * 2);
      _tile_loadd(6, q + 2 * kTileElements, kPairs * 2);
#define ELASTICMOE_KEYS(i)                           \
  if (i < left) {                                    \
    _tile_loadd(7, rows[i] + step * kPairs, stride); \
    _tile_dpbf16ps(i, 7, 4);                         \
    _tile_dpbf16ps(i, 7, 5);                         \
    _tile_dpbf16ps(i, 7, 6);                         \
  }
      ELASTICMOE_KEYS(0)
      ELASTICMOE_KEYS(1)
      ELASTICMOE_KEYS(2)
      ELASTICMOE_KEYS(3)
#undef ELASTICMOE_KEYS
      next.make_pair();
    }
    _tile_stored(0, sums[0], kTile * 4);
    _tile_stored(1, sums[1], kTile * 4);
    _tile_stored(2, sums[2], kTile * 4);
    _tile_stored(3, sums[3], kTile * 4);
    for (int64_t i = 0; i < left && i < 4; ++i) transpose(sums[i], scores + first + i * kTile, scores_stride);
  }
}

// sums[row, column] += probabilities × latents, sixteen rows; columns in the order of LatentTiles.
inline void add_tiles(const uint16_t* probabilities, const uint16_t* latents, int64_t count, int64_t columns,
                      float* sums, int64_t sums_stride, LatentTiles& next) {
  const size_t stride = static_cast<size_t>(sums_stride) * 4;
  settle();
  for (int64_t column = 0; column < columns; column += kPairs) {
    float* to = sums + column;
    _tile_loadd(0, to, stride);
    _tile_loadd(1, to + kTile, stride);
    const uint16_t* p = probabilities;
    const uint16_t* v = latents + column / kPairs * 2 * kTileElements;
    for (int64_t key = 0; key < count; key += kPairs, p += kTerms * kTileElements, v += columns * kPairs) {
      _tile_loadd(2, p, kPairs * 2);
      _tile_loadd(3, p + kTileElements, kPairs * 2);
      _tile_loadd(4, p + 2 * kTileElements, kPairs * 2);
      _tile_loadd(5, v, kPairs * 2);
      _tile_loadd(6, v + kTileElements, kPairs * 2);
      _tile_dpbf16ps(0, 2, 5);
      _tile_dpbf16ps(1, 2, 6);
      _tile_dpbf16ps(0, 3, 5);
      _tile_dpbf16ps(1, 3, 6);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      if (key % (2 * kPairs) == 0) next.make_pair();
    }
    _tile_stored(0, to, stride);
    _tile_stored(1, to + kTile, stride);
  }
}

// From the columns' order of LatentTiles to their own, each value times `factor`.
inline void untile(const float* from, int64_t count, float factor, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t within = i % kPairs, half = within / 4 % 2;
    to[i] = from[i - within + half * kTile + within / 8 * 4 + within % 4] * factor;
  }
}

// As attend_latents of latent.h.
inline void attend_tiles(const LatentAttention& a, int64_t part, int64_t begin, int64_t end, float* queries) {
  const int64_t width = a.cache.width, size = a.cache.block_size, offset = a.cache.offset(a.layer, 0, 0);
  const int64_t together = a.q_heads < kQueryRows ? kQueryRows / a.q_heads : 1;
  const int64_t most_rows = (together * a.q_heads + kTile - 1) / kTile * kTile;
  const int64_t first_position = a.parts.first_position(part) + begin - a.parts.row_starts[part];
  const HeadCache<Bfloat16> head{a.cache, a.parts.blocks + a.parts.block_starts[part], offset, offset};
  const int64_t steps = padded<Bfloat16>(width) / kPairs, columns = padded<Bfloat16>(a.rank);
  QueryTile tile = make_tile<Bfloat16>(a.cache, a.q_heads, most_rows, a.rank);
  const int64_t most_keys = (tile.stride + kPairs - 1) / kPairs * kPairs, query_tiles = steps * kTerms * kTileElements;
  // uint16_t in memory that is asked for in floats
  uint16_t* of_queries =
      reinterpret_cast<uint16_t*>(scratch(Scratch::kPackedWide, most_rows / kTile * query_tiles / 2));
  uint16_t* latents = reinterpret_cast<uint16_t*>(scratch(Scratch::kWide, most_keys * columns));
  const int64_t copy_size = most_keys * padded<Bfloat16>(width);
  uint16_t* copies = reinterpret_cast<uint16_t*>(scratch(Scratch::kCopy, copy_size));
  uint16_t* probabilities = reinterpret_cast<uint16_t*>(scratch(Scratch::kTiles, kTerms * most_keys * kTile / 2));
  const int64_t blocks_per_tile = size < kKeys ? kKeys / size : 1;
  begin_tiles();
  for (int64_t row = 0; row < end - begin; row += together) {
    const int64_t count = end - begin - row < together ? end - begin - row : together;
    float* of_tile = queries + row * a.q_heads * width;
    reset(tile, count * a.q_heads, first_position + row);
    const int64_t groups = (tile.num_rows + kTile - 1) / kTile;
    std::memset(tile.sums + tile.num_rows * tile.sums_stride, 0,
                static_cast<size_t>((groups * kTile - tile.num_rows) * tile.sums_stride) * sizeof(float));
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t left = tile.num_rows - group * kTile;
      tile_queries(of_tile + group * kTile * width, width, left < kTile ? left : kTile, width,
                   of_queries + group * query_tiles);
    }
    const int64_t num_keys = tile.first_position + count, num_blocks = (num_keys + size - 1) / size;
    const auto tiles_from = [&](int64_t first, int64_t number) {
      const int64_t left = num_keys - first * size, span = blocks_per_tile * size;
      const int64_t keys = left < 0 ? 0 : left < span ? left : span;
      return LatentTiles{key_rows(head, first, keys, copies + number % 2 * copy_size), keys, columns,
                         latents + number % 2 * most_keys * columns};
    };
    LatentTiles now = tiles_from(0, 0);
    now.make_all();
    for (int64_t first = 0, number = 0; first < num_blocks; first += blocks_per_tile, ++number) {
      LatentTiles next = tiles_from(first + blocks_per_tile, number + 1);
      for (int64_t group = 0; group < groups; ++group) {
        score_tiles(now.keys, now.count, of_queries + group * query_tiles, steps,
                    tile.scores + group * kTile * tile.stride, tile.stride, next);
      }
      soften(tile, first * size, now.count, a.scale);
      for (int64_t group = 0; group < groups; ++group) {
        tile_probabilities(tile.scores + group * kTile * tile.stride, tile.stride, now.count, probabilities);
        add_tiles(probabilities, now.to, now.count, columns, tile.sums + group * kTile * tile.sums_stride,
                  tile.sums_stride, next);
      }
      next.make_all();
      now = next;
    }
    for (int64_t i = 0; i < tile.num_rows; ++i) {
      untile(tile.sums + i * tile.sums_stride, a.rank, 1.0f / tile.totals[i], of_tile + i * width);
    }
  }
  _tile_release();
}

}  // namespace elasticmoe::kernels::ELASTICMOE_ISA
