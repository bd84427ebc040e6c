// Dispatch and combine between threads, against the direct computation; and what they refuse.
#include "bus/exchange.h"

#include <atomic>
#include <thread>

#include "bus/kernels.h"
#include "exchange_model.h"

using namespace testing;

namespace {

struct Fixture {
  Geometry geometry;
  SharedMemory memory;
  explicit Fixture(const Geometry& shape) : geometry(shape), memory(bus_bytes(shape)) {
    format_bus(memory.addr(), memory.nbytes(), shape);
  }
  void publish(uint64_t generation, uint64_t members) {
    Meeting(Segment(memory.addr(), memory.nbytes()), -1).set_membership(generation, members, true);
  }
};

// All ranks of `members` run `num_steps` layers in `generation`; returns how many of them ended well.
int run_ranks(Fixture& bus, uint32_t generation, uint64_t members, uint64_t num_steps) {
  bus.publish(generation, members);
  std::atomic<int> num_good{0};
  std::vector<std::thread> threads;
  for (int slot = 0; slot < 64; ++slot) {
    if ((members >> slot & 1) == 0) continue;
    threads.emplace_back([&, slot] {
      try {
        ExchangeRank rank(bus.memory.addr(), bus.memory.nbytes(), slot, 24);
        rank.meeting().join(generation * 100 + static_cast<uint64_t>(slot) + 1);
        for (uint64_t step = 0; step < num_steps; ++step) {
          CHECK(rank.run_layer(generation, 5, step, 15'000'000'000) == Outcome::done);
        }
        ++num_good;
      } catch (const std::exception& error) {
        std::fprintf(stderr, "slot %d: %s\n", slot, error.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return num_good;
}

}  // namespace

TEST(six_ranks_agree_with_the_direct_computation) {
  Fixture bus({.max_ranks = 6, .max_tokens = 5, .hidden = 70, .top_k = 4});
  CHECK(run_ranks(bus, 1, 0b111111, 150) == 6);
}

TEST(members_may_have_gaps_and_change) {
  Fixture bus({.max_ranks = 7, .max_tokens = 3, .hidden = 64, .top_k = 2});
  CHECK(run_ranks(bus, 1, 0b0100, 50) == 1);
  CHECK(run_ranks(bus, 2, 0b1000101, 50) == 3);
  CHECK(run_ranks(bus, 5, 0b0000011, 50) == 2);
}

TEST(odd_shapes_work) {
  Fixture bus({.max_ranks = 2, .max_tokens = 1, .hidden = 1, .top_k = 1});
  CHECK(run_ranks(bus, 1, 0b11, 50) == 2);
  Fixture wide({.max_ranks = 2, .max_tokens = 2, .hidden = 3, .top_k = 40});
  CHECK(run_ranks(wide, 1, 0b11, 50) == 2);
}

TEST(rows_are_sorted_by_expert_source_and_token) {
  Fixture bus({.max_ranks = 2, .max_tokens = 4, .hidden = 1, .top_k = 2});
  bus.publish(1, 0b11);
  std::atomic<int> num_good{0};
  std::vector<std::thread> threads;
  for (int slot = 0; slot < 2; ++slot) {
    threads.emplace_back([&, slot] {
      const Segment segment(bus.memory.addr(), bus.memory.nbytes());
      Meeting meeting(segment, slot);
      Exchange exchange(meeting);
      meeting.join(static_cast<uint64_t>(slot) + 1);
      const Routing routing({0, 0, 1});
      const float x[] = {10.0F + 100.0F * static_cast<float>(slot), 11.0F + 100.0F * static_cast<float>(slot)};
      const int32_t ids[] = {1, 0, 0, 2};
      const float weights[] = {1, 1, 1, 1};
      float rows[16];
      int32_t counts[3];
      uint64_t num_rows = 0;
      const Outcome outcome = finish(
          [&] { return exchange.dispatch(routing, 1, {x, ids, weights, 2}, {rows, 16, counts}, kNever, num_rows); });
      const std::vector<float> got(rows, rows + num_rows);
      const std::vector<float> wanted =
          slot == 0 ? std::vector<float>{10, 11, 110, 111, 10, 110} : std::vector<float>{11, 111};
      const bool are_counts_right =
          slot == 0 ? counts[0] == 4 && counts[1] == 2 && counts[2] == 0 : counts[0] + counts[1] == 0 && counts[2] == 2;
      if (outcome == Outcome::done && got == wanted && are_counts_right) ++num_good;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(num_good == 2);
}

TEST(what_is_wrong_is_refused) {
  Fixture bus({.max_ranks = 2, .max_tokens = 2, .hidden = 4, .top_k = 2});
  bus.publish(1, 0b01);
  const Segment segment(bus.memory.addr(), bus.memory.nbytes());
  Meeting meeting(segment, 0);
  Exchange exchange(meeting);
  meeting.join(1);
  const Routing routing({0, 1, -1});
  const std::vector<float> x(8, 1.0F);
  const std::vector<float> weights(4, 1.0F);
  std::vector<float> rows(16 * 4);
  std::vector<float> out(8);
  std::vector<int32_t> counts(3);
  uint64_t num_rows = 0;
  const auto dispatch = [&](std::vector<int32_t> ids, uint32_t num_tokens, uint64_t cap) {
    return exchange.dispatch(routing, 1, {x.data(), ids.data(), weights.data(), num_tokens},
                             {rows.data(), cap, counts.data()}, 0, num_rows);
  };
  CHECK_THROWS(std::invalid_argument, dispatch({0, 0, 0, 3}, 2, 16));
  CHECK_THROWS(std::invalid_argument, dispatch({0, 0, 0, -2}, 2, 16));
  CHECK_THROWS(std::invalid_argument, dispatch({0, 0, 0, 1}, 2, 16));  // its owner is no member
  CHECK_THROWS(std::invalid_argument, dispatch({0, 0, 0, 2}, 2, 16));  // it has no owner
  CHECK_THROWS(std::invalid_argument, dispatch({0, 0, 0, 0}, 3, 16));
  CHECK_THROWS(std::invalid_argument, exchange.combine(routing, 1, rows.data(), out.data(), 2, 0));
  CHECK_THROWS(std::invalid_argument, dispatch({0, 0, 0, 0}, 2, 3));
  CHECK(dispatch({0, -1, -1, -1}, 2, 1) == Outcome::done);
  CHECK(num_rows == 1);
  CHECK_THROWS(std::invalid_argument, exchange.combine(routing, 1, rows.data(), out.data(), 1, 0));
  CHECK_THROWS(std::invalid_argument, exchange.combine(Routing({0, 0, 0}), 1, rows.data(), out.data(), 2, 0));
  CHECK(exchange.combine(routing, 1, rows.data(), out.data(), 2, 0) == Outcome::done);
  CHECK(out == (std::vector<float>{1, 1, 1, 1, 0, 0, 0, 0}));
  CHECK_THROWS(std::invalid_argument, exchange.combine(routing, 1, rows.data(), out.data(), 2, 0));
  CHECK_THROWS(std::invalid_argument, Routing({}));
  CHECK_THROWS(std::invalid_argument, Routing({64}));
  CHECK_THROWS(std::invalid_argument, Routing({-2}));
}

TEST(different_routings_are_noticed) {
  Fixture bus({.max_ranks = 2, .max_tokens = 1, .hidden = 4, .top_k = 1});
  bus.publish(1, 0b11);
  std::atomic<int> num_noticed{0};
  std::vector<std::thread> threads;
  for (int slot = 0; slot < 2; ++slot) {
    threads.emplace_back([&, slot] {
      const Segment segment(bus.memory.addr(), bus.memory.nbytes());
      Meeting meeting(segment, slot);
      Exchange exchange(meeting);
      meeting.join(static_cast<uint64_t>(slot) + 1);
      const Routing routing({slot, 1 - slot});
      float rows[4];
      int32_t counts[2];
      uint64_t num_rows = 0;
      const Outcome outcome = finish([&] {
        return exchange.dispatch(routing, 1, {nullptr, nullptr, nullptr, 0}, {rows, 1, counts}, kNever, num_rows);
      });
      if (outcome == Outcome::desync) ++num_noticed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(num_noticed == 2);
}

TEST(nonsense_in_a_mailbox_is_noticed) {
  Fixture bus({.max_ranks = 2, .max_tokens = 1, .hidden = 4, .top_k = 1});
  const Segment segment(bus.memory.addr(), bus.memory.nbytes());
  for (const bool is_id : {true, false}) {
    bus.publish(is_id ? 1 : 2, 0b11);
    const uint32_t generation = is_id ? 1 : 2;
    Meeting peer(segment, 1);
    peer.join(2);
    const Routing routing({0, 1});
    segment.mailbox(1).num_tokens = is_id ? 1 : 1000;
    segment.ids(1)[0] = 77;
    CHECK(peer.arrive(generation, Kind::dispatch, routing.digest()) == Outcome::done);
    Meeting meeting(segment, 0);
    Exchange exchange(meeting);
    meeting.join(1);
    float rows[4];
    int32_t counts[2];
    uint64_t num_rows = 0;
    CHECK(exchange.dispatch(routing, generation, {nullptr, nullptr, nullptr, 0}, {rows, 1, counts}, kNever, num_rows) ==
          Outcome::desync);
  }
}

TEST(the_weighted_sum_is_one) {
  for (const size_t hidden : {1, 63, 64, 65, 200}) {
    std::vector<float> first(hidden);
    std::vector<float> second(hidden);
    for (size_t h = 0; h < hidden; ++h) {
      first[h] = static_cast<float>(h);
      second[h] = static_cast<float>(h % 7);
    }
    const float* rows[] = {first.data(), second.data()};
    const float weights[] = {0.5F, 2.0F};
    std::vector<float> out(hidden, -1.0F);
    weighted_sum(out.data(), rows, weights, 2, hidden);
    for (size_t h = 0; h < hidden; ++h) CHECK(out[h] == 0.5F * first[h] + 2.0F * second[h]);
    weighted_sum(out.data(), rows, weights, 0, hidden);
    CHECK(out == std::vector<float>(hidden, 0.0F));
  }
}
