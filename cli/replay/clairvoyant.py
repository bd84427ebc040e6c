"""A plan by somebody who knows the future: what the smallest deployment would have been, interval by interval. Pure.

From the least size that can do each interval's work at all, the plan is replayed, and raised where requests miss that
the largest size serves, until it attains TARGET of what that attains. So it is a good plan, not proven to be the best.
It pays for the actuation as everybody does: what is to serve is ordered, and held, by the delay before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.plant import Plant, Seen
from elasticmoe.cli.replay.policies import Fixed
from elasticmoe.cli.replay.simulate import Replayed, simulate
from elasticmoe.cli.traces.arrival import Arrival

INTERVAL_S = 10.0
TARGET = 0.99
_ROUNDS_MAX = 40
_BEFORE = 1  # a miss is of what came in its interval, or in the one before


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
    usual = _by_interval(best.missed)
    came = _by_interval([arrival.at_s for arrival in arrivals])
    sizes = _least_sizes(arrivals, duration_s, model, least, most)
    for _ in range(_ROUNDS_MAX):
        run = replay(sizes)
        if run.verdict.attainment >= goal:
            return run
        missed = _by_interval(run.missed)
        is_raised = False
        for at in [at for at, num in missed.items() if num > usual[at] + (1 - TARGET) * came[at]]:
            for one in range(max(0, at - _BEFORE), at + 1):
                if sizes[one] < most:
                    sizes[one] += 1
                    is_raised = True
        if not is_raised:
            break
    return best


def _by_interval(times: Sequence[float]) -> Counter[int]:
    return Counter(int(at / INTERVAL_S) for at in times)


def _least_sizes(
    arrivals: Sequence[Arrival], duration_s: float, model: DeploymentModel, least: int, most: int
) -> list[int]:
    """Without which the work of an interval cannot be done in it."""
    work = [0.0] * math.ceil(duration_s / INTERVAL_S)
    step = model.step
    for arrival in arrivals:
        kv_tokens = arrival.input_tokens + arrival.output_tokens / 2
        seconds = step.b * arrival.input_tokens + arrival.output_tokens * (step.d + step.c * kv_tokens)
        work[min(len(work) - 1, int(arrival.at_s / INTERVAL_S))] += seconds
    return [max(least, min(most, math.ceil(seconds / INTERVAL_S))) for seconds in work]
