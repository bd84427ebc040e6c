"""The scaler's decisions, one observation at a time, and a bring-up played to its end."""

from __future__ import annotations

import msgspec

from elasticmoe.common.config import defaults
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.protocol.hmm import SetMembership
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import DeviceStatus, HmmStatus, PoolRank, PoolStatus, TransitionStatus
from elasticmoe.services.scaler.actions import AnnounceLayout, LoadLayout, StartSeat, StopSeat
from elasticmoe.services.scaler.control.members import RELOAD_PAUSE_S, RELOAD_S, begun, serve
from elasticmoe.services.scaler.control.state import State, Status
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.operation import Operation, Request
from elasticmoe.services.scaler.service import BACKOFF_S_MAX, backoff_s
from tests.unit.transcripts import done
from tests.unit.transitions import cluster_of

DEFAULTS = defaults()
LAYOUT = initial_layout([4, 4], ["host:0", "host:1"])


def device(name: str, attached: str | None = None) -> DeviceStatus:
    return DeviceStatus(name, 100, 10, 10, 10, 70, 4, 8, attached)


EMPTY = HmmStatus("empty", 0, 0, None, (device("host:0"), device("host:1")), 0, (), False)
READY = msgspec.structs.replace(EMPTY, phase="ready", layout=LAYOUT)


def rank(slot: int, ready: bool) -> PoolRank:
    seat = LAYOUT.seats[slot]
    return PoolRank(seat.rank, slot, seat.device, f"rank:{slot}", 100 + slot, ready)


STANDBYS = PoolStatus(2, ())
START = tuple(StartSeat(seat, LAYOUT.epoch) for seat in LAYOUT.seats)
PARK, JOIN = (SetMembership(LAYOUT.slots, is_running) for is_running in (False, True))
# That of slot 1, by a rebalance, so that no seat is one of the operation's own.
LOSS = Operation(
    op_id="op",
    kind="rebalance",
    request=Request(),
    accepted_unix=0.0,
    deadline_s=9.0,
    plan=None,
    lost_meanwhile=("host:1",),
)


def step(
    *,
    hmm: HmmStatus | None = READY,
    pool: PoolStatus | None = STANDBYS,
    ever_served: bool = False,
    committed_at: float | None = None,
    is_lost: bool = False,
    **changes: object,
) -> Step[Status]:
    """What is made of an observation at time 10."""
    base = Observation(cluster=cluster_of(hmm, pool, beginning=LAYOUT), restarts_left=5)
    state = State(
        ever_served=ever_served,
        committed_at=committed_at,
        operation=LOSS if is_lost else None,
        stall_s=9.0,
    )
    return serve(state, msgspec.structs.replace(base, **changes), 10.0)


def test_nothing_is_done_blind() -> None:
    assert step(hmm=None).actions == ()
    assert step(pool=None).actions == ()
    loading = msgspec.structs.replace(READY, phase="loading")
    assert step(hmm=loading) == (Status("loading", "the HMM loads the model"), (), "the HMM loads the model")


def test_a_failed_load_is_reported_with_its_error() -> None:
    error = Refused("bad_checkpoint", "tensor x is missing", False)
    decision = step(hmm=msgspec.structs.replace(EMPTY, phase="failed", error=error))
    assert (decision.state.phase, decision.state.error, decision.actions) == ("failed", error, ())


SHORT = msgspec.structs.replace(
    EMPTY, phase="failed", error=Refused("does_not_fit", "the device's memory is short", False)
)
OLD = PoolStatus(2, (rank(0, True), rank(1, True)))


def after(
    before: Step[Status], hmm: HmmStatus | None = SHORT, pool: PoolStatus | None = STANDBYS, at: float = 11.0
) -> Step[Status]:
    """A turn that follows one, at the time `at`."""
    seen = Observation(cluster=cluster_of(hmm, pool, beginning=LAYOUT), restarts_left=5)
    return serve(State(status=before.state, ever_served=True, stall_s=9.0), seen, at)


