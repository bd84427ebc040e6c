// The monotonic clock, and deadlines on it.
#pragma once

#include <time.h>

#include <cmath>
#include <cstdint>

#include "core/checked.h"

namespace elasticmoe {

inline constexpr int64_t kNsPerSecond = 1'000'000'000;
inline constexpr int64_t kNever = INT64_MAX;

inline int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * kNsPerSecond + now.tv_nsec;
}

// Deadline `deadline_ms` milliseconds from now. Infinity and anything beyond a century mean never.
inline int64_t deadline_from_ms(double deadline_ms) {
  require(!std::isnan(deadline_ms) && deadline_ms >= 0, "deadline_ms must be a number, zero or greater");
  constexpr double kCenturyMs = 100.0 * 366 * 24 * 3600 * 1000;
  if (deadline_ms > kCenturyMs) return kNever;
  return now_ns() + static_cast<int64_t>(deadline_ms * 1e6);
}

}  // namespace elasticmoe
