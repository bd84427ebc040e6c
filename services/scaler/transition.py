"""The state machine of a scale operation: what is seen decides what comes next. Pure.

plan -> (prepare -> commit -> migrate -> release) once per leg -> done; or abort -> aborted, before the HMM has
committed the first leg. It is level-triggered: a phase asks what is still missing and commands that, so a scaler that
restarts goes on from the journaled operation and from what it sees. Commands are idempotent and may be repeated.

Two commands wait until the journal has the operation's state: staging and the commit. From the HMM's commit on there
is only forward, also without a store.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from common.layout import Seat
from common.protocol.replies import Refused
from common.protocol.scaler import HmmStatus, TransitionStatus
from services.scaler.actions import Abort, Action, Commit, Stage, StartSeat, StopSeat
from services.scaler.figures import count
from services.scaler.observation import Observation, Step
from services.scaler.operation import LegProgress, Operation
from services.scaler.plan import Leg
from services.scaler.settle import end_ahead, hurry, migrate, move_ahead, release, tidy
from services.scaler.steps import (
    BACKOFF_S,
    BACKOFF_S_MAX,
    DEVICE_LOST,
    LAYOUT_CHANGED,
    OVER,
    PAST_FLIP,
    STORAGE_FULL,
    TAKE_BACK_S,
    empty_leavers,
    end_lost,
    enter,
    gone,
    names,
    ours,
    progressed,
    stay,
    take_back,
)


def advance(operation: Operation, seen: Observation, now: float) -> Step[Operation]:
    """The next step at monotonic time `now`. At most one change of phase."""
    if operation.is_finished:
        return Step(operation, (), operation.why)
    step = _advance(operation, seen, now)
    # Whoever computes on a device that was lost meanwhile is ended whatever the phase.
    stops = end_lost(operation, seen) if operation.lost_meanwhile else []
    return Step(step.state, (*stops, *step.actions), step.reason)


def _advance(operation: Operation, seen: Observation, now: float) -> Step[Operation]:
    operation = count(operation, seen.hmm, seen.loads, now)
    if seen.hmm is None:
        return _blind(operation, "the HMM does not answer")
    if operation.phase == "plan":
        return _plan(operation)
    if operation.phase == "migrate":
        return migrate(operation, seen, seen.hmm)
    if seen.hmm.phase != "ready" or seen.hmm.layout is None:
        return _blind(operation, "the HMM holds no layout yet")
    if operation.phase == "abort":
        return _abort(operation, seen, seen.hmm)
    if seen.pool is None:
        return _blind(operation, "the worker pool does not answer")
    if operation.phase == "release":
        return release(operation, seen, seen.hmm)
    return _before_flip(operation, seen, seen.hmm)


def cancel(operation: Operation) -> Operation:
    """Ask for an abort. Only before the commit of the first leg: see `can_cancel`."""
    return msgspec.structs.replace(operation, is_cancelled=True)


def without_lost(operation: Operation, devices: Iterable[str]) -> Operation:
    """These devices have been lost: let the operation end where a layout is complete, before or after its present leg,
    so that the one that leaves them out can begin."""
    return msgspec.structs.replace(operation, lost_meanwhile=tuple(sorted({*operation.lost_meanwhile, *devices})))


def can_cancel(operation: Operation, *, is_durable: bool) -> bool:
    """Whether a cancel still leads back to the old layout: until the store has the record of the first commit, which is
    not sent before."""
    if operation.request.is_lost or operation.lost_meanwhile:
        return False  # its ranks have been ended
    if operation.leg or operation.kind == "rebalance":
        return False
    is_commit_open = operation.phase == "commit" and operation.progress.committed_s is None and not is_durable
    return is_commit_open or operation.phase in ("plan", "prepare", "abort")


# ---- before the flip -------------------------------------------------------------------------------------------------


def _plan(operation: Operation) -> Step[Operation]:
    if operation.kind == "rebalance":
        return enter(operation, "migrate", "sequences are levelled")
    if not operation.num_legs:
        return enter(operation, "done", "nothing to do")
    return enter(operation, "prepare", f"leg 1 of {operation.num_legs}")


def _before_flip(operation: Operation, seen: Observation, hmm: HmmStatus) -> Step[Operation]:
    """The phases prepare and commit: they differ in what a failure means and in what is sent when all is prepared."""
    leg, transition = operation.current_leg(), ours(operation, hmm)
    if transition and (transition.phase == "committed" or transition.phase in PAST_FLIP):
        return _committed(operation, transition)
    if hmm.layout == leg.layout:
        return enter(_flipped(operation), "migrate", f"layout {leg.layout.epoch} is in force")
    failure = _failure(operation, seen, transition)
    can_go_back = operation.leg == 0 and not operation.request.is_lost  # there is no way back to a lost device
    if failure is not None and (can_go_back or failure.code in (LAYOUT_CHANGED, DEVICE_LOST)):
        return enter(operation, "abort", failure.message, error=failure)
    stops = end_lost(operation, seen)
    if stops:
        ending = [seat for seat in operation.lost if seat.slot in seen.ranks]
        return stay(operation, f"ranks {names(ending)} end: their devices are lost", *stops)
    if transition is None:
        return _stage(operation, seen, hmm)
    if transition.phase == "failed":
        why = transition.error.message if transition.error else "staging failed"
        return stay(operation, f"{why}; it is staged again", Abort(transition.id, gone(operation, seen)))
    if transition.phase == "aborting":
        return stay(operation, "the HMM gives the staged layout up")
    if transition.phase == "aborted":
        return _retry(operation, "the HMM has given the staged layout up")
    return _make_ready(operation, seen, transition)


def _failure(operation: Operation, seen: Observation, transition: TransitionStatus | None) -> Refused | None:
    """Why the first leg has to be given up, if it has to be. A later one only where what it starts from is gone, or a
    device of it."""
    before = operation.layout_before()
    if transition is None and seen.hmm and seen.hmm.layout and seen.hmm.layout != before:
        have, want = seen.hmm.layout.epoch, before.epoch
        return Refused(LAYOUT_CHANGED, f"layout {have} is in force and not the layout {want} that was planned from")
    if operation.lost_meanwhile:
        lost = ", ".join(operation.lost_meanwhile)
        return Refused(DEVICE_LOST, f"given up before leg {operation.leg + 1}: {lost} was lost", True)
    if operation.is_cancelled:
        return Refused("cancelled", "cancelled by the operator")
    if seen.no_room and not seen.is_durable:
        return Refused(STORAGE_FULL, f"the operation's records find no room: {seen.no_room}", True)
    if operation.elapsed_s > operation.deadline_s:
        text = f"not committed within {operation.deadline_s:g} s; it waited for: {operation.why}"
        return Refused("deadline_exceeded", text, True)
    if transition and transition.phase == "failed":
        return transition.error or Refused("stage_failed", "the HMM could not stage the layout")
    if seen.stage_refused is not None and transition is None and not seen.stage_refused.retryable:
        return seen.stage_refused
    joining = {seat.slot: seat for seat in operation.current_leg().joining}
    for slot, text in seen.exits.items():
        if slot in joining:
            return Refused("joiner_exited", f"rank {joining[slot].rank} ended before it joined: {text}", True)
    return None


def _stage(operation: Operation, seen: Observation, hmm: HmmStatus) -> Step[Operation]:
    other, leg = hmm.transition, operation.current_leg()
    if other is not None and other.phase not in OVER:
        actions, why = tidy(seen, operation.phase_s, {seat.slot for seat in operation.lost})
        return stay(operation, why, *actions)
    if operation.elapsed_s < operation.progress.retry_s:
        return stay(operation, "the next attempt to stage waits")
    if seen.stage_refused is not None and not seen.stage_refused.retryable:
        return _retry(operation, f"staging was refused: {seen.stage_refused.message}")
    if operation.phase == "commit":
        return _again(operation, "the HMM has lost what was staged", operation.progress.retry_s)
    if not seen.is_durable:
        return stay(operation, _unwritten("journal", seen))
    # Where replicas join, or nobody computes until a lost device's experts are there, it is in a hurry.
    is_throttled = not leg.joining and not operation.request.is_lost
    return stay(operation, "the layout is staged", Stage(operation.transition_id, _fitted(leg, hmm), is_throttled))


def _fitted(leg: Leg, hmm: HmmStatus) -> Leg:
    """The leg with no more KV until its release than there is: where KV did not grow after an earlier leg, for want of
    memory, devices have less than was planned."""
    if hmm.memory is None:
        return leg
    now = {device.device: device.kv // hmm.memory.kv.handle_bytes for device in hmm.devices}
    joining = {seat.device for seat in leg.joining}
    kv_handles = {
        device: count if device in joining else min(count, now.get(device, count))
        for device, count in leg.kv_handles.items()
    }
    return msgspec.structs.replace(leg, kv_handles=kv_handles)


def _retry(operation: Operation, why: str) -> Step[Operation]:
    wait_s = min(BACKOFF_S_MAX, BACKOFF_S * 2 ** min(operation.progress.attempt + 1, 10))
    return _again(operation, why, operation.elapsed_s + wait_s)


def _again(operation: Operation, why: str, retry_s: float) -> Step[Operation]:
    """The next attempt to stage the leg, not before `retry_s`."""
    attempt = LegProgress(attempt=operation.progress.attempt + 1, retry_s=retry_s)
    return enter(operation, "prepare", why, progress=attempt)


def _make_ready(operation: Operation, seen: Observation, transition: TransitionStatus) -> Step[Operation]:
    """Start who joins, empty who leaves, and commit when every member of the new layout has mapped everything."""
    leg = operation.current_leg()
    actions: list[Action] = []
    waits = []
    if transition.phase != "staged":
        waits.append("the HMM makes room" if transition.phase == "vacating" else "the HMM copies")
        actions += hurry(operation, seen)
    else:
        starts, missing = _start_joiners(operation, seen)
        operation, moves = move_ahead(operation, seen)
        actions += [*starts, *moves]
        unprepared = sorted(set(leg.layout.slots) - set(transition.prepared))
        if missing:
            waits.append(f"ranks {names(missing)} join")
        elif unprepared:
            waits.append(f"slots {unprepared} map the new layout")
    if transition.phase != "vacating":
        moves, busy = empty_leavers(operation, seen)
        actions += moves
        if busy:
            waits.append(f"ranks {names(busy)} hand their sequences over")
    if waits:
        return stay(operation, "; ".join(waits), *actions)
    if operation.phase == "prepare":
        return enter(operation, "commit", "everything is prepared")
    if not seen.is_durable:
        return stay(operation, _unwritten("commit record", seen), *actions)
    if operation.progress.committed_s is None:
        operation = progressed(operation, committed_s=operation.elapsed_s)
    return stay(operation, "the layout is committed", *actions, Commit(operation.transition_id))


def _unwritten(what: str, seen: Observation) -> str:
    return f"the store does not take the {what}" + (f": {seen.no_room}" if seen.no_room else "")


def _start_joiners(operation: Operation, seen: Observation) -> tuple[list[Action], list[Seat]]:
    leg, ranks = operation.current_leg(), seen.ranks
    missing = [seat for seat in leg.joining if not (seat.slot in ranks and ranks[seat.slot].ready)]
    free = [seat for seat in missing if seat.slot not in ranks and seat.slot not in seen.starting]
    return [StartSeat(seat, leg.layout.epoch) for seat in seen.startable(free)], missing


def _committed(operation: Operation, transition: TransitionStatus) -> Step[Operation]:
    if operation.phase == "prepare":  # the commit was sent by this scaler's predecessor, or crossed an abort
        operation = progressed(operation, committed_s=operation.elapsed_s)
        return enter(operation, "commit", "the HMM has committed", error=None)
    since_s = operation.progress.committed_s
    if since_s is None:
        since_s = operation.elapsed_s
        operation = progressed(operation, committed_s=since_s)
    if transition.phase == "committed":
        return stay(operation, "the ranks flip")
    figures = operation.accounting.figures
    flip_s = max(figures.flip_s_max or 0.0, operation.elapsed_s - since_s)
    capacity_s = figures.capacity_s
    if capacity_s is None and operation.current_leg().joining:
        capacity_s = operation.elapsed_s
    figures = msgspec.structs.replace(figures, flip_s_max=flip_s, capacity_s=capacity_s)
    accounting = msgspec.structs.replace(operation.accounting, figures=figures)
    operation = msgspec.structs.replace(operation, accounting=accounting)
    return enter(_flipped(operation), "migrate", "all ranks flipped")


def _flipped(operation: Operation) -> Operation:
    return progressed(operation, flipped_s=operation.elapsed_s)


# ---- back ------------------------------------------------------------------------------------------------------------


def _abort(operation: Operation, seen: Observation, hmm: HmmStatus) -> Step[Operation]:
    leg, transition = operation.current_leg(), ours(operation, hmm)
    if hmm.layout == leg.layout or (transition and (transition.phase in PAST_FLIP or transition.phase == "committed")):
        # A commit that had been sent was carried out: from here there is only forward.
        return enter(operation, "commit", "the HMM has committed", error=None, is_cancelled=False)
    ranks = seen.ranks
    joiners = [seat for seat in leg.joining if seat.slot in ranks or seat.slot in seen.starting]
    lost = operation.lost
    stops = [StopSeat(seat.rank, ranks[seat.slot].incarnation, seat in lost) for seat in joiners if seat.slot in ranks]
    if joiners and seen.pool is not None:
        return stay(operation, f"ranks {names(joiners)} end", *stops)
    if transition and transition.phase not in OVER:
        is_told = transition.phase == "aborting" and not operation.lost
        abort = () if is_told else (Abort(operation.transition_id, gone(operation, seen)),)
        return stay(operation, "the HMM gives the staged layout up", *abort)
    ends, is_ahead = end_ahead(operation, seen.loads)
    back = take_back(operation.command_id("cancel"), leg.leaving, seen)
    silent = [seat for seat in leg.leaving if seat.slot in ranks and seat.slot not in seen.loads]
    if (back or silent or is_ahead) and operation.phase_s < TAKE_BACK_S:
        return stay(operation, "ranks leave no more", *back, *ends)
    step = enter(operation, "aborted", operation.error.message if operation.error else "")
    return Step(step.state, (*back, *ends), step.reason)


def _blind(operation: Operation, why: str) -> Step[Operation]:
    """Nothing can be seen. Before anything was commanded, the deadline and a cancel still count."""
    is_late = operation.elapsed_s > operation.deadline_s
    if operation.phase == "plan" and not operation.request.is_lost and (is_late or operation.is_cancelled):
        code = "cancelled" if operation.is_cancelled else "deadline_exceeded"
        return enter(operation, "aborted", why, error=Refused(code, f"{why}; nothing was begun", not is_late))
    return stay(operation, why)


Outcome = Literal["done", "cancelled", "aborted"]


def outcome(operation: Operation) -> Outcome:
    """How a finished operation ended."""
    if operation.phase == "done":
        return "done"
    return "cancelled" if operation.error and operation.error.code == "cancelled" else "aborted"
