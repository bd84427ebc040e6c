"""What came of one method of `bench slo`: objectives kept, devices held, changes of size. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from elasticmoe.cli.load.result import Result
from elasticmoe.cli.load.sample import percentile
from elasticmoe.cli.replay.judge import flaps


class Objectives(msgspec.Struct, frozen=True):
    """As the policy has them, in seconds: to a request's first token from when it was due, and the mean time between
    its tokens."""

    ttft_s: float
    itl_s: float


class Held(msgspec.Struct):
    """Devices that are held over time, and the changes of what is wanted; filled in while it goes on. Times in seconds
    of the monotonic clock, ascending.

    `steps`: (since when, devices); each counts until the next one. `changes`: orders, (when, replicas before, after).
    """

    steps: list[tuple[float, int]] = []
    changes: list[tuple[float, int, int]] = []

    def hold(self, at: float, devices: int) -> None:
        """From `at` on so many devices are held."""
        if not self.steps or self.steps[-1][1] != devices:
            self.steps.append((at, devices))

    def order(self, at: float, before: int, after: int) -> None:
        """A change of size is ordered."""
        self.changes.append((at, before, after))


def device_seconds(steps: Sequence[tuple[float, int]], begin: float, end: float) -> float:
    """Devices times seconds in [`begin`, `end`); what is held at `begin` was held before. Raises ValueError where
    nothing is known of `begin`."""
    if not steps or steps[0][0] > begin:
        raise ValueError("how many devices are held at the begin is not known")
    total = 0.0
    for (since, devices), until in zip(steps, [*(at for at, _ in steps[1:]), end], strict=True):
        total += devices * max(0.0, min(until, end) - max(since, begin))
    return total


def keeps_ttft(result: Result, objectives: Objectives) -> bool:
    """Whether its first token came in time."""
    first = result.first_token_s
    return first is not None and first - result.scheduled_s <= objectives.ttft_s


def keeps_itl(result: Result, objectives: Objectives) -> bool:
    """Whether its tokens came fast enough; a single one did."""
    return result.first_token_s is not None and (result.gap_mean_ms or 0.0) <= objectives.itl_s * 1e3


def is_attained(result: Result, objectives: Objectives) -> bool:
    """Whether it ended whole and kept both."""
    return result.outcome == "completed" and keeps_ttft(result, objectives) and keeps_itl(result, objectives)


class SloFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run. `attainment`: share of all requests of the trace that kept both objectives and ended whole; the
    others are `violations`, with `failed` (cut off, an error, none within the time after the trace) among them.
    `ttft_kept`, `itl_kept`: shares that kept the one. `device_seconds`: held while the trace lasted, from the order of
    a growth on. `operations`: orders to change the size; `flaps`: those that turn the one before back soon. TTFT in
    seconds of what got a first token; None of none. `retries`: attempts that were turned away and made again."""

    num: int
    attainment: float
    ttft_kept: float
    itl_kept: float
    violations: int
    failed: int
    device_seconds: float
    mean_devices: float
    operations: int
    flaps: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    retries: int


def figures_of(
    results: Sequence[Result],
    num: int,
    held: Held,
    begin: float,
    duration_s: float,
    objectives: Objectives,
    retries: int,
) -> SloFigures:
    """The figures of a trace of `num` requests that began at `begin` and lasted `duration_s`. Raises ValueError for an
    empty trace, and for one that is not told of as a whole."""
    if num < 1 or len({result.number for result in results}) != num or len(results) != num:
        raise ValueError(f"{len(results)} results of {num} requests")
    end = begin + duration_s
    changes = [change for change in held.changes if begin <= change[0] < end]
    firsts = sorted(one.first_token_s - one.scheduled_s for one in results if one.first_token_s is not None)
    kept = sum(is_attained(result, objectives) for result in results)
    seconds = device_seconds(held.steps, begin, end)
    return SloFigures(
        num=num,
        attainment=kept / num,
        ttft_kept=sum(keeps_ttft(result, objectives) for result in results) / num,
        itl_kept=sum(keeps_itl(result, objectives) for result in results) / num,
        violations=num - kept,
        failed=sum(result.outcome != "completed" for result in results),
        device_seconds=seconds,
        mean_devices=seconds / duration_s,
        operations=len(changes),
        flaps=flaps(changes),
        ttft_p50_s=_percentile(firsts, 50),
        ttft_p95_s=_percentile(firsts, 95),
        ttft_p99_s=_percentile(firsts, 99),
        retries=retries,
    )


def reactions(
    changes: Sequence[tuple[float, int, int]], begins: Sequence[float], length_s: float
) -> list[float | None]:
    """Seconds from the begin of each step of load, which lasts `length_s`, to the first order to grow in it; None where
    there was none."""
    growths = [at for at, before, after in changes if after > before]
    firsts = (next((at for at in growths if begin <= at < begin + length_s), None) for begin in begins)
    return [None if at is None else at - begin for at, begin in zip(firsts, begins, strict=True)]


def _percentile(ordered: Sequence[float], percent: float) -> float | None:
    return percentile(ordered, percent) if ordered else None


class Sizes(msgspec.Struct, frozen=True):
    """For a plot, in seconds of the trace. `sizes`: (since when, devices held); `missed`: when each request was due
    that broke an objective."""

    sizes: list[tuple[float, int]]
    missed: list[float]


def sizes_of(results: Sequence[Result], held: Held, begin: float, duration_s: float, objectives: Objectives) -> Sizes:
    """The line of one run."""
    found: list[tuple[float, int]] = []
    for (since, devices), until in itertools.zip_longest(held.steps, [at for at, _ in held.steps[1:]]):
        if (until is None or until > begin) and since < begin + duration_s:
            found.append((round(max(0.0, since - begin), 3), devices))
    missed = [result.scheduled_s for result in results if not is_attained(result, objectives)]
    return Sizes(found, sorted(missed))


class Comparison(msgspec.Struct, frozen=True):
    """Ours beside a baseline: violations and device-seconds over the baseline's, summed over the rounds that both
    have; None where the baseline has none. `violations_max`: the aim."""

    baseline: str
    violations: float | None
    violations_max: float
    device_seconds: float
    is_met: bool


def compare(ours: Sequence[SloFigures], baseline: Sequence[SloFigures], name: str, share_max: float) -> Comparison:
    """Violations have to be at most `share_max` of the baseline's, device-seconds below them, and none may fail.
    Raises ValueError where one of the two has no run."""
    if not ours or not baseline:
        raise ValueError(f"nothing to compare with {name}")
    misses, theirs = (sum(one.violations for one in runs) / len(runs) for runs in (ours, baseline))
    devices, their_devices = (sum(one.device_seconds for one in runs) / len(runs) for runs in (ours, baseline))
    is_met = misses <= share_max * theirs and devices < their_devices and not any(one.failed for one in ours)
    return Comparison(name, misses / theirs if theirs else None, share_max, devices / their_devices, is_met)
