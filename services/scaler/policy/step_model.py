"""How long a step takes, learned from steps: seconds = a + b·prefill tokens + c·KV tokens + d·sequences. Pure.

Non-negative least squares (Lawson and Hanson, 1974): no sample makes a step shorter by its work. The newest samples are
kept in 4 × 4 buckets of prefill and KV tokens; the oldest of the fullest bucket makes room, so that a long time at one
operating point does not push out what is known of the others. There is one model for each width; a width without one
begins with its neighbour's.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from operator import mul

import msgspec

from elasticmoe.common.protocol.signals import StepSample

SAMPLES = 64
BUCKETS = 4
WARM_UP_STEPS = 20  # after a cutover: caches are cold, and memory is mapped between steps
LEARNED_MAX = SAMPLES // 2  # at once: of hundreds of ranks, more would only push one another out
SAMPLES_MIN = 12  # three for each coefficient


class StepModel(msgspec.Struct, frozen=True):
    """Coefficients in seconds: of a step, of a prefill token, of a token of KV that is read, of a sequence."""

    a: float
    b: float
    c: float
    d: float

    def seconds(self, prefill_tokens: float, kv_tokens: float, sequences: float) -> float:
        """What such a step takes."""
        return self.a + self.b * prefill_tokens + self.c * kv_tokens + self.d * sequences

    def slowed(self, factor: float) -> StepModel:
        """Of one that has so many times less to compute with."""
        return StepModel(self.a * factor, self.b * factor, self.c * factor, self.d * factor)


class Samples:
    """Steps of one width, at most SAMPLES of them. Not thread-safe."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], deque[StepSample]] = {}
        self._most = (1.0, 1.0)
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, sample: StepSample) -> None:
        """Keep a step, but for those of the first WARM_UP_STEPS after a cutover."""
        if not self.is_warm(sample):
            return
        most = (max(self._most[0], sample.prefill_tokens), max(self._most[1], sample.kv_tokens))
        if most != self._most:
            self._most, kept = most, list(itertools.chain.from_iterable(self._buckets.values()))
            self._buckets, self._num = {}, 0
            for one in kept:
                self._put(one)
        self._put(sample)

    @staticmethod
    def is_warm(sample: StepSample) -> bool:
        """Whether a step is one like all that follow."""
        return sample.steps_since_cutover >= WARM_UP_STEPS

    def _put(self, sample: StepSample) -> None:
        """Where there are too many, the oldest of the fullest bucket goes."""
        place = (_part(sample.prefill_tokens, self._most[0]), _part(sample.kv_tokens, self._most[1]))
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = deque()
        bucket.append(sample)
        self._num += 1
        if self._num > SAMPLES:
            max(self._buckets.values(), key=len).popleft()
            self._num -= 1

    def fit(self) -> StepModel | None:
        """The model of what is kept; None of fewer than SAMPLES_MIN steps."""
        samples = list(itertools.chain.from_iterable(self._buckets.values()))
        if len(samples) < SAMPLES_MIN:
            return None
        rows = [(1.0, float(one.prefill_tokens), float(one.kv_tokens), float(one.sequences)) for one in samples]
        return StepModel(*non_negative_least_squares(rows, [one.seconds for one in samples]))


def _part(value: float, most: float) -> int:
    """Which of the BUCKETS equal parts of what was seen."""
    return min(BUCKETS - 1, int(BUCKETS * value / most))


def non_negative_least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[float, ...]:
    """Coefficients >= 0 with the least squared error of `rows` · coefficients against `values`.

    Of few columns: every set of columns that are not 0 is tried, and the best one without a negative coefficient
    taken, which is the optimum as the problem is convex. Where all columns together have no negative one, no other set
    does better.
    """
    width, by_column = len(rows[0]), list(zip(*rows, strict=True))
    raw = [[sum(map(mul, by_column[i], by_column[j])) for j in range(i + 1)] for i in range(width)]
    scale = [math.sqrt(raw[i][i]) or 1.0 for i in range(width)]
    gram = [[raw[max(i, j)][min(i, j)] / (scale[i] * scale[j]) for j in range(width)] for i in range(width)]
    right = [sum(map(mul, column, values)) / by for column, by in zip(by_column, scale, strict=True)]
    whole = _solve(gram, right)
    if whole is not None and min(whole) >= 0.0:
        return tuple(x / by for x, by in zip(whole, scale, strict=True))
    best, least = (0.0,) * width, 0.0  # the error, less what is the same for all
    for size in range(1, width + 1):
        for columns in itertools.combinations(range(width), size):
            found = _solve([[gram[i][j] for j in columns] for i in columns], [right[i] for i in columns])
            if found is None or min(found) < 0.0:
                continue
            error = -sum(x * right[i] for x, i in zip(found, columns, strict=True))
            if error < least - 1e-15:
                least = error
                full = dict(zip(columns, found, strict=True))
                best = tuple(full.get(i, 0.0) / scale[i] for i in range(width))
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gaussian elimination with pivots; None where the columns do not differ."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda j: abs(rows[j][i]))
        if abs(rows[pivot][i]) < 1e-10:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [x - factor * y for x, y in zip(rows[j], rows[i], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (rows[i][size] - sum(rows[i][j] * found[j] for j in range(i + 1, size))) / rows[i][i]
    return found


def nearest(models: Mapping[int, StepModel], width: int) -> int | None:
    """The width whose model a width goes by: its own, or its nearest neighbour's where it has none, the wider one of
    two; None where there are no models."""
    return min(models, key=lambda known: (abs(known - width), -known)) if models else None


class StepModels:
    """What is known of every width that was tried. Not thread-safe."""

    def __init__(self, given: dict[int, StepModel] | None = None) -> None:
        self._samples: dict[int, Samples] = {}
        self._models: dict[int, StepModel] = dict(given or {})

    def learn(self, width: int, steps: Sequence[StepSample]) -> None:
        """Steps of ranks of a deployment of `width` replicas. None of a transition may be among them. Of many, some of
        each rank's."""
        samples = self._samples.setdefault(width, Samples())
        # An odd stride meets other places in the ranks' windows, which tell powers of two.
        for step in steps[:: (1 + len(steps) // LEARNED_MAX) | 1]:
            samples.add(step)
        model = samples.fit()
        if model is not None:
            self._models[width] = model

    @property
    def known(self) -> dict[int, StepModel]:
        """By width."""
        return dict(self._models)

    def of(self, width: int) -> StepModel | None:
        """What a width goes by."""
        known = self.nearest(width)
        return self._models[known] if known is not None else None

    def nearest(self, width: int) -> int | None:
        """See `nearest`."""
        return nearest(self._models, width)
