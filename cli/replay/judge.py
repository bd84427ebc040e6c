"""What came of a replay: objectives kept, devices held, changes made. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import msgspec

from elasticmoe.cli.replay.replica import Stream

FLAP_S = 120.0  # a change that is turned back within this time is a flap
_HOUR_S = 3600.0


class ReplayVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """num: requests; `violations`: of them, that broke an objective or did not end; `attainment`: the share of the
    others. device_seconds: held within the trace's time. operations: changes of size; `flaps_per_hour`: of them, those
    that turned the one before back within FLAP_S. p95_ttft_s: of those with a first token; None of none."""

    num: float
    violations: float
    attainment: float
    device_seconds: float
    mean_replicas: float
    operations: float
    flaps_per_hour: float
    p95_ttft_s: float | None


def judge(
    num: int,
    ended: Sequence[Stream],
    changes: Sequence[tuple[float, int, int]],
    device_seconds: float,
    duration_s: float,
    devices: int,
    ttft_s: float,
    itl_s: float,
) -> ReplayVerdict:
    """The verdict on `num` requests, of which `ended` got all of their tokens. Raises ValueError for none at all."""
    if num < 1:
        raise ValueError("a replay without a request has no verdict")
    kept = sum(1 for stream in ended if stream.ttft_s <= ttft_s and stream.gap_s <= itl_s)
    firsts = sorted(stream.ttft_s for stream in ended)
    return ReplayVerdict(
        num=num,
        violations=num - kept,
        attainment=kept / num,
        device_seconds=device_seconds,
        mean_replicas=device_seconds / duration_s / devices,
        operations=len(changes),
        flaps_per_hour=flaps(changes) / duration_s * _HOUR_S,
        p95_ttft_s=firsts[min(len(firsts) - 1, len(firsts) * 95 // 100)] if firsts else None,
    )


def flaps(changes: Sequence[tuple[float, int, int]]) -> int:
    """Changes in the other direction than the one before, within FLAP_S of it: (when, before, after) each."""
    num = 0
    for (earlier, *first), (later, *second) in itertools.pairwise(changes):
        is_turn = (first[1] > first[0]) != (second[1] > second[0])
        num += is_turn and later - earlier <= FLAP_S
    return num


def mean(verdicts: Sequence[ReplayVerdict]) -> ReplayVerdict:
    """The mean of each figure. Raises ValueError of none."""
    if not verdicts:
        raise ValueError("no verdict has no mean")
    tails = [one.p95_ttft_s for one in verdicts if one.p95_ttft_s is not None]
    names = [name for name in ReplayVerdict.__struct_fields__ if name != "p95_ttft_s"]
    figures = {name: statistics.fmean(getattr(one, name) for one in verdicts) for name in names}
    return ReplayVerdict(**figures, p95_ttft_s=statistics.fmean(tails) if tails else None)
