"""What ranks are told ahead of a join: short steps, and who gets a sequence ready for whom."""

from __future__ import annotations

import msgspec

from elasticmoe.common.protocol.rank import DecodeOnly
from elasticmoe.services.scaler.actions import TellRank
from elasticmoe.services.scaler.operation.advance import cancel, outcome
from elasticmoe.services.scaler.operation.migrate import DECODE_ONLY_STEPS, hurry, move_ahead
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.operation.steps import progressed
from tests.unit.transitions import DOWN, SEATS, UP, World, operation_of


def told_world() -> tuple[World, Operation]:
    """Two ranks with 6 and 5 sequences, of which the first has been told to get one ready for the third."""
    world = World(UP.before)
    world.running = {0: 6, 1: 5}
    operation = world.run_to(operation_of(UP), "prepare")
    while not world.targets.get(0):
        operation = world.step(operation)
        if 2 not in world.ranks:
            world.progress()
    return world, operation


def test_sequences_are_got_ready_for_who_joins_and_go_there_after_the_flip() -> None:
    world = World(UP.before)
    world.running = {0: 6, 1: 5}
    operation = world.run_to(operation_of(UP), "commit")
    operation = world.step(operation)
    assert world.commands[0] == operation.command_id("precopy")
    assert (world.targets, world.running) == ({0: ((2, 1),), 1: ()}, {0: 6, 1: 5})
    done = world.run(operation)
    assert (done.phase, sorted(world.running.values())) == ("done", [3, 4, 4])
    assert all(world.commands[slot].kind == "cancel" for slot in (0, 1))


def test_steps_are_kept_short_while_the_hmm_copies_for_who_joins_and_for_nobody_else() -> None:
    world = World(UP.before)
    operation = world.step(world.run_to(operation_of(UP), "prepare"))
    assert world.seen().hmm.transition.phase == "copying"
    told = hurry(operation, world.seen())
    hint = DecodeOnly(operation.command_id("decode_only"), DECODE_ONLY_STEPS)
    assert told == [TellRank(seat, hint) for seat in SEATS[:2]]
    operation = world.step(operation)
    assert world.commands == {0: operation.command_id("decode_only"), 1: operation.command_id("decode_only")}
    assert hurry(operation, world.seen()) == []

    leaving = World(DOWN.before)
    operation = leaving.step(leaving.run_to(operation_of(DOWN), "prepare"))
    assert hurry(operation, leaving.seen()) == []


def test_nothing_is_got_ready_while_a_load_is_unknown_or_nobody_listens() -> None:
    world = World(UP.before)
    operation = world.run_to(operation_of(UP), "prepare")
    for _ in range(3):
        operation = world.step(operation)
        assert not world.targets
        world.progress()
    assert 2 in world.ranks
    seen = world.seen()
    operation = progressed(operation, ahead=None)
    assert move_ahead(operation, seen)[1]
    assert move_ahead(operation, msgspec.structs.replace(seen, loads={0: seen.loads[0]})) == (operation, [])


def test_who_hands_over_to_a_joining_rank_is_chosen_once_and_told_until_it_says_so() -> None:
    world, operation = told_world()
    assert world.targets == {0: ((2, 1),), 1: ()}
    world.running = {0: 1, 1: 9}  # the loads change, one rank has not heard, and one has been replaced
    seen = world.seen()
    for slot in (0, 1):
        unheard = msgspec.structs.replace(seen.loads[slot], command=operation.command_id("decode_only"))
        again, told = move_ahead(operation, msgspec.structs.replace(seen, loads={**seen.loads, slot: unheard}))
        assert again == operation
        assert [(action.seat.slot, len(action.command.targets)) for action in told] == [(slot, 1 if slot == 0 else 0)]
    assert move_ahead(operation, seen) == (operation, [])


def test_an_abort_also_tells_those_that_have_not_heard_yet_what_was_to_be_got_ready() -> None:
    world = World(UP.before)
    world.running = {0: 6, 1: 5}
    operation = world.run_to(operation_of(UP), "prepare")
    while operation.progress.ahead is None:
        operation = world.step(operation)
        if 2 not in world.ranks:
            world.progress()
    world.commands = dict.fromkeys(
        world.commands, operation.command_id("decode_only")
    )  # the command is still on its way
    done = world.run(cancel(operation))
    assert outcome(done) == "cancelled"
    assert all(world.commands[slot] == done.command_id("cancel") for slot in (0, 1))


def test_a_restarted_scaler_does_not_choose_again_who_hands_over() -> None:
    world, operation = told_world()
    world.running = {0: 1, 1: 9}
    resumed = progressed(operation, ahead=None)  # it was not journaled
    resumed, told = move_ahead(resumed, world.seen())
    assert (resumed.progress.ahead, told) == ((), [])
    assert move_ahead(resumed, world.seen()) == (resumed, [])


def test_an_abort_ends_what_was_got_ready() -> None:
    world = World(UP.before)
    world.running = {0: 6, 1: 5}
    operation = world.run_to(operation_of(UP), "prepare")
    while world.commands.get(0) != operation.command_id("precopy"):
        operation = world.step(operation)
        if 2 not in world.ranks:
            world.progress()
    assert operation.phase == "prepare"
    done = world.run(cancel(operation))
    assert (outcome(done), world.running, world.layout) == ("cancelled", {0: 6, 1: 5}, UP.before)
    assert world.commands[0].kind == "cancel"
    assert not world.targets[0]
