// Staged memberships, and members that flip to them.
#include <atomic>
#include <memory>
#include <thread>

#include "meeting_fixture.h"

using namespace elasticmoe;
using namespace elasticmoe::bus;
using testing::SharedMemory;

TEST(a_staged_membership_becomes_current_by_a_flip) {
  Fixture bus;
  Meeting hmm = bus.open();
  Meeting rank = bus.open(0);
  CHECK(rank.staged().generation == 0 && !rank.flip(0) && !rank.flip(1));
  CHECK_THROWS(std::invalid_argument, hmm.stage_membership(1, 1, 1));  // nothing is running
  hmm.set_membership(1, 0b1, true, 5);
  CHECK(rank.membership().epoch == 5);
  CHECK_THROWS(std::invalid_argument, hmm.stage_membership(1, 1, 6));
  CHECK_THROWS(std::invalid_argument, hmm.stage_membership(2, 1 << 8, 6));
  CHECK_THROWS(std::invalid_argument, hmm.stage_membership(uint64_t{1} << 32, 1, 6));
  hmm.stage_membership(3, 0b11, uint64_t{6} << 40);
  hmm.stage_membership(3, 0b11, uint64_t{6} << 40);  // what is staged already
  CHECK_THROWS(std::invalid_argument, hmm.stage_membership(4, 0b11, 7));
  const MembershipView staged = rank.staged();
  CHECK(staged.generation == 3 && staged.members == 0b11 && staged.epoch == uint64_t{6} << 40 && staged.is_running);
  CHECK(rank.membership().generation == 1 && !rank.flip(2) && !rank.flip(4));
  CHECK(rank.flip(3) && rank.flip(3) && hmm.flip(3));
  const MembershipView view = hmm.membership();
  CHECK(view.generation == 3 && view.members == 0b11 && view.epoch == uint64_t{6} << 40 && view.is_running);
  CHECK(rank.staged().generation == 0 && rank.staged().members == 0 && rank.staged().epoch == 0);
  hmm.stage_membership(4, 0b1, 8);
  CHECK(rank.flip(4) && !rank.flip(3) && hmm.membership().epoch == 8);
}

TEST(a_publication_makes_the_staged_one_void) {
  Fixture bus;
  Meeting hmm = bus.open();
  Meeting rank = bus.open(0);
  uint32_t generation = 0;
  const auto publish = [&](uint64_t members, bool is_running) {
    ++generation;
    hmm.set_membership(generation, members, is_running, generation);
  };
  for (const bool is_running : {false, true}) {
    publish(0b11, true);
    const uint32_t staged = generation + 10;
    hmm.stage_membership(staged, 0b111, staged);
    publish(0b1, is_running);
    CHECK(rank.staged().generation == 0 && !rank.flip(staged));
    publish(0b1, true);
    CHECK(rank.staged().generation == 0 && !rank.flip(staged));
    CHECK(rank.membership().generation == generation && rank.membership().epoch == generation);
    CHECK_THROWS(std::invalid_argument, hmm.stage_membership(staged, 0b111, staged));  // it would return from the dead
    hmm.stage_membership(staged + 1, 0b1, 1);
    CHECK(rank.flip(staged + 1) && rank.membership().epoch == 1);
    generation = staged + 1;
  }
}

