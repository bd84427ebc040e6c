// Processes on one bus, one of them killed at a random moment again and again: the others must notice through the next
// generation within a second, go on with its replacement, and never see a wrong result.
#include <signal.h>

#include <chrono>
#include <random>
#include <thread>

#include "exchange_model.h"
#include "tracing.h"

using namespace testing;

namespace {

constexpr Geometry kGeometry{.max_ranks = 6, .max_tokens = 6, .hidden = 48, .top_k = 3};
constexpr uint32_t kNumExperts = 20;
constexpr int64_t kSecond = 1'000'000'000;

// What the processes tell the test, beside the bus.
struct Board {
  std::atomic<uint32_t> seen_stopped[64];  // the last stopped generation that a rank has noticed
};

// A rank's life: works in running generations until membership is empty.
void live(uint64_t addr, uint64_t nbytes, Board& board, int slot, uint64_t incarnation) {
  ExchangeRank rank(addr, nbytes, slot, kNumExperts);
  Meeting& meeting = rank.meeting();
  meeting.spin_us = slot % 2 == 0 ? 0 : 3;
  meeting.join(incarnation);
  for (;;) {
    const MembershipView view = meeting.membership();
    if (!view.is_running || !view.has(meeting.slot())) {
      board.seen_stopped[slot] = view.generation;
      if (view.generation != 0 && view.members == 0) return;
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      continue;
    }
    for (uint64_t step = 0;; ++step) {
      std::vector<StepEntry> entries;
      Outcome outcome = finish([&] {
        return meeting.step(view.generation, static_cast<uint32_t>(slot), view.generation, now_ns() + 15 * kSecond,
                            entries);
      });
      if (outcome == Outcome::done) {
        for (const StepEntry& entry : entries) CHECK(entry.num_tokens == entry.slot && entry.flags == view.generation);
        outcome = rank.run_layer(view.generation, view.generation, step, 15 * kSecond);
      }
      CHECK(outcome == Outcome::done || outcome == Outcome::aborted);
      if (outcome == Outcome::aborted) break;
    }
  }
}

class Deployment {
 public:
  Deployment() {
    for (int slot = 0; slot < kNumRanks; ++slot) start(slot);
  }
  ~Deployment() {
    for (const pid_t pid : pids_) {
      if (pid > 0) kill(pid, SIGKILL), waitpid(pid, nullptr, 0);
    }
  }
  Deployment(const Deployment&) = delete;
  Deployment& operator=(const Deployment&) = delete;

  static constexpr int kNumRanks = 6;

  void start(int slot) {
    const uint64_t incarnation = ++last_incarnation_;
    pids_[slot] = spawn([&] { live(memory_.addr(), memory_.nbytes(), *board_memory_.as<Board>(), slot, incarnation); });
  }
  void kill_rank(int slot) {
    kill(pids_[slot], SIGKILL);
    CHECK(WIFSIGNALED(wait_status(pids_[slot])));
    pids_[slot] = 0;
  }
  void publish(uint64_t members, bool is_running) { hmm_.set_membership(++generation_, members, is_running); }
  uint64_t steps(int slot) const { return hmm_.segment().slot(static_cast<uint32_t>(slot)).num_steps; }

