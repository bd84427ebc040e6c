"""A plan by somebody who knows the future: what the smallest deployment would have been, interval by interval. Pure.

Every interval gets what its work needs, times a factor that is the same for all; what the largest size cannot do waits
for the next one. The least factor is sought with which the plan attains TARGET of what the largest size does. A good
plan, not proven to be the best: another one may need less. It pays for the actuation as everybody does: what is to
serve is ordered, and held, by the delay before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.plant import Plant, Seen
from elasticmoe.cli.replay.policies import Fixed
from elasticmoe.cli.replay.simulate import Replayed, simulate
from elasticmoe.cli.traces.arrival import Arrival

INTERVAL_S = 10.0
TARGET = 0.99
_FACTOR_MAX = 8.0
_ROUNDS = 9
GAP_S = 0.05  # between tokens, about: over so long the work of an output is spread


class Planned:
    """Follows a plan: `sizes` of intervals of INTERVAL_S."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes

    def turn(self, plant: Plant, seen: Seen, /) -> int:
        """The most that is planned for from now until an order of now serves."""
        return self.wanted(seen.at_s, plant.actuation.delay_s)

    def wanted(self, at_s: float, delay_s: float) -> int:
        """At a time."""
        last = len(self._sizes) - 1
        first, until = min(last, int(at_s / INTERVAL_S)), min(last, int((at_s + delay_s + 1.0) / INTERVAL_S))
        return max(self._sizes[first : until + 1])


def clairvoyant(
    arrivals: Sequence[Arrival],
    duration_s: float,
    model: DeploymentModel,
    actuation: Actuation,
    least: int,
    most: int,
    ttft_s: float,
    itl_s: float,
) -> Replayed:
    """The replay of the best plan that was found. Raises ValueError as `simulate` does."""

    def replay(plan: Sequence[int] | None) -> Replayed:
        scaler = Fixed() if plan is None else Planned(plan)
        width = most if plan is None else Planned(plan).wanted(0.0, actuation.delay_s)
        return simulate(arrivals, duration_s, scaler, model, actuation, width, ttft_s, itl_s)

    best = replay(None)
    goal = TARGET * best.verdict.attainment
    work = work_by_interval(arrivals, duration_s, model)
    low, high = 0.0, _FACTOR_MAX
    for _ in range(_ROUNDS):
        factor = math.sqrt(max(low, 1 / _FACTOR_MAX) * high)
        run = replay(sizes_for(work, factor, least, most))
        is_enough = run.verdict.attainment >= goal
        low, high = (low, factor) if is_enough else (factor, high)
        if is_enough and run.verdict.device_seconds <= best.verdict.device_seconds:
            best = run
    return best


def work_by_interval(arrivals: Sequence[Arrival], duration_s: float, model: DeploymentModel) -> list[float]:
    """Replicas that each interval's work keeps busy, without the steps' own time."""
    work = [0.0] * math.ceil(duration_s / INTERVAL_S)
    step, last = model.step, len(work) - 1
    for arrival in arrivals:
        begin = int(arrival.at_s / INTERVAL_S)
        end = int((arrival.at_s + arrival.output_tokens * GAP_S) / INTERVAL_S)
        kv_tokens = arrival.input_tokens + arrival.output_tokens / 2
        work[min(last, begin)] += step.b * arrival.input_tokens / INTERVAL_S
        each = arrival.output_tokens * (step.d + step.c * kv_tokens) / (end - begin + 1) / INTERVAL_S
        for at in range(begin, end + 1):
            work[min(last, at)] += each
    return work


def sizes_for(work: Sequence[float], factor: float, least: int, most: int) -> list[int]:
    """For `factor` times the work."""
    sizes, waiting = [], 0.0
    for each in work:
        needed = factor * each + waiting
        sizes.append(max(least, min(most, math.ceil(needed))))
        waiting = max(0.0, needed - sizes[-1])
    return sizes
