"""Percentiles of any number of values in bounded memory. Pure."""

from __future__ import annotations

import math

_LEAST = 1e-6
_GROWTH = 1.01
_LOG_GROWTH = math.log(_GROWTH)


class Histogram:
    """Counts of values of 0 and more in buckets 1 % wide, so that a percentile is right to 1 %; what is below 1e-6
    counts as that. The largest value, the sum and the number are exact."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.num = 0
        self.total = 0.0
        self.largest = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        bucket = 0 if value <= _LEAST else math.ceil(math.log(value / _LEAST) / _LOG_GROWTH)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.num += 1
        self.total += value
        self.largest = max(self.largest, value)

    def percentile(self, percent: float) -> float | None:
        """The nearest-rank percentile; None without a value."""
        if not self.num:
            return None
        wanted, seen = max(1, math.ceil(self.num * percent / 100)), 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                break
        return min(self.largest, _LEAST * _GROWTH**bucket)

    @property
    def mean(self) -> float | None:
        """None without a value."""
        return self.total / self.num if self.num else None
