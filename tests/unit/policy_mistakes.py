"""The mistakes that users of other autoscalers reported, each as a scenario and as the safeguard that it takes out.

A scenario raises AssertionError where the policy makes the mistake. It passes as the policy is, and has to fail with
the safeguard taken out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from elasticmoe.common import sketch
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.signals import StepSample
from elasticmoe.services.scaler.policy import demand as demands
from elasticmoe.services.scaler.policy import guards, recommend, saturation, signals, step_model
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.facts import OperationFacts
from elasticmoe.services.scaler.policy.figures import MISSING, UNKNOWN, Missing, Unknown
from elasticmoe.services.scaler.policy.state import Reason
from tests.unit import policy_world as world


class Mistake(NamedTuple):
    """`place` in `where` is `instead` while the safeguard is out."""

    scenario: Callable[[], None]
    where: Any
    place: str
    instead: Any


def unreadable_is_not_idle() -> None:
    """1: zero, unknown and missing demand are three things."""
    plant = world.Plant(4)
    plant.run(200, 6.0)
    width = plant.width
    before = len(plant.targets)
    nothing = dict.fromkeys(
        ("admitted_per_s", "burst_per_s", "ttft_s", "itl_s", "step_s", "kv_used", "kv_share_most"), UNKNOWN
    )
    plant.run(200, 6.0, **nothing)
    assert plant.targets[before:] == []
    assert plant.width == width
    idle = world.Plant(2)
    idle.run(200, 0.0, ttft_s=MISSING, itl_s=MISSING, step_s=MISSING, kv_used=0.0)
    assert idle.width == 1
    assert all(not math.isnan(one.evidence.smoothed or 0.0) for one in idle.decisions)


def idle_windows_have_no_latency() -> None:
    """2: nothing is averaged over a window in which nothing was."""
    intake = signals.Intake(world.CONFIG)
    intake.expect({"router:1"}, {}, 1, 0.0)
    slow = ((sketch.index(9.0), 30),)
    for number in range(1, 31):
        busy = {"ttft": slow, "admitted": 30} if number <= 3 else {}
        intake.take_router(world.router_window(number, float(number), **busy), float(number))
    assert isinstance(intake.signals(30.0).ttft_s, Missing)


def demand_is_counted_at_admission() -> None:
    """3: what is admitted and does not finish is demand."""
    intake = signals.Intake(world.CONFIG)
    intake.expect({"router:1"}, {}, 1, 0.0)
    for number in range(1, 11):
        window = world.router_window(
            number, float(number), admitted=20, prompt_tokens=2_000, finished=1, output_tokens=9
        )
        intake.take_router(window, float(number))
    assert intake.signals(10.0).admitted_per_s == 20.0


def a_shrink_is_predicted_again() -> None:
    """4: what does for two is not halved for one."""
    plant = world.Plant(2)
    plant.run(400, 0.5, itl_s=0.07, step_s=0.07)  # slower than predicted, which only measuring tells
    assert set(plant.sizes) == {2}


def one_operation_at_a_time() -> None:
    """5: nothing is ordered while the last operation goes on."""
    plant = world.Plant(2, delay_s=40.0)
    plant.run(30, 9.0)
    assert len(plant.targets) == 1


def an_operation_that_cannot_end_is_left() -> None:
    """6: it is cancelled, once."""
    plant = world.Plant(2, delay_s=1e9)
    plant.operation = OperationFacts("operator-1", "grow", 3, plant.now, 2.0)
    plant.run(300, 1.0)
    cancelled = [one for one in plant.decisions if one.reason is Reason.CANCEL_STUCK]
    assert [one.op_id for one in cancelled] == ["operator-1"]


def warm_up_steps_teach_nothing() -> None:
    """7: the first steps after a cutover are slow and tell nothing of capacity."""
    models = step_model.StepModels()
    for number in range(200):
        tokens, kv, sequences = 37 * number % 900, 1_000 + 41 * number % 9_000, 1 + number % 13
        seconds = world.STEP.seconds(tokens, kv, sequences) * (9.0 if number < step_model.WARM_UP_STEPS else 1.0)
        models.learn(2, [StepSample(seconds, tokens, kv, sequences, number)])
        if number == step_model.WARM_UP_STEPS + 40:
            model = models.of(2)
            assert model is not None
            assert abs(model.seconds(500, 5_000, 8) / world.STEP.seconds(500, 5_000, 8) - 1) < 0.02


def a_spike_is_soon_over() -> None:
    """8: one latency of 90 times its objective does not keep the deployment large."""
    plant = world.Plant(4)
    plant.run(5, 4.0, ttft_s=180.0)
    plant.run(90, 4.0)
    assert (plant.state.saturation or 9.0) < 0.85


def a_vanished_rank_is_no_lower_demand() -> None:
    """9: the KV and queue of one that is silent are unknown."""
    intake = signals.Intake(world.CONFIG)
    intake.expect({"router:1"}, {RankId(0, 0): "rank:1", RankId(1, 0): "rank:2"}, 1, 0.0)
    for number in range(1, 20):
        at = float(number)
        intake.take_router(world.router_window(number, at), at)
        intake.take_rank(world.rank_window(number, at, kv_used=500, running=3), at)
        if number < 5:
            other = world.rank_window(number, at, rank=RankId(1, 0), incarnation="rank:2", kv_used=900, running=9)
            intake.take_rank(other, at)
    seen = intake.signals(19.0)
    assert seen.silent == ("r1t0",)
    assert isinstance(seen.kv_used, Unknown)


def others_capacity_does_not_count() -> None:
    """10: ranks that are not of this layout are not heard."""
    intake = signals.Intake(world.CONFIG)
    intake.expect({"router:1"}, {RankId(0, 0): "rank:1"}, 1, 0.0)
    intake.take_rank(world.rank_window(1, 1.0, kv_used=500, running=3), 1.0)
    foreign = world.rank_window(1, 1.0, rank=RankId(7, 0), incarnation="rank:other", kv_used=10, running=50)
    intake.take_rank(foreign, 1.0)
    assert intake.signals(1.5).running == 3.0


def holds_are_counted_in_seconds() -> None:
    """11: turns that come faster shorten no hold."""
    config = msgspec.structs.replace(world.CONFIG, down_over_s=5.0, fall_s=3.0)
    plant = world.Plant(2, config)
    plant.run(10, 4.0)
    width, begun = plant.width, plant.now
    while plant.now < begun + 45.0:
        plant.turn(plant.load(0.5))
        plant.now -= 0.9  # ten turns a second
    assert width > 2
    assert plant.width == width


def a_shrink_has_room_for_all_streams() -> None:
    """12: it is not ordered where the KV of the running streams does not fit in the rest."""
    plant = world.Plant(2, kv_tokens=10_000)
    for second in range(400):
        most = 9_000.0 if second % 30 == 0 else 2_000.0
        plant.run(1, 0.2, kv_used=most, kv_share_most=most / 20_000)
    assert set(plant.sizes) == {2}
    assert Reason.KV_WOULD_NOT_FIT in {one.reason for one in plant.decisions}


def an_order_is_not_repeated_as_another() -> None:
    """13: one that is not answered stays the same order."""
    plant = world.Plant(2)
    orders = []
    for _ in range(60):
        decision = plant.turn(plant.load(9.0))
        plant.operation = plant.accepted = None  # it never arrives
        if decision.acts:
            orders.append((decision.op_id, decision.target))
    assert len(set(orders)) == 1
    assert 2 <= len(orders) <= 7


def _as_zero(seen: Any) -> Demand:
    """What cannot be read is nothing."""
    known = isinstance(seen.admitted_per_s, float)
    return demands.Demand(seen.admitted_per_s if known else 0.0, 1_200.0, 220.0, 1_200.0)


def _all_windows(self: Any, routers: Any, since: float) -> Any:
    recent = [window for router in routers for _, window in router.windows]
    return signals._tail(sketch.merge(one.ttft for one in recent), 0.95), signals._mean(())


def _finished(routers: Any, since: float) -> Any:
    recent = [window for router in routers for ended, window in router.windows if ended > since]
    return sum(one.finished for one in recent) / len(recent), 0.0


def _every_turn(config: Any, state: Any, now: float) -> bool:
    """Twenty turns are enough."""
    return bool(state.recent.entries) and now - (state.grown_s or 0.0) > 2.0


def _anyone(self: Any, window: Any, arrived_s: float) -> bool:
    """Whoever tells is one of ours."""
    self._ranks.expect(dict(self._ranks._expected) | {window.rank: window.incarnation}, 0.0)
    return _take_rank(self, window, arrived_s)


def _again(turn: Any, state: Any) -> Any:
    """An order is forgotten at once."""
    return msgspec.structs.replace(state, order=None)


_take_rank = signals.Intake.take_rank
_silent = signals.Intake._silent

MISTAKES = {
    "1 unknown demand is zero": Mistake(unreadable_is_not_idle, recommend, "demand_of", _as_zero),
    "2 latencies of idle windows": Mistake(idle_windows_have_no_latency, signals.Intake, "_latencies", _all_windows),
    "3 demand at completion": Mistake(demand_is_counted_at_admission, signals, "_rates", _finished),
    "4 a shrink without re-prediction": Mistake(a_shrink_is_predicted_again, guards, "repredicted", lambda *_: 0.0),
    "5 acting during an operation": Mistake(
        one_operation_at_a_time,
        recommend,
        "_meanwhile",
        lambda turn, state, evidence, _: recommend._order(turn, state, evidence, turn.width + 1, Reason.GROW_PANIC),
    ),
    "6 waiting for ever": Mistake(an_operation_that_cannot_end_is_left, recommend, "is_stuck", lambda *_: False),
    "7 warm-up samples": Mistake(warm_up_steps_teach_nothing, step_model.Samples, "is_warm", lambda *_: True),
    "8 unclamped signals": Mistake(a_spike_is_soon_over, saturation, "_clamped", lambda figure, _: figure),
    "9 a vanished rank": Mistake(
        a_vanished_rank_is_no_lower_demand,
        signals.Intake,
        "_silent",
        lambda self, now: {key: at for key, at in _silent(self, now).items() if isinstance(key, str)},
    ),
    "10 capacity of others": Mistake(others_capacity_does_not_count, signals.Intake, "take_rank", _anyone),
    "11 holds in turns": Mistake(holds_are_counted_in_seconds, guards, "is_held_long_enough", _every_turn),
    "12 no room for streams": Mistake(a_shrink_has_room_for_all_streams, guards, "room", lambda *_: math.inf),
    "13 an order sent anew": Mistake(an_order_is_not_repeated_as_another, recommend, "_answered", _again),
}
