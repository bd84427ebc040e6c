"""The deployment's figures over time, kept for who looks at them: each second for a quarter of an hour, means of 15
seconds for a day, and coarser means, which are few. In memory alone, and of a size that is taken at the start.

The scaler's loop adds rows, the admin listener reads them.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Mapping, Sequence

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.scaler.api import views
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot, wanted_replicas
from elasticmoe.services.scaler.policy.figures import Missing, Unknown

STEPS_S: Mapping[int, int] = {1: 900, 15: 5_760, 60: 240, 360: 240}
"""By seconds from one row to the next, how many rows are kept. The last two are 4 hours and a day for a page, whose
charts are some hundred pixels wide."""
ROWS_MAX = 1_000
"""Of one answer."""
STALE_S = 5.0  # a load that was seen before is none of this second
DIGITS = 4

_NAMES = tuple(name for name in views.SeriesColumns.__struct_fields__ if name != "at")
Row = Sequence[float | None]


def row_of(snapshot: StatusSnapshot, now: float) -> Row:
    """What a snapshot tells, in the order of SeriesColumns without `at`. `now`: by the clock of its signals."""
    layout, signals, throughput = snapshot.layout, snapshot.signals, snapshot.throughput
    found: dict[str, object] = {"serving": snapshot.phase == "serving"}
    if layout is not None:
        found |= {"replicas": layout.dp, "target": wanted_replicas(snapshot, layout)}
    if signals is not None and throughput is not None and now - signals.at_s < STALE_S:
        found |= {
            "running": signals.running,
            "queued": signals.queued,
            "requests_per_s": signals.admitted_per_s,
            "refused_per_s": signals.refused_per_s,
            "generated_per_s": throughput.generated_per_s,
            "prompt_per_s": throughput.prompt_per_s,
            "ttft_s": signals.ttft_s,
            "itl_s": signals.itl_s,
            "step_s": signals.step_s,
            "attainment": signals.attainment,
            "kv_share": signals.kv_share_most,
        }
        if snapshot.saturation is not None:
            found |= {f"{name}_saturation": value for name, value in snapshot.saturation.parts.items()}
    return [_number(found.get(name)) for name in _NAMES]


def _number(value: object) -> float | None:
    if value is None or isinstance(value, Missing | Unknown):
        return None
    assert isinstance(value, int | float)
    return float(f"{value:.{DIGITS}g}")


class _Ring:
    """The last rows, numbered from 1. NaN: not known."""

    def __init__(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self.num = 0  # that there ever were
        self._at = array("q", bytes(8 * rows_max))
        self._columns = [array("d", bytes(8 * rows_max)) for _ in _NAMES]

    def add(self, at: int, row: Row) -> None:
        place = self.num % self.rows_max
        self._at[place] = at
        for column, value in zip(self._columns, row, strict=True):
            column[place] = math.nan if value is None else value
        self.num += 1

    def read(self, first: int, last: int) -> views.SeriesColumns:
        """Rows from number `first` to `last`, which are kept."""
        places = [number % self.rows_max for number in range(first - 1, last)]
        columns = [[_told(column[place]) for place in places] for column in self._columns]
        return views.SeriesColumns([self._at[place] for place in places], *columns)


def _told(value: float) -> float | None:
    """Whole numbers are told as such, which is shorter."""
    if value != value:
        return None
    return int(value) if value.is_integer() else value


class _Mean:
    """Of the rows since the last one that was taken."""

    def __init__(self) -> None:
        self._sums, self._nums = [0.0] * len(_NAMES), [0] * len(_NAMES)

    def add(self, row: Row) -> None:
        for n, value in enumerate(row):
            if value is not None:
                self._sums[n] += value
                self._nums[n] += 1

    def take(self) -> Row:
        row = [_number(total / num) if num else None for total, num in zip(self._sums, self._nums, strict=True)]
        self._sums, self._nums = [0.0] * len(_NAMES), [0] * len(_NAMES)
        return row


class Series:
    """Rows of both steps. `origin`: names this process; places in another one's rows mean nothing here."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self._lock = threading.Lock()
        self._rings = {step: _Ring(rows) for step, rows in STEPS_S.items()}
        self._means = {step: _Mean() for step in STEPS_S if step > 1}
        self._due_at = -math.inf
        self._span: dict[int, int] = {}  # by step, the one that its mean is of

    def note(self, snapshot: StatusSnapshot, now: float, now_unix: float) -> None:
        """Add what is seen, once a second; other calls cost nothing. `now`: of a monotonic clock. The loop's thread."""
        if now < self._due_at:
            return
        self._due_at = (self._due_at if now < self._due_at + 1.0 else now) + 1.0
        row = row_of(snapshot, now)
        with self._lock:
            self._rings[1].add(int(now_unix), row)
            for step, mean in self._means.items():
                span = int(now / step)
                if self._span.setdefault(step, span) != span:
                    self._rings[step].add(int(now_unix), mean.take())
                    self._span[step] = span
                mean.add(row)

    def read(self, step_s: int, since: str) -> views.SeriesView:
        """Rows after the place `since`, which an earlier answer named; of an empty one, or of one that is not known
        here any more, all that are kept. At most ROWS_MAX, the oldest first. Any thread."""
        ring = self._rings[step_s]
        with self._lock:
            last = self._number_of(since, ring, step_s)
            oldest = max(1, ring.num - ring.rows_max + 1)
            is_whole = last is None or last + 1 < oldest
            first = oldest if last is None or is_whole else last + 1
            end = min(ring.num, first + ROWS_MAX - 1)
            return views.SeriesView(
                cursor=f"{self.origin}.{step_s}.{end}",
                step_s=step_s,
                is_whole=is_whole,
                is_more=end < ring.num,
                columns=ring.read(first, end),
            )

    def _number_of(self, since: str, ring: _Ring, step_s: int) -> int | None:
        origin, _, place = since.rpartition(f".{step_s}.")
        if origin != self.origin or not place.isascii() or not place.isdigit() or len(place) > 18:
            return None
        return min(int(place), ring.num)


def step_of(text: str) -> int:
    """The query's `step_s`. Raises InvalidRequest."""
    steps = {str(step): step for step in STEPS_S}
    if text not in steps:
        raise InvalidRequest(f"step_s is {text[:20]!r}; rows are kept every {' and every '.join(steps)} s")
    return steps[text]
