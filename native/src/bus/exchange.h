// Token exchange of one MoE layer over one-sided mailboxes: dispatch (barrier D), experts, combine (barrier C).
//
// Each rank has two areas in the segment: its *mailbox* (ids and x of its tokens), written by itself and read by all,
// and its *returned rows*, one for each (token, choice), each written by the one owner of that expert and read by the
// rank. Both are single-buffered. Why two barriers per layer are enough:
//
//   Mailbox of i. Written by i before it arrives at D; read by others between D and their arrival at C. i writes it
//   again in the next layer, after it has passed C, hence after all have arrived at C, hence after the last read.
//   Returned rows of s. Written by owners before they arrive at C; read by s between C and its arrival at the next
//   barrier, D' (or a step's). Owners write them again after they have passed D', hence after s has arrived there,
//   hence after the last read. Across an abort. Everybody begins the next generation with an arrival, which follows all
//   its reads and writes of the old one. So nobody who passes the first barrier of the new generation meets late writes
//   of a member. A late *reader* may see a mailbox that is being overwritten: it checks every number that it reads, and
//   asks whether its generation is still current before it gives out what it read. A process that is no member any more
//   must have left or died before the new generation runs (bus.pyi).
//
// Rows come back one for each choice, not summed by owner, and are weighted and added at home in the order of the
// choices: the result then does not depend on which rank owns which expert, so scaling does not change it by a bit.
// Rows whose owner is the token's own rank never pass through the segment.
//
// Where ranks compute on devices with memory of their own, rows travel between those: `plan` and `meet_combined` are
// the same two barriers with ids and counts alone, and tell each rank which rows to fetch and where to put its answers.
// The answers of one owner lie together then, so that they are one copy: in the returned rows of s, those of the lowest
// slot first, each owner's by (token, choice). Everybody works that out from the ids of s, which all have read.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "bus/meeting.h"

namespace elasticmoe::bus {

inline constexpr uint32_t kMaxExperts = 1U << 16;
inline constexpr int32_t kNoOwner = -1;

// Owner slot by expert id, of one layer. Immutable.
class Routing {
 public:
  explicit Routing(std::vector<int32_t> owners);
  uint32_t num_experts() const { return static_cast<uint32_t>(owners_.size()); }
  const std::vector<int32_t>& owners() const { return owners_; }
  // Hash of the table: members compare it at each meeting, as tables that differ would lose rows silently.
  uint64_t digest() const { return digest_; }

 private:
  std::vector<int32_t> owners_;
  uint64_t digest_;
};

// For one thread at a time. Buffers belong to the caller; their shapes are in bus.pyi.
class Exchange {
 public:
  explicit Exchange(Meeting& meeting);

  struct Tokens {
    const float* x;
    const int32_t* ids;
    const float* weights;
    uint32_t num_tokens;
  };
  struct Rows {
    float* rows;
    uint64_t rows_cap;
    int32_t* counts;
  };

  // What a member has brought to a dispatch: rows of its tokens for own experts, and where in the rows that are
  // returned to it the answers to those begin.
  struct Share {
    uint32_t slot;
    uint32_t num_tokens;
    uint64_t num_rows;
    uint64_t returned_at;
  };
  // Of a dispatch whose rows travel elsewhere. All indices are of rows. The tokens of all members lie one after the
  // other, by slot: `fetched` has for each row for an own expert the token that it is of. `answered` has the rows in
  // the order in which their answers are returned, member by member. `returned` has for each own choice where its
  // answer is among the rows that are returned here; -1 where it is unused.
  struct Plan {
    int64_t* fetched;
    int64_t* answered;
    uint64_t rows_cap;
    int64_t* returned;
    int32_t* counts;
  };

  // `interrupted` and `timeout` may be followed by the same call, which goes on.
  Outcome dispatch(const Routing& routing, uint32_t generation, const Tokens& tokens, const Rows& out,
                   int64_t deadline_ns, uint64_t& num_rows);
  Outcome combine(const Routing& routing, uint32_t generation, const float* y, float* out, uint32_t num_tokens,
                  int64_t deadline_ns);
  // `dispatch` without rows. `shares`: of every member, by slot.
  Outcome plan(const Routing& routing, uint32_t generation, const int32_t* ids, uint32_t num_tokens, const Plan& out,
               int64_t deadline_ns, std::vector<Share>& shares);
  // `combine` without rows: all answers to the last plan have been returned once it is done.
  Outcome meet_combined(const Routing& routing, uint32_t generation, uint32_t num_tokens, int64_t deadline_ns);

 private:
  // A row for one of the own experts: where it came from and where its answer goes.
  struct Row {
    uint32_t source;
    uint32_t pair;  // token * top_k + choice
    uint32_t expert;
  };

  Outcome collect(const Routing& routing, uint32_t generation, const Tokens& tokens, uint64_t rows_cap,
                  int64_t deadline_ns);
  void finish(const Routing& routing, uint32_t generation, uint32_t num_tokens);
  Outcome arrive_combined(const Routing& routing, uint32_t generation, uint32_t num_tokens, const float* y);
  void sort_rows(uint32_t num_experts, int32_t* counts);
  void share_rows(const Routing& routing, const Tokens& tokens, const Plan& out, std::vector<Share>& shares) const;
  const int32_t* ids_of(uint32_t source) const;
  void check_ids(const Routing& routing, const Tokens& tokens, uint64_t members) const;
  void publish(const Routing& routing, const Tokens& tokens, uint64_t members);
  bool find_rows(const Routing& routing, const Tokens& tokens);
  bool find_rows_of(const Routing& routing, uint32_t source, const int32_t* ids, uint32_t num_tokens);
  void gather(const Tokens& tokens, const Rows& out);
  void return_rows(const float* y);
  void sum_rows(const float* y, float* out) const;

  Meeting& meeting_;
  const Segment& segment_;
  const uint32_t top_k_;
  const uint32_t hidden_;

  // Of the layer between dispatch and combine.
  std::vector<Row> found_;          // by source, then pair
  std::vector<Row> rows_;           // in row order
  std::vector<uint64_t> places_;    // of what was found: its row
  std::vector<uint64_t> next_row_;  // by expert, while sorting
  std::vector<int32_t> own_ids_;
  std::vector<float> own_weights_;
  std::vector<int64_t> local_row_;  // by own pair: the row in y, or -1 where another rank answers
  bool is_dispatched_ = false;
  uint64_t dispatched_digest_ = 0;
  uint32_t dispatched_tokens_ = 0;
  uint32_t dispatched_generation_ = 0;
};

}  // namespace elasticmoe::bus