def test_a_scaler_that_begins_in_the_midst_of_a_load_anew_goes_on_with_it() -> None:
    """Its predecessor has ended the ranks; one that begins with nothing is told at once that there is no room."""
    fresh = after(Step(begun(10.0, is_resumed=False)), at=11.0)
    assert (fresh.state.phase, fresh.actions) == ("failed", ())
    away = after(Step(begun(10.0, is_resumed=True)), hmm=None)
    again = after(away)
    assert (again.state.phase, again.actions) == ("loading", (LoadLayout(LAYOUT),))
    late = after(again, at=10.0 + RELOAD_S)
    assert (late.state.phase, late.state.error, late.actions) == ("failed", SHORT.error, ())
    assert after(late, at=99.0) == after(late, at=98.0) == late, "it is not begun again"


def test_what_has_no_room_is_loaded_again_once_ranks_of_lost_memory_have_ended() -> None:
    ends = step(hmm=SHORT, pool=OLD, ever_served=True)
    assert ends.actions == tuple(StopSeat(one.rank, one.incarnation, is_lost=True) for one in OLD.ranks)
    assert ends.state.phase == "loading"
    blind = after(ends, pool=None)
    assert (blind.actions, blind.state.phase) == ((), "degraded"), "whether they have ended nobody knows"
    again = after(blind)
    assert again.actions == (LoadLayout(LAYOUT),)
    loading = after(again, msgspec.structs.replace(EMPTY, phase="loading"))
    assert after(loading).actions == (), "what has just failed is not tried again at once"
    assert after(loading, at=11.0 + RELOAD_PAUSE_S).actions == (LoadLayout(LAYOUT),), "a driver may give it back late"
    anew = after(after(loading, None), EMPTY)
    assert anew.actions == (LoadLayout(LAYOUT),), "the HMM died once more"
    assert after(anew, at=12.0).actions == (LoadLayout(LAYOUT),), "and that was not forgotten"
    assert after(after(again, READY, OLD)).state.phase == "failed", "another load, which no rank was in the way of"


def test_what_has_no_room_without_ranks_has_failed_and_at_last_also_after_them() -> None:
    assert step(hmm=SHORT).state == Status("failed", "the HMM could not load the model", SHORT.error)
    turn = step(hmm=SHORT, pool=OLD)
    at = 10.0
    while at + RELOAD_PAUSE_S < 10.0 + RELOAD_S:
        at += RELOAD_PAUSE_S
        turn = after(turn, at=at)
        assert turn.actions == (LoadLayout(LAYOUT),)
    assert after(turn, at=10.0 + RELOAD_S).state.phase == "failed"


def test_seats_are_filled_only_when_their_device_is_let_go_and_a_standby_is_there() -> None:
    assert step().actions == START
    assert step(pool=PoolStatus(1, ())).actions == START[:1]
    held = msgspec.structs.replace(READY, devices=(device("host:0", "rank:old"), device("host:1")))
    assert step(hmm=held).actions == START[1:]
    assert step(starting=frozenset({0, 1})).actions == ()


def test_a_crash_loop_ends() -> None:
    decision = step(restarts_left=0, last_exit="killed by signal 11")
    assert decision.state.phase == "failed"
    assert decision.state.error is not None
    assert decision.state.error.code == "rank_crash_loop"
    assert "killed by signal 11" in decision.state.error.message


def test_a_seat_that_never_comes_up_is_given_up_and_not_tried_for_ever() -> None:
    """However its pauses grow, more deaths than are allowed fall into the window, where a start takes 8 s."""
    allowed, window_s = DEFAULTS["rank_restarts_max"], DEFAULTS["rank_restarts_window_s"]
    assert isinstance(allowed, int)
    assert isinstance(window_s, float)
    pauses = [backoff_s(num) for num in range(1, allowed + 1)]
    assert (pauses[0], pauses[-1]) == (0.0, BACKOFF_S_MAX)
    assert sum(pauses) + 8.0 * allowed < window_s


def test_a_seat_whose_device_is_lost_is_not_filled_and_waited_for_by_nobody() -> None:
    one = PoolStatus(2, (rank(0, True),))
    decision = step(pool=one, is_lost=True, ever_served=True, restarts_left=0)
    assert (decision.actions, decision.state.phase, decision.state.error) == ((), "degraded", None)
    assert "r1t0" in decision.reason
    assert step(pool=one).actions == START[1:]


