#include "bus/meeting.h"

#include <algorithm>
#include <bit>
#include <string>

#include "core/checked.h"
#include "core/clock.h"
#include "core/futex.h"

namespace elasticmoe::bus {
namespace {

constexpr uint32_t kRunningBit = 1;
constexpr int64_t kDefaultSpinNs = 30'000;

uint32_t generation_of(uint64_t word) {
  return static_cast<uint32_t>(word >> 32);
}
uint32_t count_of(uint64_t word) {
  return static_cast<uint32_t>(word);
}
uint64_t pack(uint32_t generation, uint32_t low) {
  return static_cast<uint64_t>(generation) << 32 | low;
}
uint32_t index_of(uint64_t word) {
  return static_cast<uint32_t>(word >> 1) % kNumEntries;
}

// An entry that neither of two membership words refers to.
uint32_t free_index(uint64_t current, uint64_t staged) {
  uint32_t index = 0;
  while (index == index_of(current) || index == index_of(staged)) ++index;
  return index;
}

void fill(MembershipEntry& entry, uint64_t members, uint64_t epoch, uint64_t base) {
  entry.members.store(members, std::memory_order_seq_cst);
  entry.epoch.store(epoch, std::memory_order_seq_cst);
  entry.base.store(base, std::memory_order_seq_cst);
}

// Calls `visit(slot)` for every member.
template <typename Visit>
void for_each_member(uint64_t members, Visit visit) {
  for (; members != 0; members &= members - 1) visit(static_cast<uint32_t>(std::countr_zero(members)));
}

template <typename Test>
bool every_member(uint64_t members, Test test) {
  for (; members != 0; members &= members - 1) {
    if (!test(static_cast<uint32_t>(std::countr_zero(members)))) return false;
  }
  return true;
}

}  // namespace

Meeting::Meeting(const Segment& segment, int slot, Lane lane) : segment_(segment), slot_(slot), lane_(lane) {
  require(slot >= -1 && slot < static_cast<int>(segment.geometry().max_ranks),
          "slot must be -1 or below the bus's max_ranks");
}

uint32_t Meeting::slot() const {
  require(slot_ >= 0, "an observer has no slot");
  return static_cast<uint32_t>(slot_);
}

void Meeting::set_replica(uint64_t slots) {
  require((slots >> slot() & 1) != 0, "the own slot is not one of the replica's");
  require(!met_.is_pending, "a call that timed out must be ended first");
  replica_ = slots;
}

void Meeting::check_publication(uint64_t generation, uint64_t members, uint64_t current) const {
  const uint32_t max_ranks = segment_.geometry().max_ranks;
  require(max_ranks == 64 || members >> max_ranks == 0, "members has slots beyond max_ranks");
  require_range("generation", generation, 1, UINT32_MAX);
  if (generation <= generation_of(current)) {
    invalid("generation is " + std::to_string(generation) + ", must be greater than the current one, " +
            std::to_string(generation_of(current)));
  }
}

void Meeting::set_membership(uint64_t generation, uint64_t members, bool is_running, uint64_t epoch) {
  Membership& shared = segment_.membership();
  uint64_t before = shared.current.load(std::memory_order_seq_cst);
  uint64_t after = 0;
  do {
    check_publication(generation, members, before);
    const uint32_t index = free_index(before, shared.staged.load(std::memory_order_seq_cst));
    fill(shared.entries[index], members, epoch, 0);
    after = pack(static_cast<uint32_t>(generation), index << 1 | (is_running ? kRunningBit : 0));
    // It fails where a rank has made the staged publication current, once at most.
  } while (!shared.current.compare_exchange_strong(before, after, std::memory_order_seq_cst));
  wake_all();
}

void Meeting::stage_membership(uint64_t generation, uint64_t members, uint64_t epoch) {
  Membership& shared = segment_.membership();
  const uint64_t current = shared.current.load(std::memory_order_seq_cst);
  check_publication(generation, members, current);
  require((current & kRunningBit) != 0, "the current generation is not running: publish instead of staging");
  if (const MembershipView before = staged(); before.generation != 0) {
    if (before.generation == generation && before.members == members && before.epoch == epoch) return;
    invalid("generation " + std::to_string(before.generation) + " is staged already, publish to make it void");
  }
  const uint64_t last = shared.staged.load(std::memory_order_seq_cst);
  if (generation <= generation_of(last)) {
    invalid("generation is " + std::to_string(generation) + ", must be greater than the last one staged, " +
            std::to_string(generation_of(last)));
  }
  // Nothing is staged upon `current`, so nobody else can swing it meanwhile.
  const uint32_t index = free_index(current, last);
  fill(shared.entries[index], members, epoch, current);
  shared.staged.store(pack(static_cast<uint32_t>(generation), index << 1 | kRunningBit), std::memory_order_seq_cst);
}

MembershipView Meeting::membership() const {
  const Membership& shared = segment_.membership();
  uint64_t word = shared.current.load(std::memory_order_seq_cst);
  for (;;) {
    // An entry is rewritten only after `current` has moved on to another one.
    const MembershipEntry& entry = shared.entries[index_of(word)];
    const uint64_t members = entry.members.load(std::memory_order_acquire);
    const uint64_t epoch = entry.epoch.load(std::memory_order_acquire);
    const uint64_t again = shared.current.load(std::memory_order_seq_cst);
    if (again == word) return {generation_of(word), members, epoch, (word & kRunningBit) != 0};
    word = again;
  }
}

MembershipView Meeting::staged() const {
  const Membership& shared = segment_.membership();
  const uint64_t word = shared.staged.load(std::memory_order_seq_cst);
  const MembershipEntry& entry = shared.entries[index_of(word)];
  const uint64_t members = entry.members.load(std::memory_order_acquire);
  const uint64_t epoch = entry.epoch.load(std::memory_order_acquire);
  const uint64_t base = entry.base.load(std::memory_order_acquire);
  const bool is_pending = word != 0 && shared.current.load(std::memory_order_seq_cst) == base;
  if (!is_pending || shared.staged.load(std::memory_order_seq_cst) != word) return {0, 0, 0, false};
  return {generation_of(word), members, epoch, true};
}

bool Meeting::flip(uint32_t generation) {
  Membership& shared = segment_.membership();
  const uint64_t word = shared.staged.load(std::memory_order_seq_cst);
  if (generation != 0 && generation_of(word) == generation) {
    uint64_t base = shared.entries[index_of(word)].base.load(std::memory_order_acquire);
    // An entry is rewritten only after `staged` has moved on to another one.
    if (shared.staged.load(std::memory_order_seq_cst) == word) {
      shared.current.compare_exchange_strong(base, word, std::memory_order_seq_cst);
    }
  }
  if (generation == 0 || generation_of(shared.current.load(std::memory_order_seq_cst)) != generation) return false;
  wake_all();  // also where another did it, who may have been killed before it woke anybody
  return true;
}

bool Meeting::is_current(uint32_t generation) const {
  std::atomic_thread_fence(std::memory_order_acquire);
  const uint64_t word = segment_.membership().current.load(std::memory_order_seq_cst);
  return generation_of(word) == generation && (word & kRunningBit) != 0;
}

void Meeting::join(uint64_t incarnation) {
  require(incarnation != 0, "incarnation must not be zero");
  segment_.slot(slot()).is_waiting_for_device.store(0, std::memory_order_relaxed);  // a predecessor may have died so
  segment_.slot(slot()).incarnation.store(incarnation, std::memory_order_seq_cst);
  follow(incarnation);
}

void Meeting::follow(uint64_t incarnation) {
  incarnation_.store(incarnation, std::memory_order_relaxed);
  last_arrived_ = 0;
  met_ = {};
}

void Meeting::leave() {
  uint64_t own = incarnation_.exchange(0, std::memory_order_relaxed);
  if (own != 0) segment_.slot(slot()).incarnation.compare_exchange_strong(own, 0, std::memory_order_seq_cst);
}

void Meeting::wake(uint32_t num_waiting) {
  if (num_waiting != 0) wake_all();
}

void Meeting::wake_all() {
  segment_.wakeup().word.fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(segment_.wakeup().word);
}

bool Meeting::is_under_way(uint32_t generation, Kind kind) const {
  if (!met_.is_pending || met_.generation != generation) return false;
  require(met_.kind == kind, "another call that timed out must be ended first in this generation");
  return true;
}

Outcome Meeting::check_current(uint32_t generation) const {
  const uint64_t own = incarnation_.load(std::memory_order_relaxed);
  require(own != 0, "the slot has not been joined");
  if (!is_current(generation)) return Outcome::aborted;
  const MembershipView view = membership();
  if (view.generation != generation) return Outcome::aborted;
  require(view.has(slot()), "the own slot is not a member of this generation");
  require(lane_ == Lane::members || (replica_ != 0 && (replica_ & ~view.members) == 0),
          "not all ranks of the replica are members of this generation");
  if (segment_.slot(slot()).incarnation.load(std::memory_order_seq_cst) != own) return Outcome::aborted;
  // Another incarnation has arrived here already: its count is not ours to continue.
  const uint64_t word = arrivals(slot()).arrived.load(std::memory_order_seq_cst);
  const bool is_first = generation_of(word) < generation;
  return is_first || word == last_arrived_ ? Outcome::done : Outcome::aborted;
}

Outcome Meeting::arrive(uint32_t generation, Kind kind, uint64_t payload) {
  if (const Outcome outcome = check_current(generation); outcome != Outcome::done) return outcome;
  Arrivals& mine = arrivals(slot());
  uint64_t before = mine.arrived.load(std::memory_order_seq_cst);
  const uint32_t count = generation_of(before) == generation ? count_of(before) + 1 : 1;
  Publication& publication = mine.published[count & 1];
  publication.payload.store(payload, std::memory_order_release);
  publication.kind.store(static_cast<uint32_t>(kind), std::memory_order_release);
  // A compare-exchange, so that a predecessor that was only asleep cannot undo what its successor did.
  const uint64_t after = pack(generation, count);
  if (!mine.arrived.compare_exchange_strong(before, after, std::memory_order_seq_cst)) return Outcome::aborted;
  last_arrived_ = after;
  met_ = {generation, count, kind, payload, lane_ == Lane::members ? membership().members : replica_, true};
  if (all_arrived()) {
    wake(segment_.wakeup().num_sleepers.load(std::memory_order_seq_cst) |
         segment_.wakeup().num_idlers.load(std::memory_order_seq_cst));
  } else {
    wake(segment_.wakeup().num_idlers.load(std::memory_order_seq_cst));
  }
  return Outcome::done;
}

uint32_t Meeting::next_count(uint32_t generation) const {
  const uint64_t word = arrivals(slot()).arrived.load(std::memory_order_seq_cst);
  return generation_of(word) == generation ? count_of(word) + 1 : 1;
}

bool Meeting::all_arrived() const {
  return every_member(met_.members, [&](uint32_t member) {
    const uint64_t word = arrivals(member).arrived.load(std::memory_order_seq_cst);
    return generation_of(word) == met_.generation && has_reached(count_of(word), met_.count);
  });
}

bool Meeting::do_all_agree() const {
  const bool is_payload_common = met_.kind != Kind::step;
  return every_member(met_.members, [&](uint32_t member) {
    const Publication& publication = arrivals(member).published[met_.count & 1];
    return publication.kind.load(std::memory_order_acquire) == static_cast<uint32_t>(met_.kind) &&
           (!is_payload_common || publication.payload.load(std::memory_order_acquire) == met_.payload);
  });
}

// `members`: all who may want a core meanwhile.
int64_t Meeting::spin_ns(uint64_t members) const {
  const int configured = spin_us.load(std::memory_order_relaxed);
  if (configured >= 0) return static_cast<int64_t>(configured) * 1000;
  return num_cores.load(std::memory_order_relaxed) < std::popcount(members) ? 0 : kDefaultSpinNs;
}

Outcome Meeting::wait(int64_t deadline_ns) {
  const auto conclude = [&] {
    // A publication may have been overwritten if its writer is already in a later generation: that is no desync.
    const bool is_agreed = do_all_agree();
    if (!is_current(met_.generation)) return Outcome::aborted;
    return is_agreed ? Outcome::done : Outcome::desync;
  };
  Outcome outcome = Outcome::interrupted;
  if (all_arrived()) {
    outcome = conclude();
  } else {
    const int64_t start = now_ns();
    outcome = wait_slice(deadline_ns);
    wait_ns_.fetch_add(now_ns() - start, std::memory_order_relaxed);
    if (outcome == Outcome::done) outcome = conclude();
  }
  if (outcome != Outcome::timeout && outcome != Outcome::interrupted) met_.is_pending = false;
  return outcome;
}

// Spins, then sleeps once for kSliceNs or until the deadline.
Outcome Meeting::wait_slice(int64_t deadline_ns) {
  const int64_t start = now_ns();
  const int64_t spin_end = std::min(start + spin_ns(membership().members), deadline_ns);
  while (now_ns() < spin_end) {
    for (int turn = 0; turn < 16; ++turn) {
      if (all_arrived()) return Outcome::done;
      if (!is_current(met_.generation)) return Outcome::aborted;
      cpu_pause();
    }
  }
  const int64_t slice_end = std::min(deadline_ns, start + kSliceNs);
  Wakeup& wakeup = segment_.wakeup();
  bool was_signalled = false;
  for (;;) {
    const uint32_t seen = wakeup.word.load(std::memory_order_seq_cst);
    wakeup.num_sleepers.fetch_add(1, std::memory_order_seq_cst);
    const bool is_aborted = !is_current(met_.generation);
    const bool is_complete = !is_aborted && all_arrived();
    const bool is_over = is_aborted || is_complete || was_signalled || now_ns() >= slice_end;
    if (!is_over) was_signalled = !futex_wait(wakeup.word, seen, slice_end);
    wakeup.num_sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (is_aborted) return Outcome::aborted;
    if (is_complete) return Outcome::done;
    if (is_over) return now_ns() >= deadline_ns ? Outcome::timeout : Outcome::interrupted;
  }
}

Outcome Meeting::meet(uint32_t generation, Kind kind, uint64_t payload, int64_t deadline_ns) {
  if (!is_under_way(generation, kind)) {
    if (const Outcome outcome = arrive(generation, kind, payload); outcome != Outcome::done) return outcome;
  }
  return wait(deadline_ns);
}

Outcome Meeting::step(uint32_t generation, uint32_t num_tokens, uint32_t flags, int64_t deadline_ns,
                      std::vector<StepEntry>& entries) {
  const Outcome outcome = meet(generation, Kind::step, pack(num_tokens, flags), deadline_ns);
  if (outcome != Outcome::done) return outcome;
  entries.clear();
  for_each_member(met_.members, [&](uint32_t member) {
    const Publication& publication = arrivals(member).published[met_.count & 1];
    const uint64_t payload = publication.payload.load(std::memory_order_acquire);
    entries.push_back({member, static_cast<uint32_t>(payload >> 32), static_cast<uint32_t>(payload)});
  });
  if (!is_current(generation)) return Outcome::aborted;
  segment_.slot(slot()).num_steps.fetch_add(1, std::memory_order_relaxed);
  return Outcome::done;
}

bool Meeting::is_peer_ahead(const MembershipView& view, uint32_t own_count) const {
  return !every_member(view.members, [&](uint32_t member) {
    const uint64_t word = arrivals(member).arrived.load(std::memory_order_seq_cst);
    return generation_of(word) != view.generation || has_reached(own_count, count_of(word));
  });
}

Outcome Meeting::idle_wait(uint32_t generation, int64_t deadline_ns) {
  require(!met_.is_pending || met_.generation != generation, "a call that timed out must be ended first");
  const int64_t slice_end = std::min(deadline_ns, now_ns() + kSliceNs);
  Wakeup& wakeup = segment_.wakeup();
  bool was_signalled = false;
  for (;;) {
    const uint32_t seen = wakeup.word.load(std::memory_order_seq_cst);
    if (const Outcome outcome = check_current(generation); outcome != Outcome::done) return outcome;
    const uint64_t word = arrivals(slot()).arrived.load(std::memory_order_seq_cst);
    const uint32_t own_count = generation_of(word) == generation ? count_of(word) : 0;
    wakeup.num_idlers.fetch_add(1, std::memory_order_seq_cst);
    const bool is_wanted = is_peer_ahead(membership(), own_count);
    const bool is_over = is_wanted || was_signalled || now_ns() >= slice_end;
    if (!is_over) was_signalled = !futex_wait(wakeup.word, seen, slice_end);
    wakeup.num_idlers.fetch_sub(1, std::memory_order_seq_cst);
    if (is_wanted) return Outcome::done;
    if (is_over) return now_ns() >= deadline_ns ? Outcome::timeout : Outcome::interrupted;
  }
}

}  // namespace elasticmoe::bus
