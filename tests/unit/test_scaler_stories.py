"""The stories of an operation as transcripts: see transcripts.py for how they are read."""

from __future__ import annotations

import pytest

from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.operation.operation import outcome
from tests.unit.transcripts import play
from tests.unit.transitions import DOWN, UP, World, operation_of

PHASES = ("prepare", "commit", "migrate", "release")

SECOND_LEG = """
    released 0:2 1:1 2:1 -> Stage                              | 2 prepare: the layout is staged
    staged 0:2 1:1 2:1   -> nothing                            | 2 prepare: slots [0, 1, 2] map the new layout
    staged 0:2 1:1 2:1   -> nothing                            | 2 commit: everything is prepared
    staged 0:2 1:1 2:1   -> Commit                             | 2 commit: the layout is committed
    flipped 0:2 1:1 2:1  -> nothing                            | 2 migrate: all ranks flipped
    flipped 0:2 1:1 2:1  -> nothing                            | 2 release: no replica came or went
    flipped 0:2 1:1 2:1  -> Release | 2 release: the HMM gives back what only the old layout used
    released 0:2 1:1 2:1 -> nothing                            | 2 done: released
"""


def test_scaling_up_brings_replicas_in_first_and_moves_experts_then() -> None:
    world = World(UP.before)
    first_leg = """
    no transition 0:2 1:2 -> nothing                           | 1 prepare: leg 1 of 2
    no transition 0:2 1:2 -> Stage                             | 1 prepare: the layout is staged
    staged 0:2 1:2        -> StartSeat r2t0                    | 1 prepare: ranks r2t0 join
    staged 0:2 1:2 2:0    -> nothing                           | 1 commit: everything is prepared
    staged 0:2 1:2 2:0    -> precopy r0t0, precopy r1t0 1>2, Commit | 1 commit: the layout is committed
    flipped 0:2 1:1 2:1   -> nothing                           | 1 migrate: all ranks flipped
    flipped 0:2 1:1 2:1   -> cancel r0t0, cancel r1t0          | 1 release: all replicas have the same load within one
    flipped 0:2 1:1 2:1   -> Release | 1 release: the HMM gives back what only the old layout used
    released 0:2 1:1 2:1  -> nothing                           | 2 prepare: leg 2 of 2
    """
    done = play(world, operation_of(UP), first_leg + SECOND_LEG)
    assert (outcome(done), world.layout) == ("done", UP.after)
    assert [(time.leg, time.phase) for time in done.accounting.timings] == [
        (0, "plan"),
        *((leg, phase) for leg in (0, 1) for phase in PHASES),
    ]
    figures = done.accounting.figures
    assert figures.capacity_s is not None
    assert figures.capacity_s < done.elapsed_s
    assert (figures.bytes_copied, figures.peak_bytes_total, figures.sequences_moved) == (2000, 60, 1)


def test_nothing_moves_before_all_ranks_have_flipped() -> None:
    world = World(UP.before)
    story = """
    * nothing goes on
    staged 0:2 1:2 2:0    -> precopy r0t0, precopy r1t0 1>2, Commit | 1 commit: the layout is committed
    committed 0:2 1:2 2:0 -> nothing                                | 1 commit: the ranks flip
    * all goes on
    committed 0:2 1:2 2:0 -> nothing                                | 1 commit: the ranks flip
    flipped 0:2 1:1 2:1   -> nothing                                | 1 migrate: all ranks flipped
    """
    play(world, world.run_to(operation_of(UP), "commit"), story)


def test_leaving_replicas_are_empty_before_the_commit() -> None:
    world = World(DOWN.before)
    story = """
    no transition 0:2 1:2 2:2 -> nothing              | 1 prepare: leg 1 of 1
    no transition 0:2 1:2 2:2 -> Stage                | 1 prepare: the layout is staged
    staged 0:2 1:2 2:2        -> drain r1t0 0>0 0>2   | 1 prepare: slots [0, 2] map the new layout; \
ranks r1t0 hand their sequences over
    staged 0:4 1:0~ 2:2       -> nothing              | 1 commit: everything is prepared
    staged 0:4 1:0~ 2:2       -> Commit               | 1 commit: the layout is committed
    flipped 0:4 1:0~ 2:2      -> nothing              | 1 migrate: all ranks flipped
    flipped 0:4 2:2           -> migrate r0t0 1>2     | 1 migrate: sequences move
    flipped 0:3 2:3           -> cancel r0t0          | 1 release: all replicas have the same load within one
    flipped 0:3 2:3           -> Release              | 1 release: the HMM gives back what only the old layout used
    released 0:3 2:3          -> nothing              | 1 done: released
    """
    done = play(world, operation_of(DOWN), story)
    assert world.layout == DOWN.after
    assert done.accounting.figures.sequences_moved >= 2
    assert done.accounting.figures.capacity_s is None


