// A rank that does exchanges whose outcome anybody can compute: inputs follow from (seed, step, slot), the experts are
// a simple function, and all numbers are small dyadic fractions, so sums are exact and comparisons are for equality.
#pragma once

#include <random>
#include <vector>

#include "bus/exchange.h"
#include "core/clock.h"
#include "testing.h"

namespace testing {

using namespace elasticmoe;
using namespace elasticmoe::bus;

struct Batch {
  uint32_t num_tokens;
  std::vector<float> x;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

inline Batch make_batch(const Geometry& geometry, uint32_t num_experts, uint64_t seed, uint64_t step, uint32_t slot) {
  std::mt19937_64 random(seed * 1'000'003 + step * 101 + slot);
  const auto below = [&](uint64_t bound) { return random() % bound; };
  Batch batch;
  batch.num_tokens = below(4) == 0 ? 0 : static_cast<uint32_t>(below(geometry.max_tokens + 1));
  batch.x.resize(size_t{batch.num_tokens} * geometry.hidden);
  for (float& value : batch.x) value = static_cast<float>(static_cast<int>(below(17)) - 8);
  batch.ids.resize(size_t{batch.num_tokens} * geometry.top_k);
  batch.weights.resize(batch.ids.size());
  for (size_t pair = 0; pair < batch.ids.size(); ++pair) {
    batch.ids[pair] = below(8) == 0 ? -1 : static_cast<int32_t>(below(num_experts));
    batch.weights[pair] = 0.25F * static_cast<float>(below(9));
  }
  return batch;
}

inline float expert(int32_t id, float x) {
  return x * static_cast<float>(id + 1) + static_cast<float>(id % 5);
}

inline std::vector<float> expected_output(const Geometry& geometry, const Batch& batch) {
  std::vector<float> out(batch.x.size(), 0.0F);
  for (size_t pair = 0; pair < batch.ids.size(); ++pair) {
    if (batch.ids[pair] < 0) continue;
    const size_t row = pair / geometry.top_k * geometry.hidden;
    for (size_t h = 0; h < geometry.hidden; ++h) {
      out[row + h] += batch.weights[pair] * expert(batch.ids[pair], batch.x[row + h]);
    }
  }
  return out;
}

// Owners spread over the members, differently for each layer.
inline Routing make_routing_for(uint32_t num_experts, uint64_t members, uint64_t layer) {
  std::vector<int32_t> slots;
  for (int32_t slot = 0; slot < 64; ++slot) {
    if ((members >> slot & 1) != 0) slots.push_back(slot);
  }
  std::vector<int32_t> owners(num_experts);
  for (uint32_t id = 0; id < num_experts; ++id) owners[id] = slots[(id * 7 + layer) % slots.size()];
  return Routing(owners);
}

template <typename Operation>
Outcome finish(Operation operation) {
  Outcome outcome;
  do outcome = operation();
  while (outcome == Outcome::interrupted);
  return outcome;
}

// One participant; its methods throw Failure where a result is wrong.
class ExchangeRank {
 public:
  ExchangeRank(uint64_t addr, uint64_t nbytes, int slot, uint32_t num_experts)
      : segment_(addr, nbytes), meeting_(segment_, slot), exchange_(meeting_), num_experts_(num_experts) {}

  Meeting& meeting() { return meeting_; }

  // One MoE layer: dispatch, experts, combine, compare.
  Outcome run_layer(uint32_t generation, uint64_t seed, uint64_t step, int64_t timeout_ns) {
    const Geometry& geometry = segment_.geometry();
    const uint64_t members = meeting_.membership().members;
    if (members == 0) return Outcome::aborted;
    const Routing routing = make_routing_for(num_experts_, members, step);
    const Batch batch = make_batch(geometry, num_experts_, seed, step, meeting_.slot());
    const uint64_t cap = uint64_t{geometry.max_tokens} * geometry.max_ranks * geometry.top_k;
    std::vector<float> rows(cap * geometry.hidden);
    std::vector<int32_t> counts(num_experts_, -7);
    uint64_t num_rows = 0;
    const int64_t deadline = now_ns() + timeout_ns;
    const Exchange::Tokens tokens{batch.x.data(), batch.ids.data(), batch.weights.data(), batch.num_tokens};
    Outcome outcome = finish([&] {
      return exchange_.dispatch(routing, generation, tokens, {rows.data(), cap, counts.data()}, deadline, num_rows);
    });
    if (outcome != Outcome::done) return outcome;
    apply_experts(routing, rows, counts, num_rows);
    std::vector<float> out(batch.x.size(), -1.0F);
    outcome = finish(
        [&] { return exchange_.combine(routing, generation, rows.data(), out.data(), batch.num_tokens, deadline); });
    if (outcome != Outcome::done) return outcome;
    CHECK(out == expected_output(geometry, batch));
    return Outcome::done;
  }

 private:
  void apply_experts(const Routing& routing, std::vector<float>& rows, const std::vector<int32_t>& counts,
                     uint64_t num_rows) const {
    uint64_t row = 0;
    for (uint32_t id = 0; id < num_experts_; ++id) {
      CHECK(counts[id] >= 0);
      CHECK(counts[id] == 0 || routing.owners()[id] == static_cast<int32_t>(meeting_.slot()));
      for (int32_t left = counts[id]; left > 0; --left, ++row) {
        for (uint32_t h = 0; h < segment_.geometry().hidden; ++h) {
          float& value = rows[row * segment_.geometry().hidden + h];
          value = expert(static_cast<int32_t>(id), value);
        }
      }
    }
    CHECK(row == num_rows);
  }

  Segment segment_;
  Meeting meeting_;
  Exchange exchange_;
  uint32_t num_experts_;
};

}  // namespace testing
