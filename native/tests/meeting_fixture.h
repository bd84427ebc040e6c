// What meeting and flip tests share: a bus for threads of one process.
#pragma once

#include "bus/meeting.h"
#include "core/clock.h"
#include "testing.h"

namespace elasticmoe::bus {

constexpr Geometry kGeometry{.max_ranks = 8, .max_tokens = 4, .hidden = 16, .top_k = 2};

struct Fixture {
  testing::SharedMemory memory{bus_bytes(kGeometry)};
  Fixture() { format_bus(memory.addr(), memory.nbytes(), kGeometry); }
  Meeting open(int slot = -1) { return Meeting(Segment(memory.addr(), memory.nbytes()), slot); }
};

inline int64_t in_ms(int64_t ms) {
  return now_ns() + ms * 1'000'000;
}

// Repeats an operation while it is only interrupted.
template <typename Operation>
Outcome finish(Operation operation) {
  Outcome outcome;
  do outcome = operation();
  while (outcome == Outcome::interrupted);
  return outcome;
}

inline Outcome meet(Meeting& meeting, uint32_t generation, int64_t deadline) {
  return finish([&] { return meeting.meet(generation, Kind::combine, 0, deadline); });
}

}  // namespace elasticmoe::bus
