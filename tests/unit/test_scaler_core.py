"""The scaler's decisions, one observation at a time, and a bring-up played to its end."""

from __future__ import annotations

import msgspec

from common.layout import initial_layout
from common.protocol.ids import TransitionId
from common.protocol.replies import Refused
from common.protocol.scaler import DeviceStatus, HmmStatus, PoolRank, PoolStatus, TransitionStatus
from services.scaler.core import AnnounceLayout, Decision, Load, Observed, Publish, Start, decide

LAYOUT = initial_layout([4, 4], ["host:0", "host:1"])


def device(name: str, attached: str | None = None) -> DeviceStatus:
    return DeviceStatus(name, 100, 10, 10, 10, 70, 4, 8, attached)


EMPTY = HmmStatus("empty", 0, 0, None, (device("host:0"), device("host:1")), 0, (), False)
READY = msgspec.structs.replace(EMPTY, phase="ready", layout=LAYOUT)


def rank(slot: int, ready: bool) -> PoolRank:
    seat = LAYOUT.seats[slot]
    return PoolRank(seat.rank, slot, seat.device, f"rank:{slot}", 100 + slot, ready)


def seen(**changes: object) -> Observed:
    base = Observed(
        hmm=READY,
        pool=PoolStatus(2, ()),
        announced_epoch=0,
        starting=frozenset(),
        ever_served=False,
        restarts_left=5,
    )
    return msgspec.structs.replace(base, **changes)


def test_nothing_is_done_blind() -> None:
    assert decide(LAYOUT, seen(hmm=None)).actions == ()
    assert decide(LAYOUT, seen(pool=None)).actions == ()
    loading = msgspec.structs.replace(READY, phase="loading")
    assert decide(LAYOUT, seen(hmm=loading)) == Decision((), "loading", "the HMM loads the model")


def test_a_failed_load_is_reported_with_its_error() -> None:
    error = Refused("bad_checkpoint", "tensor x is missing", False)
    decision = decide(LAYOUT, seen(hmm=msgspec.structs.replace(EMPTY, phase="failed", error=error)))
    assert (decision.phase, decision.error, decision.actions) == ("failed", error, ())


def test_seats_are_filled_only_when_their_device_is_let_go_and_a_standby_is_there() -> None:
    assert decide(LAYOUT, seen()).actions == (Start(LAYOUT.seats[0]), Start(LAYOUT.seats[1]))
    assert decide(LAYOUT, seen(pool=PoolStatus(1, ()))).actions == (Start(LAYOUT.seats[0]),)
    held = msgspec.structs.replace(READY, devices=(device("host:0", "rank:old"), device("host:1")))
    assert decide(LAYOUT, seen(hmm=held)).actions == (Start(LAYOUT.seats[1]),)
    assert decide(LAYOUT, seen(starting=frozenset({0, 1}))).actions == ()


def test_a_crash_loop_ends() -> None:
    decision = decide(LAYOUT, seen(restarts_left=0, last_exit="killed by signal 11"))
    assert decision.phase == "failed"
    assert decision.error is not None
    assert decision.error.code == "rank_crash_loop"
    assert "killed by signal 11" in decision.error.message


def test_a_seat_whose_device_is_lost_is_not_filled_and_waited_for_by_nobody() -> None:
    one = PoolStatus(2, (rank(0, True),))
    decision = decide(LAYOUT, seen(pool=one, lost=frozenset({1}), ever_served=True, restarts_left=0))
    assert (decision.actions, decision.phase, decision.error) == ((), "degraded", None)
    assert "r1t0" in decision.reason
    assert decide(LAYOUT, seen(pool=one)).actions == (Start(LAYOUT.seats[1]),)


def test_what_was_committed_while_nobody_steps_is_in_force_also_where_a_seat_is_lost() -> None:
    status = TransitionStatus(TransitionId("op"), 1, "committed", (0, 1), 0, 0, {})
    parked = msgspec.structs.replace(READY, generation=1, members=(0, 1), transition=status)
    one, lost = PoolStatus(0, (rank(0, True),)), frozenset({1})
    assert decide(LAYOUT, seen(hmm=parked, pool=one, lost=lost)).actions == (Publish(False),)
    held = msgspec.structs.replace(parked, running=True, devices=(device("host:0"), device("host:1", "rank:old")))
    assert decide(LAYOUT, seen(hmm=held, pool=one, lost=lost)).actions == (), "its end parks the others"
    unseen = msgspec.structs.replace(parked, running=True)
    assert decide(LAYOUT, seen(hmm=unseen, pool=one, lost=lost)).actions == (Publish(False),), "no HMM saw its end"
    without = msgspec.structs.replace(unseen, members=(0,))
    assert decide(LAYOUT, seen(hmm=without, pool=one, lost=lost)).actions == ()
    flipped = msgspec.structs.replace(parked, transition=msgspec.structs.replace(status, phase="flipped"))
    assert decide(LAYOUT, seen(hmm=flipped, pool=one, lost=lost)).actions == ()


def test_a_rank_that_dies_again_is_replaced_later() -> None:
    assert decide(LAYOUT, seen(is_backing_off=True)).actions == ()


def test_ranks_that_are_about_to_flip_are_left_alone_unless_they_are_parked_or_it_takes_too_long() -> None:
    status = TransitionStatus(TransitionId("op"), 1, "committed", (0, 1), 0, 0, {})
    running = msgspec.structs.replace(READY, generation=1, members=(0,), running=True, transition=status)
    both = PoolStatus(0, (rank(0, True), rank(1, True)))
    assert decide(LAYOUT, seen(hmm=running, pool=both)).actions == ()
    assert decide(LAYOUT, seen(hmm=running, pool=both, committed_for_s=6.0)).actions == (Publish(True),)
    parked = msgspec.structs.replace(running, running=False)
    assert decide(LAYOUT, seen(hmm=parked, pool=both)).actions == (Publish(True),)
    flipped = msgspec.structs.replace(running, transition=msgspec.structs.replace(status, phase="flipped"))
    assert decide(LAYOUT, seen(hmm=flipped, pool=both)).actions == (Publish(True),)


def test_bring_up_to_serving_and_recovery_of_a_rank() -> None:
    phases = []

    def step(**changes: object) -> tuple[object, ...]:
        decision = decide(LAYOUT, seen(**changes))
        phases.append(decision.phase)
        return decision.actions

    both = PoolStatus(2, (rank(0, True), rank(1, True)))
    running = msgspec.structs.replace(READY, generation=1, members=(0, 1), running=True)
    assert step(hmm=EMPTY) == (Load(),)
    assert len(step()) == 2
    assert step(pool=PoolStatus(2, (rank(0, True), rank(1, False)))) == ()
    assert step(pool=both) == (Publish(True),)
    assert step(pool=both, hmm=running) == (AnnounceLayout(),)
    assert step(pool=both, hmm=running, announced_epoch=1) == ()
    parked = msgspec.structs.replace(running, generation=2, running=False)
    dead = {"hmm": parked, "announced_epoch": 1, "ever_served": True}
    assert step(pool=PoolStatus(2, (rank(0, True),)), **dead) == (Start(LAYOUT.seats[1]),)
    assert step(pool=both, **dead) == (Publish(True),)
    assert phases == ["loading", *["attaching"] * 3, "serving", "serving", "degraded", "degraded"]
