"""The phases prepare and commit: what the leg needs is staged, joining ranks are started, leaving ones emptied; when
every member of the new layout has mapped everything, it is committed. Pure."""

from __future__ import annotations

import msgspec

from elasticmoe.common.layout import Seat
from elasticmoe.common.protocol.hmm import AbortLayout, CommitLayout
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import TransitionStatus
from elasticmoe.services.scaler.actions import Action, Stage, StartSeat
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.cutover import cut_over, flipped
from elasticmoe.services.scaler.operation.migrate import empty_leavers, hurry, move_ahead
from elasticmoe.services.scaler.operation.operation import LegProgress, Operation
from elasticmoe.services.scaler.operation.orphans import collect_orphans
from elasticmoe.services.scaler.operation.steps import (
    OVER,
    PAST_FLIP,
    end_lost,
    enter,
    gone,
    names,
    ours,
    progressed,
    stay,
)
from elasticmoe.services.scaler.planning.plan import Leg

BACKOFF_S = 0.5
BACKOFF_S_MAX = 10.0

STORAGE_FULL = "storage_full"
LAYOUT_CHANGED = "layout_changed"
DEVICE_LOST = "device_lost"


def prepare(operation: Operation, seen: Observation) -> Step[Operation]:
    """The phases prepare and commit: they differ in what a failure means and in what is sent when all is prepared."""
    leg, transition = operation.current_leg(), ours(operation, seen.cluster)
    if transition and (transition.phase == "committed" or transition.phase in PAST_FLIP):
        return cut_over(operation, transition)
    if seen.cluster.in_force.committed == leg.layout:
        return enter(flipped(operation), "migrate", f"layout {leg.layout.epoch} is in force")
    failure = _failure(operation, seen, transition)
    can_go_back = operation.leg == 0 and not operation.request.is_lost  # there is no way back to a lost device
    if failure is not None and (can_go_back or failure.code in (LAYOUT_CHANGED, DEVICE_LOST)):
        return enter(operation, "abort", failure.message, error=failure)
    stops = end_lost(operation, seen)
    if stops:
        ending = [seat for seat in operation.lost if seat.slot in seen.cluster.ranks]
        return stay(operation, f"ranks {names(ending)} end: their devices are lost", *stops)
    if transition is None:
        return _stage(operation, seen)
    if transition.phase == "failed":
        why = transition.error.message if transition.error else "staging failed"
        return stay(operation, f"{why}; it is staged again", AbortLayout(transition.id, gone(operation, seen)))
    if transition.phase == "aborting":
        return stay(operation, "the HMM gives the staged layout up")
    if transition.phase == "aborted":
        return _retry(operation, "the HMM has given the staged layout up")
    return _make_ready(operation, seen, transition)


def _failure(operation: Operation, seen: Observation, transition: TransitionStatus | None) -> Refused | None:
    """Why the first leg has to be given up, if it has to be. A later one only where what it starts from is gone, or a
    device of it."""
    before, committed = operation.layout_before(), seen.cluster.in_force.committed
    if transition is None and committed is not None and committed != before:
        have, want = committed.epoch, before.epoch
        return Refused(LAYOUT_CHANGED, f"layout {have} is in force and not the layout {want} that was planned from")
    if operation.lost_meanwhile:
        lost = ", ".join(operation.lost_meanwhile)
        return Refused(DEVICE_LOST, f"given up before leg {operation.leg + 1}: {lost} was lost", True)
    if operation.is_cancelled:
        return Refused("cancelled", "cancelled on request")
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


def _stage(operation: Operation, seen: Observation) -> Step[Operation]:
    other, leg = seen.cluster.transition, operation.current_leg()
    if other is not None and other.phase not in OVER:
        actions, why = collect_orphans(seen, operation.phase_s, {seat.slot for seat in operation.lost})
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
    stage = Stage(operation.transition_id, fitted(leg, seen.cluster), is_throttled)
    return stay(operation, "the layout is staged", stage)


def fitted(leg: Leg, cluster: Cluster) -> Leg:
    """The leg with no more KV until its release than there is: where KV did not grow after an earlier leg, for want of
    memory, devices have less than was planned."""
    if cluster.memory is None:
        return leg
    now = {device.device: device.kv // cluster.memory.kv.handle_bytes for device in cluster.devices}
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
    return stay(operation, "the layout is committed", *actions, CommitLayout(operation.transition_id))


def _unwritten(what: str, seen: Observation) -> str:
    return f"the store does not take the {what}" + (f": {seen.no_room}" if seen.no_room else "")


def _start_joiners(operation: Operation, seen: Observation) -> tuple[list[Action], list[Seat]]:
    leg, ranks = operation.current_leg(), seen.cluster.ranks
    missing = [seat for seat in leg.joining if not (seat.slot in ranks and ranks[seat.slot].ready)]
    free = [seat for seat in missing if seat.slot not in ranks and seat.slot not in seen.starting]
    return [StartSeat(seat, leg.layout.epoch) for seat in seen.cluster.startable(free)], missing
