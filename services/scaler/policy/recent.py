"""The load of the last minutes: what came beyond what the size can do, and what would have come too late with a smaller
one. Pure data and functions.

Both are a fluid's backlog: it grows while more comes than is done, and shrinks while less does. It is there before a
latency tells of it, and the noise of arrivals that a size keeps up with does not gather in it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

EXCESS_S_MAX = 10.0
RECENT_S = 2.0  # of an entry
PLAYED_S = 600.0  # are played again; of what lies further behind, only peaks are kept
PEAKS_MAX = 100
_replace = msgspec.structs.replace


class Excess(msgspec.Struct, frozen=True):
    """What came beyond what a size can do, as seconds of its work. `load`: the last one, in what it can do."""

    seconds: float = 0.0
    load: float = 0.0

    def seen(self, load: float, elapsed_s: float) -> Excess:
        """After `elapsed_s` with `load` times the work that the size can do."""
        return Excess(_gathered(self.seconds, load, elapsed_s), load)

    def is_too_much(self, after_s: float) -> bool:
        """Whether the size is too small: after `after_s` of excess; the more comes in a second, the sooner."""
        return _is_too_much(self.seconds, self.load, after_s)


def _gathered(seconds: float, load: float, elapsed_s: float) -> float:
    return min(EXCESS_S_MAX, max(0.0, seconds + (load - 1.0) * elapsed_s))


def _is_too_much(seconds: float, load: float, after_s: float) -> bool:
    return seconds > 0.0 and seconds * max(1.0, load) >= after_s


class Abilities(NamedTuple):
    """A size's, in requests per second: with which it keeps its objectives, and that it can do at all."""

    kept: float
    most: float


class Past(msgspec.Struct, frozen=True, array_like=True):
    """RECENT_S from `at_s` on: requests per second, the same smoothed, and the most tokens in KV."""

    at_s: float
    requests_per_s: float
    level: float
    kv_tokens: float


class Recent(msgspec.Struct, frozen=True):
    """What was, oldest first. `entries`: of up to PLAYED_S; `peaks`: of the time before, the most of each of up to
    PEAKS_MAX spans, with the time of the last entry in it."""

    entries: tuple[Past, ...] = ()
    peaks: tuple[Past, ...] = ()

    def seen(self, past: Past, over_s: float) -> Recent:
        """After a turn at its `at_s`; what is older than `over_s` goes."""
        entries = self.entries
        if entries and past.at_s - entries[-1].at_s < RECENT_S:
            most = max(entries[-1].kv_tokens, past.kv_tokens)
            return _replace(self, entries=(*entries[:-1], _replace(entries[-1], kv_tokens=most)))
        since = past.at_s - min(over_s, PLAYED_S)
        first = next((at for at, entry in enumerate(entries) if entry.at_s > since), len(entries))
        peaks = [peak for peak in self.peaks if peak.at_s > past.at_s - over_s]
        if over_s > PLAYED_S:
            for entry in entries[:first]:
                _keep_peak(peaks, entry, (over_s - PLAYED_S) / PEAKS_MAX)
        return Recent((*entries[first:], past), tuple(peaks))

    def level(self, since_s: float) -> float:
        """The most requests per second, smoothed."""
        return max((entry.level for entry in (*self.peaks, *self.entries) if entry.at_s >= since_s), default=0.0)

    def kv_tokens(self, since_s: float) -> float:
        """The most tokens in KV."""
        return max((entry.kv_tokens for entry in (*self.peaks, *self.entries) if entry.at_s >= since_s), default=0.0)

    def most(self) -> float:
        """The most requests per second of any entry."""
        return max((entry.requests_per_s for entry in self.entries), default=0.0)

    def late(self, smaller: Abilities, present: Abilities, after_s: float, react_s: float, wait_s: float) -> float:
        """The share of all requests that would have come too late with a size that grows to the present one, in
        `react_s`, whenever more comes than keeps the objectives (`after_s` as in `Excess.is_too_much`). Too late:
        behind a backlog of more than `wait_s` of what can be done at all."""
        excess = backlog = late = num = 0.0  # plain numbers: a turn may play hundreds of entries several times
        grown_at = math.inf
        for entry in self.entries:
            at, rate = entry.at_s, entry.requests_per_s
            if at >= grown_at and excess == 0.0:
                grown_at = math.inf
            limits = present if at >= grown_at else smaller
            load = rate / limits.kept
            excess = _gathered(excess, load, RECENT_S)
            before, backlog = backlog, _gathered(backlog, rate / limits.most, RECENT_S)
            if grown_at == math.inf and _is_too_much(excess, load, after_s):
                grown_at = at + react_s
            num += rate
            if (most := max(before, backlog)) > wait_s:  # the backlog changes evenly over the entry
                late += rate * min(1.0, (most - wait_s) / max(most - min(before, backlog), 1e-9))
        return late / num if num else 0.0


def _keep_peak(peaks: list[Past], entry: Past, span_s: float) -> None:
    """Add an entry to the peak of its span."""
    if peaks and int(peaks[-1].at_s / span_s) == int(entry.at_s / span_s):
        last = peaks.pop()
        entry = Past(entry.at_s, *map(max, msgspec.structs.astuple(entry)[1:], msgspec.structs.astuple(last)[1:]))
    peaks.append(entry)
