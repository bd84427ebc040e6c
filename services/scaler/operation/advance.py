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

from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.abort import abort
from elasticmoe.services.scaler.operation.accounting import count
from elasticmoe.services.scaler.operation.migrate import migrate
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.operation.prepare import prepare
from elasticmoe.services.scaler.operation.release import release
from elasticmoe.services.scaler.operation.steps import end_lost, enter, stay

Outcome = Literal["done", "cancelled", "aborted"]


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
        return abort(operation, seen, seen.hmm)
    if seen.pool is None:
        return _blind(operation, "the worker pool does not answer")
    if operation.phase == "release":
        return release(operation, seen, seen.hmm)
    return prepare(operation, seen, seen.hmm)


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


def outcome(operation: Operation) -> Outcome:
    """How a finished operation ended."""
    if operation.phase == "done":
        return "done"
    return "cancelled" if operation.error and operation.error.code == "cancelled" else "aborted"
