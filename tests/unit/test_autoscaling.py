"""What the policy is told of the deployment, and what its decisions ask of the scaler."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.services.scaler.actions import CancelStuck, ScaleTo
from elasticmoe.services.scaler.control import autoscaling
from elasticmoe.services.scaler.control.audit_log import TurnTaken, is_notable, turn_taken
from elasticmoe.services.scaler.control.autoscaling import NO_PLAN_S, PRICE_S, Autoscaling, follow_load, remembered
from elasticmoe.services.scaler.control.reconciler import reconcile
from elasticmoe.services.scaler.control.state import State, Status
from elasticmoe.services.scaler.observation import Load
from elasticmoe.services.scaler.operation.operation import Figures, Operation, Planned
from elasticmoe.services.scaler.planning.plan import Rates
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import ChangePrice
from elasticmoe.services.scaler.policy.figures import Signals
from elasticmoe.services.scaler.policy.state import Decision, PolicyState, Reason
from elasticmoe.services.scaler.policy.step_model import StepModel
from tests.unit.transitions import UP, World, layout_of, operation_of

DEVICES = tuple(f"host:{slot}" for slot in range(4))
EXPERTS = tuple(len(homes) for homes in UP.before.homes)
SIZES = Sizes(100, (10,) * len(EXPERTS), (8,) * len(EXPERTS))
MEMORY = MemoryForecast(
    budgets=dict.fromkeys(DEVICES, 2_000),
    footprint=1_000,
    ledger=16,
    kv_handle_bytes=32,
    kv_handles_min=2,
    kv_handles=dict.fromkeys(DEVICES, 20),
    kv_handles_load=2,
)
STEPS = {2: StepModel(0.01, 1e-4, 1e-7, 1e-3)}


def signals(requests_per_s: float = 1.0, *, queued: int = 0, age_s: float = 0.0, **changes: Any) -> Signals:
    known = {
        "admitted_per_s": requests_per_s,
        "burst_per_s": requests_per_s,
        "prompt_tokens": 100.0,
        "output_tokens": 50.0,
        "uncached_share": 1.0,
        "queued_prefill_tokens": 100.0 * queued,
        "running": 3.0,
        "kv_used": 300.0,
        "kv_share_most": 0.3,
    }
    return Signals(at_s=0.0, queued=queued, oldest_queued_s=age_s, **{**known, **changes})


BUSY = signals(60.0, queued=30, age_s=5.0, kv_share_most=0.95)


def load(seen: Signals, *, mode: str = "act", **changes: Any) -> Load:
    base = Load(
        config=PolicyConfig(mode=mode, replicas_max=4, up_after_s=0.0),  # type: ignore[arg-type]
        signals=seen,
        steps=STEPS,
        sizes=SIZES,
        memory=MEMORY,
        devices=DEVICES,
        rates=Rates(),
        kv_handle_tokens=64,
        step_tokens_max=128,
    )
    return msgspec.structs.replace(base, **changes)


def decide(
    seen: Load, now: float = 100.0, before: Autoscaling | None = None, operation: Operation | None = None, **facts: Any
) -> tuple[Autoscaling, tuple[Any, ...]]:
    known: dict[str, Any] = {"is_serving": True, "is_lossy": False, "last": None, **facts}
    last = known.pop("last")
    return follow_load(before or Autoscaling(), seen, UP.before, operation, last, now, **known)


def test_a_deployment_that_is_too_small_is_let_grow_under_an_id_of_its_own() -> None:
    after, actions = decide(load(BUSY))
    (action,) = actions
    assert isinstance(action, ScaleTo)
    assert (action.replicas, action.reason, action.supersedes) == (4, Reason.GROW_PANIC.value, "")
    assert after.decision is not None
    assert (after.decision.op_id, after.decision.target) == (action.op_id, 4)
    again, actions = decide(load(BUSY), 101.0, after)
    assert actions == (), "one decision, one order"
    assert again.decision is not None
    assert again.decision.reason is Reason.AWAITING


@pytest.mark.parametrize(("shares_cores", "factors"), [(False, [1, 1, 1]), (True, [0.5, 1, 2])])
def test_replicas_that_share_cores_are_the_slower_the_more_there_are(shares_cores: bool, factors: list[float]) -> None:
    seen = load(BUSY, shares_cores=shares_cores)
    facts = [autoscaling._width_facts(seen, EXPERTS, 1, width) for width in (1, 2, 4)]
    assert [one.step for one in facts] == [STEPS[2].slowed(factor) for factor in factors]
    assert STEPS[2].slowed(2).seconds(100, 1_000, 10) == pytest.approx(2 * STEPS[2].seconds(100, 1_000, 10))


@pytest.mark.parametrize(
    ("cores", "tp", "factors", "shares"),
    [
        (0, 1, [0.5, 1, 2], [True] * 3),  # no pool has said
        (32, 1, [1, 1, 1], [False] * 3),
        (16, 1, [1, 1, 1], [False, False, True]),  # of four each has four, of five less
        (8, 1, [1, 1, 2], [False, True, True]),
        (6, 1, [0.75, 1, 2], [False, True, True]),  # two use all six, one no more than four
        (8, 2, [0.5, 1, 2], [True] * 3),
        (16, 2, [1, 1, 2], [False, True, True]),
    ],
)
def test_replicas_that_use_no_more_of_the_cores_are_as_fast_as_before(
    cores: int, tp: int, factors: list[float], shares: list[bool]
) -> None:
    seen = load(BUSY, shares_cores=True, cores=cores, threads_max=4)
    facts = [autoscaling._width_facts(seen, EXPERTS, tp, width) for width in (1, 2, 4)]
    assert [one.step for one in facts] == [STEPS[2].slowed(factor) for factor in factors]
    assert [one.shares_cores for one in facts] == shares


def test_a_growth_that_brings_cores_that_nobody_used_is_ordered_for_their_sake() -> None:
    busy = signals(60.0, queued=30, age_s=5.0)
    _, actions = decide(load(busy, shares_cores=True, cores=8, threads_max=2))
    assert [action.replicas for action in actions] == [4]
    _, actions = decide(load(busy, shares_cores=True, cores=8, threads_max=4))
    assert actions == ()


@pytest.mark.parametrize(("threads_max", "ordered"), [(3, [3]), (4, [])])
def test_a_growth_that_brings_the_last_cores_is_ordered_though_each_replica_has_fewer(
    threads_max: int, ordered: list[int]
) -> None:
    late, steps = signals(0.1, age_s=5.0, prompt_tokens=2000.0), {2: StepModel(0.1, 1e-4, 1e-7, 1e-3)}
    _, actions = decide(load(late, shares_cores=True, cores=8, threads_max=threads_max, steps=steps))
    assert [action.replicas for action in actions] == ordered


def test_a_growth_that_brings_no_cores_is_not_ordered_for_their_sake() -> None:
    busy = signals(60.0, queued=30, age_s=5.0)
    _, actions = decide(load(busy))
    assert [action.replicas for action in actions] == [4]
    after, actions = decide(load(busy, shares_cores=True))
    assert actions == ()
    assert after.decision is not None
    assert after.decision.reason is Reason.OUT_OF_REACH
    _, actions = decide(load(BUSY, shares_cores=True))
    assert [action.replicas for action in actions] == [4], "it brings memory"


def test_advice_says_the_same_and_does_nothing() -> None:
    after, actions = decide(load(BUSY, mode="advise"))
    assert actions == ()
    assert after.decision is not None
    assert (after.decision.target, after.decision.reason, after.decision.acts) == (4, Reason.GROW_PANIC, False)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [({"is_serving": False}, Reason.RECOVERING), ({"is_lossy": True}, Reason.RECOVERING)],
)
def test_recovery_goes_first(facts: dict[str, bool], reason: Reason) -> None:
    after, actions = decide(load(BUSY), **facts)
    assert actions == ()
    assert after.decision is not None
    assert after.decision.reason is reason


def test_after_a_loss_it_may_only_grow() -> None:
    after, _ = decide(load(signals(0.0)), is_lossy=True)
    quiet = load(signals(0.0))
    for second in range(300):
        after, actions = decide(quiet, 101.0 + second, after)
        assert actions == ()
    assert after.decision is not None
    assert after.decision.reason is Reason.AFTER_LOSS
    _, actions = decide(load(BUSY), 402.0, after)
    assert [type(action) for action in actions] == [ScaleTo]


def test_devices_that_may_not_be_used_bound_it() -> None:
    after, actions = decide(load(BUSY, devices=DEVICES[:3]))
    assert [action.replicas for action in actions] == [3]
    after, actions = decide(load(BUSY, devices=DEVICES[:2]))
    assert actions == ()
    assert after.decision is not None
    assert after.decision.reason is Reason.AT_MAX


def shrinking(**changes: Any) -> Operation:
    planned = Planned(1, 2, 2, 1, (), ("r1t0",), 0, 0, 0, 0, 0, 2.0, 30.0, {})
    base = msgspec.structs.replace(operation_of(UP), kind="scale_down", planned=planned, phase="prepare", elapsed_s=1.0)
    return msgspec.structs.replace(base, **changes)


def test_a_shrink_gives_way_to_a_panic_before_its_commit_and_not_after_it() -> None:
    _, actions = decide(load(BUSY), operation=shrinking())
    (action,) = actions
    assert (action.supersedes, action.replicas) == ("op", 4)
    for committed in ({"phase": "commit"}, {"phase": "release"}, {"phase": "prepare", "leg": 1}):
        after, actions = decide(load(BUSY), operation=shrinking(**committed))
        assert actions == ()
        assert after.decision is not None
        assert after.decision.reason is Reason.OPERATION


def test_a_shrink_does_not_give_way_while_a_rank_is_replaced() -> None:
    """Found by the simulation: requests wait for the rank, and no width would serve them sooner."""
    after, actions = decide(load(BUSY), operation=shrinking(), is_serving=False)
    assert actions == ()
    assert after.decision is not None
    assert after.decision.reason is Reason.OPERATION
    stuck = shrinking(elapsed_s=500.0)
    _, actions = decide(load(BUSY), operation=stuck, is_serving=False)
    assert actions == (CancelStuck("op"),), "it may wait for that very rank"


def test_an_operation_that_does_not_come_to_its_commit_is_cancelled_once() -> None:
    stuck = shrinking(kind="scale_up", elapsed_s=500.0)
    after, actions = decide(load(signals()), operation=stuck)
    assert actions == (CancelStuck("op"),)
    _, actions = decide(load(signals()), 101.0, after, operation=stuck)
    assert actions == ()


def test_how_long_the_last_growth_took_is_what_the_next_one_is_expected_to_take() -> None:
    done = msgspec.structs.replace(operation_of(UP), phase="done")
    grown = msgspec.structs.replace(
        done, accounting=msgspec.structs.replace(done.accounting, figures=Figures(capacity_s=7.5))
    )
    after, _ = decide(load(signals()), last=grown)
    assert after.reaction_s == 7.5
    after, _ = decide(load(signals()), 101.0, after, last=done)
    assert after.reaction_s == 7.5, "a shrink says nothing of it"


def test_latencies_are_of_the_present_size_once_it_has_changed() -> None:
    after, _ = decide(load(signals()))
    assert after.resized_at is None
    wider = layout_of(3, (0, 1, 2))
    after, _ = follow_load(after, load(signals()), wider, None, None, 105.0, is_serving=True, is_lossy=False)
    assert (after.resized_at, after.replicas) == (105.0, 3)


def test_the_reconciler_asks_the_policy_where_there_is_a_load_and_what_it_did_is_recorded_to_be_made_again() -> None:
    seen = World(UP.before).seen()
    state = State(status=Status("serving", ""), ever_served=True, stall_s=60.0)
    idle = reconcile(state, seen, 100.0)
    assert idle.state.autoscaling == Autoscaling()
    shown = msgspec.structs.replace(seen, load=load(BUSY))
    step = reconcile(idle.state, shown, 101.0)
    assert [action.replicas for action in step.actions if isinstance(action, ScaleTo)] == [4]
    assert is_notable(idle.state, step)
    record = turn_taken(idle.state, shown, 101.0, step)
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=TurnTaken)
    again = reconcile(read.before, read.seen, read.now)
    assert turn_taken(read.before, read.seen, read.now, again) == record


def test_a_deployment_that_nobody_asks_anything_shrinks_however_slow_its_steps_are() -> None:
    """Found by chaos on a busy machine: a step took longer than the objective at every width, and none was left."""
    slow = {2: StepModel(0.5, 1e-4, 1e-7, 1e-3)}
    idle = signals(0.0, running=0.0, kv_used=0.0, kv_share_most=0.0)

    def last(seen: Signals) -> Decision:
        after = Autoscaling()
        for second in range(130):
            after, actions = decide(load(seen, steps=slow), 100.0 + second, after)
            if actions:
                break
        assert after.decision is not None
        return after.decision

    assert (last(idle).reason, last(idle).target) == (Reason.SHRINK_IDLE, 1)
    assert last(signals(0.1)).reason is Reason.WOULD_SATURATE, "a request would be too slow, and slower there"


def test_the_planner_is_asked_for_a_price_again_only_where_it_may_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()
    known: list[ChangePrice | None] = [ChangePrice(1.0, 1.0, 10, 0.01)]

    def price(*_: object) -> ChangePrice | None:
        asked.append(now)
        return known[0]

    monkeypatch.setattr(autoscaling, "_price", price)
    idle = load(signals(0.0, running=0.0, kv_used=0.0, kv_share_most=0.0))
    dear = msgspec.structs.replace(idle, config=PolicyConfig(mode="act", price_factor=1_000.0))
    after, now = Autoscaling(), 0.0
    for second in range(70 + int(PRICE_S)):
        now = float(second)
        after, actions = decide(dear, now, after)
        assert actions == ()
    assert after.decision is not None
    assert after.decision.reason is Reason.NOT_WORTH
    assert [at - asked[0] for at in asked] == [0.0, PRICE_S]
    now += 1.0
    after, _ = decide(msgspec.structs.replace(dear, devices=DEVICES[:3]), now, after)
    assert len(asked) == 3, "other devices, another plan"
    known[0] = None
    for _ in range(6):
        now += NO_PLAN_S / 3  # a longer time without a turn would be a gap, after which demand is seen anew
        after, _ = decide(dear, now, after)
    assert after.decision is not None
    assert (len(asked), after.decision.reason) == (5, Reason.NO_PLAN), "a refusal does not last"


def ordered(number: int, accepted_unix: float, before: int, after: int, **changes: Any) -> Operation:
    """One that has ended. `number`: of the policy's order; 0 for an operator's."""
    planned = Planned(1, 2, before, after, (), (), 0, 0, 0, 0, 0, 2.0, 30.0, {})
    op_id = f"policy-{number}-12.345" if number else f"mine-{accepted_unix}"
    known = {"op_id": op_id, "kind": "scale_up", "planned": planned, "accepted_unix": accepted_unix, "elapsed_s": 3.0}
    known |= {"policy_order": number or None, "phase": "done", "plan": None}
    return msgspec.structs.replace(operation_of(UP), **{**known, **changes})


def test_a_scaler_that_begins_counts_on_from_the_operations_that_the_journal_has() -> None:
    now, unix = 50.0, 1_700_000_000.0  # this host has just started: its predecessor's monotonic clock was another one
    history = [
        ordered(4, unix - 100.0, 2, 4),
        ordered(0, unix - 130.0, 3, 2),
        ordered(3, unix - 170.0, 3, 2, phase="aborted"),
        ordered(2, unix - 800.0, 2, 3),
    ]
    policy = remembered(history, PolicyConfig(), now, unix).policy
    assert (policy.grown_s, policy.shrunk_s) == (now - 100.0, now - 130.0), "an operator's shrink is one, too"
    assert (policy.flap_s, policy.hold_s, policy.dwell_s) == (now - 100.0, 240.0, 30.0), "and the hold is doubled"
    assert (policy.num_orders, policy.order) == (4, None)
    after, _ = decide(load(signals(1.0)), now, Autoscaling(policy=policy))
    assert after.policy.sent_s == (now - 170.0, now - 100.0), "what is older than ten minutes counts no more"
    full = [ordered(number, unix - 5.0 * (9 - number), 1, 2) for number in range(8, 0, -1)]
    after, actions = decide(load(BUSY), now, remembered(full, PolicyConfig(), now, unix))
    assert actions == ()
    assert after.decision is not None
    assert after.decision.reason is Reason.TOO_MANY
    _, actions = decide(load(BUSY), now, remembered(full[:7], PolicyConfig(), now, unix))
    assert [action.op_id for action in actions] == ["policy-9-50.000"], "no name is used twice"


def test_a_scaler_that_begins_holds_after_its_predecessors_growth_and_loss() -> None:
    now, unix = 1_000.0, 1_700_000_000.0
    idle = load(signals(0.0, queued_prefill_tokens=0.0, running=0.0, kv_used=0.0, kv_share_most=0.0))

    def reasons(before: Autoscaling, seconds: int) -> list[Reason]:
        found = []
        for second in range(seconds):
            before, _ = decide(idle, now + second, before)
            assert before.decision is not None
            found.append(before.decision.reason)
        return found

    grown = remembered([ordered(1, unix - 1.0, 1, 2)], PolicyConfig(hold_s=90.0), now, unix)
    patient = msgspec.structs.replace(idle, config=PolicyConfig(mode="act", hold_s=90.0))
    after, _ = decide(patient, now, grown)
    for second in range(1, 89):
        after, actions = decide(patient, now + second, after)
        assert actions == ()
    assert after.decision is not None
    assert after.decision.reason is Reason.HOLDING
    gone = ordered(0, unix - 20.0, 3, 2, lost_meanwhile=("host:2",))
    assert set(reasons(remembered([gone], PolicyConfig(), now, unix), 70)) == {Reason.AFTER_LOSS}
    assert Reason.AFTER_LOSS not in reasons(Autoscaling(), 70)


def test_a_wall_clock_that_was_put_back_makes_nothing_lie_ahead() -> None:
    policy = remembered([ordered(1, 2_000.0, 1, 2)], PolicyConfig(), 10.0, 1_000.0).policy
    assert policy.grown_s == 10.0


@pytest.mark.parametrize(("number", "is_own"), [(7, True), (None, False)])
def test_whose_a_change_is_does_not_depend_on_its_name(number: int | None, is_own: bool) -> None:
    """A change of others teaches at once; the policy knew of its own when it gave the order."""
    last = ordered(0, 5.0, 3, 2, op_id="policy-7-1.000", policy_order=number)
    before = Autoscaling(policy=PolicyState(at_s=99.0, width=UP.before.dp + 1))
    after, _ = decide(load(signals(1.0)), 100.0, before, last=last)
    assert (after.policy.shrunk_s is None) == is_own


def test_a_growth_into_the_bounds_is_no_flap_after_a_restart_either() -> None:
    def flap(reason: str) -> tuple[object, ...]:
        grown = ordered(2, 1_050.0, 1, 3)
        grown = msgspec.structs.replace(grown, request=msgspec.structs.replace(grown.request, reason=reason))
        policy = remembered([grown, ordered(1, 1_000.0, 4, 1)], PolicyConfig(), 100.0, 1_100.0).policy
        assert policy.grown_s == 50.0
        return policy.flap_s, policy.too_small

    assert flap("policy: grow_bound") == (None, ())
    assert flap("policy: grow_panic")[0] == 50.0


def test_what_an_operator_calls_as_the_policy_would_is_no_order_of_the_policy() -> None:
    policy = remembered([ordered(0, 5.0, 1, 2, op_id="policy-7-1.000")], PolicyConfig(), 10.0, 10.0).policy
    assert (policy.sent_s, policy.num_orders, policy.grown_s) == ((), 0, 5.0)
