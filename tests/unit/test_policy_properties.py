"""What holds of the policy whatever the load: Hypothesis looks for one where it does not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.protocol.signals import StepSample
from elasticmoe.services.scaler.policy import step_model
from elasticmoe.services.scaler.policy.config import PolicyConfig, policy_config
from elasticmoe.services.scaler.policy.facts import ChangePrice, DeploymentFacts, OperationFacts
from elasticmoe.services.scaler.policy.figures import UNKNOWN, Missing, Unknown
from elasticmoe.services.scaler.policy.recommend import recommend
from elasticmoe.services.scaler.policy.saturation import measured
from elasticmoe.services.scaler.policy.signals import Intake
from elasticmoe.services.scaler.policy.state import PolicyState, Reason, ScaleOrder
from tests.unit import policy_world as world

RATES = st.floats(0.0, 12.0)
WIDTHS = st.integers(1, 8)
FEW = settings(max_examples=25)


def num_turns(plant: world.Plant) -> int:
    """Changes of the other direction than the one before."""
    changes = [after - before for before, after in pairwise(plant.sizes) if after != before]
    return sum((one > 0) != (other > 0) for one, other in pairwise(changes))


@FEW
@example(1.625, 1, 1.25)  # that much work shows little at two replicas, where a step's own time is most of it
@given(RATES, WIDTHS, st.floats(0.8, 1.25))
def test_a_constant_load_never_flaps(rate: float, width: int, scale: float) -> None:
    """Wherever it begins, it goes one way and stays, though the model be wrong by a quarter."""
    plant = world.Plant(width, scale=scale)
    plant.run(1_500, rate)
    assert num_turns(plant) <= 1, plant.sizes
    assert len(set(plant.sizes[-300:])) == 1


@FEW
@given(WIDTHS, RATES, st.lists(RATES, min_size=1, max_size=30))
def test_unknown_never_shrinks(width: int, before: float, rates: list[float]) -> None:
    plant = world.Plant(width)
    plant.run(100, before)
    at, running = plant.width, plant.operation
    least = at if running is None or running.target is None else min(at, running.target)  # what was known before
    for rate in rates:
        decisions = plant.run(20, rate, admitted_per_s=UNKNOWN, burst_per_s=UNKNOWN, silent=("router:2",))
        assert all(one.target is None or one.target > at for one in decisions if plant.operation is None)
    assert min(plant.sizes[100:]) >= least
    assert plant.decisions[-1].target is None


@FEW
@given(WIDTHS, st.floats(0.0, 6.0), st.floats(0.0, 0.02))
def test_a_growing_load_never_shrinks(width: int, begin: float, per_s: float) -> None:
    """From where it fits: what is too large for the first load may become smaller before."""
    plant = world.Plant(width)
    plant.run(900, begin)
    settled = len(plant.sizes)
    for second in range(400):
        plant.run(1, begin + per_s * second)
    assert all(after >= before for before, after in pairwise(plant.sizes[settled:]))


@FEW
@given(WIDTHS, WIDTHS, WIDTHS, st.lists(st.floats(0.0, 40.0), min_size=1, max_size=40))
def test_targets_are_within_the_bounds(width: int, one: int, other: int, rates: list[float]) -> None:
    config = msgspec.structs.replace(world.CONFIG, replicas_min=min(one, other), replicas_max=max(one, other))
    plant = world.Plant(width, config)
    for rate in rates:
        plant.run(20, rate)
    assert all(config.replicas_min <= target <= config.replicas_max for target in plant.targets)
    assert plant.width >= config.replicas_min


@FEW
@given(WIDTHS, st.lists(st.floats(0.0, 20.0), min_size=5, max_size=40), st.floats(1.0, 60.0))
def test_there_is_one_decision_for_an_operation(width: int, rates: list[float], delay_s: float) -> None:
    plant = world.Plant(width, delay_s=delay_s)
    for rate in rates:
        plant.run(15, rate)
    acting = [one.op_id for one in plant.decisions if one.acts and one.reason is not Reason.REPEAT_ORDER]
    assert len(acting) == len(set(acting))
    times = [float(str(op_id).rsplit("-", 1)[1]) for op_id in acting]
    assert all(len([at for at in times if begin <= at < begin + 600.0]) <= 8 for begin in times)


def test_a_step_of_load_is_answered_within_three_seconds() -> None:
    plant = world.Plant(2)
    plant.run(120, 2.5)
    assert plant.targets == []
    decisions = plant.run(3, 7.5)
    assert next(one.target for one in decisions if one.target is not None) == 4


def test_one_growth_is_at_most_to_four_times_the_size() -> None:
    plant = world.Plant(1)
    plant.run(30, 1.0)
    assert plant.targets == []
    assert [one.target for one in plant.run(2, 200.0) if one.target is not None] == [4]


def test_the_more_comes_the_sooner_it_grows_and_noise_gathers_to_nothing() -> None:
    waits = []
    for rate in (20.0, 7.0, 4.6):
        plant = world.Plant(2)
        plant.run(30, 2.5)
        calm = len(plant.decisions)
        plant.run(30, rate)
        waits.append(next(at for at, one in enumerate(plant.decisions[calm:]) if one.target is not None))
    assert waits == sorted(waits)
    assert waits[0] < waits[-1] <= 4
    plant = world.Plant(1)
    for second in range(300):
        plant.run(1, 1.2, burst_per_s=3.0 if second % 6 == 0 else 0.8)
    assert plant.targets == []


def test_what_one_long_prompt_takes_is_no_queue() -> None:
    facts = world.widths(2)
    for tokens, expected in ((30_000, 0.0), (100, 2.0)):
        seen = world.signals(50.0, 2.0, queued=1, oldest_queued_s=2.5, oldest_prompt_tokens=tokens)
        raw = measured(seen, facts, world.demand(2.0), world.CONFIG, changed_s=None, drained=True)
        assert raw.queue_age == pytest.approx(expected, abs=0.2)


def test_what_waited_before_a_change_tells_nothing_of_the_size_after_it() -> None:
    seen = world.signals(50.0, 2.0, queued=9, oldest_queued_s=9.0, itl_s=9.0, step_s=9.0)
    raw = measured(seen, world.widths(2), world.demand(2.0), world.CONFIG, changed_s=49.9, drained=False)
    assert raw.itl is None
    assert raw.queue_age == pytest.approx(0.0, abs=0.1)


def test_a_shrink_is_tried_on_the_bursts_of_the_last_minutes() -> None:
    """Bursts that come each minute keep the size that they need; the same load, even, does not."""
    sizes = []
    for burst, calm in ((24.0, 0.0), (4.0, 4.0)):
        plant = world.Plant(8)
        for second in range(900):
            rate = burst if second % 60 < 10 else calm
            plant.run(1, 4.0, burst_per_s=rate)
        sizes.append(plant.width)
        reasons = {one.reason for one in plant.decisions}
        assert (Reason.WOULD_BE_LATE in reasons) == (burst != calm)
    assert sizes[0] > sizes[1]


def test_a_forecast_within_what_chance_makes_of_arrivals_grows_nothing() -> None:
    """A steady rise is met before it is there, by what it will be; the noise of few requests is no rise."""
    plant = world.Plant(1)
    for second in range(400):
        plant.run(1, 1.0 + (0.6 if second // 10 % 2 else 0.0))
    assert plant.targets == []


def test_a_shrink_gives_way_to_a_panic_before_its_commit_only() -> None:
    for is_committed, expected in ((False, Reason.SUPERSEDE_SHRINK), (True, Reason.OPERATION)):
        plant = world.Plant(4, delay_s=1e9)
        plant.operation = OperationFacts("policy-1", "shrink", 3, plant.now, 1.0, is_committed)
        (decision,) = plant.run(1, 30.0)
        assert decision.reason is expected
        assert decision.supersedes == (None if is_committed else "policy-1")


def test_kv_alone_makes_it_grow() -> None:
    plant = world.Plant(2)
    plant.run(5, 0.5, kv_used=360_000.0, kv_share_most=0.9)
    assert plant.targets[0] > 2


def test_after_a_loss_it_only_grows_and_in_recovery_it_holds() -> None:
    now, seen = 2_000.0, world.signals(2_000.0, 0.1)
    state = PolicyState(known_since_s=0.0)
    lost = DeploymentFacts(width=4, lost_s=now - 100.0)
    assert recommend(world.CONFIG, seen, lost, world.widths, world.prices, state, now).reason is Reason.AFTER_LOSS
    bad = DeploymentFacts(width=4, is_recovering=True)
    assert recommend(world.CONFIG, seen, bad, world.widths, world.prices, state, now).reason is Reason.RECOVERING


def test_a_shrink_that_costs_more_than_it_brings_is_not_made() -> None:
    state = PolicyState(known_since_s=0.0, dwell_s=50.0)
    facts = DeploymentFacts(width=4)
    for seconds, reason in ((1.0, Reason.SHRINK_IDLE), (60.0, Reason.NOT_WORTH)):
        price = ChangePrice(seconds, seconds, 1 << 40, 0.1)
        found = recommend(world.CONFIG, world.signals(9e3, 0.1), facts, world.widths, lambda _, p=price: p, state, 9e3)
        assert found.reason is reason


def test_blind_for_long_nothing_is_done_and_it_is_said() -> None:
    plant = world.Plant(2)
    plant.run(60, 1.0)
    decisions = plant.run(40, 1.0, admitted_per_s=UNKNOWN, silent=("router:2",), oldest_queued_s=9.0)
    assert decisions[0].reason is Reason.GROW_BACKLOG_BLIND
    assert decisions[-1].reason is Reason.BLIND
    assert decisions[-1].evidence.is_blind


@pytest.mark.parametrize("mode", ["advise", "off"])
def test_other_modes_do_nothing(mode: str) -> None:
    plant = world.Plant(2, msgspec.structs.replace(world.CONFIG, mode=mode))
    decisions = plant.run(30, 9.0)
    assert not any(one.acts for one in decisions)
    assert any(one.target for one in decisions) == (mode == "advise")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"ttft_s": 0.0}, "ttft_s: has to be a number of at least 0.001"),
        ({"replicas_min": 5, "replicas_max": 4}, "replicas_min is 5, above replicas_max, which is 4"),
        ({"mode": "auto"}, "mode: has to be one of"),
        ({"itl": 0.1}, "has no field 'itl'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_words(raw: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        policy_config(raw)
    assert policy_config({"ttft_s": 1.5}) == PolicyConfig(ttft_s=1.5)


def test_lost_doubled_late_and_foreign_windows() -> None:
    intake = Intake(world.CONFIG)
    intake.expect({"router:1"}, {RankId(0, 0): "rank:1"}, 2, 0.0)
    for number in (1, 2, 4, 4, 5, 3):  # 3 comes last, 4 twice
        window = world.router_window(number, 100.0 + number, admitted=10, prompt_tokens=10)
        intake.take_router(window, 5.0 if number == 3 else float(number))
    assert intake.signals(5.0).admitted_per_s == 10.0
    intake.take_router(world.router_window(1, 5.0, router="router:9", admitted=99), 5.0)
    assert intake.signals(5.0).admitted_per_s == 10.0
    intake.take_rank(world.rank_window(1, 1.0, epoch=1, running=9), 5.0)
    assert isinstance(intake.signals(5.0).running, Unknown)
    intake.take_rank(world.rank_window(2, 1.0, epoch=2, running=9), 5.0)
    assert intake.signals(5.0).running == 9.0
    assert intake.signals(5.0).silent == ()
    assert isinstance(intake.signals(12.0).admitted_per_s, Unknown)
    assert isinstance(intake.signals(12.0).ttft_s, Missing)


def test_routers_add_up_and_a_silent_one_makes_the_sum_unknown() -> None:
    intake = Intake(world.CONFIG)
    intake.expect({"router:1", "router:2"}, {}, 1, 0.0)
    for number in range(1, 12):
        intake.take_router(world.router_window(number, float(number), admitted=3), float(number))
        if number < 6:
            other = world.router_window(number, 7e5 + number, router="router:2", admitted=4, queued=2, open=2)
            intake.take_router(other, float(number))
        if number == 5:
            assert intake.signals(5.0).admitted_per_s == 7.0
            assert intake.signals(5.0).queued == 2
    seen = intake.signals(11.0)
    assert isinstance(seen.admitted_per_s, Unknown)
    assert seen.silent == ("router:2",)
    assert seen.silent_since_s == 5.0


@given(st.tuples(*[st.floats(0.0, 1.0)] * 4), st.integers(0, 2**32 - 1))
@FEW
def test_a_step_model_is_found_again(scale: tuple[float, ...], seed: int) -> None:
    import random

    rng = random.Random(seed)
    true = step_model.StepModel(0.01 + 0.05 * scale[0], 1e-4 * scale[1], 1e-6 * scale[2], 1e-3 * scale[3])
    models = step_model.StepModels()
    for number in range(100):
        work = rng.randrange(2_048), rng.randrange(90_000), rng.randrange(1, 64)
        models.learn(3, [StepSample(true.seconds(*work), *work, 20 + number)])
    found = models.of(4)
    assert found is not None
    assert min(found.a, found.b, found.c, found.d) >= 0.0
    assert found.seconds(1_000, 40_000, 30) == pytest.approx(true.seconds(1_000, 40_000, 30), rel=1e-6)


def test_of_the_steps_of_hundreds_of_ranks_some_of_many_ranks_are_learned() -> None:
    models, true = step_model.StepModels(), step_model.StepModel(0.02, 1e-5, 1e-7, 1e-3)
    told = [(at % 8 * 64, rank * 100, at % 8 + rank % 3) for rank in range(384) for at in range(8)]
    models.learn(384, [StepSample(true.seconds(*work), *work, 50) for work in told])
    samples = models._samples[384]
    assert 16 <= len(samples) <= step_model.LEARNED_MAX
    kept = [one for bucket in samples._buckets.values() for one in bucket]
    assert len({one.kv_tokens for one in kept}) >= 16, "of many ranks"
    assert len({one.prefill_tokens for one in kept}) >= 4, "and of many places in what a rank tells"
    models.learn(2, [])
    models.learn(1, [StepSample(0.02, 1, 1, 1, 50)])
    assert (len(models._samples[2]), len(models._samples[1])) == (0, 1)


def test_of_hundreds_of_ranks_the_steps_of_many_are_handed_on_and_of_few_all() -> None:
    for num, most in ((3, 3), (32, 32), (64, 32), (384, 32)):
        intake = Intake(world.CONFIG)
        ranks = {RankId(at, 0): f"rank:{at}" for at in range(num)}
        intake.expect((), ranks, 1, 0.0)
        for rank, name in ranks.items():
            steps = (StepSample(0.02, 1, rank.replica, 1, 50),)
            window = world.rank_window(1, 1.0, rank=rank, incarnation=name, num_steps=1, steps=steps)
            assert intake.take(window, 1.0)
        handed_on = {step.kv_tokens for step in intake.take_steps()}
        assert most / 2 <= len(handed_on) <= most
        assert max(handed_on) - min(handed_on) >= 0.9 * (num - 1)
        assert intake.take_steps() == []


def test_one_operating_point_does_not_push_out_the_others() -> None:
    samples = step_model.Samples()
    for number in range(200):
        samples.add(StepSample(0.05, 2_000 if number < 12 else 0, 50_000 if number < 12 else 100, 3, 50))
    assert len(samples) == step_model.SAMPLES
    assert any(one.prefill_tokens == 2_000 for bucket in samples._buckets.values() for one in bucket)


@FEW
@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{name: st.sampled_from([5e-324, 1e-300, 0.001, 86_400.0]) for name in ("ttft_s", "itl_s", "rise_s")},
            **{name: st.sampled_from([5e-324, 0.001, 1.0]) for name in ("kv_share_max", "quantile", "down_share")},
            **{name: st.sampled_from([5e-324, 0.001]) for name in ("up_min", "up_max")},
            "unknown_after_s": st.sampled_from([5e-324, 0.001]),
        },
    )
)
def test_what_is_accepted_can_be_decided_by(raw: dict[str, float]) -> None:
    """A policy that is kept and ends each scaler which follows it would end them all."""
    try:
        config = policy_config({"mode": "act", "up_min": 0.001, **raw})
    except ConfigError:
        return
    plant = world.Plant(2, config=config)
    plant.run(3, 0.0)
    plant.run(3, 1e6, queued=1_000, oldest_queued_s=1e5, ttft_s=1e3, itl_s=1e3)


@pytest.mark.parametrize("field", ["ttft_s", "up_max"])
def test_a_number_next_to_zero_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.*0.001"):
        policy_config({field: 5e-324})


def with_order(target: int, supersedes: str | None = None) -> PolicyState:
    return PolicyState(order=ScaleOrder("policy-1", target, 999.0, 2, world.CONFIG, supersedes), num_orders=1)


@pytest.mark.parametrize("changes", [{"mode": "advise"}, {"replicas_max": 3}, {"replicas_min": 5}])
def test_an_order_that_another_policy_would_not_give_is_not_waited_for(changes: dict[str, Any]) -> None:
    """It would be repeated: beyond the bounds, or for ever where nothing is done."""
    config = msgspec.structs.replace(world.CONFIG, **changes)
    facts, seen = DeploymentFacts(width=2), world.signals(1_000.0)
    decision = recommend(config, seen, facts, world.widths, world.prices, with_order(4), 1_020.0)
    assert decision.reason not in (Reason.AWAITING, Reason.REPEAT_ORDER)
    assert decision.target != 4
    kept = recommend(world.CONFIG, seen, facts, world.widths, world.prices, with_order(4), 1_020.0)
    assert (kept.reason, kept.target) == (Reason.REPEAT_ORDER, 4)


@pytest.mark.parametrize(("op_id", "is_waited_for"), [("somebody's", False), ("given up", True)])
def test_somebody_elses_operation_ends_an_order(op_id: str, is_waited_for: bool) -> None:
    running = OperationFacts(op_id, "grow", 5, 999.0, 2.0)
    facts, seen = DeploymentFacts(width=2, operation=running), world.signals(1_000.0)
    state = with_order(3, "given up")
    decision = recommend(world.CONFIG, seen, facts, world.widths, world.prices, state, 1_001.0)
    assert (decision.state.order is not None) == is_waited_for


def test_a_cancel_that_was_only_advised_is_done_once_the_policy_acts() -> None:
    facts = DeploymentFacts(width=2, operation=OperationFacts("op", "grow", 5, 0.0, 2.0))
    seen, advise = world.signals(1_000.0), msgspec.structs.replace(world.CONFIG, mode="advise")
    told = recommend(advise, seen, facts, world.widths, world.prices, PolicyState(), 1_000.0)
    assert (told.reason, told.acts) == (Reason.CANCEL_STUCK, False)
    done = recommend(world.CONFIG, seen, facts, world.widths, world.prices, told.state, 1_001.0)
    assert (done.reason, done.acts) == (Reason.CANCEL_STUCK, True)
    again = recommend(world.CONFIG, seen, facts, world.widths, world.prices, done.state, 1_002.0)
    assert again.reason == Reason.OPERATION


def test_another_size_than_an_order_was_for_ends_it() -> None:
    facts, seen = DeploymentFacts(width=5, changed_s=1_003.0), world.signals(1_000.0)
    decision = recommend(world.CONFIG, seen, facts, world.widths, world.prices, with_order(3), 1_020.0)
    assert decision.target != 3


def test_bounds_above_the_devices_are_kept_as_far_as_devices_go() -> None:
    config = msgspec.structs.replace(world.CONFIG, replicas_min=4)
    seen = world.signals(1_000.0, 0.0)
    few = DeploymentFacts(width=1, available=3)
    decision = recommend(config, seen, few, world.widths, world.prices, PolicyState(), 1_000.0)
    assert (decision.reason, decision.target) == (Reason.GROW_BOUND, 3)
    all_ = DeploymentFacts(width=3, available=3)
    decision = recommend(config, seen, all_, world.widths, world.prices, PolicyState(), 1_000.0)
    assert (decision.reason, decision.target) == (Reason.AT_MAX, None), "it has not the fewest that are allowed"


def test_a_flap_does_not_end_all_shrinks() -> None:
    """However soon a growth followed on a shrink, it shrinks again when the load has gone."""
    plant = world.Plant(3)
    plant.state = msgspec.structs.replace(plant.state, dwell_s=2.0, flap_s=plant.now, hold_s=120.0)
    plant.run(600, 0.0)
    assert plant.width == 1


def test_a_turn_asks_for_one_price_however_many_widths_it_tries() -> None:
    """Of a plan for hundreds of devices, which takes a tenth of a second."""
    asked: list[int] = []

    def price(width: int) -> ChangePrice:
        asked.append(width)
        return world.prices(width)

    plant = world.Plant(8)
    for _ in range(200):
        before = len(asked)
        seen = plant.load(0.1)
        recommend(plant.config, seen, plant.facts(), plant.widths, price, plant.state, plant.now)
        assert len(asked) - before <= 1
        plant.turn(seen)
    assert asked[0] == 4, "a half at once, and only that is priced"
