"""Makes journaled decisions again with the present code: each has to come out as it did (promise P20)."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from services.scaler.core import decide
from services.scaler.decisions import (
    Decision,
    PhaseChosen,
    PlanMade,
    StepTaken,
    digests,
    without_plan,
)
from services.scaler.plan import Plan
from services.scaler.settle import tidy
from services.scaler.transition import advance

DECISIONS = msgspec.msgpack.Decoder(Decision)


def replay(decisions: Iterable[Decision]) -> list[str]:
    """What comes out otherwise than it did; empty where all is identical. Oldest first: a plan precedes its steps."""
    plans: dict[str, Plan] = {}
    found = []
    for decision in decisions:
        if isinstance(decision, PlanMade):
            plan, again = msgspec.structs.replace(decision, plan="").make()
            plans[decision.op_id] = plan
            if again != decision:
                found.append(f"{decision.op_id}: another plan")
        elif isinstance(decision, StepTaken):
            found += _step(decision, plans)
        elif isinstance(decision, PhaseChosen):
            if (chosen := decide(decision.layout, decision.observed)) != decision.chosen:
                found.append(f"phase: {chosen} and not {decision.chosen}")
        else:
            actions, reason = tidy(decision.seen, decision.since_s)
            if (reason, digests(actions)) != (decision.reason, decision.commands):
                found.append(f"tidy: {reason} and not {decision.reason}")
    return found


def _step(decision: StepTaken, plans: dict[str, Plan]) -> list[str]:
    before = decision.before
    plan = plans.get(before.op_id)
    if plan is None and before.kind != "rebalance":
        return [f"{before.op_id}: the journal has a step and no plan"]
    step = advance(msgspec.structs.replace(before, plan=plan), decision.seen, decision.now)
    after, wanted = without_plan(step.operation), decision.after
    if after != wanted:
        return [f"{before.op_id}: {after.phase}, {after.why} and not {wanted.phase}, {wanted.why}"]
    if digests(step.actions) != decision.commands:
        return [f"{before.op_id}: {after.phase}: other commands"]
    return []