def test_a_rebalance_only_moves_sequences() -> None:
    story = """
    no transition 0:9 1:0 -> nothing          | 1 migrate: sequences are levelled
    no transition 0:9 1:0 -> migrate r0t0 4>1 | 1 migrate: sequences move
    no transition 0:5 1:4 -> cancel r0t0      | 1 done: all replicas have the same load within one
    """
    play(World(UP.before, {0: 9, 1: 0}), operation_of(None), story)


def test_ranks_are_told_to_stay_though_the_pool_is_away_when_that_is_due() -> None:
    world = World(DOWN.before)
    story = """
    * an operator cancels it
    staged 0:4 1:0~ 2:2  -> nothing     | 1 abort: cancelled on request
    * the pool is away
    staged no pool       -> Abort       | 1 abort: the HMM gives the staged layout up
    aborted no pool      -> nothing     | 1 abort: ranks leave no more
    * the pool is back
    aborted 0:4 1:0~ 2:2 -> cancel r1t0 | 1 abort: ranks leave no more
    aborted 0:4 1:0 2:2  -> nothing     | 1 aborted: cancelled on request
    """
    play(world, world.run_to(operation_of(DOWN), "commit"), story)


def test_a_later_leg_waits_for_room_and_says_so() -> None:
    world = World(UP.before)
    story = """
    * the store has no room: it is out of disk
    staged 0:2 1:1 2:1 -> nothing | 2 commit: the store does not take the commit record: it is out of disk
    * 100 s pass
    staged 0:2 1:1 2:1 -> nothing | 2 commit: the store does not take the commit record: it is out of disk
    * the store takes everything
    staged 0:2 1:1 2:1 -> Commit  | 2 commit: the layout is committed
    """
    operation = play(world, world.run_to(operation_of(UP, deadline_s=5.0), "commit", leg=1), story)
    assert world.run(operation).phase == "done"


def test_a_deadline_before_the_commit_aborts() -> None:
    world = World(DOWN.before)
    why = "not committed within 3 s; it waited for: ranks r1t0 hand their sequences over"
    story = f"""
    no transition 0:2 1:2 2:2 -> nothing            | 1 prepare: leg 1 of 1
    no transition 0:2 1:2 2:2 -> Stage              | 1 prepare: the layout is staged
    * nobody heeds commands
    staged 0:2 1:2 2:2        -> drain r1t0 0>0 0>2 | 1 prepare: slots [0, 2] map the new layout; \
ranks r1t0 hand their sequences over
    staged 0:2 1:2 2:2        -> drain r1t0 0>0 0>2 | 1 prepare: ranks r1t0 hand their sequences over
    staged 0:2 1:2 2:2        -> nothing            | 1 abort: {why}
    staged 0:2 1:2 2:2        -> Abort              | 1 abort: the HMM gives the staged layout up
    aborted 0:2 1:2 2:2       -> nothing            | 1 aborted: {why}
    """
    done = play(world, operation_of(DOWN, deadline_s=3.0), story)
    assert (done.error, world.layout) == (Refused("deadline_exceeded", why, True), DOWN.before)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("device_error", Refused("device_error", "no memory")),
        ("", Refused("stage_failed", "the HMM could not stage the layout")),
    ],
)
def test_staging_that_fails_aborts_the_first_leg(code: str, error: Refused) -> None:
    world = World(UP.before)
    story = f"""
    no transition 0:2 1:2 -> Stage                    | 1 prepare: the layout is staged
    * staging fails: {code}
    failed 0:2 1:2        -> nothing                  | 1 abort: {error.message}
    failed 0:2 1:2        -> Abort                    | 1 abort: the HMM gives the staged layout up
    aborted 0:2 1:2       -> cancel r0t0, cancel r1t0 | 1 aborted: {error.message}
    """
    done = play(world, world.run_to(operation_of(UP), "prepare"), story)
    assert (done.error, world.layout) == (error, UP.before)


