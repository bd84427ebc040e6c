"""A trace made to fit: played faster, a window of it, lengths that a model takes; and its figures. Pure.

Time is scaled, never rates: leaving requests out of a trace, or drawing more, takes its bursts away.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import msgspec

from elasticmoe.cli.traces.arrival import PREFIX_BLOCK_TOKENS, Arrival

_FITTED_PERCENT = 99
COUNTED_S = (1, 10, 60)
_PEAK_S = 10


class Fitted(msgspec.Struct, frozen=True):
    """Arrivals whose lengths were scaled. `factor`: of the lengths. `block_tokens`: what one of their prefix ids stands
    for. `num_cut`: arrivals that were too long all the same, and were cut."""

    arrivals: list[Arrival]
    factor: float
    block_tokens: int
    num_cut: int


class TraceFigures(msgspec.Struct, frozen=True):
    """Of a trace. `gap_cv`: standard deviation of the gaps between arrivals over their mean. `dispersion`: variance
    over mean of the counts in windows of 1, 10 and 60 s; 1 is a Poisson process. `peak_ratio`: the fullest 10 s over
    the mean. None where the trace is too short for it. Tokens are means."""

    num: int
    duration_s: float
    rate: float
    gap_cv: float | None
    dispersion: dict[int, float | None]
    peak_ratio: float | None
    input_tokens: float
    output_tokens: float


def speed_up(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """The same arrivals in a `factor`-th of the time. Raises ValueError for a factor that is not a number above 0."""
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"a time scale of {factor:g} is not a finite number above 0")
    return [msgspec.structs.replace(arrival, at_s=arrival.at_s / factor) for arrival in arrivals]


def window(arrivals: Sequence[Arrival], start_s: float = 0.0, duration_s: float = math.inf) -> list[Arrival]:
    """Those in [`start_s`, `start_s` + `duration_s`), at their time after `start_s`. Raises ValueError where there is
    none."""
    found = [
        msgspec.structs.replace(arrival, at_s=arrival.at_s - start_s)
        for arrival in arrivals
        if start_s <= arrival.at_s < start_s + duration_s
    ]
    if not found:
        last = f"the last comes at {arrivals[-1].at_s:.1f} s" if arrivals else "there is none at all"
        until = f" before {start_s + duration_s:g} s" if math.isfinite(duration_s) else ""
        raise ValueError(f"no request comes from {start_s:g} s on{until}; {last}")
    return found


def fit_lengths(arrivals: Sequence[Arrival], tokens_max: int) -> Fitted:
    """Lengths for a model whose sequences have at most `tokens_max` tokens, prompt and output together.

    All are scaled by one factor, at most 1, with which 99 of 100 fit; those that do not are cut: first the prompt's
    end, then the output. Raises ValueError below 2 tokens, which no request has.
    """
    if tokens_max < 2:
        raise ValueError(f"sequences of at most {tokens_max} tokens: a prompt and an output are 2 or more")
    totals = sorted(arrival.input_tokens + arrival.output_tokens for arrival in arrivals)
    usual = totals[min(len(totals) - 1, len(totals) * _FITTED_PERCENT // 100)] if totals else 0
    factor = min(1.0, tokens_max / usual) if usual else 1.0
    block = max(1, round(PREFIX_BLOCK_TOKENS * factor))
    fitted, num_cut = [], 0
    for arrival in arrivals:
        prompt, output = max(1, round(arrival.input_tokens * factor)), max(1, round(arrival.output_tokens * factor))
        if prompt + output > tokens_max + 1:  # one token more is rounding
            num_cut += 1
        output = min(output, tokens_max - 1)
        prompt = min(prompt, tokens_max - output)
        prefixes = arrival.prefixes[: -(-prompt // block)]
        fitted.append(Arrival(arrival.at_s, prompt, output, prefixes))
    return Fitted(fitted, factor, block, num_cut)


def cut(
    arrivals: Sequence[Arrival], input_tokens_max: int | None = None, output_tokens_max: int | None = None
) -> list[Arrival]:
    """Prompts and outputs cut at these lengths. Before `fit_lengths`: prefix ids stand for blocks of the recorded
    size. Raises ValueError for a length below 1."""
    for what, most in (("prompts", input_tokens_max), ("outputs", output_tokens_max)):
        if most is not None and most < 1:
            raise ValueError(f"{what} cut at {most} tokens: 1 is the least")
    found = []
    for arrival in arrivals:
        prompt = min(arrival.input_tokens, input_tokens_max or arrival.input_tokens)
        output = min(arrival.output_tokens, output_tokens_max or arrival.output_tokens)
        prefixes = arrival.prefixes[: -(-prompt // PREFIX_BLOCK_TOKENS)]
        found.append(Arrival(arrival.at_s, prompt, output, prefixes))
    return found


def figures_of(arrivals: Sequence[Arrival]) -> TraceFigures:
    """The figures of a trace. Raises ValueError for one without arrivals."""
    if not arrivals:
        raise ValueError("a trace without a request has no figures")
    times = [arrival.at_s for arrival in arrivals]
    duration = times[-1]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    counts = {seconds: _counts(times, seconds) for seconds in COUNTED_S}
    peaks = counts[_PEAK_S]
    return TraceFigures(
        num=len(times),
        duration_s=duration,
        rate=len(times) / duration if duration else 0.0,
        gap_cv=statistics.pstdev(gaps) / statistics.fmean(gaps) if duration else None,
        dispersion={seconds: _dispersion(found) for seconds, found in counts.items()},
        peak_ratio=max(peaks) / statistics.fmean(peaks) if any(peaks) else None,
        input_tokens=statistics.fmean(arrival.input_tokens for arrival in arrivals),
        output_tokens=statistics.fmean(arrival.output_tokens for arrival in arrivals),
    )


def _counts(times: Sequence[float], seconds: int) -> list[int]:
    """Arrivals in each whole window; what is left behind the last one is not counted."""
    counts = [0] * int(times[-1] // seconds)
    for at in times:
        number = int(at // seconds)
        if number < len(counts):
            counts[number] += 1
    return counts


def _dispersion(counts: Sequence[int]) -> float | None:
    if len(counts) < 2 or not any(counts):
        return None
    mean = statistics.fmean(counts)
    return statistics.fmean((count - mean) ** 2 for count in counts) / mean
