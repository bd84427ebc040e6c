"""The one place where it is decided what the scaler does next: from a state and an observation to a new state and what
is asked for. Pure: no sockets, no store, no clock.

All parts see the same observation, in this order. What the first ones ask for is done first:

| part | acts where | asks for |
|---|---|---|
| watchdog | a rank lives and makes no progress | EjectRank |
| members | always: says the deployment's phase | LoadLayout, StartSeat, StopSeat, SetMembership, AnnounceLayout |
| operation | one is in progress | Stage, CommitLayout, ReleaseLayout, AbortLayout, StartSeat, StopSeat, TellRank |
| lost devices | no operation is, and a device that was lost has a seat | LeaveOut |
| orphans | no operation is, and ranks or a transition belong to none | AbortLayout, ReleaseLayout, StopSeat, TellRank |
| load | once a second: the policy decides | ScaleTo, CancelStuck |

An operation in progress is never interrupted by lost devices or orphans; the policy may cancel one before its commit.
It takes the members' seats into account by the layout in force. Orphans are collected only by a scaler that has seen
the deployment serve: before, the ranks of an operation that is yet to be read would be taken for some.

An operation goes through plan -> (prepare -> commit -> migrate -> release) once per leg -> done; or abort -> aborted,
before the HMM has committed the first leg. It is level-triggered: a phase asks what is still missing and commands that,
so a scaler that restarts goes on from the journaled operation and from what it sees. Commands are idempotent and may be
repeated. Two wait until the journal has the operation's state: staging and the commit. From the HMM's commit on there
is only forward, also without a store.
"""

from __future__ import annotations

import msgspec

from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.actions import Action, LeaveOut
from elasticmoe.services.scaler.control.autoscaling import follow_load
from elasticmoe.services.scaler.control.members import is_flipping, serve
from elasticmoe.services.scaler.control.state import Orphans, State
from elasticmoe.services.scaler.control.watchdog import pulses_of, watch
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.abort import abort
from elasticmoe.services.scaler.operation.accounting import count
from elasticmoe.services.scaler.operation.migrate import migrate
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.operation.orphans import collect_orphans
from elasticmoe.services.scaler.operation.prepare import prepare
from elasticmoe.services.scaler.operation.release import release
from elasticmoe.services.scaler.operation.steps import end_lost, enter, stay

LEAVE_OUT_S = 1.0  # between two attempts to begin the operation that leaves lost devices out


def reconcile(state: State, seen: Observation, now: float) -> Step[State]:
    """The next state and actions at monotonic time `now`. An operation changes its phase once at most."""
    replace = msgspec.structs.replace
    cluster, committed = seen.cluster, seen.cluster.in_force.committed
    if not is_flipping(cluster):
        state = replace(state, committed_at=None)
    elif state.committed_at is None:
        state = replace(state, committed_at=now)
    watched, ejected, _ = watch(state.watched, state.stall_s, now, pulses_of(cluster))
    status, members, reason = serve(state, seen, now)
    state = replace(state, status=status, watched=watched, ever_served=state.ever_served or status.phase == "serving")
    actions: tuple[Action, ...] = ()
    if state.operation is not None:
        operation, actions, _ = advance(state.operation, seen, now)
        state = replace(state, operation=operation, orphans=None)
    elif leave_out := _leave_out(state, seen, now):
        state, actions = replace(state, leave_out_at=now + LEAVE_OUT_S), (leave_out,)
    elif state.ever_served:
        since_s = now - state.orphans.since if state.orphans is not None else 0.0
        actions, orphans = collect_orphans(seen, since_s, state.lost_slots(committed))
        state = replace(state, orphans=(state.orphans or Orphans(now, orphans)) if orphans else None)
    state, wanted = _follow_load(state, seen, now)
    return Step(state, (*ejected, *members, *actions, *wanted), reason)


def _follow_load(state: State, seen: Observation, now: float) -> tuple[State, tuple[Action, ...]]:
    committed = seen.cluster.in_force.committed
    if seen.load is None or committed is None:
        return state, ()
    autoscaling, wanted = follow_load(
        state.autoscaling,
        seen.load,
        committed,
        state.operation,
        state.last,
        now,
        is_serving=state.status.phase == "serving" and state.orphans is None,
        is_lossy=bool(state.lost_slots(committed)),
    )
    return msgspec.structs.replace(state, autoscaling=autoscaling), wanted


def _leave_out(state: State, seen: Observation, now: float) -> LeaveOut | None:
    """For lost devices that still have seats, because an operation gave way to an order that did not follow."""
    committed = seen.cluster.in_force.committed
    if committed is None or now < state.leave_out_at:
        return None
    slots = state.lost_slots(committed)
    replicas = {seat.rank.replica for seat in committed.seats if seat.slot in slots}
    return LeaveOut(tuple(sorted(replicas))) if replicas else None


def advance(operation: Operation, seen: Observation, now: float) -> Step[Operation]:
    """The next step at monotonic time `now`. At most one change of phase."""
    if operation.is_finished:
        return Step(operation, (), operation.why)
    step = _advance(operation, seen, now)
    # Whoever computes on a device that was lost meanwhile is ended whatever the phase.
    stops = end_lost(operation, seen) if operation.lost_meanwhile else []
    return Step(step.state, (*stops, *step.actions), step.reason)


def _advance(operation: Operation, seen: Observation, now: float) -> Step[Operation]:
    cluster = seen.cluster
    operation = count(operation, cluster, seen.loads, now)
    if cluster.phase is None:
        return _blind(operation, "the HMM does not answer")
    if operation.phase == "plan":
        return _plan(operation)
    if operation.phase == "migrate":
        return migrate(operation, seen)
    if cluster.phase != "ready" or cluster.in_force.committed is None:
        return _blind(operation, "the HMM holds no layout yet")
    if operation.phase == "abort":
        return abort(operation, seen)
    if not cluster.pools_answer:
        return _blind(operation, "the worker pool does not answer")
    if operation.phase == "release":
        return release(operation, seen)
    return prepare(operation, seen)


def _plan(operation: Operation) -> Step[Operation]:
    if operation.kind == "rebalance":
        return enter(operation, "migrate", "sequences are levelled")
    if not operation.num_legs:
        return enter(operation, "done", "nothing to do")
    return enter(operation, "prepare", f"leg 1 of {operation.num_legs}")


def _blind(operation: Operation, why: str) -> Step[Operation]:
    """Nothing can be seen. Before anything was commanded, the deadline and a cancel still count."""
    is_late = operation.elapsed_s > operation.deadline_s
    if operation.phase == "plan" and not operation.request.is_lost and (is_late or operation.is_cancelled):
        code = "cancelled" if operation.is_cancelled else "deadline_exceeded"
        return enter(operation, "aborted", why, error=Refused(code, f"{why}; nothing was begun", not is_late))
    return stay(operation, why)
