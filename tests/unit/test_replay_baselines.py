"""The laws of others, as their sources and guides have them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from elasticmoe.cli.replay.baselines import (
    Bounds,
    DynamoLoad,
    HpaOnQueue,
    Kpa,
    LlmD,
    RayServe,
    mean_demand,
    open_target,
)
from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.plant import Plant, Seen
from elasticmoe.cli.replay.policies import Scaler
from elasticmoe.cli.replay.replica import Stream
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.services.scaler.policy.config import PolicyConfig

BOUNDS = Bounds(1, 20)
MODEL = DeploymentModel()


def seen(at: float, plant: Plant, *, waiting: int = 0, is_open: int = 0, gap_s: float | None = None) -> Seen:
    gaps = () if gap_s is None else ((gap_s, 10),)
    return Seen(
        at_s=at,
        span_s=1.0,
        admitted=(),
        firsts=(),
        ended=(),
        gaps=gaps,
        waiting=waiting,
        oldest_s=0.0,
        oldest_tokens=0,
        open=is_open,
        ready=plant.width,
        wanted=plant.wanted,
    )


def sizes(scaler: Scaler, figures: Callable[[int], dict[str, int | float]], seconds: int, width: int) -> Sequence[int]:
    """Wanted after each second, of a plant that does as it is told at once."""
    plant, found = Plant(MODEL, Actuation(0.001), width), []
    for second in range(seconds):
        plant.advance(float(second))
        plant.order(scaler.turn(plant, seen(float(second), plant, **figures(second))))  # type: ignore[arg-type]
        plant.advance(second + 0.5)
        found.append(plant.wanted)
    return found


def test_hpa_holds_within_its_tolerance_grows_each_15_s_and_shrinks_after_300_s() -> None:
    near = sizes(HpaOnQueue(BOUNDS), lambda _: {"waiting": 21}, 60, 4)
    assert set(near) == {4}
    grown = sizes(HpaOnQueue(BOUNDS), lambda _: {"waiting": 100}, 31, 2)
    assert (grown[0], grown[14], grown[15], grown[30]) == (6, 6, 12, 20)
    fallen = sizes(HpaOnQueue(BOUNDS), lambda second: {"waiting": 20 if second == 0 else 0}, 320, 4)
    assert fallen[299] == 4
    assert fallen[-1] == 1


def test_kpa_panics_at_twice_what_is_ready_never_shrinks_in_it_and_leaves_after_a_stable_window() -> None:
    load = {"is_open": 70.0}
    scaler = Kpa(BOUNDS, 10.0)  # 7 for each replica
    found = sizes(scaler, lambda second: load if 60 <= second < 70 else {"is_open": 7.0}, 220, 1)
    assert found[59] == 1
    top = max(found)
    assert top == 10
    begun = found.index(top)
    assert begun < 67, "six seconds are enough"
    assert min(found[begun : begun + 50]) == top
    assert found[-1] == 1


def test_ray_serve_grows_after_30_s_and_shrinks_after_600_s() -> None:
    up = sizes(RayServe(BOUNDS, 10.0), lambda _: {"is_open": 40.0}, 40, 1)
    assert (up[29], up[30]) == (1, 4)
    down = sizes(RayServe(BOUNDS, 10.0), lambda _: {"is_open": 10.0}, 610, 4)
    assert (down[599], down[600]) == (4, 1)


@pytest.mark.parametrize(
    ("wanted", "ready", "s", "wish"),
    [(4, 4, 0.5, 4), (4, 4, 1.1, 8), (4, 2, 1.1, 4), (4, 4, 0.2, 2), (4, 4, 0.39, 4), (1, 1, 0.56, 2), (4, 4, 2.0, 15)],
)
def test_llm_d_wishes_by_its_law(wanted: int, ready: int, s: float, wish: int) -> None:
    assert LlmD(BOUNDS, 2.0, 0.1).wish(wanted, ready, s) == wish


def test_llm_d_shrinks_by_one_in_two_minutes_and_not_before_three() -> None:
    found = sizes(LlmD(BOUNDS, 2.0, 0.1), lambda second: {"gap_s": 0.05 if second < 30 else 0.001}, 480, 6)
    shrunk = [second for second in range(1, 480) if found[second] < found[second - 1]]
    assert shrunk[0] >= 180
    assert all(later - earlier >= 120 for earlier, later in itertools.pairwise(shrunk))
    assert all(found[second - 1] - found[second] == 1 for second in shrunk)


def test_llm_d_takes_the_ninetieth_percentile_at_most_twice_the_objective() -> None:
    scaler, plant = LlmD(BOUNDS, 2.0, 0.1), Plant(MODEL, Actuation(1.0), 1)
    slow = Stream(0, Arrival(0.0, 10, 10))
    slow.first_s = 500.0
    look = seen(0.0, plant)
    late = Seen(**{name: getattr(look, name) for name in look.__struct_fields__} | {"firsts": (slow,)})
    assert scaler.turn(plant, late) == 1 + 3  # ceil(2 / 0.55 - 1)


def loaded(width: int, prompts: int) -> Plant:
    plant = Plant(MODEL, Actuation(10.0), width)
    for _ in range(prompts):
        plant.offer(Arrival(0.0, 2_000, 100))
    return plant


def test_dynamo_grows_by_one_where_all_engines_are_late_and_holds_while_replicas_come() -> None:
    scaler, plant = DynamoLoad(BOUNDS, 2.0, 0.1, 1_000.0), loaded(2, 40)
    assert scaler.turn(plant, seen(0.0, plant)) == 3
    plant.order(3)
    assert scaler.turn(plant, seen(5.0, plant)) == 3
    one_is_late = loaded(2, 0)
    for _ in range(20):
        one_is_late.replicas[0].offer(Stream(0, Arrival(0.0, 2_000, 100)), 0.0)
    assert scaler.turn(one_is_late, seen(0.0, one_is_late)) == 2


def test_dynamo_shrinks_only_where_the_rest_would_still_keep_to_80_percent() -> None:
    scaler = DynamoLoad(BOUNDS, 2.0, 0.1, 1_000.0)
    idle = loaded(2, 0)
    assert scaler.turn(idle, seen(0.0, idle)) == 1
    assert scaler.turn(idle, seen(1.0, idle)) == 2, "each 5 s"
    busy = loaded(2, 8)  # 8 000 tokens each: 80 % of the objective at half the width, and not now
    assert scaler.saturation(MODEL, busy.replicas[0], 1.0) < 0.8 < scaler.saturation(MODEL, busy.replicas[0], 2.0)
    assert scaler.turn(busy, seen(0.0, busy)) == 2


def test_the_open_requests_of_a_replica_are_those_at_the_objectives() -> None:
    arrivals = [Arrival(0.0, 1_000, 200), Arrival(1.0, 1_400, 240)]
    assert mean_demand(arrivals, 2.0).prompt_tokens == 1_200.0
    target = open_target(arrivals, MODEL, PolicyConfig())
    tighter = open_target(arrivals, MODEL, PolicyConfig(itl_s=0.04))
    assert 1.0 < tighter < target < MODEL.sequences_max
