"""What orchestrators are told of the deployment's size, from the states that an operation passes through."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from elasticmoe.common.protocol.errors import Conflict, InvalidRequest, Unready
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import PoolRank, PoolStatus
from elasticmoe.services.scaler.api.contract import check_instance, scale_status
from elasticmoe.services.scaler.api.policy_views import policy_view
from elasticmoe.services.scaler.api.requests import parse_scale
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot, find_operation, layout_view
from elasticmoe.services.scaler.operation.operation import planned_of
from tests.unit.transitions import DOWN, SEATS, SIZES, UP, World, cluster_of, operation_of


def snapshot_of(world: World, **changes: Any) -> StatusSnapshot:
    seen = world.seen()
    base = StatusSnapshot("serving", "nothing to do", None, world.layout, seen.cluster, 3, {}, instance="i-1")
    return msgspec.structs.replace(base, **changes)


def planned(operation_plan: Any, **changes: Any) -> Any:
    operation = operation_of(operation_plan)
    return msgspec.structs.replace(operation, planned=planned_of(operation_plan, SIZES), **changes)


def pool_of(*slots: int) -> PoolStatus:
    ranks = [PoolRank(SEATS[slot].rank, slot, SEATS[slot].device, f"r{slot}", 1, ready=True) for slot in slots]
    return PoolStatus(standby=1, ranks=tuple(ranks))


def test_before_anything_is_known_nothing_is_told() -> None:
    for missing in ({"layout": None}, {"instance": ""}):
        with pytest.raises(Unready):
            scale_status(snapshot_of(World(UP.before), **missing))


def test_a_scaler_without_the_lease_says_who_holds_it() -> None:
    """It said that no layout had been made, though another scaler served by one."""
    reason = "waiting for the lease: scaler:1 holds it"
    waiting = StatusSnapshot("starting", reason, None, None, None, 0, {})
    for view in (
        scale_status,
        layout_view,
        policy_view,
        lambda snapshot: find_operation(snapshot, "grow"),
        lambda snapshot: check_instance("i-1", snapshot),
    ):
        with pytest.raises(Unready, match=reason) as refused:
            view(waiting)
        assert (refused.value.code, refused.value.http_status) == ("not_ready", 503)


def test_a_deployment_that_never_scaled_is_idle() -> None:
    status = scale_status(snapshot_of(World(UP.before)))
    assert (status.phase, status.operation_id, status.pending_target) == ("idle", None, None)
    assert (status.effective_size, status.topology_generation) == (UP.before.dp, UP.before.epoch)
    assert status.participating_ranks == tuple(str(seat.rank) for seat in UP.before.seats)


def test_a_growth_shows_its_target_and_who_joins() -> None:
    status = scale_status(snapshot_of(World(UP.before), operation=planned(UP, phase="prepare")))
    assert (status.effective_size, status.pending_target, status.phase) == (2, 3, "prepare")
    given_up = scale_status(snapshot_of(World(UP.before), operation=planned(UP, phase="abort")))
    assert given_up.pending_target == 2, "it comes to nothing"
    later = snapshot_of(World(UP.before), operation=planned(UP, phase="abort", leg=1))
    later = msgspec.structs.replace(later, layout=UP.after)
    assert scale_status(later).pending_target == UP.after.dp, "its first leg stays"
    assert status.joining_ranks == (str(SEATS[2].rank),)
    assert status.safe_to_terminate_ranks == ()


@pytest.mark.parametrize(
    ("layout", "pool", "safe"),
    [
        (DOWN.before, pool_of(0, 1, 2), ()),  # before the commit
        (DOWN.before, pool_of(0, 2), ()),  # its process died meanwhile: it is a member all the same
        (DOWN.after, pool_of(0, 1, 2), ()),  # committed, and its process lives
        (DOWN.after, None, ()),  # nobody knows what lives
        (DOWN.after, pool_of(0, 2), (str(SEATS[1].rank),)),
    ],
)
def test_a_rank_may_be_terminated_when_it_is_no_member_and_its_process_has_ended(
    layout: Any, pool: PoolStatus | None, safe: tuple[str, ...]
) -> None:
    for over in (False, True):
        operation = planned(DOWN, phase="done" if over else "release")
        place = {"ended": (operation,)} if over else {"operation": operation}
        status = scale_status(snapshot_of(World(layout), cluster=cluster_of(None, pool), **place))
        assert status.safe_to_terminate_ranks == safe
        assert status.pending_target == (None if over else 2)


def test_why_an_operation_was_undone_stays_until_the_next() -> None:
    error = Refused("does_not_fit", "too large")
    status = scale_status(snapshot_of(World(UP.before), ended=(planned(UP, phase="aborted", error=error),)))
    assert (status.phase, status.last_error) == ("aborted", error)


def test_an_order_for_another_deployment_is_refused() -> None:
    snapshot = snapshot_of(World(UP.before))
    check_instance("i-1", snapshot)
    with pytest.raises(Conflict, match="the order is for i-2; this deployment is i-1") as refused:
        check_instance("i-2", snapshot)
    assert refused.value.code == "wrong_instance"
    with pytest.raises(Unready):
        check_instance("i-1", snapshot_of(World(UP.before), instance=""))


def test_both_names_of_the_operations_id_mean_the_same() -> None:
    for body in (b'{"replicas": 2, "op_id": "a"}', b'{"replicas": 2, "operation_id": "a"}'):
        assert parse_scale(body, 60.0).op_id == "a"
    assert parse_scale(b'{"replicas": 2, "op_id": "a", "operation_id": "a"}', 60.0).op_id == "a"
    with pytest.raises(InvalidRequest, match="op_id is a and operation_id, which says the same, is b"):
        parse_scale(b'{"replicas": 2, "op_id": "a", "operation_id": "b"}', 60.0)