def test_staging_that_is_refused_aborts_the_first_leg_and_a_busy_hmm_does_not() -> None:
    world = World(UP.before)
    story = """
    * staging is refused: busy
    no transition 0:2 1:2 -> Stage                    | 1 prepare: the layout is staged
    * the HMM forgets the transition
    * staging is refused: does_not_fit
    no transition 0:2 1:2 -> nothing                  | 1 abort: says the HMM
    no transition 0:2 1:2 -> cancel r0t0, cancel r1t0 | 1 aborted: says the HMM
    """
    done = play(world, world.run_to(operation_of(UP), "prepare"), story)
    assert done.error == world.refused


def test_a_joiner_that_ends_aborts_the_first_leg() -> None:
    world = World(UP.before)
    why = "rank r2t0 ended before it joined: killed by signal 11"
    story = f"""
    no transition 0:2 1:2 -> Stage                    | 1 prepare: the layout is staged
    staged 0:2 1:2        -> StartSeat r2t0           | 1 prepare: ranks r2t0 join
    * slot 2 ends: killed by signal 11
    staged 0:2 1:2        -> nothing                  | 1 abort: {why}
    staged 0:2 1:2        -> Abort                    | 1 abort: the HMM gives the staged layout up
    aborted 0:2 1:2       -> cancel r0t0, cancel r1t0 | 1 aborted: {why}
    """
    done = play(world, world.run_to(operation_of(UP), "prepare"), story)
    assert (done.error, world.layout) == (Refused("joiner_exited", why, True), UP.before)


AGAIN = {
    "failed": """
    * staging fails:
    failed 0:2 1:1 2:1        -> Abort   | 2 prepare: staging failed; it is staged again
    aborted 0:2 1:1 2:1       -> nothing | 2 prepare: the HMM has given the staged layout up
    aborted 0:2 1:1 2:1       -> nothing | 2 prepare: the next attempt to stage waits
    aborted 0:2 1:1 2:1       -> Stage   | 2 prepare: the layout is staged
    """,
    "aborted": """
    * the HMM has aborted the transition
    aborted 0:2 1:1 2:1       -> nothing | 2 prepare: the HMM has given the staged layout up
    aborted 0:2 1:1 2:1       -> nothing | 2 prepare: the next attempt to stage waits
    aborted 0:2 1:1 2:1       -> Stage   | 2 prepare: the layout is staged
    """,
    "forgotten": """
    * the HMM forgets the transition
    no transition 0:2 1:1 2:1 -> Stage   | 2 prepare: the layout is staged
    """,
}


@pytest.mark.parametrize("how", AGAIN)
def test_a_later_leg_is_staged_again_until_it_succeeds(how: str) -> None:
    world = World(UP.before)
    operation = world.step(world.run_to(operation_of(UP), "prepare", leg=1))
    for _ in range(3):
        operation = play(world, operation, AGAIN[how])
    world.progress()
    play(world, operation, SECOND_LEG.partition("\n    staged")[2].join(("staged", "")))
    assert world.layout == UP.after


def test_a_store_outage_before_the_commit_waits_and_aborts_at_the_deadline() -> None:
    world = World(UP.before)
    why = "not committed within 20 s; it waited for: the store does not take the commit record"
    story = f"""
    * the store takes nothing
    staged 0:2 1:2 2:0 -> precopy r0t0, precopy r1t0 1>2 | 1 commit: the store does not take the commit record
    staged 0:2 1:2 2:0 -> nothing                        | 1 commit: the store does not take the commit record
    staged 0:2 1:2 2:0 -> nothing                        | 1 abort: {why}
    staged 0:2 1:2 2:0 -> StopSeat rank-r2t0:1           | 1 abort: ranks r2t0 end
    staged 0:2 1:2     -> Abort                          | 1 abort: the HMM gives the staged layout up
    aborted 0:2 1:2    -> cancel r0t0, cancel r1t0       | 1 abort: ranks leave no more
    aborted 0:2 1:2    -> cancel r0t0, cancel r1t0       | 1 aborted: {why}
    """
    play(world, world.run_to(operation_of(UP, deadline_s=20.0), "commit"), story)
    assert world.layout == UP.before
