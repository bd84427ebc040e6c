"""Makes journaled decisions again with the present code: each has to come out as it did (promise P20). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import msgspec

from elasticmoe.common.wording import counted
from elasticmoe.services.scaler.control.audit_log import (
    AuditRecord,
    PlanMade,
    TurnTaken,
    digest,
    digests,
    without_plan,
)
from elasticmoe.services.scaler.control.reconciler import reconcile
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.observation import Step
from elasticmoe.services.scaler.planning.plan import Plan
from elasticmoe.services.scaler.planning.planner import plan_way

DECISIONS = msgspec.msgpack.Decoder(AuditRecord)


class Remade(NamedTuple):
    """A decision that was made again. `kind`: `load`: a turn in which the policy decided; `turn`: another one. `said`:
    what was decided; `difference`: what comes out now, empty where it is the same. `is_whole`: the journal had all that
    it was made from."""

    kind: Literal["plan", "turn", "load"]
    name: str
    now: float
    said: str
    difference: str
    is_whole: bool = True


def replay_records(records: Iterable[bytes]) -> tuple[list[Remade], int]:
    """The decisions in the journal's records again, oldest first, and how many records are of no form that this release
    knows."""
    decisions, num_unread = list[AuditRecord](), 0
    for raw in records:
        try:
            decisions.append(DECISIONS.decode(raw))
        except (msgspec.DecodeError, ValueError):
            num_unread += 1
    return list(replay(decisions)), num_unread


def replay(decisions: Iterable[AuditRecord]) -> Iterator[Remade]:
    """Each decision again. Oldest first: a plan precedes its operation's turns."""
    plans: dict[str, Plan] = {}
    for decision in decisions:
        if isinstance(decision, PlanMade):
            plans[decision.op_id] = plan = plan_again(decision)
            difference = "" if digest(plan) == decision.plan else "another plan"
            yield Remade("plan", decision.op_id, 0.0, f"a plan for {decision.target}", difference)
        else:
            yield _turn(decision, plans)


def plan_again(made: PlanMade) -> Plan:
    """From what it was made from. Raises what plan_way raises."""
    return plan_way(made.layout, made.target, made.sizes, made.memory, made.devices, made.rates)


def _turn(decision: TurnTaken, plans: dict[str, Plan]) -> Remade:
    before, name = decision.before, "members"
    is_of_load = decision.seen.load is not None
    said = decided(decision, decision.after) if is_of_load else _said(decision.after)
    made = Remade("load" if is_of_load else "turn", name, decision.now, said, "")
    if before.operation is not None:
        name = before.operation.op_id
        made = made._replace(name=name)
        plan = plans.get(name)
        if plan is None and before.operation.kind != "rebalance":
            return made._replace(difference="the journal has a turn and no plan", is_whole=False)
        before = msgspec.structs.replace(before, operation=msgspec.structs.replace(before.operation, plan=plan))
    return made._replace(difference=_difference(decision, reconcile(before, decision.seen, decision.now)))


def _difference(decision: TurnTaken, step: Step[State]) -> str:
    after, wanted = without_plan(step.state), decision.after
    if after.autoscaling != wanted.autoscaling:
        now, then = decided(decision, after), decided(decision, wanted)
        if now != then:
            return f"{now} and not {then}"
        return f"{now} by other figures, or with another state"
    if after != wanted:
        return f"{_said(after)} and not {_said(wanted)}"
    return "" if digests(step.actions) == decision.commands else f"{_said(after)}: other commands"


def decided(turn: TurnTaken, state: State) -> str:
    """What the policy has decided by a state after this turn, in short."""
    decision, width = state.autoscaling.decision, turn.seen.cluster.in_force.layout.dp
    if decision is None:
        return "nothing"
    before, size = ("", width) if decision.target is None else (f"{width} -> ", decision.target)
    return f"{before}{counted(size, 'replica')}, {decision.reason}"


def _said(state: State) -> str:
    operation = state.operation
    return f"{operation.phase}, {operation.why}" if operation else f"{state.status.phase}, {state.status.reason}"
