#include "bus/exchange.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <utility>

#include "bus/kernels.h"
#include "core/checked.h"
#include "core/xxh64.h"

namespace elasticmoe::bus {

Routing::Routing(std::vector<int32_t> owners)
    : owners_(std::move(owners)), digest_(xxh64(owners_.data(), owners_.size() * sizeof(int32_t))) {
  require_range("number of experts", owners_.size(), 1, kMaxExperts);
  for (const int32_t owner : owners_) {
    require(owner >= kNoOwner && owner < static_cast<int32_t>(kMaxRanks),
            "an expert's owner must be -1 or a slot below 64");
  }
}

Exchange::Exchange(Meeting& meeting)
    : meeting_(meeting),
      segment_(meeting.segment()),
      top_k_(segment_.geometry().top_k),
      hidden_(segment_.geometry().hidden) {}

// Before anybody is told anything: every own choice has an owner who takes part.
void Exchange::check_ids(const Routing& routing, const Tokens& tokens, uint64_t members) const {
  const uint64_t num_pairs = uint64_t{tokens.num_tokens} * top_k_;
  for (uint64_t pair = 0; pair < num_pairs; ++pair) {
    const int32_t expert = tokens.ids[pair];
    if (expert == -1) continue;
    if (expert < -1 || static_cast<uint32_t>(expert) >= routing.num_experts()) {
      invalid("expert id " + std::to_string(expert) + " is out of range, there are " +
              std::to_string(routing.num_experts()) + " experts");
    }
    const int32_t owner = routing.owners()[static_cast<uint32_t>(expert)];
    if (owner == kNoOwner || (members >> owner & 1) == 0) {
      invalid("expert " + std::to_string(expert) + " has no home among the members");
    }
  }
}

void Exchange::publish(const Routing& routing, const Tokens& tokens, uint64_t members) {
  const uint32_t me = meeting_.slot();
  const uint64_t num_pairs = uint64_t{tokens.num_tokens} * top_k_;
  own_ids_.assign(tokens.ids, tokens.ids + num_pairs);
  own_weights_.assign(tokens.weights, tokens.weights + (tokens.weights != nullptr ? num_pairs : 0));
  local_row_.assign(num_pairs, -1);
  // Orders these plain writes behind the look at membership that allowed them.
  std::atomic_thread_fence(std::memory_order_release);
  segment_.mailbox(me).num_tokens.store(tokens.num_tokens, std::memory_order_release);
  if (members == uint64_t{1} << me) return;  // nobody reads it
  if (num_pairs != 0) std::memcpy(segment_.ids(me), tokens.ids, num_pairs * sizeof(int32_t));
  if (tokens.x == nullptr) return;  // rows travel elsewhere
  for (uint32_t token = 0; token < tokens.num_tokens; ++token) {
    bool is_wanted = false;  // by another rank
    for (uint32_t choice = 0; choice < top_k_; ++choice) {
      const int32_t expert = tokens.ids[uint64_t{token} * top_k_ + choice];
      is_wanted |= expert >= 0 && routing.owners()[static_cast<uint32_t>(expert)] != static_cast<int32_t>(me);
    }
    const uint64_t at = uint64_t{token} * hidden_;
    if (is_wanted) std::memcpy(segment_.x(me) + at, tokens.x + at, hidden_ * sizeof(float));
  }
}

// Notes which of a source's choices are own experts. False where the ids make no sense.
bool Exchange::find_rows_of(const Routing& routing, uint32_t source, const int32_t* ids, uint32_t num_tokens) {
  const auto me = static_cast<int32_t>(meeting_.slot());
  const uint32_t num_pairs = num_tokens * top_k_;
  for (uint32_t pair = 0; pair < num_pairs; ++pair) {
    const int32_t expert = ids[pair];
    if (expert == -1) continue;
    if (expert < -1 || static_cast<uint32_t>(expert) >= routing.num_experts()) return false;
    const auto index = static_cast<uint32_t>(expert);
    if (routing.owners()[index] == me) found_.push_back({source, pair, index});
  }
  return true;
}

const int32_t* Exchange::ids_of(uint32_t source) const {
  return source == meeting_.slot() ? own_ids_.data() : segment_.ids(source);
}

bool Exchange::find_rows(const Routing& routing, const Tokens& tokens) {
  const uint32_t me = meeting_.slot();
  found_.clear();
  for (uint64_t left = meeting_.members(); left != 0; left &= left - 1) {
    const auto source = static_cast<uint32_t>(std::countr_zero(left));
    const uint32_t num_tokens =
        source == me ? tokens.num_tokens : segment_.mailbox(source).num_tokens.load(std::memory_order_acquire);
    if (num_tokens > segment_.geometry().max_tokens) return false;
    if (!find_rows_of(routing, source, ids_of(source), num_tokens)) return false;
  }
  return true;
}

// Sorts by expert, keeping the order (source, token) within each. `next_row_[expert]` is then the end of its rows.
void Exchange::sort_rows(uint32_t num_experts, int32_t* counts) {
  const uint32_t me = meeting_.slot();
  std::memset(counts, 0, num_experts * sizeof(int32_t));
  for (const Row& row : found_) ++counts[row.expert];
  next_row_.resize(num_experts);
  uint64_t start = 0;
  for (uint32_t expert = 0; expert < num_experts; ++expert) {
    next_row_[expert] = start;
    start += static_cast<uint64_t>(counts[expert]);
  }
  rows_.resize(found_.size());
  places_.resize(found_.size());
  for (size_t index = 0; index < found_.size(); ++index) {
    const Row& row = found_[index];
    const uint64_t at = next_row_[row.expert]++;
    rows_[at] = row;
    places_[index] = at;
    if (row.source == me) local_row_[row.pair] = static_cast<int64_t>(at);
  }
}

void Exchange::gather(const Tokens& tokens, const Rows& out) {
  const uint32_t me = meeting_.slot();
  for (uint64_t at = 0; at < rows_.size(); ++at) {
    const Row& row = rows_[at];
    const float* x = (row.source == me ? tokens.x : segment_.x(row.source)) + uint64_t{row.pair / top_k_} * hidden_;
    std::memcpy(out.rows + at * hidden_, x, hidden_ * sizeof(float));
  }
}

// The barrier of a dispatch, with ids (and rows, where they travel here) written before it, and `found_` read after it.
Outcome Exchange::collect(const Routing& routing, uint32_t generation, const Tokens& tokens, uint64_t rows_cap,
                          int64_t deadline_ns) {
  require_range("n", tokens.num_tokens, 0, segment_.geometry().max_tokens);
  if (!meeting_.is_under_way(generation, Kind::dispatch)) {
    is_dispatched_ = false;
    if (const Outcome outcome = meeting_.check_current(generation); outcome != Outcome::done) return outcome;
    const MembershipView view = meeting_.membership();
    if (view.generation != generation) return Outcome::aborted;
    check_ids(routing, tokens, view.members);
    publish(routing, tokens, view.members);
    const Outcome outcome = meeting_.arrive(generation, Kind::dispatch, routing.digest());
    if (outcome != Outcome::done) return outcome;
  }
  if (const Outcome outcome = meeting_.wait(deadline_ns); outcome != Outcome::done) return outcome;
  const bool is_sound = find_rows(routing, tokens);
  if (!meeting_.is_current(generation)) return Outcome::aborted;
  if (!is_sound) return Outcome::desync;
  if (found_.size() > rows_cap) {
    invalid("rows_cap is " + std::to_string(rows_cap) + ", there are " + std::to_string(found_.size()) + " rows");
  }
  return Outcome::done;
}

void Exchange::finish(const Routing& routing, uint32_t generation, uint32_t num_tokens) {
  is_dispatched_ = true;
  dispatched_digest_ = routing.digest();
  dispatched_tokens_ = num_tokens;
  dispatched_generation_ = generation;
}

Outcome Exchange::dispatch(const Routing& routing, uint32_t generation, const Tokens& tokens, const Rows& out,
                           int64_t deadline_ns, uint64_t& num_rows) {
  const Outcome outcome = collect(routing, generation, tokens, out.rows_cap, deadline_ns);
  if (outcome != Outcome::done) return outcome;
  sort_rows(routing.num_experts(), out.counts);
  gather(tokens, out);
  if (!meeting_.is_current(generation)) return Outcome::aborted;
  num_rows = rows_.size();
  finish(routing, generation, tokens.num_tokens);
  return Outcome::done;
}

// What everybody has to fetch and to return. Reads the ids of all members once more: where a generation has ended
// meanwhile they may make no sense, which the caller notices.
void Exchange::share_rows(const Routing& routing, const Tokens& tokens, const Plan& out,
                          std::vector<Share>& shares) const {
  const uint32_t me = meeting_.slot();
  uint64_t before[kMaxRanks];  // tokens of the members in lower slots
  uint64_t num_before = 0;
  shares.clear();
  for (uint64_t left = meeting_.members(); left != 0; left &= left - 1) {
    const auto source = static_cast<uint32_t>(std::countr_zero(left));
    const uint32_t num_tokens = source == me
                                    ? tokens.num_tokens
                                    : std::min(segment_.mailbox(source).num_tokens.load(std::memory_order_acquire),
                                               segment_.geometry().max_tokens);
    const uint64_t num_pairs = uint64_t{num_tokens} * top_k_;
    const int32_t* ids = ids_of(source);
    uint64_t next[kMaxRanks] = {};  // by owner: first how many rows it answers, then where its next answer goes
    const auto owner_of = [&](uint64_t pair) {
      const auto expert = static_cast<uint32_t>(ids[pair]);  // unused: beyond all
      return expert < routing.num_experts() ? routing.owners()[expert] : kNoOwner;
    };
    for (uint64_t pair = 0; pair < num_pairs; ++pair) {
      if (const int32_t owner = owner_of(pair); owner >= 0) ++next[owner];
    }
    shares.push_back({source, num_tokens, next[me], 0});
    uint64_t at = 0;
    for (uint64_t& one : next) at += std::exchange(one, at);
    shares.back().returned_at = next[me];
    before[source] = num_before;
    num_before += num_tokens;
    for (uint64_t pair = 0; source == me && pair < num_pairs; ++pair) {
      const int32_t owner = owner_of(pair);
      out.returned[pair] = owner >= 0 ? static_cast<int64_t>(next[owner]++) : -1;
    }
  }
  for (uint64_t at = 0; at < rows_.size(); ++at) {
    out.fetched[at] = static_cast<int64_t>(before[rows_[at].source] + rows_[at].pair / top_k_);
    out.answered[at] = static_cast<int64_t>(places_[at]);
  }
}

Outcome Exchange::plan(const Routing& routing, uint32_t generation, const int32_t* ids, uint32_t num_tokens,
                       const Plan& out, int64_t deadline_ns, std::vector<Share>& shares) {
  const Tokens tokens{nullptr, ids, nullptr, num_tokens};
  const Outcome outcome = collect(routing, generation, tokens, out.rows_cap, deadline_ns);
  if (outcome != Outcome::done) return outcome;
  sort_rows(routing.num_experts(), out.counts);
  share_rows(routing, tokens, out, shares);
  if (!meeting_.is_current(generation)) return Outcome::aborted;
  finish(routing, generation, num_tokens);
  return Outcome::done;
}

void Exchange::return_rows(const float* y) {
  const uint32_t me = meeting_.slot();
  for (uint64_t at = 0; at < rows_.size(); ++at) {
    const Row& row = rows_[at];
    if (row.source == me) continue;
    std::memcpy(segment_.returned(row.source) + uint64_t{row.pair} * hidden_, y + at * hidden_,
                hidden_ * sizeof(float));
  }
}

void Exchange::sum_rows(const float* y, float* out) const {
  const float* returned = segment_.returned(meeting_.slot());
  const float* rows[kMaxTopK];
  float weights[kMaxTopK];
  for (uint32_t token = 0; token < dispatched_tokens_; ++token) {
    size_t num_rows = 0;
    for (uint32_t choice = 0; choice < top_k_; ++choice) {
      const uint64_t pair = uint64_t{token} * top_k_ + choice;
      if (own_ids_[pair] < 0) continue;
      const int64_t local = local_row_[pair];
      rows[num_rows] = local >= 0 ? y + static_cast<uint64_t>(local) * hidden_ : returned + pair * hidden_;
      weights[num_rows++] = own_weights_[pair];
    }
    weighted_sum(out + uint64_t{token} * hidden_, rows, weights, num_rows, hidden_);
  }
}

// The arrival of a combine, with the answers written before it where they travel here.
Outcome Exchange::arrive_combined(const Routing& routing, uint32_t generation, uint32_t num_tokens, const float* y) {
  if (meeting_.is_under_way(generation, Kind::combine)) return Outcome::done;
  if (const Outcome outcome = meeting_.check_current(generation); outcome != Outcome::done) return outcome;
  require(is_dispatched_ && dispatched_generation_ == generation, "combine without a dispatch before it");
  require(dispatched_digest_ == routing.digest(), "combine with another routing than dispatch");
  require(dispatched_tokens_ == num_tokens, "combine with another number of tokens than dispatch");
  std::atomic_thread_fence(std::memory_order_release);
  if (y != nullptr) return_rows(y);
  is_dispatched_ = false;
  return meeting_.arrive(generation, Kind::combine, routing.digest());
}

Outcome Exchange::combine(const Routing& routing, uint32_t generation, const float* y, float* out, uint32_t num_tokens,
                          int64_t deadline_ns) {
  const Outcome arrived = arrive_combined(routing, generation, num_tokens, y);
  if (arrived != Outcome::done) return arrived;
  if (const Outcome outcome = meeting_.wait(deadline_ns); outcome != Outcome::done) return outcome;
  sum_rows(y, out);
  return meeting_.is_current(generation) ? Outcome::done : Outcome::aborted;
}

Outcome Exchange::meet_combined(const Routing& routing, uint32_t generation, uint32_t num_tokens, int64_t deadline_ns) {
  const Outcome arrived = arrive_combined(routing, generation, num_tokens, nullptr);
  return arrived == Outcome::done ? meeting_.wait(deadline_ns) : arrived;
}

}  // namespace elasticmoe::bus
