"""What becomes of the policy's decisions: told, and carried out as an operator's orders are."""

from __future__ import annotations

import msgspec
import pytest

from elasticmoe.common.protocol.errors import DoesNotFit, ElasticMoEError, NotFound, Unavailable
from elasticmoe.services.scaler.actions import CancelStuck, ScaleTo
from elasticmoe.services.scaler.control.admission import CancelOperation, Later, Order, Running
from elasticmoe.services.scaler.control.autoscaler import (
    DECISIONS_MAX,
    TELL_AGAIN_S,
)
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import RefusedOrder
from elasticmoe.services.scaler.policy.saturation import Saturation
from elasticmoe.services.scaler.policy.state import Reason
from tests.unit.autoscaler_bench import Bench


def waiting() -> Bench:
    """Its order waits for the operation `op`, which is to give way to it."""
    bench = Bench()
    bench.answer = Running("operation op is in progress", "op")
    bench.scaler.scale(ScaleTo("policy-1", 3, "supersede_shrink", "op"))
    return bench


def test_a_decision_is_told_when_it_differs_from_the_one_before() -> None:
    bench = Bench()
    for reason, target in (
        (Reason.STEADY, None),
        (Reason.STEADY, None),
        (Reason.GROW_PANIC, 3),
        (Reason.GROW_PANIC, 4),
    ):
        bench.scaler.note(bench.decision(reason, target), 2)
    assert [(reason, facts["target"]) for _, reason, facts in bench.told] == [
        ("steady", "2"),
        ("grow_panic", "3"),
        ("grow_panic", "4"),
    ]
    assert [decided.target for decided in bench.scaler.decided] == [4, 3, None], "newest first"
    assert bench.counted == ["steady", "grow_panic", "grow_panic"]


def test_decisions_that_take_turns_do_not_crowd_out_other_events() -> None:
    bench = Bench(mode="advise")
    for turn in range(240):
        bench.scaler.note(bench.decision(Reason.GROW_PANIC, 3) if turn % 2 else bench.decision(Reason.STEADY), 2)
        assert bench.scaler.decision is not None
        assert bench.scaler.decision.target == (3 if turn % 2 else None), "the last one is shown all the same"
        bench.now += 1.0
    assert len(bench.told) == len(bench.scaler.decided) == 2 * 240 / TELL_AGAIN_S
    assert len(bench.counted) == 240
    bench.scaler.note(bench.decision(Reason.GROW_PANIC, 3, acts=True), 2)
    bench.scaler.note(bench.decision(Reason.GROW_PANIC, 3, acts=True), 2)
    assert len(bench.told) == 10, "what is done is told each time"


def test_the_saturation_is_shown_anew_where_the_decision_stays() -> None:
    bench = Bench()
    for ttft in (0.1, 0.7):
        decision = bench.decision(Reason.STEADY)
        evidence = msgspec.structs.replace(decision.evidence, raw=Saturation(ttft))
        bench.scaler.note(msgspec.structs.replace(decision, evidence=evidence), 2)
    assert len(bench.scaler.decided) == 1
    assert bench.scaler.saturation == Saturation(0.7)
    assert bench.scaler.decision is not None
    assert bench.scaler.decision.evidence.raw == Saturation(0.7), "why it is so now"
    assert bench.scaler.decided[0].evidence.raw == Saturation(0.1), "and what it was told with"


def test_what_is_done_is_told_each_time_and_only_so_many_are_kept() -> None:
    bench = Bench()
    for _ in range(DECISIONS_MAX + 5):
        bench.scaler.note(bench.decision(Reason.REPEAT_ORDER, 3, acts=True), 2)
    assert len(bench.told) == DECISIONS_MAX + 5
    assert len(bench.scaler.decided) == DECISIONS_MAX


