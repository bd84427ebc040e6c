"""Makes journaled decisions again with the present code: each has to come out as it did (promise P20)."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from elasticmoe.services.scaler.control.audit_log import (
    Decision,
    PlanMade,
    TurnTaken,
    digest,
    digests,
    without_plan,
)
from elasticmoe.services.scaler.control.reconciler import reconcile
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.planning.plan import Plan
from elasticmoe.services.scaler.planning.planner import plan_way

DECISIONS = msgspec.msgpack.Decoder(Decision)


def replay(decisions: Iterable[Decision]) -> list[str]:
    """What comes out otherwise than it did; empty where all is identical. Oldest first: a plan precedes its steps."""
    plans: dict[str, Plan] = {}
    found = []
    for decision in decisions:
        if isinstance(decision, PlanMade):
            plans[decision.op_id] = plan = plan_again(decision)
            if digest(plan) != decision.plan:
                found.append(f"{decision.op_id}: another plan")
        else:
            found += _turn(decision, plans)
    return found


def plan_again(made: PlanMade) -> Plan:
    """From what it was made from. Raises what plan_way raises."""
    return plan_way(made.layout, made.target, made.sizes, made.memory, made.devices, made.rates)


def _turn(decision: TurnTaken, plans: dict[str, Plan]) -> list[str]:
    before, name = decision.before, "members"
    if before.operation is not None:
        name = before.operation.op_id
        plan = plans.get(name)
        if plan is None and before.operation.kind != "rebalance":
            return [f"{name}: the journal has a turn and no plan"]
        before = msgspec.structs.replace(before, operation=msgspec.structs.replace(before.operation, plan=plan))
    step = reconcile(before, decision.seen, decision.now)
    after, wanted = without_plan(step.state), decision.after
    if after != wanted:
        return [f"{name}: {_said(after)} and not {_said(wanted)}"]
    return [] if digests(step.actions) == decision.commands else [f"{name}: {_said(after)}: other commands"]


def _said(state: State) -> str:
    operation = state.operation
    return f"{operation.phase}, {operation.why}" if operation else f"{state.status.phase}, {state.status.reason}"
