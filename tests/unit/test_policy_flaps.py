"""What a flap teaches, for which load and for how long."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from elasticmoe.services.scaler.policy.orders import SHOWN_S, SHOWN_S_MAX, PastOrder, remembering, resized
from elasticmoe.services.scaler.policy.recent import Past, Recent
from elasticmoe.services.scaler.policy.saturation import capacity
from elasticmoe.services.scaler.policy.state import PolicyState, Reason, TooSmall
from tests.unit import policy_world as world

CONFIG = world.CONFIG
ALONE = capacity(world.widths(1), world.demand(1.0), CONFIG)  # requests per second that one replica does


class Treacherous(world.Plant):
    """One replica does much less than two let expect."""

    def load(self, requests_per_s: float) -> Any:
        self.scale = 1.5 if self.width == 1 else 1.0
        return super().load(requests_per_s)


class Farther(world.Plant):
    """Whose tokens take 10 ms more to their router than the steps that the model knows of."""

    def load(self, requests_per_s: float) -> Any:
        seen = super().load(requests_per_s)
        return msgspec.structs.replace(seen, itl_s=float(seen.itl_s) + 0.01)  # type: ignore[arg-type]


def flap(state: PolicyState, now: float, width: int, load: float, rate: float | None = None) -> PolicyState:
    """It shrinks to `width` at `load`, and grows at once."""
    recent = Recent(entries=(Past(now, load if rate is None else rate, load, 0.0),))
    state = resized(CONFIG, msgspec.structs.replace(state, recent=recent), width + 1, width, now)
    return resized(CONFIG, state, width, width + 1, now + 20.0)


def shown(state: PolicyState) -> list[tuple[int, float | None, float]]:
    return [(one.width, one.requests_per_s, one.for_s) for one in state.too_small]


def test_what_no_measurement_shows_before_is_tried_once_an_hour_and_then_more_seldom() -> None:
    plant = Treacherous(2)
    plant.run(8 * 3_600, 1.5)
    shrinks = [second for second, (one, other) in enumerate(pairwise(plant.sizes)) if other < one]
    apart = [round((later - earlier) / 3_600) for earlier, later in pairwise(shrinks)]
    assert apart == [1, 2, 4]


def test_it_ends_at_a_day() -> None:
    state, now = PolicyState(), 0.0
    for _ in range(10):
        state = flap(state, now, 2, 1.5)
        now += state.too_small[0].for_s + 1.0
    assert shown(state) == [(2, 1.5, SHOWN_S_MAX)]


def test_a_burst_shows_nothing_of_the_load_that_it_came_upon() -> None:
    assert shown(flap(PolicyState(), 0.0, 1, 0.3, rate=4.0)) == []
    assert shown(flap(PolicyState(), 0.0, 1, 0.3, rate=0.5)) == [(1, 0.3, SHOWN_S)]
    plant = world.Plant(2)
    plant.run(400, 0.15 * ALONE)
    assert plant.width == 1
    plant.run(5, 2.0 * ALONE)
    assert plant.run(3, 0.15 * ALONE)
    plant.run(1_200, 0.15 * ALONE)
    assert plant.width == 1, "it is not kept from the size that does by far"


def test_only_the_same_once_more_counts_for_longer_and_no_evidence_is_lost() -> None:
    state = PolicyState()
    for number, load in enumerate((1.5, 1.2, 0.9, 3.0, 5.0)):
        state = flap(state, 600.0 * number, 2, load)
    assert shown(state) == [(2, 0.9, SHOWN_S)]
    assert shown(flap(state, 3_000.0, 3, 4.0)) == [(2, 0.9, SHOWN_S), (3, 4.0, SHOWN_S)]
    assert shown(flap(state, 3_000.0, 2, 0.93)) == [(2, 0.9, 2 * SHOWN_S)]


def test_of_two_sizes_each_is_barred_for_its_load() -> None:
    objectives = CONFIG.ttft_s, CONFIG.itl_s
    known = (TooSmall(1, 0.4 * ALONE, 0.0, 1e6, *objectives), TooSmall(2, 3.0 * ALONE, 0.0, 1e6, *objectives))
    for load, size in ((0.3, 1), (0.5, 2)):
        plant = world.Plant(3)
        plant.state = msgspec.structs.replace(plant.state, too_small=known)
        plant.run(900, load * ALONE)
        assert plant.width == size, load


def test_other_objectives_free_the_size() -> None:
    plant = Treacherous(2)
    plant.run(400, 1.5)
    assert plant.state.too_small
    plant.config = msgspec.structs.replace(plant.config, ttft_s=10.0, itl_s=0.5)
    plant.run(400, 1.5)
    assert plant.width == 1


def test_after_a_restart_it_is_known_for_ten_minutes_only() -> None:
    past = [
        PastOrder(2 * number + turn, 500.0 * number + 50.0 * turn, 3 - turn, 2 + turn)
        for number in range(6)
        for turn in (0, 1)
    ]
    assert shown(remembering(CONFIG, past)) == [(2, None, CONFIG.hold_max_s)]


@pytest.mark.parametrize("load", [0.35, 0.55])
def test_latency_that_is_no_work_does_not_keep_a_size(load: float) -> None:
    plant = Farther(2)
    plant.run(900, load * ALONE)
    assert plant.width == 1
    assert Reason.GROW_PANIC not in {one.reason for one in plant.decisions}
