// What the ranks of one replica do together: sums and rows that all of them get, and the plan that its leader makes.
//
// A collective is one meeting in the replica's lane. Each rank writes what it brings to one of its two halves, meets,
// and reads those of all. Which half: by the parity of the meeting's count, which all have in common. Why two are
// enough: who writes a half again, two meetings later, has passed the meeting between, at which all arrived after their
// last read. Across an abort, as in the exchange (exchange.h): everybody begins the next generation with an arrival, in
// the other lane, which follows all its reads and writes of the old one; and nobody gives out what it read before it
// has asked whether the generation is still current.
//
// A leader writes its plan before it arrives at a step, and the others read it after that, if the step is computed. It
// writes the next one after it has passed a collective of this step, at which all arrived after they had read.
//
// Sums run by the ranks' order in the replica, so that all have the same bits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bus/meeting.h"

namespace elasticmoe::bus {

// For one thread at a time, that of `meeting`, which is of the replica's lane.
class Collectives {
 public:
  explicit Collectives(Meeting& meeting);

  // The slots of the replica's ranks in their order; the own one is among them. Between two collectives only.
  void set_replica(std::vector<uint32_t> slots);
  uint32_t size() const { return static_cast<uint32_t>(slots_.size()); }

  // out [n, width] = the rows that ranks have of their own, each from its rank, plus x [n, width] of all ranks. `rows`
  // [n, width]: rank t of N has those from n t / N to n (t + 1) / N; null where nobody has any. `x`: null where nobody
  // brings some. Both may be `out`. `interrupted` and `timeout` may be followed by the same call.
  Outcome reduce(uint32_t generation, const float* x, const float* rows, float* out, uint32_t n, uint32_t width,
                 int64_t deadline_ns);
  // out [n, total] = x of all ranks side by side; rank t of N has the columns from total t / N to total (t + 1) / N, in
  // `x` [n, those]. Null `out`: the own ones are wanted elsewhere.
  Outcome gather(uint32_t generation, const float* x, float* out, uint32_t n, uint32_t total, int64_t deadline_ns);

  void write_plan(const void* data, uint64_t nbytes);
  // Of the replica's first rank, as it was said before the last step.
  Outcome read_plan(uint32_t generation, std::string& out) const;

 private:
  struct Span {
    uint64_t begin;
    uint64_t end;
  };
  Span share(uint64_t count, uint32_t rank) const { return {count * rank / size(), count * (rank + 1) / size()}; }
  uint32_t own_rank() const;
  void check_elements(uint64_t num_elements) const;

  Meeting& meeting_;
  const Segment& segment_;
  std::vector<uint32_t> slots_;
};

}  // namespace elasticmoe::bus
