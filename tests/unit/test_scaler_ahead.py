"""What ranks are told ahead of a join: short steps, and who gets a sequence ready for whom."""

from __future__ import annotations

import msgspec

from elasticmoe.common.protocol.rank import DecodeOnly
from elasticmoe.services.scaler.actions import TellRank
from elasticmoe.services.scaler.operation.migrate import DECODE_ONLY_STEPS, hurry, move_ahead
from elasticmoe.services.scaler.operation.operation import Operation, cancel, outcome
from elasticmoe.services.scaler.operation.steps import progressed
from tests.unit.transcripts import play
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
    story = """
    staged 0:6 1:5 2:0  -> precopy r0t0 1>2, precopy r1t0, Commit | 1 commit: the layout is committed
    flipped 0:5 1:5 2:1 -> nothing                                | 1 migrate: all ranks flipped
    flipped 0:5 1:5 2:1 -> migrate r0t0 1>2, migrate r1t0 1>2     | 1 migrate: sequences move
    flipped 0:4 1:4 2:3 -> cancel r0t0, cancel r1t0 | 1 release: all replicas have the same load within one
    """
    play(world, world.run_to(operation_of(UP), "commit"), story)


def test_steps_are_kept_short_while_the_hmm_copies_for_who_joins_and_for_nobody_else() -> None:
    world = World(UP.before)
    operation = world.step(world.run_to(operation_of(UP), "prepare"))
    assert world.seen().cluster.transition.phase == "copying"
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
    story = """
    * the store takes nothing
    staged 0:6 1:5 2:0 -> precopy r0t0 1>2, precopy r1t0 | 1 commit: the store does not take the commit record
    * an operator cancels it
    staged 0:6 1:5 2:0 -> nothing                  | 1 abort: cancelled on request
    staged 0:6 1:5 2:0 -> StopSeat rank-r2t0:1     | 1 abort: ranks r2t0 end
    staged 0:6 1:5     -> Abort                    | 1 abort: the HMM gives the staged layout up
    aborted 0:6 1:5    -> cancel r0t0, cancel r1t0 | 1 abort: ranks leave no more
    aborted 0:6 1:5    -> cancel r0t0, cancel r1t0 | 1 aborted: cancelled on request
    """
    done = play(world, world.run_to(operation_of(UP), "commit"), story)
    assert (outcome(done), world.layout) == ("cancelled", UP.before)
