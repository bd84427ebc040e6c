#include "kernels/oracle.h"

#include <cstring>
#include <vector>

namespace elasticmoe::kernels {
namespace {

struct Head {
  const KvCache& cache;
  const int32_t* table;
  int64_t layer;

  // Key (which = 0) or value (1) of one position.
  float* at(int64_t position, int64_t which) const {
    char* block = cache.base + table[position / cache.block_size] * cache.stride;
    const int64_t row = (layer * 2 + which) * cache.block_size + position % cache.block_size;
    return reinterpret_cast<float*>(block) + row * cache.head_dim;
  }
};

// sum[d] += values[d] * factor: below 2^32 each, so that 2^31 positions fit.
void add_scaled(const float* values, uint64_t factor, int64_t count, uint64_t* sum) {
  for (int64_t d = 0; d < count; ++d) {
    sum[d] += static_cast<uint64_t>(static_cast<uint32_t>(static_cast<int32_t>(values[d]))) * factor;
  }
}

}  // namespace

void oracle_mix(const OracleMix& a) {
  const int64_t dim = a.cache.head_dim;
  const uint64_t modulus = static_cast<uint64_t>(a.modulus), base = static_cast<uint64_t>(a.base);
  int64_t longest = 0;
  for (int64_t part = 0; part < a.parts.num_parts; ++part) {
    longest = a.parts.kv_lens[part] > longest ? a.parts.kv_lens[part] : longest;
  }
  std::vector<uint64_t> powers(static_cast<size_t>(longest + 1), 1 % modulus);
  for (size_t i = 1; i < powers.size(); ++i) powers[i] = powers[i - 1] * base % modulus;
  std::vector<uint64_t> sums(static_cast<size_t>(2 * dim));
  for (int64_t part = 0; part < a.parts.num_parts; ++part) {
    const Head head{a.cache, a.parts.blocks + a.parts.block_starts[part], a.layer};
    const int64_t first_row = a.parts.row_starts[part], last_row = a.parts.row_starts[part + 1];
    const int64_t start = a.parts.first_position(part);
    for (int64_t row = first_row; row < last_row; ++row) {
      for (int64_t which = 0; which < 2; ++which) {
        std::memcpy(head.at(start + row - first_row, which), a.kv + (row * 2 + which) * dim,
                    static_cast<size_t>(dim) * sizeof(float));
      }
    }
    for (uint64_t& sum : sums) sum = 0;
    for (int64_t j = 0; j < start; ++j) {
      const uint64_t factor = powers[static_cast<size_t>(start - 1 - j)];
      for (int64_t which = 0; which < 2; ++which) add_scaled(head.at(j, which), factor, dim, sums.data() + which * dim);
    }
    for (int64_t row = first_row; row < last_row; ++row) {
      for (uint64_t& sum : sums) sum = sum % modulus * base;
      for (int64_t which = 0; which < 2; ++which) {
        add_scaled(head.at(start + row - first_row, which), 1, dim, sums.data() + which * dim);
      }
      for (int64_t i = 0; i < 2 * dim; ++i) {
        a.out[row * 2 * dim + i] = static_cast<float>(sums[static_cast<size_t>(i)] % modulus);
      }
    }
  }
}

}  // namespace elasticmoe::kernels