TEST(a_publication_and_a_flip_race) {
  Fixture bus;
  Meeting hmm = bus.open();
  const auto members_of = [](uint32_t generation) { return uint64_t{generation % 251}; };
  const auto epoch_of = [](uint32_t generation) { return uint64_t{generation} << 20 | 5; };
  std::atomic<bool> is_over{false};
  std::atomic<int> num_bad{0};
  std::vector<std::thread> ranks;
  for (int slot = 0; slot < 3; ++slot) {
    ranks.emplace_back([&, slot] {
      Meeting rank = bus.open(slot);
      uint32_t last = 0;
      while (!is_over) {
        const MembershipView staged = rank.staged();
        bool is_good = staged.generation == 0 ||
                       (staged.members == members_of(staged.generation) && staged.epoch == epoch_of(staged.generation));
        if (staged.generation != 0 && slot != 0) (void)rank.flip(staged.generation);
        const MembershipView view = rank.membership();
        is_good &= view.generation >= last && view.members == members_of(view.generation);
        is_good &= view.generation == 0 || view.epoch == epoch_of(view.generation);
        last = view.generation;
        if (!is_good) ++num_bad;
      }
    });
  }
  int num_flipped = 0;
  int num_overtaken = 0;
  uint32_t generation = 0;
  for (int round = 0; round < 5'000; ++round) {
    ++generation;
    hmm.set_membership(generation, members_of(generation), true, epoch_of(generation));
    const uint32_t staged = generation + 1;
    hmm.stage_membership(staged, members_of(staged), epoch_of(staged));
    for (int turn = 0; turn < round % 64; ++turn) std::atomic_signal_fence(std::memory_order_seq_cst);
    generation = staged + 1;
    if (round % 2 == 0) {
      // The same number as the flip: one of the two wins.
      try {
        hmm.set_membership(staged, members_of(staged), true, epoch_of(staged));
        ++num_overtaken;
      } catch (const std::invalid_argument&) {
        ++num_flipped;
      }
    }
    hmm.set_membership(generation, members_of(generation), round % 3 != 0, epoch_of(generation));
  }
  is_over = true;
  for (std::thread& rank : ranks) rank.join();
  CHECK(num_bad == 0);
  CHECK(num_flipped + num_overtaken == 2'500);
}

// Members that tell each other in `step` what they see staged, and flip where all see the same.
TEST(members_flip_together_and_lose_no_step) {
  Fixture bus;
  constexpr uint32_t kRanks = 5;
  constexpr uint32_t kLast = 120;
  constexpr uint64_t kMembers = (1 << kRanks) - 1;
  Meeting hmm = bus.open();
  hmm.set_membership(1, kMembers, true, 1);
  std::atomic<uint32_t> seen[kRanks] = {};      // the generation that a rank works in
  std::atomic<uint64_t> computed[kRanks] = {};  // steps that a rank computed, by which all must be equal
  std::atomic<int> num_bad{0};
  std::vector<std::thread> threads;
  for (uint32_t slot = 0; slot < kRanks; ++slot) {
    threads.emplace_back([&, slot] {
      Meeting rank = bus.open(static_cast<int>(slot));
      rank.join(slot + 1);
      std::vector<StepEntry> entries;
      MembershipView view = rank.membership();
      while (view.generation < kLast) {
        seen[slot] = view.generation;
        const MembershipView staged = rank.staged();
        const Outcome outcome =
            finish([&] { return rank.step(view.generation, 1, staged.generation, in_ms(60'000), entries); });
        bool is_common = outcome == Outcome::done && staged.generation != 0;
        for (const StepEntry& entry : entries) is_common &= entry.flags == staged.generation;
        if (outcome == Outcome::done && !is_common) {
          ++computed[slot];
          // Nobody computes with a peer that is in another generation.
          for (const StepEntry& entry : entries) num_bad += seen[entry.slot] != view.generation;
          if (meet(rank, view.generation, in_ms(60'000)) != Outcome::done) ++num_bad;
          continue;
        }
        if (is_common && !rank.flip(staged.generation)) ++num_bad;
        const uint32_t before = view.generation;
        view = rank.membership();
        if (view.generation != before + 1 || view.epoch != view.generation || view.members != kMembers) ++num_bad;
      }
      seen[slot] = view.generation;
    });
  }
  for (uint32_t generation = 2; generation <= kLast; ++generation) {
    hmm.stage_membership(generation, kMembers, generation);
    const int64_t deadline = in_ms(60'000);
    for (std::atomic<uint32_t>& one : seen) {
      while (one != generation && now_ns() < deadline) std::this_thread::yield();
    }
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(num_bad == 0);
  for (const std::atomic<uint64_t>& count : computed) CHECK(count == computed[0]);
}

TEST(a_slow_member_ends_in_the_generation_that_another_flipped_to) {
  Fixture bus;
  Meeting hmm = bus.open();
  hmm.set_membership(1, 0b11, true, 1);
  hmm.stage_membership(2, 0b11, 2);
  Meeting fast = bus.open(0);
  Meeting slow = bus.open(1);
  fast.join(1);
  slow.join(2);
  std::vector<StepEntry> entries;
  CHECK(finish([&] { return slow.step(1, 0, 2, in_ms(1), entries); }) == Outcome::timeout);
  CHECK(finish([&] { return fast.step(1, 0, 2, in_ms(1), entries); }) == Outcome::done);
  CHECK(entries[0].flags == 2 && entries[1].flags == 2 && fast.flip(2));
  CHECK(finish([&] { return slow.step(1, 0, 2, in_ms(1), entries); }) == Outcome::aborted);
  CHECK(slow.membership().generation == 2 && slow.membership().epoch == 2 && slow.staged().generation == 0);
  CHECK(finish([&] { return slow.step(2, 0, 0, in_ms(1), entries); }) == Outcome::timeout);
  CHECK(finish([&] { return fast.step(2, 0, 0, in_ms(1), entries); }) == Outcome::done);
  CHECK(finish([&] { return slow.step(2, 0, 0, in_ms(1), entries); }) == Outcome::done);
}

TEST(a_flip_wakes_every_sleeper) {
  Fixture bus;
  Meeting hmm = bus.open();
  hmm.set_membership(1, 0b111, true);
  int64_t total_ns = 0;
  constexpr int kRounds = 8;
  Meeting first = bus.open(0);
  Meeting second = bus.open(1);
  first.join(1);
  second.join(2);
  for (uint32_t generation = 1; generation <= kRounds; ++generation) {
    hmm.stage_membership(generation + 1, 0b111, 0);
    std::atomic<int64_t> last{0};
    std::atomic<int> num_aborted{0};
    const auto note = [&](Outcome outcome) {
      num_aborted += outcome == Outcome::aborted;
      last = now_ns();
    };
    std::thread waiter([&] { note(meet(first, generation, in_ms(60'000))); });
    while (hmm.segment().wakeup().num_sleepers == 0) std::this_thread::yield();
    std::thread member([&] { note(meet(second, generation, in_ms(60'000))); });
    while (hmm.segment().wakeup().num_sleepers != 2) std::this_thread::yield();
    const int64_t start = now_ns();
    CHECK(bus.open(2).flip(generation + 1));
    waiter.join();
    member.join();
    CHECK(num_aborted == 2);
    total_ns += last - start;
  }
  CHECK(total_ns < kRounds * kSliceNs / 2);
}
