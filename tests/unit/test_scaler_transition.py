"""The state machine of an operation: its way, every failure in every phase, resuming, and random worlds."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.common.protocol.hmm import AbortLayout, ReleaseLayout
from elasticmoe.common.protocol.ids import CommandId, TransitionId
from elasticmoe.common.protocol.rank import CancelMigration
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.actions import StopSeat, TellRank
from elasticmoe.services.scaler.control.reconciler import advance
from elasticmoe.services.scaler.operation.operation import Operation, Request, can_cancel, cancel, outcome, without_lost
from elasticmoe.services.scaler.operation.orphans import collect_orphans
from elasticmoe.services.scaler.operation.release import LEAVE_S
from elasticmoe.services.scaler.operation.steps import progressed
from elasticmoe.services.scaler.planning.plan import Plan
from tests.unit.transitions import DOWN, UP, World, operation_of, plan_of

BEFORE = ("plan", "prepare")
PHASES = ("prepare", "commit", "migrate", "release")


def world_of(plan: Plan) -> World:
    return World(plan.before)


def test_nothing_to_do_is_done() -> None:
    world = world_of(UP)
    done = world.run(operation_of(plan_of("none", UP.before)))
    assert (done.phase, world.log) == ("done", [])


@pytest.mark.parametrize("plan", [None, UP, DOWN])
def test_no_rank_goes_on_with_what_a_scaler_that_has_ended_told_it(plan: Plan | None) -> None:
    """The rounds of leveling are not in the journal: the next scaler learns of them from the ranks."""
    world = World(plan.before if plan else UP.before, {0: 9, 1: 0})
    journaled = world.run_to(operation_of(plan), "migrate")
    world.running[0] += 5
    told = world.step(journaled)
    assert told.progress.sources
    assert {at.kind for at in world.commands.values()} >= {"migrate"}
    world.progress()
    done = world.run(msgspec.structs.replace(journaled, clock=None))
    assert done.phase == "done"
    assert {at.kind for slot, at in world.commands.items() if slot in world.ranks} == {"cancel"}


def test_no_command_to_move_sequences_outlives_the_phase_that_levels() -> None:
    """Not one of an operation before, nor one of a rank that is silent at the end, nor where a device is lost."""
    world = World(UP.before)
    world.commands[1] = CommandId("before", 0, 0, "migrate", 2)
    assert world.run(operation_of(None)).phase == "done"
    assert world.commands[1] == CommandId("op", 0, 0, "cancel")

    world = World(UP.before, {0: 9, 1: 0})
    operation = world.step(world.run_to(operation_of(None), "migrate"))
    assert [at.kind for at in world.commands.values()] == ["migrate"]
    world.pool_answers = False
    assert world.run(operation).phase == "done"
    assert {at.kind for at in world.commands.values()} == {"cancel"}

    world = World(UP.before, {0: 9, 1: 0})
    operation = world.run_to(operation_of(UP), "migrate")
    operation = world.step(operation)
    world.commands[1] = CommandId("op", 0, 0, "precopy")
    step = advance(without_lost(operation, ("host:2",)), world.seen(), world.now)
    ends = {action.seat.slot for action in step.actions if isinstance(action, TellRank)}
    assert (step.state.phase, ends) == ("release", {0, 1}), "who is lost is told nothing"


def test_leveling_that_leads_nowhere_ends() -> None:
    world = World(UP.before, {0: 9, 1: 0})
    world._tell = lambda _: None  # type: ignore[method-assign]
    assert world.run(operation_of(None)).phase == "done"


@pytest.mark.parametrize("plan", [UP, DOWN])
@pytest.mark.parametrize("phase", BEFORE)
def test_a_cancel_before_the_commit_leads_back(plan: Plan, phase: str) -> None:
    world = world_of(plan)
    operation = world.run_to(operation_of(plan), phase)
    world.progress()
    operation = world.step(operation)
    assert can_cancel(operation, is_durable=True)
    done = world.run(cancel(operation))
    assert (done.phase, outcome(done), world.layout) == ("aborted", "cancelled", plan.before)
    assert set(world.ranks) == set(plan.before.slots)
    assert not world.leaving


@pytest.mark.parametrize("phase", ["commit", "migrate", "release"])
def test_there_is_no_cancel_after_that(phase: str) -> None:
    operation = world_of(UP).run_to(operation_of(UP), phase)
    assert not can_cancel(operation, is_durable=True)
    assert can_cancel(operation, is_durable=False) == (phase == "commit")
    sent = progressed(operation, committed_s=1.0)  # and another record is not written yet
    assert not can_cancel(sent, is_durable=False)
    assert not can_cancel(msgspec.structs.replace(operation, leg=1, phase="prepare"), is_durable=False)


@pytest.mark.parametrize("plan", [UP, DOWN])
def test_a_cancel_of_a_commit_that_is_not_durable_leads_back(plan: Plan) -> None:
    world = world_of(plan)
    operation = world.run_to(operation_of(plan), "commit")
    world.is_durable = False
    for _ in range(5):
        operation = world.step(operation)
        world.progress()
    assert (operation.phase, operation.why) == ("commit", "the store does not take the commit record")
    done = world.run(cancel(operation))
    assert (outcome(done), world.layout, "Commit" in world.log) == ("cancelled", plan.before, False)


@pytest.mark.parametrize("plan", [UP, DOWN])
@pytest.mark.parametrize("phase", ["prepare", "commit"])
def test_records_that_find_no_room_undo_an_operation_at_once(plan: Plan, phase: str) -> None:
    world = world_of(plan)
    operation = world.run_to(operation_of(plan), phase)
    world.no_room = "it is out of disk"
    if phase == "prepare":
        assert world.step(operation).phase == phase  # what is written needs no room
    world.is_durable = False
    assert advance(operation, world.seen(), world.now).state.phase == "abort"
    done = world.run(operation)
    assert done.error is not None
    assert (done.error.code, done.error.retryable, outcome(done)) == ("storage_full", True, "aborted")
    assert "it is out of disk" in done.error.message
    assert (world.layout, set(world.ranks)) == (plan.before, set(plan.before.slots))
    assert "Commit" not in world.log


def test_a_deadline_after_the_commit_only_warns() -> None:
    world = world_of(UP)
    operation = world.run_to(operation_of(UP, deadline_s=5.0), "release")
    world.now += 100
    done = world.run(operation)
    assert (done.phase, done.is_late) == ("done", True)


@pytest.mark.parametrize("phase", ["migrate", "release"])
def test_a_store_outage_after_the_flip_holds_nothing_up(phase: str) -> None:
    world = world_of(DOWN)
    operation = world.run_to(operation_of(DOWN), phase)
    world.is_durable = False
    assert world.run(operation).phase == "done"


@pytest.mark.parametrize("plan", [UP, DOWN])
@pytest.mark.parametrize("leg", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_a_restarted_scaler_goes_on_in_every_phase(plan: Plan, leg: int, phase: str) -> None:
    if leg >= len(plan.legs):
        return
    world = world_of(plan)
    operation = world.run_to(operation_of(plan), phase, leg)
    raw = msgspec.msgpack.encode(operation)
    for _ in range(2):  # what the first scaler did after its last record
        operation = world.step(operation)
        world.progress()
    again = msgspec.structs.replace(msgspec.msgpack.decode(raw, type=Operation), clock=None)
    world.now = 5.0  # another process's clock
    done = world.run(again)
    assert (done.phase, world.layout) == ("done", plan.after)
    assert world.starts <= 1


def test_a_commit_that_crosses_an_abort_is_gone_through_with() -> None:
    world = world_of(UP)
    operation = world.run_to(operation_of(UP), "commit")
    operation = msgspec.structs.replace(operation, phase="abort", error=Refused("deadline_exceeded", "late"))
    assert world.transition is not None
    world.layout = UP.legs[0].layout
    world.transition = msgspec.structs.replace(world.transition, phase="committed")
    done = world.run(operation)
    assert (done.phase, done.error, world.layout) == ("done", None, UP.after)


def test_a_rank_that_does_not_end_by_itself_is_stopped() -> None:
    world = world_of(DOWN)
    operation = world.run_to(operation_of(DOWN), "release")
    world.ranks[1] = "stubborn"
    world.progress = lambda: None  # type: ignore[method-assign]
    actions: list[object] = []
    for _ in range(40):
        world.now += LEAVE_S / 20
        actions = list(advance(operation, world.seen(), world.now).actions)
        operation = world.step(operation)
        if any(isinstance(action, StopSeat) for action in actions):
            break
    assert any(isinstance(action, StopSeat) and action.incarnation == "stubborn" for action in actions)
    assert operation.elapsed_s - (operation.progress.flipped_s or 0) > LEAVE_S


def test_an_hmm_that_lost_the_plans_ground_ends_the_operation() -> None:
    world = world_of(UP)
    operation = world.run_to(operation_of(UP), "prepare", leg=1)
    world.layout = msgspec.structs.replace(UP.before, epoch=7)
    world.transition = None
    done = world.run(operation)
    assert done.error is not None
    assert (done.phase, done.error.code) == ("aborted", "layout_changed")


# ---- what no operation answers for -----------------------------------------------------------------------------------


def test_a_transition_that_no_journal_knows_is_given_up_before_the_commit() -> None:
    world = world_of(UP)
    operation = world.run_to(operation_of(UP), "prepare")
    for _ in range(3):
        operation = world.step(operation)
        world.progress()
    for _ in range(5):
        for action in collect_orphans(world.seen(), 0.0, ())[0]:
            world.obey(action)
        world.progress()
    assert collect_orphans(world.seen(), 0.0, ()) == ((), "")
    assert (world.layout, set(world.ranks)) == (UP.before, {0, 1})
    assert world.transition is not None
    assert world.transition.phase == "aborted"


def test_a_transition_that_no_journal_knows_is_finished_after_the_commit() -> None:
    world = world_of(DOWN)
    operation = world.run_to(operation_of(DOWN), "commit")
    world.step(operation)
    assert collect_orphans(world.seen(), 0.0, ())[0] == ()  # the ranks flip by themselves
    world.progress()
    assert collect_orphans(world.seen(), 0.0, ())[0] == (ReleaseLayout(TransitionId("op")),)
    assert any(isinstance(action, StopSeat) for action in collect_orphans(world.seen(), LEAVE_S + 1, ())[0])


@pytest.mark.parametrize("plan", [UP, DOWN])
@pytest.mark.parametrize(
    ("phase", "does"), [("staged", AbortLayout), ("aborting", AbortLayout), ("releasing", ReleaseLayout)]
)
def test_an_hmm_is_told_that_nobody_comes_back_to_a_lost_device(plan: Plan, phase: str, does: type) -> None:
    """Found by the simulation: it had restarted, and waited for that rank before the transition could end."""
    world = world_of(plan)
    operation = world.run_to(operation_of(plan), "prepare")
    for _ in range(3):
        operation = world.step(operation)
        world.progress()
    assert world.transition is not None
    world.transition = msgspec.structs.replace(world.transition, phase=phase)
    told = does(TransitionId("op"), (1,))
    assert told not in collect_orphans(world.seen(), 0.0, {1})[0], "its rank lives"
    world.end(1)
    assert told in collect_orphans(world.seen(), 0.0, {1})[0]
    assert told not in collect_orphans(world.seen(), 0.0, ())[0]
    successor = msgspec.structs.replace(operation_of(DOWN), op_id="lost", phase="prepare")
    successor = msgspec.structs.replace(successor, request=Request(remove=(1,), is_lost=True))
    if plan is DOWN:  # what the next operation starts from is the same
        assert told in advance(successor, world.seen(), world.now).actions


def test_ranks_that_still_leave_are_taken_back() -> None:
    world = world_of(DOWN)
    world.leaving.add(1)
    actions, reason = collect_orphans(world.seen(), 0.0, ())
    assert [action.command for action in actions if isinstance(action, TellRank)] == [
        CancelMigration(CommandId("", 0, 0, "cancel"))
    ]
    assert reason
    assert not any(isinstance(action, AbortLayout) for action in actions)


# ---- random worlds ---------------------------------------------------------------------------------------------------

FAULTS = ("hmm", "pool", "store", "full", "fail", "exit", "restart", "cancel", "die", "forget", "standby")


@settings(max_examples=300)
@given(
    plan=st.sampled_from([UP, DOWN]),
    faults=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(FAULTS)), max_size=8),
    deadline_s=st.sampled_from([3.0, 60.0]),
)
def test_whatever_fails_it_ends_in_the_old_layout_or_the_new_one(
    plan: Plan, faults: list[tuple[int, str]], deadline_s: float
) -> None:
    world = world_of(plan)
    operation = operation_of(plan, deadline_s=deadline_s)
    for turn in range(41):
        world.hmm_answers = world.pool_answers = world.is_durable = True
        world.standby, world.exits, world.no_room = 2, {}, ""
        for at, fault in faults:
            if at == turn:
                operation = inject(world, operation, fault)
        operation = world.step(operation)
        world.progress()
        heal(world)
    world.hmm_answers = world.pool_answers = world.is_durable = True
    world.standby, world.exits, world.no_room = 2, {}, ""
    for _ in range(200):
        if operation.is_finished:
            break
        operation = world.step(operation)
        world.progress()
        heal(world)
    assert operation.is_finished, operation.why
    assert world.layout == (plan.after if operation.phase == "done" else plan.before)
    assert (operation.phase == "aborted") == (operation.error is not None)


def inject(world: World, operation: Operation, fault: str) -> Operation:
    status = world.transition
    if fault == "hmm":
        world.hmm_answers = False
    elif fault == "pool":
        world.pool_answers = False
    elif fault == "store":
        world.is_durable = False
    elif fault == "full":
        world.is_durable, world.no_room = False, "it is out of disk"
    elif fault == "standby":
        world.standby = 0
    elif fault == "fail" and status and status.phase in ("copying", "staged"):
        world.transition = msgspec.structs.replace(status, phase="failed", error=Refused("device_error", "no"))
    elif fault == "forget" and status and status.phase not in ("committed", "flipped", "releasing"):
        world.transition, world.staged = None, None
    elif fault == "exit" and 2 in world.ranks and 2 not in world.layout.slots:
        world.end(2)
        world.exits = {2: "killed"}
    elif fault == "die":
        world.end(0)
        world.transition = msgspec.structs.replace(status, prepared=()) if status else None
    elif fault == "restart":
        raw = msgspec.msgpack.encode(operation)
        return msgspec.structs.replace(msgspec.msgpack.decode(raw, type=Operation), clock=None)
    elif fault == "cancel" and can_cancel(operation, is_durable=world.is_durable) and not operation.is_finished:
        return cancel(operation)
    return operation


def heal(world: World) -> None:
    """The base duties: seats of the layout in force are filled."""
    for slot in world.layout.slots:
        if slot not in world.ranks:
            world.starts += 1
            world.ranks[slot] = f"rank-{slot}:{world.starts}"
