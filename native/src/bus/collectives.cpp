#include "bus/collectives.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "bus/kernels.h"
#include "core/checked.h"

namespace elasticmoe::bus {
namespace {

constexpr uint64_t kHasX = uint64_t{1} << 63;
constexpr uint64_t kHasRows = uint64_t{1} << 62;

}  // namespace

Collectives::Collectives(Meeting& meeting) : meeting_(meeting), segment_(meeting.segment()) {}

void Collectives::set_replica(std::vector<uint32_t> slots) {
  uint64_t mask = 0;
  for (const uint32_t slot : slots) {
    require(slot < segment_.geometry().max_ranks, "a slot of the replica must be below the bus's max_ranks");
    require((mask >> slot & 1) == 0, "a replica has a slot twice");
    mask |= uint64_t{1} << slot;
  }
  meeting_.set_replica(mask);
  slots_ = std::move(slots);
}

uint32_t Collectives::own_rank() const {
  require(!slots_.empty(), "the replica's ranks have not been told");
  return static_cast<uint32_t>(std::find(slots_.begin(), slots_.end(), meeting_.slot()) - slots_.begin());
}

void Collectives::check_elements(uint64_t num_elements) const {
  if (num_elements > segment_.geometry().half_elements) {
    invalid("a collective of " + std::to_string(num_elements) + " elements; the bus has room for " +
            std::to_string(segment_.geometry().half_elements));
  }
}

Outcome Collectives::reduce(uint32_t generation, const float* x, const float* rows, float* out, uint32_t n,
                            uint32_t width, int64_t deadline_ns) {
  const uint32_t me = own_rank();
  const uint64_t count = uint64_t{n} * width;
  check_elements(checked_mul(count, (x != nullptr) + (rows != nullptr)));
  const uint64_t rows_at = x != nullptr ? count : 0;  // within a half
  if (!meeting_.is_under_way(generation, Kind::reduce)) {
    if (const Outcome outcome = meeting_.check_current(generation); outcome != Outcome::done) return outcome;
    float* half = segment_.half(meeting_.slot(), meeting_.next_count(generation) & 1);
    // Orders these plain writes behind the look at membership that allowed them.
    std::atomic_thread_fence(std::memory_order_release);
    if (x != nullptr && count != 0) std::memcpy(half, x, count * sizeof(float));
    const Span own = share(n, me);
    if (rows != nullptr && own.end != own.begin) {
      std::memcpy(half + rows_at + own.begin * width, rows + own.begin * width,
                  (own.end - own.begin) * width * sizeof(float));
    }
    const uint64_t payload = (x != nullptr ? kHasX : 0) | (rows != nullptr ? kHasRows : 0) | uint64_t{n} << 31 | width;
    if (const Outcome outcome = meeting_.arrive(generation, Kind::reduce, payload); outcome != Outcome::done) {
      return outcome;
    }
  }
  if (const Outcome outcome = meeting_.wait(deadline_ns); outcome != Outcome::done) return outcome;
  const uint32_t which = meeting_.count() & 1;
  const float* parts[1 + kMaxRanks];
  float ones[1 + kMaxRanks];
  std::fill(std::begin(ones), std::end(ones), 1.0F);
  for (uint32_t owner = 0; owner < size(); ++owner) {
    const Span span = rows != nullptr ? share(n, owner) : Span{0, owner == 0 ? n : uint64_t{0}};
    for (uint64_t row = span.begin; row < span.end; ++row) {
      size_t num_parts = 0;
      if (rows != nullptr) parts[num_parts++] = segment_.half(slots_[owner], which) + rows_at + row * width;
      for (uint32_t rank = 0; x != nullptr && rank < size(); ++rank) {
        parts[num_parts++] = segment_.half(slots_[rank], which) + row * width;
      }
      weighted_sum(out + row * width, parts, ones, num_parts, width);
    }
  }
  return meeting_.is_current(generation) ? Outcome::done : Outcome::aborted;
}

Outcome Collectives::gather(uint32_t generation, const float* x, float* out, uint32_t n, uint32_t total,
                            int64_t deadline_ns) {
  const uint32_t me = own_rank();
  const auto width_of = [&](uint32_t rank) {
    const Span span = share(total, rank);
    return span.end - span.begin;
  };
  check_elements(checked_mul(n, width_of(size() - 1)));  // the last share is never smaller than another
  if (!meeting_.is_under_way(generation, Kind::gather)) {
    if (const Outcome outcome = meeting_.check_current(generation); outcome != Outcome::done) return outcome;
    float* half = segment_.half(meeting_.slot(), meeting_.next_count(generation) & 1);
    std::atomic_thread_fence(std::memory_order_release);
    if (const uint64_t count = n * width_of(me); count != 0) std::memcpy(half, x, count * sizeof(float));
    const Outcome outcome = meeting_.arrive(generation, Kind::gather, uint64_t{n} << 32 | total);
    if (outcome != Outcome::done) return outcome;
  }
  if (const Outcome outcome = meeting_.wait(deadline_ns); outcome != Outcome::done) return outcome;
  const uint32_t which = meeting_.count() & 1;
  for (uint32_t rank = 0; out != nullptr && rank < size(); ++rank) {
    const float* half = segment_.half(slots_[rank], which);
    const uint64_t width = width_of(rank);
    for (uint64_t row = 0; row < n && width != 0; ++row) {
      std::memcpy(out + row * total + share(total, rank).begin, half + row * width, width * sizeof(float));
    }
  }
  return meeting_.is_current(generation) ? Outcome::done : Outcome::aborted;
}

void Collectives::write_plan(const void* data, uint64_t nbytes) {
  if (nbytes > segment_.geometry().plan_bytes) {
    invalid("a plan of " + std::to_string(nbytes) + " bytes; the bus has room for " +
            std::to_string(segment_.geometry().plan_bytes));
  }
  std::atomic_thread_fence(std::memory_order_release);
  if (nbytes != 0) std::memcpy(segment_.plan(meeting_.slot()), data, nbytes);
  segment_.mailbox(meeting_.slot()).plan_nbytes.store(static_cast<uint32_t>(nbytes), std::memory_order_release);
}

Outcome Collectives::read_plan(uint32_t generation, std::string& out) const {
  require(!slots_.empty(), "the replica's ranks have not been told");
  const uint32_t leader = slots_.front();
  const uint64_t nbytes =
      std::min(segment_.mailbox(leader).plan_nbytes.load(std::memory_order_acquire), segment_.geometry().plan_bytes);
  out.assign(reinterpret_cast<const char*>(segment_.plan(leader)), nbytes);
  return meeting_.is_current(generation) ? Outcome::done : Outcome::aborted;
}

}  // namespace elasticmoe::bus