  void wait_for(const char* what, const std::function<bool()>& condition, int64_t limit_ns) const {
    const int64_t start = now_ns();
    while (!condition()) {
      if (now_ns() - start > limit_ns) throw Failure(std::string("waited too long for ") + what);
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
  void wait_for_steps(uint64_t members, uint64_t num_more) const {
    uint64_t goals[kNumRanks];
    for (int slot = 0; slot < kNumRanks; ++slot) goals[slot] = steps(slot) + num_more;
    for (int slot = 0; slot < kNumRanks; ++slot) {
      if ((members >> slot & 1) != 0) wait_for("steps", [&] { return steps(slot) >= goals[slot]; }, 15 * kSecond);
    }
  }
  void wait_for_stop(uint64_t members, int64_t limit_ns) {
    auto* board = board_memory_.as<Board>();
    for (int slot = 0; slot < kNumRanks; ++slot) {
      if ((members >> slot & 1) == 0) continue;
      wait_for("survivors to stop", [&] { return board->seen_stopped[slot] == generation_; }, limit_ns);
    }
  }
  void expect_clean_exit() {
    for (int slot = 0; slot < kNumRanks; ++slot) {
      if (pids_[slot] == 0) continue;
      const int status = wait_status(pids_[slot]);
      pids_[slot] = 0;
      CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
  }

 private:
  static Segment formatted(const SharedMemory& memory) {
    format_bus(memory.addr(), memory.nbytes(), kGeometry);
    return Segment(memory.addr(), memory.nbytes());
  }

  SharedMemory memory_{bus_bytes(kGeometry)};
  SharedMemory board_memory_{sizeof(Board)};
  Meeting hmm_{formatted(memory_), -1};
  pid_t pids_[kNumRanks] = {};
  uint64_t last_incarnation_ = 0;
  uint32_t generation_ = 0;
};

constexpr uint64_t kEverybody = (1 << Deployment::kNumRanks) - 1;

}  // namespace

TEST(survivors_of_a_kill_stop_and_go_on) {
  Deployment deployment;
  std::mt19937_64 random(20251002);
  for (int round = 0; round < 60; ++round) {
    deployment.publish(kEverybody, true);
    deployment.wait_for_steps(kEverybody, 3);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
    const int victim = static_cast<int>(random() % Deployment::kNumRanks);
    deployment.kill_rank(victim);
    std::this_thread::sleep_for(
        std::chrono::microseconds(random() % 2 * 2000));  // long enough for the others to sleep, or not
    deployment.publish(kEverybody, false);
    deployment.wait_for_stop(kEverybody & ~(uint64_t{1} << victim), kSecond);
    deployment.start(victim);
  }
  deployment.publish(0, false);
  deployment.expect_clean_exit();
}

TEST(membership_shrinks_and_grows_under_load) {
  Deployment deployment;
  std::mt19937_64 random(7);
  for (int round = 0; round < 60; ++round) {
    const uint64_t members = random() % kEverybody + 1;
    deployment.publish(members, true);
    deployment.wait_for_steps(members, 3);
    deployment.publish(members, false);
    deployment.wait_for_stop(members, kSecond);
  }
  deployment.publish(0, false);
  deployment.expect_clean_exit();
}

TEST(an_observer_killed_while_publishing_blocks_nobody) {
  SharedMemory memory(bus_bytes(kGeometry));
  format_bus(memory.addr(), memory.nbytes(), kGeometry);
  Meeting reader(Segment(memory.addr(), memory.nbytes()), -1);
  std::mt19937_64 random(11);
  for (int round = 0; round < 40; ++round) {
    const uint64_t first = reader.membership().generation + 1;
    const pid_t pid = spawn([&] {
      Meeting hmm(Segment(memory.addr(), memory.nbytes()), -1);
      for (uint64_t generation = first;; ++generation) hmm.set_membership(generation, generation % 61, true);
    });
    while (reader.membership().generation < first + 10) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    kill(pid, SIGKILL);
    CHECK(WIFSIGNALED(wait_status(pid)));
    const MembershipView view = reader.membership();
    CHECK(view.members == view.generation % 61);
  }
}

TEST(a_kill_at_any_instruction_of_an_arrival_blocks_nobody) {
  const SharedMemory memory(bus_bytes(kGeometry));
  format_bus(memory.addr(), memory.nbytes(), kGeometry);
  const Segment segment(memory.addr(), memory.nbytes());
  Meeting hmm(segment, -1);
  Meeting survivor(segment, 0);
  survivor.join(1);
  uint32_t generation = 0;
  uint64_t num_instructions = UINT64_MAX;  // known after the first round, which kills nobody
  uint64_t stride = 1;
  for (uint64_t goal = UINT64_MAX; num_instructions == UINT64_MAX || goal < num_instructions; goal += stride) {
    hmm.set_membership(++generation, 0b11, true);
    // The victim is the last to arrive: it is the one who must wake the survivor.
    TracedProcess victim([&] {
      Meeting rank(segment, 1);
      rank.join(1000 + generation);
      if (rank.meet(generation, Kind::combine, 0, kNever) != Outcome::done) throw Failure("the victim did not pass");
    });
    if (!victim.is_traceable()) {
      std::printf("      skipped: this machine forbids tracing\n");
      return;
    }
    Outcome outcome = Outcome::interrupted;
    std::jthread waiter([&] {
      outcome = finish([&] { return survivor.meet(generation, Kind::combine, 0, now_ns() + 15 * kSecond); });
    });
    while (segment.slot(0).lane(Lane::members).arrived >> 32 != generation) std::this_thread::yield();
    uint64_t done = 0;
    while (done < goal && victim.step()) ++done;
    victim.kill_now();
    if (num_instructions == UINT64_MAX) {
      num_instructions = done;
      stride = done / 400 + 1;  // a sanitizer's build has ten times the instructions
      goal = 0;
    }
    const int64_t killed_at = now_ns();
    hmm.set_membership(++generation, 0b11, false);
    waiter.join();
    CHECK(outcome == Outcome::done || outcome == Outcome::aborted);
    CHECK(now_ns() - killed_at < kSecond);
    // The pair goes on with a replacement in the victim's slot.
    hmm.set_membership(++generation, 0b11, true);
    Meeting replacement(segment, 1);
    replacement.join(2000 + generation);
    CHECK(replacement.arrive(generation, Kind::combine, 0) == Outcome::done);
    CHECK(survivor.meet(generation, Kind::combine, 0, 0) == Outcome::done);
    CHECK(replacement.wait(0) == Outcome::done);
  }
  CHECK(num_instructions > 20);
}

TEST(membership_is_whole_wherever_its_reader_is_overtaken) {
  const SharedMemory memory(bus_bytes(kGeometry));
  const SharedMemory answer_memory(sizeof(MembershipView));
  format_bus(memory.addr(), memory.nbytes(), kGeometry);
  Meeting hmm(Segment(memory.addr(), memory.nbytes()), -1);
  uint64_t generation = 0;
  const auto publish = [&] {
    ++generation;
    hmm.set_membership(generation, generation % 61, generation % 2 == 0);
  };
  publish();
  bool was_overtaken = true;
  for (uint64_t goal = 0; was_overtaken; ++goal) {
    TracedProcess reader([&] { *answer_memory.as<MembershipView>() = hmm.membership(); });
    if (!reader.is_traceable()) {
      std::printf("      skipped: this machine forbids tracing\n");
      return;
    }
    uint64_t done = 0;
    while (done < goal && reader.step()) ++done;
    was_overtaken = done == goal;
    // Twice, so that the mask under the reader's eyes is written again.
    publish();
    publish();
    while (was_overtaken && reader.step()) ++done;
    const MembershipView view = *answer_memory.as<MembershipView>();
    CHECK(view.members == view.generation % 61 && view.is_running == (view.generation % 2 == 0));
  }
}

TEST(a_kill_at_any_instruction_of_a_flip_leaves_either_membership) {
  const SharedMemory memory(bus_bytes(kGeometry));
  format_bus(memory.addr(), memory.nbytes(), kGeometry);
  Meeting hmm(Segment(memory.addr(), memory.nbytes()), -1);
  uint32_t generation = 1;
  hmm.set_membership(generation, 1, true, 1);
  bool was_killed = true;
  uint64_t num_flipped = 0;
  for (uint64_t goal = 0; was_killed; ++goal) {
    // First the HMM is killed while it stages, then a member while it flips.
    const uint32_t next = generation + 1;
    TracedProcess stager([&] { hmm.stage_membership(next, next % 61, next); });
    if (!stager.is_traceable()) {
      std::printf("      skipped: this machine forbids tracing\n");
      return;
    }
    uint64_t done = 0;
    while (done < goal && stager.step()) ++done;
    was_killed = done == goal;
    stager.kill_now();
    const MembershipView half = hmm.staged();
    CHECK(hmm.membership().generation == generation);
    CHECK(half.generation == 0 || (half.generation == next && half.members == next % 61 && half.epoch == next));
    hmm.stage_membership(next, next % 61, next);  // by its successor, whether it is staged already or not
    TracedProcess flipper([&] {
      if (!hmm.flip(next)) throw Failure("the flip was refused");
    });
    done = 0;
    while (done < goal && flipper.step()) ++done;
    was_killed |= done == goal;
    flipper.kill_now();
    const MembershipView view = hmm.membership();
    num_flipped += view.generation == next;
    CHECK(view.generation == next ? view.members == next % 61 && view.epoch == next : view.generation == generation);
    CHECK(hmm.flip(next));
    CHECK(hmm.membership().generation == next && hmm.membership().members == next % 61);
    generation = next;
  }
  CHECK(num_flipped > 0 && num_flipped < generation);
}

TEST(a_flip_that_is_overtaken_at_any_instruction_revives_nothing) {
  const SharedMemory memory(bus_bytes(kGeometry));
  format_bus(memory.addr(), memory.nbytes(), kGeometry);
  Meeting hmm(Segment(memory.addr(), memory.nbytes()), -1);
  uint32_t generation = 0;
  const auto publish = [&](bool is_running) {
    ++generation;
    hmm.set_membership(generation, generation % 61, is_running, generation);
  };
  bool was_overtaken = true;
  for (uint64_t goal = 0; was_overtaken; ++goal) {
    publish(true);
    const uint32_t stale = generation + 1;
    hmm.stage_membership(stale, stale % 61, stale);
    TracedProcess flipper([&] { (void)hmm.flip(stale); });
    if (!flipper.is_traceable()) {
      std::printf("      skipped: this machine forbids tracing\n");
      return;
    }
    uint64_t done = 0;
    while (done < goal && flipper.step()) ++done;
    was_overtaken = done == goal;
    // As often as it takes to fill every entry again, and another one staged.
    generation = hmm.membership().generation;
    for (const bool is_running : {false, true, false, true}) publish(is_running);
    const uint32_t fresh = generation + 1;
    hmm.stage_membership(fresh, fresh % 61, fresh);
    while (was_overtaken && flipper.step()) ++done;
    CHECK(hmm.membership().generation == generation && hmm.membership().epoch == generation);
    CHECK(hmm.staged().generation == fresh && hmm.staged().members == fresh % 61 && hmm.staged().epoch == fresh);
  }
}
