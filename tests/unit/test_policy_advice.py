"""What the policy makes of orders that cannot be followed any more, and of changes that others make by its advice."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.services.scaler.policy.facts import DeploymentFacts, OperationFacts, RefusedOrder
from elasticmoe.services.scaler.policy.orders import PastOrder, remembering
from elasticmoe.services.scaler.policy.recent import Excess
from elasticmoe.services.scaler.policy.recommend import recommend
from elasticmoe.services.scaler.policy.saturation import capacity
from elasticmoe.services.scaler.policy.signals import NO_ROUTER, Intake
from elasticmoe.services.scaler.policy.state import Decision, PolicyState, Reason, ScaleOrder
from tests.unit import policy_world as world

ADVISE = msgspec.structs.replace(world.CONFIG, mode="advise")


@pytest.mark.parametrize("refused", [None, RefusedOrder("policy-1", True)])
def test_an_order_that_there_are_no_more_devices_for_makes_room_for_a_smaller_one(refused: RefusedOrder | None) -> None:
    """Repeated, it would be refused; and a refusal for want of devices says nothing against a size that they do for."""
    order = ScaleOrder("policy-1", 6, 1_015.0, 2, world.CONFIG)
    state = PolicyState(at_s=1_019.0, order=order, num_orders=1, excess=Excess(9.0, 2.0))
    facts, seen = DeploymentFacts(width=2, available=4, refused=refused), world.signals(1_020.0, 20.0)
    decision = recommend(world.CONFIG, seen, facts, world.widths, world.prices, state, 1_020.0)
    assert (decision.reason, decision.target, decision.acts) == (Reason.GROW_DEMAND, 4, True)
    assert decision.op_id != order.op_id


class Followed(world.Plant):
    """A deployment whose policy only advises, and somebody else, who makes it what is advised after `lag_s`, looking
    every `each_s`."""

    def __init__(self, width: int, lag_s: float, each_s: float) -> None:
        super().__init__(width, ADVISE)
        self.lag_s, self.each_s = lag_s, each_s
        self.wanted: list[int] = []
        self.made: list[tuple[float, int, int]] = []
        self._coming: tuple[float, int] | None = None

    def follow(self, decision: Decision) -> None:
        """After a turn."""
        self.wanted.append(self.width if decision.target is None else decision.target)
        if self._coming is None and self.now % self.each_s == 0.0 and self.wanted[-1] != self.width:
            self._coming = (self.now + self.lag_s, self.wanted[-1])
        if self._coming is not None and self.now >= self._coming[0]:
            self.made.append((self.now, self.width, self._coming[1]))
            self.width, self.changed_s, self.last_op = self._coming[1], self.now, f"theirs-{len(self.made)}"
            self._coming = None


def flaps(changes: list[tuple[float, int, int]]) -> int:
    ways = [(at, after > before) for at, before, after in changes]
    return sum(one[1] != two[1] and two[0] - one[0] <= 120.0 for one, two in pairwise(ways))


@pytest.mark.parametrize(("lag_s", "each_s"), [(0.0, 1.0), (5.0, 15.0), (100.0, 15.0)])
def test_whoever_follows_advice_is_not_sent_to_and_fro(lag_s: float, each_s: float) -> None:
    """Bursts of twelve seconds, forty apart, with noise: too much for two, little in the mean."""
    plant, rng = Followed(2, lag_s, each_s), random.Random(5)
    for second in range(1_800):
        rate = 7.0 if second % 40 < 12 else 0.5
        seen = plant.load(min(rate, 5.0))
        seen = msgspec.structs.replace(
            seen, at_s=plant.now, admitted_per_s=2.5, burst_per_s=rng.gammavariate(9, rate / 9)
        )
        plant.follow(plant.turn(seen))
    desired = [(float(at), *pair) for at, pair in enumerate(pairwise(plant.wanted)) if pair[0] != pair[1]]
    assert flaps(plant.made) <= 1
    assert flaps(desired) <= 1


def test_advice_to_grow_stands_while_it_is_not_followed_and_a_growth_would_be_held() -> None:
    plant = world.Plant(2, ADVISE)
    grown = plant.run(10, 9.0)[-1]
    assert grown.target is not None
    assert grown.target > 2
    calm = plant.run(int(ADVISE.hold_s) - 2, 1.5)
    assert {one.target for one in calm} == {grown.target}
    assert Reason.ADVISED in {one.reason for one in calm}
    assert plant.run(120, 1.5)[-1].target is None


def test_advice_to_shrink_that_is_taken_back_is_not_given_again_at_once() -> None:
    plant = world.Plant(3, ADVISE)
    plant.run(200, 0.5)
    assert plant.decisions[-1].reason is Reason.SHRINK_IDLE
    wave = plant.run(12, 1.5)
    assert wave[-1].target is None
    after = plant.run(int(ADVISE.hold_s) - 12, 0.5)
    assert {(one.target, one.reason) for one in after} == {(None, Reason.HOLDING)}
    assert plant.run(30, 0.5)[-1].reason is Reason.SHRINK_IDLE


@pytest.mark.parametrize("mode", ["act", "advise"])
def test_what_others_change_is_held_and_teaches_as_its_own_changes_do(mode: str) -> None:
    plant = world.Plant(3, msgspec.structs.replace(world.CONFIG, mode=mode))
    plant.run(60, 2.5)
    plant.width, plant.changed_s, plant.last_op = 2, plant.now, "theirs-1"
    plant.run(20, 2.5)
    plant.width, plant.changed_s, plant.last_op = 3, plant.now, "theirs-2"
    plant.run(2, 2.5)
    assert plant.state.hold_s == 2 * world.CONFIG.hold_s
    assert [shown.width for shown in plant.state.too_small] == [2]
    assert {one.reason for one in plant.run(230, 0.0)} == {Reason.HOLDING}
    assert Reason.SHRINK_IDLE in {one.reason for one in plant.run(20, 0.0)}


def test_the_excess_of_the_size_before_asks_for_nothing_once_somebody_else_has_changed_it() -> None:
    plant = world.Plant(2)
    for _ in range(30):
        plant.operation = OperationFacts("theirs-1", "grow", 6, plant.now, 2.0)
        plant.state = msgspec.structs.replace(plant.turn(plant.load(7.0)).state, excess=Excess(9.0, 1.5))
    plant.operation, plant.width, plant.changed_s, plant.last_op = None, 6, plant.now, "theirs-1"
    assert plant.turn(plant.load(7.0)).target is None


@pytest.mark.parametrize("lost_s", [995.0, None])
def test_a_lost_device_is_no_shrink_that_somebody_wished(lost_s: float | None) -> None:
    state = PolicyState(at_s=999.0, width=3)
    facts = DeploymentFacts(width=2, lost_s=lost_s)
    seen = world.signals(1_000.0)
    after = recommend(world.CONFIG, seen, facts, world.widths, world.prices, state, 1_000.0).state
    assert after.shrunk_s == (None if lost_s else 1_000.0)


@pytest.mark.parametrize(("share", "is_tried"), [(0.0, True), (0.3, True), (0.7, False)])
def test_what_a_flap_showed_before_a_restart_holds_for_about_that_load_only(share: float, is_tried: bool) -> None:
    """For how much the smaller size was too small is not known again; for how much it is said to do is."""
    known = remembering(world.CONFIG, [PastOrder(1, 850.0, 3, 2), PastOrder(2, 900.0, 2, 3)])
    assert [(shown.width, shown.requests_per_s) for shown in known.too_small] == [(2, None)]
    plant = world.Plant(3)
    plant.state = known
    rate = share * capacity(world.widths(2), world.demand(1.0), world.CONFIG)
    reasons = {one.reason for one in plant.run(200, rate)}
    assert (Reason.SHRINK_IDLE in reasons) == is_tried


def test_a_bound_that_no_plan_leads_to_is_not_ordered() -> None:
    config = msgspec.structs.replace(world.CONFIG, replicas_max=1)
    facts, seen = DeploymentFacts(width=4), world.signals(1_000.0, 0.0, kv_used=0.0)
    decision = recommend(config, seen, facts, world.widths, lambda _: None, PolicyState(), 1_000.0)
    assert (decision.reason, decision.target) == (Reason.NO_PLAN, None)


@pytest.mark.parametrize(("most", "available"), [(2, None), (8, 2)])
def test_advice_does_not_stand_out_of_bounds(most: int, available: int | None) -> None:
    plant = world.Plant(2, ADVISE)
    advised = next(one for one in plant.run(60, 30.0) if one.target is not None and one.target > 2)
    assert advised.state.advice is not None
    config = msgspec.structs.replace(ADVISE, replicas_max=most)
    facts = DeploymentFacts(width=2, available=available)
    seen = msgspec.structs.replace(plant.load(1.0), at_s=plant.now)
    decision = recommend(config, seen, facts, world.widths, world.prices, plant.state, plant.now)
    assert decision.target is None or decision.target <= 2
    assert decision.reason is not Reason.ADVISED


def test_nobody_heard_at_all_is_somebody_silent() -> None:
    intake = Intake(world.CONFIG)
    for at in range(60):
        intake.expect((), {RankId(0, 0): "rank:1"}, 1, float(at))
        intake.take(world.rank_window(at + 1, float(at), epoch=1), float(at))
    seen = intake.signals(59.0)
    assert (seen.silent, seen.silent_since_s) == ((NO_ROUTER,), 0.0)
    intake.expect(("router:1",), {RankId(0, 0): "rank:1"}, 1, 60.0)
    intake.take(world.router_window(1, 60.0), 60.0)
    assert intake.signals(60.5).silent == ()
