// Membership and the abortable barrier that all meetings of the members go through.
//
// Arrive, then check: each member stores its own arrived word (seq_cst) and then looks at all of them (seq_cst). In the
// one total order of these operations some member's store is the last, and that member sees every other: it is done,
// and wakes whoever sleeps. A sleeper counts itself as asleep (seq_cst) and looks once more before it sleeps; if it
// still misses the last arrival, its count precedes that arrival in the order, so the last arriver sees the count and
// calls the kernel; and the futex word, read before the look, has then changed. No lock and no counter is shared, so a
// process killed at any instruction blocks nobody beyond the next generation: its arrived word is either there or not,
// and a publication of membership wakes everybody without asking the counters. Should a waker die between publishing
// and waking, sleepers look again after kSliceNs by themselves.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "bus/segment.h"

namespace elasticmoe::bus {

struct MembershipView {
  uint32_t generation;
  uint64_t members;
  uint64_t epoch;
  bool is_running;

  bool has(uint32_t slot) const { return (members >> slot & 1) != 0; }
};

struct StepEntry {
  uint32_t slot;
  uint32_t num_tokens;
  uint32_t flags;
};

// How a blocking operation ended. After `interrupted` and `timeout` the arrival stands and the same operation may be
// called again; `interrupted` comes at least every kSliceNs so that the caller can handle signals.
enum class Outcome { done, aborted, timeout, interrupted, desync };

enum class Kind : uint32_t { none, step, dispatch, combine, reduce, gather };

inline constexpr int64_t kSliceNs = 100'000'000;

// One participant's view of membership and meetings. Blocking operations are for one thread at a time, the rest for
// any. Those of the replica's lane are between the ranks that `set_replica` names, who all name the same ones; all else
// is common to both lanes: membership, generations, incarnations and their ends.
class Meeting {
 public:
  static constexpr int kSpinAuto = -1;

  Meeting(const Segment& segment, int slot, Lane lane = Lane::members);

  // The ranks of the own replica, a bit mask of slots: who meets in the replica's lane from now on.
  void set_replica(uint64_t slots);

  // Membership, published by the HMM alone.
  void set_membership(uint64_t generation, uint64_t members, bool is_running, uint64_t epoch = 0);
  MembershipView membership() const;
  // The running membership that may follow the current, running one without the HMM. By the HMM alone.
  void stage_membership(uint64_t generation, uint64_t members, uint64_t epoch);
  // Generation 0 where nothing is staged upon what is current.
  MembershipView staged() const;
  // Makes what is staged current and wakes everybody; true if that generation is current now, whoever did it.
  bool flip(uint32_t generation);

  void join(uint64_t incarnation);
  // To meet in this lane, too, as the incarnation that has joined by another one's Meeting.
  void follow(uint64_t incarnation);
  void leave();

  // Meets the others; `payload` goes to all of them, and must be the same from all but for steps (else
  // `desync`). Blocks until the deadline at most, in slices.
  Outcome meet(uint32_t generation, Kind kind, uint64_t payload, int64_t deadline_ns);
  // Meets, and gives what every member said, by slot.
  Outcome step(uint32_t generation, uint32_t num_tokens, uint32_t flags, int64_t deadline_ns,
               std::vector<StepEntry>& entries);

  // A meeting in two halves, with something to write for the others before the first and to read after the second.
  // `arrive` is left out where a meeting of this kind is under way, which `wait` ends.
  bool is_under_way(uint32_t generation, Kind kind) const;
  // Whether this rank takes part in the generation now: asked before it writes what others read.
  Outcome check_current(uint32_t generation) const;
  Outcome arrive(uint32_t generation, Kind kind, uint64_t payload);
  // The number that the next arrival will have: what is written before it may go where its parity says, as publications
  // do.
  uint32_t next_count(uint32_t generation) const;
  // That of the meeting that was arrived at last.
  uint32_t count() const { return met_.count; }
  Outcome wait(int64_t deadline_ns);
  // The members of the meeting. Whoever acts on what it read from others' areas first asks `is_current`: members of a
  // later generation may already have begun to overwrite.
  uint64_t members() const { return met_.members; }
  bool is_current(uint32_t generation) const;

  // Sleeps without arriving until a peer waits at the next meeting (`done`).
  Outcome idle_wait(uint32_t generation, int64_t deadline_ns);

  const Segment& segment() const { return segment_; }
  uint32_t slot() const;  // throws for an observer
  int slot_or_observer() const { return slot_; }
  int64_t take_wait_ns() { return wait_ns_.exchange(0, std::memory_order_relaxed); }

  // How long a wait for `members` spins before it sleeps: not at all where they have not a core each.
  int64_t spin_ns(uint64_t members) const;

  std::atomic<int> spin_us{kSpinAuto};
  std::atomic<int> num_cores{static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN))};  // that all members share

 private:
  struct Current {
    uint32_t generation = 0;
    uint32_t count = 0;
    Kind kind = Kind::none;
    uint64_t payload = 0;
    uint64_t members = 0;
    bool is_pending = false;
  };

  bool all_arrived() const;
  bool is_peer_ahead(const MembershipView& view, uint32_t own_count) const;
  bool do_all_agree() const;
  void check_publication(uint64_t generation, uint64_t members, uint64_t current) const;
  void wake(uint32_t num_waiting);
  void wake_all();
  Outcome wait_slice(int64_t deadline_ns);

  Arrivals& arrivals(uint32_t slot) const { return segment_.slot(slot).lane(lane_); }

  Segment segment_;
  int slot_;
  Lane lane_;
  uint64_t replica_ = 0;
  std::atomic<uint64_t> incarnation_{0};
  uint64_t last_arrived_ = 0;
  Current met_;
  std::atomic<int64_t> wait_ns_{0};
};

// Whether a count has reached another, where both may have wrapped around.
inline bool has_reached(uint32_t count, uint32_t goal) {
  return static_cast<int32_t>(count - goal) >= 0;
}

}  // namespace elasticmoe::bus
