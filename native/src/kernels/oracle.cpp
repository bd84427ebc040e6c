#include "kernels/oracle.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace elasticmoe::kernels {
namespace {

struct Head {
  const KvCache& cache;
  const int32_t* table;
  int64_t layer;

  // A plane of a block: [block_size, width].
  float* block(int64_t index, int64_t plane) const {
    char* start = cache.base + table[index] * cache.stride;
    return reinterpret_cast<float*>(start) + cache.offset(layer, plane, 0);
  }

  float* at(int64_t position, int64_t plane) const {
    return block(position / cache.block_size, plane) + position % cache.block_size * cache.width;
  }
};

// sum[d] += values[d] * factor: below 2^32 each, so that 2^31 positions fit.
void add_scaled(const float* __restrict values, uint32_t factor, int64_t count, uint64_t* __restrict sum) {
  for (int64_t d = 0; d < count; ++d) {
    sum[d] += static_cast<uint64_t>(static_cast<uint32_t>(static_cast<int32_t>(values[d]))) * factor;
  }
}

std::vector<uint32_t> powers_of(uint64_t base, uint64_t modulus, int64_t count) {
  std::vector<uint32_t> powers(static_cast<size_t>(count));
  uint64_t power = 1 % modulus;
  for (uint32_t& to : powers) {
    to = static_cast<uint32_t>(power);
    power = power * base % modulus;
  }
  return powers;
}

// Adds positions 0 .. end - 1, the last one with factor 1.
void add_positions(const Head& head, int64_t end, const std::vector<uint32_t>& powers, uint64_t* sums) {
  const int64_t size = head.cache.block_size, width = head.cache.width;
  for (int64_t begin = 0; begin < end; begin += size) {
    const int64_t count = std::min(size, end - begin);
    for (int64_t plane = 0; plane < head.cache.num_planes; ++plane) {
      const float* values = head.block(begin / size, plane);
      for (int64_t j = 0; j < count; ++j) {
        add_scaled(values + j * width, powers[static_cast<size_t>(end - 1 - begin - j)], width, sums + plane * width);
      }
    }
  }
}

void mix_part(const OracleMix& a, int64_t part, const std::vector<uint32_t>& powers, std::vector<uint64_t>& sums) {
  const int64_t width = a.cache.width, planes = a.cache.num_planes, start = a.parts.first_position(part);
  const int64_t first_row = a.parts.row_starts[part], last_row = a.parts.row_starts[part + 1];
  const Head head{a.cache, a.parts.blocks + a.parts.block_starts[part], a.layer};
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t plane = 0; plane < planes; ++plane) {
      std::memcpy(head.at(start + row - first_row, plane), a.kv + (row * planes + plane) * width,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }
  std::fill(sums.begin(), sums.end(), 0);
  add_positions(head, start, powers, sums.data());
  for (int64_t row = first_row; row < last_row; ++row) {
    float* out = a.out + row * planes * width;
    for (uint64_t& sum : sums) sum = sum % static_cast<uint64_t>(a.modulus) * static_cast<uint64_t>(a.base);
    for (int64_t plane = 0; plane < planes; ++plane) {
      add_scaled(head.at(start + row - first_row, plane), 1, width, sums.data() + plane * width);
    }
    for (const uint64_t sum : sums) *out++ = static_cast<float>(sum % static_cast<uint64_t>(a.modulus));
  }
}

}  // namespace

void oracle_mix(const OracleMix& a) {
  int64_t longest = 0;
  for (int64_t part = 0; part < a.parts.num_parts; ++part) {
    longest = std::max<int64_t>(longest, a.parts.kv_lens[part]);
  }
  const auto powers = powers_of(static_cast<uint64_t>(a.base), static_cast<uint64_t>(a.modulus), longest);
  std::vector<uint64_t> sums(static_cast<size_t>(a.cache.num_planes * a.cache.width));
  for (int64_t part = 0; part < a.parts.num_parts; ++part) mix_part(a, part, powers, sums);
}

}  // namespace elasticmoe::kernels
