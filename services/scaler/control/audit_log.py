"""Decisions with all that they were made from, as the journal keeps them, so that each can be made again: the plans,
and the turns in which the reconciler did something new. Pure data.

What is large and follows from the rest is left out: a plan is named by its digest, and commands are by theirs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import msgspec

from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.layout import Layout
from elasticmoe.services.scaler.actions import Action, CancelStuck, EjectRank, LeaveOut, ScaleTo
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.planning.plan import Rates, Target

ADVICE_AGAIN_S = 60.0  # so that advice at a threshold does not crowd out the journal's other decisions

_encoder = msgspec.msgpack.Encoder(order="deterministic")


class PlanMade(msgspec.Struct, frozen=True, tag="plan-2"):
    """What `plan_way` took, and the digest of what it gave, for the operation `op_id`."""

    op_id: str
    layout: Layout
    target: Target
    sizes: Sizes
    memory: MemoryForecast
    devices: tuple[str, ...]
    rates: Rates
    plan: str


class TurnTaken(msgspec.Struct, frozen=True, tag="turn-3"):
    """What `reconcile` took and gave in a turn that changed the deployment's reason, the operation's leg, attempt or
    phase, or asked for something that is seldom; operations without their plans."""

    before: State
    seen: Observation
    now: float
    after: State
    commands: tuple[str, ...]


AuditRecord = PlanMade | TurnTaken


def turn_taken(before: State, seen: Observation, now: float, step: Step[State]) -> TurnTaken:
    """The record of one turn."""
    return TurnTaken(without_plan(before), seen, now, without_plan(step.state), digests(step.actions))


def is_notable(before: State, step: Step[State]) -> bool:
    """Whether a turn is worth a record."""
    after = step.state
    marks = [state.operation.mark for state in (before, after) if state.operation is not None]
    return (
        after.status.reason != before.status.reason
        or len(set(marks)) > 1
        or (after.orphans is not None and before.orphans is None)
        or any(isinstance(action, EjectRank | LeaveOut | ScaleTo | CancelStuck) for action in step.actions)
    )


class Advice:
    """Which turns that only advise are worth a record: each decision for another size, by its reason and target, once
    in ADVICE_AGAIN_S. The loop's thread."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, int], float] = {}

    def is_notable(self, after: State, seen: Observation, now: float) -> bool:
        """Whether this turn is, and then count it as recorded."""
        decision = after.autoscaling.decision
        if seen.load is None or seen.load.config.mode != "advise" or decision is None or decision.target is None:
            return False
        key = decision.reason.value, decision.target
        if now - self._at.get(key, -math.inf) < ADVICE_AGAIN_S:
            return False
        self._at[key] = now
        return True


def without_plan(state: State) -> State:
    """The state as records hold it."""
    if state.operation is None:
        return state
    return msgspec.structs.replace(state, operation=msgspec.structs.replace(state.operation, plan=None))


def digest(value: object) -> str:
    """Names a value: equal ones have the same."""
    return hashlib.sha256(_encoder.encode(value)).hexdigest()[:32]


def digests(actions: Iterable[Action]) -> tuple[str, ...]:
    """Names commands: each by its type and digest."""
    return tuple(f"{type(action).__name__} {digest(action)}" for action in actions)
