"""The one reconciler: who goes before whom, and what outlives a turn."""

from __future__ import annotations

import msgspec
import pytest

from elasticmoe.common.protocol.hmm import SetMembership
from elasticmoe.common.protocol.scaler import PoolStatus
from elasticmoe.services.scaler.actions import Action, EjectRank, LeaveOut, StartSeat, StopSeat, TellRank
from elasticmoe.services.scaler.control.reconciler import LEAVE_OUT_S, reconcile
from elasticmoe.services.scaler.control.state import Orphans, State, Status
from elasticmoe.services.scaler.control.watchdog import Standing, Watched
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.operation.release import LEAVE_S
from tests.unit.transitions import DEVICES, DOWN, UP, World, answered, host_of, operation_of

STALL_S = 3.0


def state_of(world: World, operation: Operation | None = None, **changes: object) -> State:
    state = State(operation=operation, ever_served=True, stall_s=STALL_S)
    return msgspec.structs.replace(state, **changes)


def kinds(step: Step[State]) -> list[type[Action]]:
    return [type(action) for action in step.actions]


def with_stray(world: World) -> Observation:
    """A rank in slot 3, which no layout has."""
    world.ranks[3] = "rank-r3t0:9"
    return world.seen()


def standing(world: World, slot: int) -> Watched:
    """The rank in `slot` has stood for as long as it may, and another one has not."""
    name = world.ranks[slot]
    return Watched(world.now, {name: Standing(0, STALL_S, STALL_S)})


def test_ejection_goes_first_then_members_then_the_operation() -> None:
    world = World(UP.before)
    operation = world.run_to(operation_of(UP), "prepare")
    operation = world.step(operation)  # staged; nobody has been told of it
    del world.ranks[1]
    world.commands.clear()
    seen = world.seen()
    pool = host_of(seen).pool
    assert pool is not None
    asleep = tuple(msgspec.structs.replace(rank, is_asleep=True) for rank in pool.ranks)
    seen = answered(seen, pool=msgspec.structs.replace(pool, ranks=asleep))
    step = reconcile(state_of(world, operation, watched=standing(world, 0)), seen, world.now)
    assert kinds(step) == [EjectRank, StartSeat, TellRank]
    assert step.reason == step.state.status.reason == "seats r1t0 have no rank; 2 standbys"


@pytest.mark.parametrize("is_running", [True, False])
def test_an_operation_in_progress_keeps_orphans_and_losses_waiting(is_running: bool) -> None:
    world = World(UP.before)
    operation = world.run_to(operation_of(UP), "prepare") if is_running else None
    gave_way = msgspec.structs.replace(operation_of(DOWN), phase="aborted", lost_meanwhile=(DEVICES[1],))
    seen = with_stray(world)
    first = reconcile(state_of(world, operation, last=gave_way), seen, 5.0)
    assert (LeaveOut((1,)) in first.actions) == (not is_running)
    assert StopSeat not in kinds(first), "what is left of operations waits until the loss is answered"
    refused = reconcile(first.state, seen, 5.0 + LEAVE_OUT_S / 2)
    assert LeaveOut not in kinds(refused), "not at once"
    assert (StopSeat in kinds(refused)) == (not is_running), "the rest goes on meanwhile"
    again = reconcile(refused.state, seen, 5.0 + LEAVE_OUT_S)
    assert (LeaveOut in kinds(again)) == (not is_running)


def test_orphans_are_collected_once_it_has_served() -> None:
    world = World(UP.before)
    seen = with_stray(world)
    unready = answered(seen, pool=None)
    assert kinds(reconcile(state_of(world, ever_served=False), unready, 1.0)) == []
    first = reconcile(state_of(world), seen, 1.0)
    assert StopSeat in kinds(first)
    assert first.state.orphans == Orphans(1.0, "ranks without an operation")
    later = reconcile(first.state, seen, 2.0)
    assert later.state.orphans == first.state.orphans
    del world.ranks[3]
    assert reconcile(later.state, world.seen(), 3.0).state.orphans is None


def test_how_long_orphans_have_been_there_is_counted_from_when_they_were_first_seen() -> None:
    world = World(DOWN.before)
    operation = world.run_to(operation_of(DOWN), "commit")
    world.step(operation)
    world.progress()
    assert world.transition is not None
    assert world.transition.phase == "flipped"
    first = reconcile(state_of(world), world.seen(), 1.0)
    assert StopSeat not in kinds(first)
    assert StopSeat not in kinds(reconcile(first.state, world.seen(), 1.0 + LEAVE_S))
    assert StopSeat in kinds(reconcile(first.state, world.seen(), 1.1 + LEAVE_S))


def test_a_commit_that_is_not_flipped_to_is_published_after_a_time() -> None:
    world = World(DOWN.before)
    operation = world.run_to(operation_of(DOWN), "commit")
    world.step(operation)
    seen = world.seen()
    seen = answered(seen, hmm=msgspec.structs.replace(host_of(seen).hmm, members=DOWN.before.slots))
    first = reconcile(state_of(world), seen, 10.0)
    assert (first.state.committed_at, first.reason) == (10.0, "the ranks flip to the new layout")
    assert SetMembership not in kinds(first)
    assert SetMembership in kinds(reconcile(first.state, seen, 15.1))
    world.progress()
    assert reconcile(first.state, world.seen(), 15.1).state.committed_at is None


def test_serving_is_remembered() -> None:
    world = World(UP.before)
    served = reconcile(state_of(world, ever_served=False), world.seen(), 1.0).state
    assert served.status == Status("serving", "layout 1 serves")
    assert served.ever_served
    blind = reconcile(served, answered(world.seen(), pool=None), 2.0).state
    assert blind.status.phase == "degraded"
    early = reconcile(
        state_of(world, ever_served=False),
        Observation(cluster=answered(world.seen(), pool=PoolStatus(0, ())).cluster),
        1.0,
    )
    assert early.state.status.phase == "attaching"