def test_what_was_committed_while_nobody_steps_is_in_force_also_where_a_seat_is_lost() -> None:
    status = TransitionStatus(TransitionId("op"), 1, "committed", (0, 1), 0, 0, {})
    parked = msgspec.structs.replace(READY, generation=1, members=(0, 1), transition=status)
    one = PoolStatus(0, (rank(0, True),))
    assert step(hmm=parked, pool=one, is_lost=True).actions == (PARK,)
    held = msgspec.structs.replace(parked, running=True, devices=(device("host:0"), device("host:1", "rank:old")))
    assert step(hmm=held, pool=one, is_lost=True).actions == (), "its end parks the others"
    unseen = msgspec.structs.replace(parked, running=True)
    assert step(hmm=unseen, pool=one, is_lost=True).actions == (PARK,), "no HMM saw its end"
    without = msgspec.structs.replace(unseen, members=(0,))
    assert step(hmm=without, pool=one, is_lost=True).actions == ()
    flipped = msgspec.structs.replace(parked, transition=msgspec.structs.replace(status, phase="flipped"))
    assert step(hmm=flipped, pool=one, is_lost=True).actions == ()


def test_a_rank_that_dies_again_is_replaced_later() -> None:
    assert step(is_backing_off=True).actions == ()


def test_ranks_that_are_about_to_flip_are_left_alone_unless_they_are_parked_or_it_takes_too_long() -> None:
    status = TransitionStatus(TransitionId("op"), 1, "committed", (0, 1), 0, 0, {})
    running = msgspec.structs.replace(READY, generation=1, members=(0,), running=True, transition=status)
    both = PoolStatus(0, (rank(0, True), rank(1, True)))
    assert step(hmm=running, pool=both, committed_at=9.0).actions == ()
    assert step(hmm=running, pool=both, committed_at=4.0).actions == (JOIN,)
    parked = msgspec.structs.replace(running, running=False)
    assert step(hmm=parked, pool=both).actions == (JOIN,)
    flipped = msgspec.structs.replace(running, transition=msgspec.structs.replace(status, phase="flipped"))
    assert step(hmm=flipped, pool=both).actions == (JOIN,)


def test_bring_up_to_serving_and_recovery_of_a_rank() -> None:
    both = PoolStatus(2, (rank(0, True), rank(1, True)))
    running = msgspec.structs.replace(READY, generation=1, members=(0, 1), running=True)
    parked = {"hmm": msgspec.structs.replace(running, generation=2, running=False), "ever_served": True}
    observations: dict[str, dict[str, object]] = {
        "nothing is loaded": {"hmm": EMPTY},
        "it is loaded": {},
        "one rank is ready": {"pool": PoolStatus(2, (rank(0, True), rank(1, False)))},
        "both are ready": {"pool": both},
        "they run": {"pool": both, "hmm": running},
        "it is announced": {"pool": both, "hmm": running, "announced_epoch": 1},
        "one has died": {"pool": PoolStatus(2, (rank(0, True),)), "announced_epoch": 1, **parked},
        "it is replaced": {"pool": both, "announced_epoch": 1, **parked},
    }
    decisions = {seen: step(**changes) for seen, changes in observations.items()}  # type: ignore[arg-type]
    assert [
        f"{seen} -> {done(decision.actions)} | {decision.state.phase}: {decision.reason}"
        for seen, decision in decisions.items()
    ] == [
        "nothing is loaded -> LoadLayout | loading: the HMM holds nothing",
        "it is loaded -> StartSeat r0t0, StartSeat r1t0 | attaching: seats r0t0, r1t0 have no rank; 2 standbys",
        "one rank is ready -> nothing | attaching: ranks attach",
        "both are ready -> SetMembership (0, 1) running | attaching: all ranks are ready",
        "they run -> AnnounceLayout | serving: layout 1 serves",
        "it is announced -> nothing | serving: nothing to do",
        "one has died -> StartSeat r1t0 | degraded: seats r1t0 have no rank; 2 standbys",
        "it is replaced -> SetMembership (0, 1) running | degraded: all ranks are ready",
    ]
    assert decisions["nothing is loaded"].actions == (LoadLayout(LAYOUT),)
    assert decisions["they run"].actions == (AnnounceLayout(LAYOUT),)
