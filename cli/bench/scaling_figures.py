"""The arithmetic of `bench scaling`: from requests and memory samples to figures and series. Pure.

All times are seconds of the monotonic clock. A window is half open: its start belongs to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from elasticmoe.cli.load.sample import Sample, percentile

GRID_S = 0.05  # how finely the moment of full throughput is looked for
SHARE = 0.95  # of the new steady throughput
BIN_S = 1.0
SLO_BIN_S = 5.0


class Window(msgspec.Struct, frozen=True):
    """From `start` to before `end`."""

    start: float
    end: float


class Bounds(msgspec.Struct, frozen=True):
    """What a request has to keep to attain its SLO, in seconds."""

    ttft_s: float
    gap_s: float


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One command to grow or shrink and what is known of it.

    `issued`: when the command was accepted. `serving`: when the first token came from what is new, None where nothing
    is or no token came. `done`: when all of it was over, the old gone. `before` and `after`: steady windows beside it.
    Bytes moved, KV blocks over all ranks. `recomputed`: tokens, as far as the deployment counts them; `resubmitted`:
    requests that it had to start anew. `operation`: what the scaler says of it.
    """

    direction: str
    issued: float
    done: float
    before: Window
    after: Window
    serving: float | None = None
    bytes_moved: int = 0
    kv_blocks_before: int = 0
    kv_blocks_after: int = 0
    recomputed: int = 0
    resubmitted: int = 0
    operation: Any = None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one change did to its clients. Times count from the command.

    `first_token_s`: Change.serving. `capacity_s`: from when on `SHARE` of the new steady throughput is served.
    `done_s`: Change.done. `pause_ms`: the longest gap of any stream that lies in part between command and done; beside
    it the gaps in the steady window before. `tokens_per_s_during`: from the command until done, at least the time of
    one throughput window. `failed`: requests that were taken and ended without a finish reason; `refused`: requests
    that were turned away at least once; both from the command to the end of the window after it. `recomputed`: tokens
    of failed requests, prompts included, prompts of requests started anew, and what the deployment counts. Attainment:
    shares of the requests asked for in that window, `during` being that of the throughput.
    """

    direction: str
    first_token_s: float | None
    capacity_s: float | None
    done_s: float
    pause_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    tokens_per_s_before: float
    tokens_per_s_during: float
    tokens_per_s_after: float
    requests: int
    failed: int
    refused: int
    recomputed: int
    bytes_before: int
    bytes_peak: int
    bytes_after: int
    bytes_moved: int
    kv_blocks_before: int
    kv_blocks_after: int
    slo_before: float | None
    slo_during: float | None
    slo_after: float | None


def measure(
    requests: Sequence[Sample],
    memory: Sequence[tuple[float, int]],
    change: Change,
    bounds: Bounds,
    prompt_tokens: int,
    window_s: float,
) -> Figures:
    """The figures of one change. `window_s`: over which throughput is taken while it changes."""
    arrivals = arrivals_of(requests)
    transition = Window(change.issued, max(change.done, change.issued + window_s))
    whole = Window(change.issued, change.after.end)
    every_gap = gaps_of(requests, change.after.end)
    steady = sorted(end - start for start, end in every_gap if change.before.start <= end < change.before.end)
    after = throughput(arrivals, change.after)
    origin = change.issued if change.serving is None else change.serving
    full = time_to(arrivals, origin, change.after.end, SHARE * after, window_s)
    in_reach = [
        item for item in requests if item.asked < whole.end and (item.error is None or item.ended >= whole.start)
    ]
    failed = [item for item in in_reach if item.error and item.ended < whole.end]
    lost = sum(prompt_tokens + len(item.arrivals) for item in failed)
    return Figures(
        direction=change.direction,
        first_token_s=None if change.serving is None else change.serving - change.issued,
        capacity_s=None if full is None else full - change.issued,
        done_s=change.done - change.issued,
        pause_ms=longest(every_gap, Window(change.issued, change.done)) * 1e3,
        gap_p50_ms=percentile(steady, 50) * 1e3 if steady else 0.0,
        gap_p99_ms=percentile(steady, 99) * 1e3 if steady else 0.0,
        tokens_per_s_before=throughput(arrivals, change.before),
        tokens_per_s_during=throughput(arrivals, transition),
        tokens_per_s_after=after,
        requests=len(in_reach),
        failed=len(failed),
        refused=sum(item.refusals > 0 for item in in_reach),
        recomputed=lost + change.recomputed + change.resubmitted * prompt_tokens,
        bytes_before=median_of(memory, change.before),
        bytes_peak=max((nbytes for t, nbytes in memory if change.issued <= t < transition.end), default=0),
        bytes_after=median_of(memory, change.after),
        bytes_moved=change.bytes_moved,
        kv_blocks_before=change.kv_blocks_before,
        kv_blocks_after=change.kv_blocks_after,
        slo_before=attainment(requests, change.before, bounds),
        slo_during=attainment(requests, transition, bounds),
        slo_after=attainment(requests, change.after, bounds),
    )


def arrivals_of(requests: Iterable[Sample]) -> list[float]:
    """When each token came to any client, sorted."""
    return sorted(arrival for request in requests for arrival in request.arrivals)


def throughput(arrivals: Sequence[float], window: Window) -> float:
    """Tokens per second in a window, from sorted arrivals; 0 for an empty one."""
    if window.end <= window.start:
        return 0.0
    return (bisect_left(arrivals, window.end) - bisect_left(arrivals, window.start)) / (window.end - window.start)


def time_to(arrivals: Sequence[float], start: float, until: float, wanted: float, window_s: float) -> float | None:
    """The first moment from `start` on after which `window_s` seconds bring `wanted` tokens per second, on a grid of
    GRID_S; None when there is none whose window ends by `until`."""
    num = int((until - window_s - start) / GRID_S) + 1 if until - window_s >= start else 0
    for moment in (start + number * GRID_S for number in range(num)):
        if throughput(arrivals, Window(moment, moment + window_s)) >= wanted:
            return moment
    return None


def gaps_of(requests: Iterable[Sample], until: float) -> list[tuple[float, float]]:
    """The gaps between tokens of every stream, as (start, end).

    A stream that was cut off pauses until any client gets a token after that (at the latest `until`): its own client
    never gets another. A client that was turned away pauses from when it asked until its first token.
    """
    listed = list(requests)
    arrivals = arrivals_of(listed)
    gaps = []
    for request in listed:
        gaps += list(zip(request.arrivals, request.arrivals[1:], strict=False))
        if request.refusals:
            gaps.append((request.asked, request.arrivals[0] if request.arrivals else max(until, request.asked)))
        if request.error and request.arrivals:
            after = bisect_left(arrivals, request.ended)
            end = arrivals[after] if after < len(arrivals) else until
            gaps.append((request.arrivals[-1], max(end, request.arrivals[-1])))
    return gaps


def longest(gaps: Iterable[tuple[float, float]], window: Window) -> float:
    """The longest gap that lies in part in the window, whole, in seconds; 0 for none."""
    return max((end - start for start, end in gaps if start < window.end and end >= window.start), default=0.0)


def median_of(memory: Iterable[tuple[float, int]], window: Window) -> int:
    """The median of the samples in a window; 0 for none."""
    found = sorted(nbytes for t, nbytes in memory if window.start <= t < window.end)
    return found[len(found) // 2] if found else 0


def is_attained(request: Sample, bounds: Bounds) -> bool | None:
    """Whether a request kept its bounds; None while that is open. The time to the first token counts from when it was
    asked for, refusals included."""
    if request.error or (request.arrivals and request.arrivals[0] - request.asked > bounds.ttft_s):
        return False
    if any(b - a > bounds.gap_s for a, b in zip(request.arrivals, request.arrivals[1:], strict=False)):
        return False
    return True if request.error == "" and request.arrivals else None


def attainment(requests: Iterable[Sample], window: Window, bounds: Bounds) -> float | None:
    """The share of the requests asked for in a window that kept their bounds; None when there are none."""
    verdicts = [is_attained(request, bounds) for request in requests if window.start <= request.asked < window.end]
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known) / len(known) if known else None


class Series(msgspec.Struct, frozen=True):
    """What happened around a command, by bins of BIN_S seconds from `start`, and attainment by bins of SLO_BIN_S from
    `slo_start`, both in seconds from the command. Gaps: the longest that lies in part in the bin. Bytes: the most in
    it."""

    start: float
    slo_start: float
    tokens_per_s: list[float]
    gap_ms: list[float]
    memory: list[int]
    slo: list[float | None]


def series_of(
    requests: Sequence[Sample], memory: Sequence[tuple[float, int]], change: Change, bounds: Bounds
) -> Series:
    """The series from the window before a change to the end of the one after it."""
    bins = _bins(change, BIN_S)
    arrivals, gaps = arrivals_of(requests), gaps_of(requests, change.after.end)
    slo_bins = _bins(change, SLO_BIN_S)
    return Series(
        start=round(bins[0].start - change.issued, 3) if bins else 0.0,
        slo_start=round(slo_bins[0].start - change.issued, 3) if slo_bins else 0.0,
        tokens_per_s=[round(throughput(arrivals, each), 2) for each in bins],
        gap_ms=[round(longest(gaps, each) * 1e3, 1) for each in bins],
        memory=[max((nbytes for t, nbytes in memory if each.start <= t < each.end), default=0) for each in bins],
        slo=[attainment(requests, each, bounds) for each in slo_bins],
    )


def _bins(change: Change, width: float) -> list[Window]:
    """Whole bins from the window before to the end of the one after; one of them starts at the command."""
    first = -int((change.issued - change.before.start) / width)
    last = int((change.after.end - change.issued) / width)
    return [Window(change.issued + n * width, change.issued + (n + 1) * width) for n in range(first, last)]
