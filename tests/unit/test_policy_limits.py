"""The policy at its limits: after a time without turns, over a day of history, and with hundreds of replicas."""

from __future__ import annotations

import random

import msgspec
import pytest

from elasticmoe.services.scaler.policy import guards
from elasticmoe.services.scaler.policy.facts import DeploymentFacts
from elasticmoe.services.scaler.policy.recent import PEAKS_MAX, PLAYED_S, RECENT_S, Abilities, Past, Recent
from elasticmoe.services.scaler.policy.recommend import recommend
from elasticmoe.services.scaler.policy.saturation import capacity
from elasticmoe.services.scaler.policy.state import PolicyState, Reason
from tests.unit import policy_world as world

HOURS_S = 3 * 3_600.0


def after(seconds: int, width: int, rate: float, **figures: float) -> PolicyState:
    """The state after so many turns, a second apart, in the mode `advise`."""
    state = PolicyState()
    for at in range(seconds):
        state = turn(state, float(at), width, rate, **figures)[0]
    return state


def turn(state: PolicyState, at: float, width: int, rate: float, **figures: float) -> tuple[PolicyState, Reason]:
    config = msgspec.structs.replace(world.CONFIG, mode="advise", replicas_max=384)
    facts = DeploymentFacts(width=width)
    signals = world.signals(at, rate, **figures)
    decision = recommend(config, signals, facts, world.widths, world.prices, state, at)
    return decision.state, decision.reason


def test_after_a_gap_demand_is_seen_anew_before_anything_shrinks() -> None:
    state, reason = turn(after(200, 8, 12.0), HOURS_S, 8, 0.1)
    assert reason is Reason.HOLDING
    reasons = []
    for at in range(1, 32):
        state, reason = turn(state, HOURS_S + at, 8, 0.1)
        reasons.append(reason)
    assert reasons[:29] == [Reason.HOLDING] * 29
    assert Reason.SHRINK_IDLE in reasons[29:], "thirty seconds were seen again"


def test_what_was_saturated_before_a_gap_has_to_last_again() -> None:
    state = after(60, 2, 1.0)
    state, reason = turn(state, 60.0, 2, 1.0, itl_s=0.15)
    assert reason is Reason.STEADY
    state, reason = turn(state, HOURS_S, 2, 1.0, itl_s=0.15)
    assert reason is Reason.STEADY, "two looks, hours apart, are not four seconds"
    for at in range(1, 5):
        state, reason = turn(state, HOURS_S + at, 2, 1.0, itl_s=0.15)
    assert reason is Reason.GROW_PANIC


def test_the_rate_of_a_moment_does_not_stand_for_a_time_without_turns() -> None:
    state = after(60, 2, 1.0)
    limit = capacity(world.widths(2), world.demand(1.0), world.CONFIG)
    for gap_s in (8.0, HOURS_S):
        assert turn(state, 59.0 + gap_s, 2, 1.0, burst_per_s=1.5 * limit)[1] is not Reason.GROW_DEMAND, gap_s


def test_the_history_of_a_day_is_bounded_and_keeps_its_peaks() -> None:
    day_s, recent = 86_400.0, Recent()
    for at in range(0, 100_000, 2):
        peak = 9.0 if at == 40_000 else 1.0
        recent = recent.seen(Past(float(at), peak, peak, 100 * peak), day_s)
        if at == 400:
            assert recent.peaks == ()
    assert len(recent.entries) <= PLAYED_S / RECENT_S
    assert len(recent.peaks) <= PEAKS_MAX + 1
    assert (recent.level(100_000 - day_s), recent.kv_tokens(100_000 - day_s)) == (9.0, 900.0)
    assert (recent.level(50_000.0), recent.kv_tokens(50_000.0)) == (1.0, 100.0)
    for at in range(100_000, 40_000 + int(day_s) + 1_000, 2):
        recent = recent.seen(Past(float(at), 1.0, 1.0, 100.0), day_s)
    assert recent.level(0.0) == 1.0, "what is older than a day is gone"


def test_the_load_that_a_shrink_is_judged_by_is_kept_for_as_long_as_the_policy_says() -> None:
    config = msgspec.structs.replace(world.CONFIG, hold_s=5.0, hold_max_s=5.0, down_over_s=60.0)
    plant = world.Plant(8, config)
    plant.run(100, 14.0)
    assert plant.targets == []
    plant.run(50, 0.1)
    assert plant.targets == [], "a peak of the last minute"


@pytest.mark.parametrize("seed", range(20))
def test_where_nothing_was_beyond_a_size_its_limits_are_not_looked_for_and_it_makes_no_difference(seed: int) -> None:
    rng = random.Random(seed)
    present, smaller, demand = world.widths(8), world.widths(rng.randint(1, 7)), world.demand(1.0)
    rate, config, recent = rng.uniform(0.0, 16.0), world.CONFIG, Recent()
    for at in range(0, 600, 2):
        recent = recent.seen(Past(float(at), rng.gammavariate(4.0, rate / 4.0), rate, 0.0), 600.0)
    loose = msgspec.structs.replace(config, ttft_s=5 * config.ttft_s, itl_s=2 * config.itl_s)
    small, large = (
        Abilities(capacity(one, demand, config), capacity(one, demand, loose)) for one in (smaller, present)
    )
    expected = recent.late(small, large, config.up_after_s, 1.0 + guards.NOTICE_S, config.ttft_s / 2)
    assert guards.late(PolicyState(recent=recent), present, smaller, demand, config, 1.0) == expected


def test_advice_to_shrink_hundreds_of_replicas_costs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> float:
        raise AssertionError("limits are looked for, for each of ten widths")

    state = after(200, 384, 4.0)
    monkeypatch.setattr(guards, "capacity", forbidden)
    assert turn(state, 200.0, 384, 4.0)[1] is Reason.SHRINK_IDLE
