"""The clairvoyant that keeps the rule on flaps: the best plan there is for its fluid, and one that does in a replay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from elasticmoe.cli.replay import foresight
from elasticmoe.cli.replay.foresight import BACKLOGS, DOWN, UP, Floats, Outlook, Prices, Rule, flap_limited, plan
from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.policies import Fixed
from elasticmoe.cli.replay.simulate import simulate
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.services.scaler.policy.config import PolicyConfig

CONFIG = PolicyConfig(mode="act", replicas_max=6)
MODEL = DeploymentModel()
SIZES = np.array([1.0, 2.0, 4.0])


def price_of(at: tuple[int, ...], views: list[Outlook], sizes: Floats, prices: Prices, rule: Rule) -> float:
    """What a plan costs, by the definition."""
    cost, backlog, way, since = 0.0, 0, -1, 0
    for number, (size, view) in enumerate(zip(at, views, strict=True)):
        if number and size != at[number - 1]:
            turned = UP if size > at[number - 1] else DOWN
            if turned == UP:
                cost += rule.lead_s * (sizes[size] - sizes[at[number - 1]])
            if way not in (-1, turned) and number - since < rule.apart[way]:
                cost += prices.flap
            way, since = turned, number
        cost += foresight.INTERVAL_S * sizes[size] + prices.late * view.late[size, backlog]
        backlog = int(view.backlog[size, backlog])
    return float(cost)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("flap", [0.0, 15.0, 1e5])
def test_no_other_plan_costs_less(seed: int, flap: float) -> None:
    """Of all that there are for six intervals and three sizes, where the backlog stays on its grid."""
    rng = np.random.default_rng(seed)
    prices, rule, views = Prices(1.0, flap), Rule(2.0, (2, 3)), list[Outlook]()
    for load in rng.integers(0, 8, 6).tolist():
        after = np.clip(np.arange(BACKLOGS) + load - 2 * SIZES[:, None], 0, BACKLOGS - 1)
        views.append(Outlook(float(rng.integers(1, 9)) * after, after))
    found, num_flaps = plan(views, SIZES, prices, rule)
    costs = {at: price_of(at, views, SIZES, prices, rule) for at in itertools.product(range(3), repeat=len(views))}
    at = tuple(int(np.flatnonzero(size == SIZES)[0]) for size in found)
    assert costs[at] == pytest.approx(min(costs.values()))
    if flap == 1e5:
        assert num_flaps == 0


@pytest.mark.parametrize("delay_s", [1.0, 20.0])
def test_it_attains_what_the_largest_size_does_without_flaps(delay_s: float) -> None:
    """Of bursts half a minute long, a minute and a half apart at first and four later."""
    begins = (60.0, 150.0, 240.0, 500.0, 760.0)
    bursts = [Arrival(begin + at / 12.0, 800, 150) for begin in begins for at in range(360)]
    arrivals = sorted([*(Arrival(float(at), 800, 150) for at in range(900)), *bursts], key=lambda one: one.at_s)
    most = simulate(arrivals, 900.0, Fixed(), MODEL, Actuation(delay_s), 6, CONFIG.ttft_s, CONFIG.itl_s)
    run = flap_limited(arrivals, 900.0, MODEL, Actuation(delay_s), CONFIG)
    assert run.verdict.attainment >= 0.99 * most.verdict.attainment
    assert run.verdict.device_seconds < 0.85 * most.verdict.device_seconds
    assert run.verdict.flaps_per_hour == 0.0, "less than an hour may have none"
    assert run.verdict.operations >= 3, "and the calm is used"


def test_one_size_alone_leaves_nothing_to_plan() -> None:
    config = PolicyConfig(mode="act", replicas_min=2, replicas_max=2)
    run = flap_limited([Arrival(float(at), 800, 150) for at in range(60)], 60.0, MODEL, Actuation(), config)
    assert (run.verdict.mean_replicas, run.verdict.operations) == (2.0, 0)


def test_the_work_of_a_fluid_is_that_of_its_requests() -> None:
    arrivals = [Arrival(3.5, 1_000, 100), Arrival(58.0, 500, 400)]
    load, step = foresight.fluid(arrivals, 60.0, MODEL), MODEL.step
    answers = [one.output_tokens * (step.d + step.c * (one.input_tokens + one.output_tokens / 2)) for one in arrivals]
    assert load.work.sum() == pytest.approx(1_500 * step.b + sum(answers))
    assert load.work[3] == pytest.approx(1_000 * step.b + answers[0] / 6), "five seconds of answer are in six of them"
    assert np.flatnonzero(load.num).tolist() == [3, 58]
