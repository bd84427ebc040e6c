"""Decisions with all that they were made from, as the journal keeps them, so that each can be made again: the plans,
each change of an operation's phase, what was tidied up, and each new phase of the deployment. Pure data.

What is large and follows from the rest is left out: a plan is named by its digest, and commands are by theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from common.layout import Layout
from services.scaler.core import Decision as Chosen
from services.scaler.core import Observed
from services.scaler.operation import Action, Operation
from services.scaler.plan import Memory, Plan, Rates, Sizes, Target
from services.scaler.steps import Seen, Step
from services.scaler.way import plan_way

_encoder = msgspec.msgpack.Encoder(order="deterministic")


class PlanMade(msgspec.Struct, frozen=True, tag="plan", kw_only=True):
    """What `plan_way` took, and the digest of what it gave, for the operation `op_id`."""

    op_id: str
    layout: Layout
    target: Target
    sizes: Sizes
    memory: Memory
    devices: tuple[str, ...]
    rates: Rates
    plan: str = ""

    def make(self) -> tuple[Plan, PlanMade]:
        """The plan, and this with its digest. Raises what plan_way raises."""
        plan = plan_way(self.layout, self.target, self.sizes, self.memory, self.devices, self.rates)
        return plan, msgspec.structs.replace(self, plan=digest(plan))


class StepTaken(msgspec.Struct, frozen=True, tag="step"):
    """What `advance` took and gave where a phase, leg or attempt changed; the operation without its plan."""

    before: Operation
    seen: Seen
    now: float
    after: Operation
    commands: tuple[str, ...]


class Tidied(msgspec.Struct, frozen=True, tag="tidy"):
    """What `tidy` took and gave where it began to tidy."""

    seen: Seen
    since_s: float
    reason: str
    commands: tuple[str, ...]


class PhaseChosen(msgspec.Struct, frozen=True, tag="phase"):
    """What `decide` took and gave where its reason was a new one."""

    layout: Layout
    observed: Observed
    chosen: Chosen


Decision = PlanMade | StepTaken | Tidied | PhaseChosen


def step_taken(before: Operation, seen: Seen, now: float, step: Step) -> StepTaken:
    """The record of one step."""
    return StepTaken(without_plan(before), seen, now, without_plan(step.operation), digests(step.actions))


def without_plan(operation: Operation) -> Operation:
    """The operation as records hold it."""
    return msgspec.structs.replace(operation, plan=None)


def digest(value: object) -> str:
    """Names a value: equal ones have the same."""
    return hashlib.sha256(_encoder.encode(value)).hexdigest()[:32]


def digests(actions: Iterable[Action]) -> tuple[str, ...]:
    """Names commands: each by its type and digest."""
    return tuple(f"{type(action).__name__} {digest(action)}" for action in actions)
