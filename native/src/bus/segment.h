// Layout of the bus segment, and its checked opening.
//
//   Header | Membership | Wakeup | Slot[max_ranks] | for each rank, page-aligned: Mailbox, ids, x, returned rows, its
//   two halves and its plan, where replicas have several ranks
//
// Whatever several processes touch is a lock-free atomic in a cache line of its writer, except for the bulk arrays of
// the exchange, which barriers order (exchange.h).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace elasticmoe::bus {

inline constexpr uint32_t kMaxRanks = 64;
inline constexpr uint32_t kMaxTopK = 256;
inline constexpr uint64_t kMagic = 0x31535542454F4D45;  // "EMOEBUS1"
inline constexpr uint32_t kVersion = 6;
inline constexpr size_t kLine = 64;
inline constexpr uint32_t kNumEntries = 4;

struct Geometry {
  uint32_t max_ranks;
  uint32_t max_tokens;
  uint32_t hidden;
  uint32_t top_k;
  uint32_t half_elements = 0;  // floats of a rank in one collective of its replica; 0 where replicas are single ranks
  uint32_t plan_bytes = 0;     // the longest plan of a leader

  bool operator==(const Geometry&) const = default;
};

struct alignas(kLine) Header {
  std::atomic<uint64_t> magic;  // written last
  uint32_t version;
  Geometry geometry;
  uint64_t nbytes;
};

// What one membership word refers to.
struct MembershipEntry {
  std::atomic<uint64_t> members;
  std::atomic<uint64_t> epoch;
  std::atomic<uint64_t> base;  // the value of `current` that a staged publication replaces
};

// Both words are generation << 32 | index << 1 | running, where index says which entry belongs to the word. The HMM
// alone fills entries and writes `staged`. It fills an entry that neither word refers to and then writes the word, so a
// writer killed half-way leaves both publications whole (an odd seqlock would leave readers spinning).
//
// `current` is swung by compare-exchange: by the HMM from whatever is current to a greater generation, and by any rank
// from the base of the staged publication to `staged`, word for word. No value of either word ever returns, as the
// generations of each only grow. So
//   - whatever the HMM publishes makes a staged publication void in the same instant, as its base is gone;
//   - a rank that has read `staged` and falls asleep can still swing `current` only while its base is current. As long
//     as it is, the HMM writes neither `staged` nor that entry: what is staged is replaced by publishing, not by
//     staging again.
struct alignas(kLine) Membership {
  std::atomic<uint64_t> current;
  std::atomic<uint64_t> staged;  // 0: none yet
  MembershipEntry entries[kNumEntries];
};

// All sleepers of the bus sleep on one word. The counters say whether a waker must call the kernel; one leaked by a
// killed sleeper costs needless wake-ups and nothing else.
struct alignas(kLine) Wakeup {
  std::atomic<uint32_t> word;
  std::atomic<uint32_t> num_sleepers;
  std::atomic<uint32_t> num_idlers;
};

// What a rank says at one meeting. Two of them by the parity of the count: the next meeting's is written while slow
// members still read this one's; the one after that cannot begin before they have arrived at the next, and so have
// read.
struct Publication {
  std::atomic<uint64_t> payload;
  std::atomic<uint32_t> kind;
};

// Meetings of all members, and those of the ranks of one replica, are counted apart: each has its own order.
enum class Lane : uint32_t { members, replica };
inline constexpr uint32_t kNumLanes = 2;

// `arrived` is generation << 32 | count of the meetings that the rank arrived at in that generation.
struct alignas(kLine) Arrivals {
  std::atomic<uint64_t> arrived;
  Publication published[2];
};

struct Slot {
  Arrivals lanes[kNumLanes];
  alignas(kLine) std::atomic<uint64_t> incarnation;
  std::atomic<uint64_t> progress;
  std::atomic<uint64_t> num_steps;
  std::atomic<uint32_t> is_waiting_for_device;
  std::atomic<uint32_t> kv_blocks;  // see Bus.set_kv_blocks; outlives the incarnation, as KV does
  std::atomic<uint64_t> shortage;   // of the last step that the rank ended a generation for, for want of memory

  Arrivals& lane(Lane which) { return lanes[static_cast<uint32_t>(which)]; }
};

struct alignas(kLine) Mailbox {
  std::atomic<uint32_t> num_tokens;
  std::atomic<uint32_t> plan_nbytes;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);
static_assert(sizeof(Header) == kLine && sizeof(Membership) == 2 * kLine && sizeof(Wakeup) == kLine);
static_assert(sizeof(Slot) == (1 + kNumLanes) * kLine && alignof(Slot) == kLine && sizeof(Mailbox) == kLine);

uint64_t bus_bytes(const Geometry& geometry);
void format_bus(uint64_t addr, uint64_t nbytes, const Geometry& geometry);

// Pointers into an opened segment, which the caller keeps mapped. Every offset was checked against the segment's size.
class Segment {
 public:
  Segment(uint64_t addr, uint64_t nbytes);

  const Geometry& geometry() const { return geometry_; }
  Membership& membership() const { return *membership_; }
  Wakeup& wakeup() const { return *wakeup_; }
  Slot& slot(uint32_t index) const { return slots_[index]; }

  Mailbox& mailbox(uint32_t rank) const { return *reinterpret_cast<Mailbox*>(area(rank)); }
  // int32 [max_tokens, top_k] expert ids of the rank's tokens.
  int32_t* ids(uint32_t rank) const { return reinterpret_cast<int32_t*>(area(rank) + ids_offset_); }
  // float32 [max_tokens, hidden] rows of the rank's tokens.
  float* x(uint32_t rank) const { return reinterpret_cast<float*>(area(rank) + x_offset_); }
  // float32 [max_tokens, top_k, hidden] what the owners of the rank's experts answer, one row for each choice of a
  // token.
  float* returned(uint32_t rank) const { return reinterpret_cast<float*>(area(rank) + returned_offset_); }
  // float32 [half_elements]: what the rank brings to a collective of its replica; two of them, used in turns.
  float* half(uint32_t rank, uint32_t which) const {
    return reinterpret_cast<float*>(area(rank) + halves_offset_) + size_t{which} * geometry_.half_elements;
  }
  // [plan_bytes]: the step plan of a leader.
  std::byte* plan(uint32_t rank) const { return area(rank) + plan_offset_; }

 private:
  std::byte* area(uint32_t rank) const { return areas_ + area_stride_ * rank; }

  Geometry geometry_;
  Membership* membership_;
  Wakeup* wakeup_;
  Slot* slots_;
  std::byte* areas_;
  uint64_t area_stride_;
  uint64_t ids_offset_;
  uint64_t x_offset_;
  uint64_t returned_offset_;
  uint64_t halves_offset_;
  uint64_t plan_offset_;
};

}  // namespace elasticmoe::bus
