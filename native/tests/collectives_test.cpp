// Sums, rows and plans between the ranks of replicas, against the direct computation; their ends, and what they refuse.
#include "bus/collectives.h"

#include <atomic>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "core/clock.h"
#include "testing.h"

using namespace elasticmoe;
using namespace elasticmoe::bus;
using namespace testing;

namespace {

constexpr int64_t kLong = 30'000'000'000;
constexpr Geometry kGeometry{
    .max_ranks = 8, .max_tokens = 4, .hidden = 16, .top_k = 2, .half_elements = 400, .plan_bytes = 64};

struct Fixture {
  SharedMemory memory{bus_bytes(kGeometry)};
  Fixture() { format_bus(memory.addr(), memory.nbytes(), kGeometry); }
  void publish(uint64_t generation, uint64_t members, bool is_running = true) const {
    Meeting(Segment(memory.addr(), memory.nbytes()), -1).set_membership(generation, members, is_running);
  }
};

// One rank: its view of both lanes.
struct Rank {
  Segment segment;
  Meeting members;
  Meeting replica;
  Collectives collectives;

  Rank(const Fixture& bus, uint32_t slot, std::vector<uint32_t> slots)
      : segment(bus.memory.addr(), bus.memory.nbytes()),
        members(segment, static_cast<int>(slot)),
        replica(segment, static_cast<int>(slot), Lane::replica),
        collectives(replica) {
    members.join(slot + 1);
    replica.follow(slot + 1);
    collectives.set_replica(std::move(slots));
  }
};

template <typename Operation>
Outcome finish(Operation operation) {
  Outcome outcome = operation();
  while (outcome == Outcome::interrupted) outcome = operation();
  return outcome;
}

// What the rank `rank` of a replica brings to a round: the same for whoever asks.
float value(uint32_t replica, uint32_t rank, uint64_t round, uint64_t at) {
  std::minstd_rand random(static_cast<uint32_t>(1 + replica * 7919 + rank * 104'729 + round * 31 + at * 17));
  random.discard(3);
  return (static_cast<float>(random() % 2'000'001) - 1e6F) / 3e3F;
}

float own_row(uint32_t replica, uint64_t round, uint64_t at) {
  return value(replica, 63, round, at);
}

void check_reduce(Rank& rank, uint32_t replica, uint32_t me, uint32_t size, uint64_t round) {
  const auto n = static_cast<uint32_t>(round * 5 % 7), width = static_cast<uint32_t>(1 + round % 9);
  const bool has_x = round % 3 != 1, has_rows = round % 3 != 0;
  std::vector<float> x(n * width), rows(n * width, std::nanf("")), out(n * width, std::nanf(""));
  for (uint64_t at = 0; at < x.size(); ++at) x[at] = value(replica, me, round, at);
  for (uint64_t row = n * me / size; row < n * (me + 1) / size; ++row) {
    for (uint64_t at = row * width; at < (row + 1) * width; ++at) rows[at] = own_row(replica, round, at);
  }
  CHECK(finish([&] {
          return rank.collectives.reduce(1, has_x ? x.data() : nullptr, has_rows ? rows.data() : nullptr, out.data(), n,
                                         width, now_ns() + kLong);
        }) == Outcome::done);
  for (uint64_t at = 0; at < out.size(); ++at) {
    float sum = has_rows ? own_row(replica, round, at) : 0.0F;
    for (uint32_t other = 0; has_x && other < size; ++other) sum = sum + value(replica, other, round, at);
    CHECK(out[at] == sum);
  }
}

void check_gather(Rank& rank, uint32_t replica, uint32_t me, uint32_t size, uint64_t round) {
  const auto n = static_cast<uint32_t>(round % 4), total = static_cast<uint32_t>(size + round % 50);
  const uint64_t begin = uint64_t{total} * me / size, end = uint64_t{total} * (me + 1) / size;
  std::vector<float> x(n * (end - begin) + 1), out(n * total, std::nanf(""));
  for (uint64_t row = 0; row < n; ++row) {
    for (uint64_t at = begin; at < end; ++at)
      x[row * (end - begin) + at - begin] = value(replica, 0, round, row * total + at);
  }
  const bool is_wanted = me == round % size;
  CHECK(finish([&] {
          return rank.collectives.gather(1, x.data(), is_wanted ? out.data() : nullptr, n, total, now_ns() + kLong);
        }) == Outcome::done);
  for (uint64_t at = 0; is_wanted && at < out.size(); ++at) CHECK(out[at] == value(replica, 0, round, at));
}

void run_replica(const Fixture& bus, uint32_t replica, const std::vector<uint32_t>& slots, uint64_t num_steps,
                 uint64_t rounds, std::atomic<int>& num_good, std::vector<std::thread>& threads) {
  for (uint32_t me = 0; me < slots.size(); ++me) {
    threads.emplace_back([&bus, &num_good, replica, slots, num_steps, rounds, me] {
      try {
        const auto size = static_cast<uint32_t>(slots.size());
        Rank rank(bus, slots[me], slots);
        std::vector<StepEntry> entries;
        for (uint64_t step = 0; step < num_steps; ++step) {
          const std::string plan = std::to_string(replica) + "/" + std::to_string(step);
          if (me == 0) rank.collectives.write_plan(plan.data(), plan.size());
          CHECK(finish([&] { return rank.members.step(1, 1, 0, now_ns() + kLong, entries); }) == Outcome::done);
          std::string read;
          CHECK(rank.collectives.read_plan(1, read) == Outcome::done);
          CHECK(read == plan);
          for (uint64_t round = 0; round < rounds; ++round) {
            if ((step + round + me) % 3 == 0) std::this_thread::yield();
            check_reduce(rank, replica, me, size, step * rounds + round);
            if (round % 2 != 0) check_gather(rank, replica, me, size, step * rounds + round);
          }
        }
        ++num_good;
      } catch (const std::exception& error) {
        std::fprintf(stderr, "replica %u, rank %u: %s\n", replica, me, error.what());
      }
    });
  }
}

}  // namespace

TEST(replicas_go_on_by_themselves_between_steps_of_all) {
  Fixture bus;
  bus.publish(1, 0b11111011);
  std::atomic<int> num_good{0};
  std::vector<std::thread> threads;
  run_replica(bus, 0, {4, 1, 6}, 60, 6, num_good, threads);
  run_replica(bus, 1, {0, 7}, 60, 2, num_good, threads);
  run_replica(bus, 2, {5, 3}, 60, 9, num_good, threads);
  for (std::thread& thread : threads) thread.join();
  CHECK(num_good == 7);
}

TEST(the_generations_end_is_a_collectives_end) {
  Fixture bus;
  bus.publish(1, 0b11);
  Rank rank(bus, 0, {0, 1});
  float x[2] = {1, 2}, out[2] = {};
  CHECK(finish([&] { return rank.collectives.reduce(1, x, nullptr, out, 1, 2, now_ns() + 1'000'000); }) ==
        Outcome::timeout);
  std::thread hmm([&] { bus.publish(2, 0b11, false); });
  CHECK(finish([&] { return rank.collectives.reduce(1, x, nullptr, out, 1, 2, now_ns() + kLong); }) ==
        Outcome::aborted);
  hmm.join();
  std::string plan;
  CHECK(rank.collectives.read_plan(1, plan) == Outcome::aborted);
}

TEST(a_collective_that_timed_out_goes_on_with_what_it_brought) {
  Fixture bus;
  bus.publish(1, 0b11);
  Rank first(bus, 0, {0, 1}), second(bus, 1, {0, 1});
  float x[2] = {1, 2}, out[2] = {}, other[2] = {10, 20};
  CHECK(finish([&] { return first.collectives.reduce(1, x, nullptr, out, 1, 2, now_ns()); }) == Outcome::timeout);
  x[0] = 5;  // too late
  CHECK(finish([&] { return second.collectives.reduce(1, other, nullptr, other, 1, 2, now_ns() + kLong); }) ==
        Outcome::done);
  CHECK(finish([&] { return first.collectives.reduce(1, x, nullptr, x, 1, 2, now_ns() + kLong); }) == Outcome::done);
  CHECK(x[0] == 11 && x[1] == 22 && other[0] == 11 && other[1] == 22);
}

TEST(ranks_that_bring_different_rows_are_out_of_step) {
  Fixture bus;
  bus.publish(1, 0b11);
  Rank first(bus, 0, {0, 1}), second(bus, 1, {0, 1});
  float x[4] = {1, 2, 3, 4};
  CHECK(finish([&] { return first.collectives.reduce(1, x, nullptr, x, 1, 2, now_ns()); }) == Outcome::timeout);
  CHECK(finish([&] { return second.collectives.reduce(1, x, nullptr, x, 2, 2, now_ns() + kLong); }) == Outcome::desync);
  CHECK(finish([&] { return first.collectives.reduce(1, x, nullptr, x, 1, 2, now_ns() + kLong); }) == Outcome::desync);
}

TEST(what_makes_no_sense_is_refused) {
  Fixture bus;
  bus.publish(1, 0b11);
  Rank rank(bus, 0, {0, 1});
  float x[1] = {};
  CHECK_THROWS(std::invalid_argument, rank.collectives.reduce(1, x, nullptr, x, 101, 4, now_ns()));
  CHECK_THROWS(std::invalid_argument, rank.collectives.reduce(1, x, x, x, 51, 4, now_ns()));
  CHECK_THROWS(std::invalid_argument, rank.collectives.gather(1, x, x, 4, 202, now_ns()));
  CHECK_THROWS(std::invalid_argument, rank.collectives.write_plan(x, 65));
  CHECK_THROWS(std::invalid_argument, rank.collectives.set_replica({1}));
  CHECK_THROWS(std::invalid_argument, rank.collectives.set_replica({0, 0}));
  CHECK_THROWS(std::invalid_argument, rank.collectives.set_replica({0, 8}));
  rank.collectives.set_replica({0, 2});  // of which one is no member
  CHECK_THROWS(std::invalid_argument, rank.collectives.reduce(1, x, nullptr, x, 1, 1, now_ns()));
  Meeting meeting(rank.segment, 1, Lane::replica);
  Collectives untold(meeting);
  CHECK_THROWS(std::invalid_argument, untold.reduce(1, x, nullptr, x, 1, 1, now_ns()));
}