def test_an_order_is_one_like_an_operators() -> None:
    bench = Bench()
    bench.scaler.scale(ScaleTo("policy-1", 3, "grow_panic"))
    (order,) = bench.orders
    assert isinstance(order, Order)
    assert order.target is not None
    assert (order.op_id, order.target.replicas, order.request.reason) == ("policy-1", 3, "policy: grow_panic")
    bench.scaler.turn()
    assert len(bench.orders) == 1, "it has been accepted"
    assert bench.tick().accepted == "policy-1"


def test_an_order_waits_for_the_operation_that_gives_way_to_it() -> None:
    bench = waiting()
    first, second = bench.orders
    assert first == CancelOperation("op", by="policy")
    assert isinstance(second, Order)
    bench.scaler.turn()
    bench.answer = None
    bench.scaler.turn()
    bench.scaler.turn()
    assert [type(order) for order in bench.orders[2:]] == [Order, Order]
    assert bench.tick().refused is None


def test_an_order_does_not_follow_somebody_elses_operation() -> None:
    """A growth to 3 would make the 5 replicas smaller that an operator has asked for meanwhile."""
    bench = waiting()
    bench.answer = Running("operation grow is in progress", "grow")
    bench.scaler.turn()
    num = len(bench.orders)
    bench.answer = None
    bench.scaler.turn()
    assert len(bench.orders) == num
    assert bench.tick().refused is None


def test_a_refused_order_is_told_and_not_repeated() -> None:
    bench = Bench()
    bench.answer = DoesNotFit("host:0 has no room")
    bench.scaler.scale(ScaleTo("policy-1", 3, "grow_panic"))
    assert [(kind, facts["op_id"], facts["code"]) for kind, _, facts in bench.told] == [
        ("policy_refused", "policy-1", "does_not_fit")
    ]
    bench.scaler.turn()
    assert len(bench.orders) == 1
    assert bench.tick().refused == RefusedOrder("policy-1", is_of_size=True)


@pytest.mark.parametrize("error", [None, NotFound("no operation op", code="unknown_operation")])
def test_an_operation_that_cannot_end_is_cancelled(error: ElasticMoEError | None) -> None:
    bench = Bench()
    bench.answer = error
    bench.scaler.cancel(CancelStuck("op"))
    assert bench.orders == [CancelOperation("op", by="policy")]


def test_a_cancel_is_repeated_until_it_is_taken() -> None:
    """An operation that stands because the store is away cannot be cancelled before the store is back."""
    bench = Bench()
    bench.answer = Later(Unavailable("the store does not answer"))
    bench.scaler.cancel(CancelStuck("op"))
    bench.scaler.turn()
    bench.answer = None
    bench.scaler.turn()
    bench.scaler.turn()
    assert bench.orders == [CancelOperation("op", by="policy")] * 3
    bench.answer = Later(Unavailable("the store does not answer"))
    bench.scaler.cancel(CancelStuck("op"))
    bench.scaler.use(PolicyConfig(mode="off"))
    bench.scaler.turn()
    assert len(bench.orders) == 4


def test_another_policy_that_might_have_given_it_leaves_an_order_waiting() -> None:
    """A growth that waits for a shrink to give way came a repetition later, after ten seconds."""
    bench = waiting()
    bench.scaler.use(PolicyConfig(mode="act", ttft_s=7.0))
    bench.scaler.turn()
    assert len(bench.orders) == 3
    bench.scaler.use(PolicyConfig(mode="act", replicas_max=2))
    bench.scaler.turn()
    assert len(bench.orders) == 3


def test_an_order_that_the_policy_waits_for_no_more_is_dropped() -> None:
    """There are no more devices for it, say: accepted all the same, it would be nobody's."""
    bench = waiting()
    bench.scaler.wait_for("policy-1")
    bench.scaler.turn()
    assert len(bench.orders) == 3
    bench.scaler.wait_for(None)
    bench.scaler.turn()
    assert len(bench.orders) == 3


def test_another_policy_drops_the_order_of_the_one_before() -> None:
    bench = waiting()
    bench.scaler.use(PolicyConfig(mode="off"))
    bench.scaler.turn()
    assert len(bench.orders) == 2
