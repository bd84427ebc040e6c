// Membership, barriers and steps between threads.
#include <atomic>
#include <memory>
#include <thread>

#include "meeting_fixture.h"

using namespace elasticmoe;
using namespace elasticmoe::bus;
using testing::SharedMemory;

TEST(segment_is_verified) {
  Fixture bus;
  CHECK(Segment(bus.memory.addr(), bus.memory.nbytes()).geometry() == kGeometry);
  CHECK_THROWS(std::invalid_argument, Segment(bus.memory.addr(), bus.memory.nbytes() - 1));
  CHECK_THROWS(std::invalid_argument, Segment(bus.memory.addr() + 64, bus.memory.nbytes() - 64));
  CHECK_THROWS(std::invalid_argument, Segment(bus.memory.addr() + 8, bus.memory.nbytes() - 8));
  CHECK_THROWS(std::invalid_argument, Segment(0, bus.memory.nbytes()));
  CHECK_THROWS(std::invalid_argument, format_bus(bus.memory.addr(), bus.memory.nbytes(), kGeometry));
  auto* header = bus.memory.as<Header>();
  header->geometry.hidden = 1 << 19;
  CHECK_THROWS(std::invalid_argument, Segment(bus.memory.addr(), bus.memory.nbytes()));
  header->geometry = kGeometry;
  header->version = 99;
  CHECK_THROWS(std::invalid_argument, Segment(bus.memory.addr(), bus.memory.nbytes()));
  CHECK_THROWS(std::invalid_argument, bus_bytes({65, 4, 16, 2}));
  CHECK_THROWS(std::invalid_argument, bus_bytes({0, 4, 16, 2}));
  CHECK_THROWS(std::invalid_argument, bus_bytes({64, (1 << 20) + 1, 16, 2}));
}

TEST(membership_grows_only) {
  Fixture bus;
  Meeting hmm = bus.open();
  CHECK(hmm.membership().generation == 0 && !hmm.membership().is_running);
  hmm.set_membership(3, 0b101, true);
  const MembershipView view = bus.open(2).membership();
  CHECK(view.generation == 3 && view.members == 0b101 && view.is_running && view.has(2) && !view.has(1));
  CHECK_THROWS(std::invalid_argument, hmm.set_membership(3, 1, true));
  CHECK_THROWS(std::invalid_argument, hmm.set_membership(2, 1, true));
  CHECK_THROWS(std::invalid_argument, hmm.set_membership(4, 1 << 8, true));
  CHECK_THROWS(std::invalid_argument, hmm.set_membership(uint64_t{1} << 32, 1, true));
  hmm.set_membership(UINT32_MAX, 1, false);
  CHECK(hmm.membership().generation == UINT32_MAX && !hmm.membership().is_running);
}

TEST(membership_is_read_whole) {
  Fixture bus;
  std::atomic<bool> is_over{false};
  std::thread writer([&] {
    Meeting hmm = bus.open();
    for (uint32_t generation = 1; generation <= 20'000; ++generation) {
      hmm.set_membership(generation, generation % 251, generation % 2 == 0);
    }
    is_over = true;
  });
  const Meeting reader = bus.open();
  uint32_t last = 0;
  bool is_whole = true;
  while (!is_over) {
    const MembershipView view = reader.membership();
    is_whole &= view.generation >= last && view.members == view.generation % 251;
    is_whole &= view.generation == 0 || view.is_running == (view.generation % 2 == 0);
    last = view.generation;
  }
  writer.join();
  CHECK(is_whole);
}

TEST(a_writer_killed_half_way_changes_nothing) {
  Fixture bus;
  Meeting hmm = bus.open();
  hmm.set_membership(1, 0b1, true);
  hmm.stage_membership(2, 0b11, 9);
  // What a killed writer leaves: entries that do not count were filled, no word was written.
  Membership& shared = Segment(bus.memory.addr(), bus.memory.nbytes()).membership();
  for (uint32_t index = 0; index < kNumEntries; ++index) {
    if (index == (shared.current.load() >> 1 & 3) || index == (shared.staged.load() >> 1 & 3)) continue;
    shared.entries[index].members = 0b111;
    shared.entries[index].epoch = 77;
    shared.entries[index].base = shared.current.load();
  }
  CHECK(hmm.membership().generation == 1 && hmm.membership().members == 0b1 && hmm.membership().epoch == 0);
  CHECK(hmm.staged().generation == 2 && hmm.staged().members == 0b11 && hmm.staged().epoch == 9);
  hmm.set_membership(3, 0b110, true, 10);
  CHECK(hmm.membership().members == 0b110 && hmm.membership().epoch == 10);
}

