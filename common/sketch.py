"""How long things took, as counts in fixed geometric buckets: sketches of several processes add up without error. Pure.

All processes share the same SKETCH_BUCKETS buckets. Bucket 0 has what took up to MIN_S, bucket i what took more than
MIN_S·GROWTH^(i-1) and up to MIN_S·GROWTH^i, the last one all above. `value(i)` is off by RELATIVE_ERROR at the most for
anything between MIN_S and MAX_S (the bucket mapping of DDSketch, Masson et al., VLDB 2019, with a fixed range).

On the wire a sketch is sparse: (bucket, count) in ascending order of buckets, counts above zero.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta

from elasticmoe.common.protocol.limits import SKETCH_BUCKETS, WINDOW_COUNT_MAX

MIN_S = 0.001
MAX_S = 1_000.0
RELATIVE_ERROR = 0.05
GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GROWTH = math.log(GROWTH)

Bucket = Annotated[int, Meta(ge=0, lt=SKETCH_BUCKETS)]
BucketCount = Annotated[int, Meta(ge=1, le=WINDOW_COUNT_MAX)]
Counts = Annotated[tuple[tuple[Bucket, BucketCount], ...], Meta(max_length=SKETCH_BUCKETS)]
"""(bucket, count), ascending."""
JointCounts = Annotated[tuple[tuple[Bucket, Bucket, BucketCount], ...], Meta(max_length=SKETCH_BUCKETS**2)]
"""(bucket of the one figure, bucket of the other, count), ascending."""


def index(seconds: float) -> int:
    """The bucket of a time. Raises ValueError for one that is no number."""
    if math.isnan(seconds):
        raise ValueError("a time that is not a number has no bucket")
    if seconds <= MIN_S:
        return 0
    if seconds >= MAX_S:
        return SKETCH_BUCKETS - 1
    return math.ceil(math.log(seconds / MIN_S) / _LOG_GROWTH)


def upper(bucket: int) -> float:
    """The longest time in a bucket, in seconds."""
    return MIN_S * GROWTH**bucket


_VALUES = (MIN_S, *(2 * upper(bucket) / (1 + GROWTH) for bucket in range(1, SKETCH_BUCKETS)))


def value(bucket: int) -> float:
    """The time, in seconds, that stands for a bucket."""
    return _VALUES[bucket]


def total(counts: Counts) -> int:
    """How many times were counted."""
    return sum(count for _, count in counts)


def share_within(counts: JointCounts, first_s: float, second_s: float) -> float | None:
    """The share of which the one figure is up to `first_s` and the other up to `second_s`; None of nothing. What is in
    a bucket of a limit counts as within where the bucket's value is."""
    num = sum(count for _, _, count in counts)
    if num == 0:
        return None
    first, second = bisect_right(_VALUES, first_s), bisect_right(_VALUES, second_s)  # buckets that are within
    return sum(count for a, b, count in counts if a < first and b < second) / num


def merge(sketches: Iterable[Counts]) -> Counts:
    """One sketch of all that several counted."""
    merged: Counter[int] = Counter()
    for counts in sketches:
        for bucket, count in counts:
            merged[bucket] += count
    return tuple(sorted(merged.items()))


def check_ascending(name: str, keys: Iterable[object]) -> None:
    """Verify that buckets of a sketch come in ascending order, each once. Raises ValueError that names the sketch."""
    last: object = None
    for key in keys:
        if last is not None and not last < key:  # type: ignore[operator]
            raise ValueError(f"{name}: bucket {key} comes after {last}")
        last = key


class Sketch:
    """Counts of one figure, added up where they arise. Not thread-safe; bounded by its buckets."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float, num: int = 1) -> None:
        """Count a time `num` times."""
        self._counts[index(seconds)] += num

    def take(self) -> Counts:
        """What was counted since the last call; the counts begin anew."""
        counts = tuple(sorted((bucket, min(num, WINDOW_COUNT_MAX)) for bucket, num in self._counts.items() if num > 0))
        self._counts.clear()
        return counts


class JointSketch:
    """Counts of two figures at once. Not thread-safe; bounded by its buckets."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, int]] = Counter()

    def add(self, first_s: float, second_s: float) -> None:
        """Count a pair of times."""
        self._counts[index(first_s), index(second_s)] += 1

    def take(self) -> JointCounts:
        """What was counted since the last call; the counts begin anew."""
        counts = sorted(self._counts.items())
        self._counts.clear()
        return tuple((first, second, min(num, WINDOW_COUNT_MAX)) for (first, second), num in counts)
