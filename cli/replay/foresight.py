"""The plan of somebody who knows the future and keeps the rule on flaps: what can be had with few changes turned back.

The load is taken as a fluid: each second brings work, and a size does so much of it in a second as it can with the
objectives kept, times a margin; who comes behind a backlog of more than half the objective's seconds is late. Over
intervals of INTERVAL_S, dynamic programming finds the sizes with the least device-seconds + a price for each late
request + one for each flap. A state is the size, the direction of the last change, how long ago that was, and the
backlog. The least prices are sought with which the simulation, which judges this plan as everybody's, has TARGET of the
largest size's requests in time, and no more flaps than it may. Optimal for the fluid and its prices, not for
the simulation: another plan may need less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from elasticmoe.cli.replay.baselines import mean_demand
from elasticmoe.cli.replay.clairvoyant import GAP_S, INTERVAL_S, TARGET, Planned
from elasticmoe.cli.replay.judge import FLAP_S
from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.policies import Fixed
from elasticmoe.cli.replay.simulate import Replayed, simulate
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import WidthFacts
from elasticmoe.services.scaler.policy.saturation import capacity, work

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.intp]

FLAPS_PER_HOUR = 1.0
SIZES_MAX = 16  # that are planned with
MARGINS = (1.0, 1.2, 1.35, 1.5)
LATE_PRICES = (0.1, 30.0)  # device-seconds for a request in time
LATE_ROUNDS = 6
FLAP_PRICES = (1.0, 1e5)  # the higher one forbids them
FLAP_ROUNDS = 6
BACKLOG_S = 0.25  # of the largest size's work: the grid on which backlogs are told apart
BACKLOGS = 40
UP, DOWN = 0, 1


class Fluid(NamedTuple):
    """The load of whole seconds: work in seconds of a replica, and requests."""

    work: Floats
    num: Floats


class Rule(NamedTuple):
    """What a plan's changes cost. `lead_s`: that a growth's devices are held before they serve; `apart`: intervals from
    a change to one in the other direction, after a growth and after a shrink, below which that is a flap."""

    lead_s: float
    apart: tuple[int, int]


class Outlook(NamedTuple):
    """What an interval does at each size and backlog: requests that are late, and the backlog at its end, in steps of
    the grid; both [sizes, BACKLOGS]."""

    late: Floats
    backlog: Floats


class Prices(NamedTuple):
    """In device-seconds, of a late request and of a flap."""

    late: float
    flap: float


def fluid(arrivals: Sequence[Arrival], duration_s: float, model: DeploymentModel) -> Fluid:
    """The work of a prompt comes with its request, that of the answer spread over its life."""
    seconds, step = math.ceil(duration_s / INTERVAL_S) * int(INTERVAL_S), model.step
    at = np.array([arrival.at_s for arrival in arrivals])
    prompt = np.array([float(arrival.input_tokens) for arrival in arrivals])
    output = np.array([float(arrival.output_tokens) for arrival in arrivals])
    begin = np.minimum(at.astype(np.intp), seconds - 1)
    end = np.minimum((at + output * GAP_S).astype(np.intp), seconds - 1)
    each = output * (step.d + step.c * (prompt + output / 2)) / (end - begin + 1)
    steps = np.zeros(seconds + 1)
    np.add.at(steps, begin, each)
    np.add.at(steps, end + 1, -each)
    work = np.cumsum(steps)[:seconds] + np.bincount(begin, step.b * prompt, seconds)
    return Fluid(work, np.bincount(begin, minlength=seconds).astype(np.float64))


def outlooks(load: Fluid, does: Floats, wait_s: float) -> list[Outlook]:
    """Of every interval. `does`: work that each size does in a second, ascending; `wait_s`: what the objective leaves
    for waiting."""
    unit, most, found = BACKLOG_S * does[-1], BACKLOGS - 1, list[Outlook]()
    begin = np.broadcast_to(np.arange(BACKLOGS, dtype=np.float64), (len(does), BACKLOGS))
    for first in range(0, len(load.work), int(INTERVAL_S)):
        backlog, late = begin, np.zeros_like(begin)
        for second in range(first, first + int(INTERVAL_S)):
            after = np.clip(backlog + (load.work[second] - does[:, None]) / unit, 0.0, most)
            waits = (backlog + after) / 2 * unit / does[:, None]
            late = late + load.num[second] * np.clip(waits - wait_s + 0.5, 0.0, 1.0)
            backlog = after
        found.append(Outlook(late, backlog))
    return found


def abilities(arrivals: Sequence[Arrival], model: DeploymentModel, config: PolicyConfig, sizes: Floats) -> Floats:
    """Seconds of one replica's work that each size does in a second with the objectives kept, of requests of the mean
    lengths."""
    demand = mean_demand(arrivals, 1.0)
    facts = [
        WidthFacts(w, model.kv_tokens(w), model.step, model.step_tokens_max, model.devices) for w in map(int, sizes)
    ]
    each = work(model.step, demand, 1.0)
    return np.array([min(capacity(one, demand, config) * each, one.width) for one in facts])


def plan(views: Sequence[Outlook], sizes: Floats, prices: Prices, rule: Rule) -> tuple[list[int], int]:
    """The sizes of all intervals, and how many flaps they make."""
    free = max(rule.apart)
    ages = np.arange(free + 1)
    # Of a change, by [direction of the one before, intervals since then].
    cost_up = np.where(ages < rule.apart[DOWN], prices.flap, 0.0) * np.array([[0.0], [1.0]])
    cost_down = np.where(ages < rule.apart[UP], prices.flap, 0.0) * np.array([[1.0], [0.0]])
    older = np.minimum(ages + 1, free)
    value = np.zeros((len(sizes), 2, free + 1, BACKLOGS))
    row = BACKLOGS * np.arange(value.size // BACKLOGS).reshape(*value.shape[:3], 1)
    own = np.arange(len(sizes), dtype=np.int8)[:, None, None, None]
    choices, lead = list[npt.NDArray[np.int8]](), rule.lead_s * sizes[:, None]
    for view in reversed(views):
        low = np.minimum(view.backlog.astype(np.intp), BACKLOGS - 2)
        share, index = (view.backlog - low)[:, None, None, :], row + low[:, None, None, :]
        coming = value.take(index) * (1 - share) + value.take(index + 1) * share
        coming += (INTERVAL_S * sizes[:, None] + prices.late * view.late)[:, None, None, :]
        up, to_up = _best_beyond(coming[:, UP, 1] + lead)
        down, to_down = _best_beyond(coming[::-1, DOWN, 1])
        value, choice = coming.take(older, axis=2), np.broadcast_to(own, value.shape).copy()
        for best, to, cost in ((up - lead, to_up, cost_up), (down[::-1], len(sizes) - 1 - to_down[::-1], cost_down)):
            other = best[:, None, None, :] + cost[None, :, :, None]
            is_less = other < value
            np.copyto(value, other, where=is_less)
            np.copyto(choice, to.astype(np.int8)[:, None, None, :], where=is_less)
        choices.append(choice)
    choices.reverse()
    return _followed(views, sizes, choices, rule, int(np.argmin(value[:, UP, free, 0])))


def _best_beyond(costs: Floats) -> tuple[Floats, Whole]:
    """For each size, the least cost of a greater one, and which: [sizes, BACKLOGS]."""
    best, which = np.full_like(costs, np.inf), np.zeros(costs.shape, dtype=np.intp)
    for at in range(len(costs) - 2, -1, -1):
        is_next = costs[at + 1] <= best[at + 1]
        best[at] = np.where(is_next, costs[at + 1], best[at + 1])
        which[at] = np.where(is_next, at + 1, which[at + 1])
    return best, which


def _followed(
    views: Sequence[Outlook], sizes: Floats, choices: Sequence[npt.NDArray[np.int8]], rule: Rule, width: int
) -> tuple[list[int], int]:
    """What the choices lead to, from a size on that is free to change."""
    free = max(rule.apart)
    way, age, backlog, num_flaps, found = UP, free, 0.0, 0, list[int]()
    for number, (view, choice) in enumerate(zip(views, choices, strict=True)):
        near = round(backlog)
        chosen = int(choice[width, way, age, near]) if number else width
        if chosen != width:
            turned = UP if chosen > width else DOWN
            num_flaps += turned != way and age < rule.apart[way]
            way, age = turned, 0
        width, age = chosen, min(age + 1, free)
        backlog = float(np.interp(backlog, np.arange(BACKLOGS), view.backlog[width]))
        found.append(int(sizes[width]))
    return found, num_flaps


def _thrifty(views: Sequence[Outlook], sizes: Floats, late_price: float, rule: Rule, flaps_max: float) -> list[int]:
    """The plan with the least flap price that makes no more flaps."""
    found, num = plan(views, sizes, Prices(late_price, 0.0), rule)
    if num <= flaps_max:
        return found
    (low, high), (found, _) = FLAP_PRICES, plan(views, sizes, Prices(late_price, FLAP_PRICES[1]), rule)
    for _ in range(FLAP_ROUNDS if flaps_max >= 1 else 0):
        price = math.sqrt(low * high)
        other, num = plan(views, sizes, Prices(late_price, price), rule)
        if num <= flaps_max:
            high, found = price, other
        else:
            low = price
    return found


def _rule(actuation: Actuation) -> Rule:
    """A growth is ordered by the delay and a turn before its interval."""
    lead = math.floor(actuation.delay_s + 1.0)
    apart = [math.floor(seconds / INTERVAL_S) + 1 for seconds in (FLAP_S - lead, FLAP_S + lead)]
    return Rule(float(lead), (max(1, apart[UP]), max(1, apart[DOWN])))


def flap_limited(
    arrivals: Sequence[Arrival],
    duration_s: float,
    model: DeploymentModel,
    actuation: Actuation,
    config: PolicyConfig,
    flaps_per_hour: float = FLAPS_PER_HOUR,
) -> Replayed:
    """The replay of the best plan that was found with at most so many flaps. Raises ValueError as `simulate` does."""
    least, most = config.replicas_min, config.replicas_max

    def replay(plan: Sequence[int] | None) -> Replayed:
        scaler = Fixed() if plan is None else Planned(plan)
        width = most if plan is None else Planned(plan).wanted(0.0, actuation.delay_s)
        return simulate(arrivals, duration_s, scaler, model, actuation, width, config.ttft_s, config.itl_s)

    best = replay(None)
    goal = TARGET * best.verdict.attainment
    sizes = np.unique(np.linspace(least, most, min(SIZES_MAX, most - least + 1)).round())
    load, does = fluid(arrivals, duration_s, model), abilities(arrivals, model, config, sizes)
    rule, flaps_max = _rule(actuation), flaps_per_hour * duration_s / 3600.0
    for margin in MARGINS:
        views, (low, high) = outlooks(load, margin * does, config.ttft_s / 2), LATE_PRICES
        for _ in range(LATE_ROUNDS):
            price = math.sqrt(low * high)
            verdict = (run := replay(_thrifty(views, sizes, price, rule, flaps_max))).verdict
            is_enough = verdict.attainment >= goal
            low, high = (low, price) if is_enough else (price, high)
            is_within = verdict.flaps_per_hour <= flaps_per_hour
            if is_enough and is_within and verdict.device_seconds <= best.verdict.device_seconds:
                best = run
    return best