TEST(alone_the_barrier_is_free) {
  Fixture bus;
  Meeting rank = bus.open(3);
  rank.join(7);
  bus.open().set_membership(1, 1 << 3, true);
  for (int count = 0; count < 1000; ++count) CHECK(meet(rank, 1, 0) == Outcome::done);
  CHECK(rank.take_wait_ns() == 0);
}

TEST(misuse_is_refused) {
  Fixture bus;
  Meeting hmm = bus.open();
  Meeting rank = bus.open(1);
  hmm.set_membership(1, 0b1, true);
  CHECK_THROWS(std::invalid_argument, meet(rank, 1, 0));  // not joined
  CHECK_THROWS(std::invalid_argument, rank.join(0));
  rank.join(5);
  CHECK_THROWS(std::invalid_argument, meet(rank, 1, 0));  // not a member
  CHECK_THROWS(std::invalid_argument, meet(hmm, 1, 0));   // an observer
  CHECK(meet(rank, 2, 0) == Outcome::aborted);
  CHECK_THROWS(std::invalid_argument, bus.open(8));
}

TEST(nobody_spins_where_members_have_not_a_core_each) {
  Fixture bus;
  Meeting rank = bus.open(0);
  rank.num_cores = 2;
  CHECK(rank.spin_ns(0b11) > 0);
  CHECK(rank.spin_ns(0b10000001) > 0);
  CHECK(rank.spin_ns(0b111) == 0);
  rank.spin_us = 5;  // asked for
  CHECK(rank.spin_ns(0b111) == 5'000);
}

TEST(threads_stay_in_lockstep) {
  Fixture bus;
  constexpr int kRanks = 6;
  constexpr uint32_t kRounds = 400;
  bus.open().set_membership(1, (1 << kRanks) - 1, true);
  std::atomic<uint32_t> rounds[kRanks] = {};
  std::atomic<int> num_bad{0};
  std::vector<std::thread> threads;
  const int64_t start = now_ns();
  for (int slot = 0; slot < kRanks; ++slot) {
    threads.emplace_back([&, slot] {
      Meeting rank = bus.open(slot);
      rank.spin_us = slot % 2 == 0 ? 0 : 5;
      rank.join(static_cast<uint64_t>(slot) + 1);
      std::vector<StepEntry> entries;
      for (uint32_t round = 1; round <= kRounds; ++round) {
        rounds[slot] = round;
        const auto tokens = static_cast<uint32_t>(slot) + round;
        const Outcome outcome = finish([&] { return rank.step(1, tokens, round, in_ms(60'000), entries); });
        bool is_good = outcome == Outcome::done && entries.size() == kRanks;
        for (const StepEntry& entry : entries) {
          is_good &= entry.num_tokens == entry.slot + round && entry.flags == round;
          is_good &= rounds[entry.slot] >= round && rounds[entry.slot] <= round + 1;
        }
        if (round % 3 == 0) is_good &= meet(rank, 1, in_ms(60'000)) == Outcome::done;
        if (!is_good) ++num_bad;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(num_bad == 0);
  CHECK(now_ns() - start < kRounds * kSliceNs / 10);  // sleepers were woken, rather than looking again by themselves
  const Meeting reader = bus.open();
  for (uint32_t slot = 0; slot < kRanks; ++slot) CHECK(reader.segment().slot(slot).num_steps == kRounds);
}

TEST(a_timed_out_meeting_goes_on) {
  Fixture bus;
  bus.open().set_membership(1, 0b11, true);
  Meeting first = bus.open(0);
  Meeting second = bus.open(1);
  first.join(1);
  second.join(2);
  std::vector<StepEntry> entries;
  CHECK(finish([&] { return first.step(1, 10, 20, in_ms(5), entries); }) == Outcome::timeout);
  CHECK(finish([&] { return first.step(1, 99, 99, in_ms(5), entries); }) == Outcome::timeout);
  CHECK_THROWS(std::invalid_argument, meet(first, 1, 0));  // something else is under way
  CHECK(finish([&] { return second.step(1, 11, 21, in_ms(5), entries); }) == Outcome::done);
  CHECK(entries.size() == 2 && entries[0].num_tokens == 10 && entries[0].flags == 20);
  CHECK(finish([&] { return first.step(1, 99, 99, in_ms(5), entries); }) == Outcome::done);
  CHECK(entries[0].num_tokens == 10 && entries[1].num_tokens == 11 && entries[1].flags == 21);
  CHECK(first.take_wait_ns() > 4'000'000);
}

TEST(a_new_generation_aborts_waiters_and_resets_counts) {
  Fixture bus;
  Meeting hmm = bus.open();
  hmm.set_membership(1, 0b11, true);
  Meeting first = bus.open(0);
  first.join(1);
  int64_t total_ns = 0;
  for (uint32_t generation = 1; generation < 20; generation += 2) {
    std::atomic<int64_t> aborted_at{0};
    std::atomic<Outcome> outcome{Outcome::done};
    std::thread waiter([&] {
      outcome = meet(first, generation, in_ms(60'000));
      aborted_at = now_ns();
    });
    while (hmm.segment().slot(0).lane(Lane::members).arrived.load() >> 32 != generation) std::this_thread::yield();
    const int64_t published_at = now_ns();
    hmm.set_membership(generation + 1, 0b11, false);
    waiter.join();
    CHECK(outcome == Outcome::aborted);
    total_ns += aborted_at - published_at;
    CHECK(meet(first, generation + 1, in_ms(1)) == Outcome::aborted);  // not running
    hmm.set_membership(generation + 2, 0b11, true);
  }
  CHECK(total_ns < 10 * kSliceNs / 2);
}

TEST(a_predecessor_is_fenced) {
  Fixture bus;
  Meeting hmm = bus.open();
  hmm.set_membership(1, 0b1, true);
  Meeting old = bus.open(0);
  old.join(1);
  CHECK(meet(old, 1, 0) == Outcome::done);
  Meeting young = bus.open(0);
  young.join(2);
  CHECK(meet(old, 1, 0) == Outcome::aborted);
  CHECK(meet(young, 1, 0) == Outcome::aborted);  // its predecessor arrived in this generation
  old.leave();                                   // must not take the slot from its successor
  CHECK(hmm.segment().slot(0).incarnation == 2);
  hmm.set_membership(2, 0b1, true);
  CHECK(meet(young, 2, 0) == Outcome::done);
  young.leave();
  CHECK(hmm.segment().slot(0).incarnation == 0);
}

TEST(different_calls_are_noticed) {
  Fixture bus;
  bus.open().set_membership(1, 0b11, true);
  Meeting first = bus.open(0);
  Meeting second = bus.open(1);
  first.join(1);
  second.join(2);
  std::vector<StepEntry> entries;
  CHECK(finish([&] { return first.step(1, 1, 0, in_ms(1), entries); }) == Outcome::timeout);
  CHECK(meet(second, 1, in_ms(1)) == Outcome::desync);
  CHECK(finish([&] { return first.step(1, 1, 0, in_ms(1), entries); }) == Outcome::desync);
}

TEST(counts_may_wrap) {
  CHECK(has_reached(5, 5) && has_reached(6, 5) && !has_reached(4, 5));
  CHECK(has_reached(0, UINT32_MAX) && !has_reached(UINT32_MAX, 0));
  Fixture bus;
  bus.open().set_membership(1, 0b1, true);
  Meeting rank = bus.open(0);
  rank.join(1);
  CHECK(meet(rank, 1, 0) == Outcome::done);
  CHECK((rank.segment().slot(0).lane(Lane::members).arrived.load() & 0xFFFFFFFF) == 1);
}

TEST(idlers_wake_for_a_peer) {
  Fixture bus;
  Meeting hmm = bus.open();
  hmm.set_membership(1, 0b11, true);
  Meeting first = bus.open(0);
  Meeting second = bus.open(1);
  first.join(1);
  second.join(2);
  CHECK(finish([&] { return first.idle_wait(1, in_ms(3)); }) == Outcome::timeout);
  std::atomic<Outcome> outcome{Outcome::timeout};
  std::thread idler([&] { outcome = finish([&] { return first.idle_wait(1, in_ms(60'000)); }); });
  while (hmm.segment().wakeup().num_idlers == 0) std::this_thread::yield();
  CHECK(second.arrive(1, Kind::combine, 0) == Outcome::done);
  idler.join();
  CHECK(outcome == Outcome::done);
  CHECK(meet(first, 1, in_ms(1000)) == Outcome::done);
  CHECK(second.wait(in_ms(1000)) == Outcome::done);
  hmm.set_membership(2, 0b11, false);
  CHECK(finish([&] { return first.idle_wait(1, in_ms(3)); }) == Outcome::aborted);
}
