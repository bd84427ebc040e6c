"""The reconciler's part that lets the deployment follow its load: what the policy is told of it, and what its decision
asks for. Pure.

The policy (`services/scaler/policy`) knows widths and prices; this knows layouts, operations and the planner. Where the
mode is `act`, a decision becomes an order like an operator's, under an id of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Literal

import msgspec

from elasticmoe.common.capacity import kv_handles_at
from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.scaler.actions import Action, CancelStuck, ScaleTo
from elasticmoe.services.scaler.observation import Load
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.planning.plan import Target
from elasticmoe.services.scaler.planning.planner import plan_way
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import ChangePrice, DeploymentFacts, OperationFacts, WidthFacts
from elasticmoe.services.scaler.policy.orders import PastOrder, remembering, told
from elasticmoe.services.scaler.policy.price import NO_PLAN_S
from elasticmoe.services.scaler.policy.recommend import recommend
from elasticmoe.services.scaler.policy.state import Decision, PolicyState, Reason
from elasticmoe.services.scaler.policy.step_model import nearest

REACTION_S = 1.0  # of a growth, before one has been seen
PRICE_S = 300.0  # for so long a price counts
_INTO_BOUNDS = (told(Reason.GROW_BOUND), told(Reason.SHRINK_BOUND))
_KINDS: dict[str, Literal["grow", "shrink", "other"]] = {"scale_up": "grow", "scale_down": "shrink"}


class Priced(msgspec.Struct, frozen=True):
    """What the planner said of the change of the layout `epoch` to `width`, where so many devices could be used."""

    epoch: int
    width: int
    devices: int
    at_s: float
    price: ChangePrice | None

    def tells(self, epoch: int, width: int, devices: int, now: float) -> bool:
        """Whether it is an answer to this question too. What a plan costs changes little while the layout stays."""
        kept_s = PRICE_S if self.price is not None else NO_PLAN_S
        return (self.epoch, self.width, self.devices) == (epoch, width, devices) and now - self.at_s < kept_s


class Autoscaling(msgspec.Struct, frozen=True, kw_only=True):
    """What outlives a turn.

    policy: its own state
    decision: the last one; its state is `policy`
    resized_at: when the number of replicas changed last, and `replicas`: which it was seen to be
    lost_at: when a device was lost last
    reaction_s: what the last growth took until its replicas served
    priced: the last price: with hundreds of devices, a plan takes the planner a tenth of a second
    """

    policy: PolicyState = PolicyState()
    decision: Decision | None = None
    resized_at: float | None = None
    replicas: int | None = None
    lost_at: float | None = None
    reaction_s: float = REACTION_S
    priced: Priced | None = None


def follow_load(
    before: Autoscaling,
    load: Load,
    layout: Layout,
    operation: Operation | None,
    last: Operation | None,
    now: float,
    *,
    is_serving: bool,
    is_lossy: bool,
) -> tuple[Autoscaling, tuple[Action, ...]]:
    """The policy's decision in one turn. `layout`: in force. `is_serving`: all of its ranks step. `is_lossy`: some of
    its devices are lost."""
    after = _seen(before, layout, last, now, is_lossy=is_lossy)
    latest = operation if operation is not None else last
    facts = DeploymentFacts(
        width=layout.dp,
        changed_s=after.resized_at,
        operation=_operation_facts(operation, now) if operation is not None else None,
        is_recovering=is_lossy or not (is_serving or operation is not None),
        is_degraded=not is_serving,
        lost_s=after.lost_at,
        is_own=latest is not None and latest.policy_order is not None,
        accepted=load.accepted,
        refused=load.refused,
        reaction_s=after.reaction_s,
        available=len(load.devices) // layout.tp,
    )

    experts = tuple(map(len, layout.homes))

    @cache
    def width_facts(width: int) -> WidthFacts:
        return _width_facts(load, experts, layout.tp, width)

    priced = after.priced

    def price(width: int) -> ChangePrice | None:
        nonlocal priced
        if priced is None or not priced.tells(layout.epoch, width, len(load.devices), now):
            priced = Priced(layout.epoch, width, len(load.devices), now, _price(load, layout, width))
        return priced.price

    decision = recommend(load.config, load.signals, facts, width_facts, price, after.policy, now)
    last_decision = msgspec.structs.replace(decision, state=PolicyState())  # which is `policy`
    after = msgspec.structs.replace(after, policy=decision.state, decision=last_decision, priced=priced)
    return after, _actions(decision)


def remembered(operations: Iterable[Operation], config: PolicyConfig, now: float, now_unix: float) -> Autoscaling:
    """What a scaler that begins knows of the operations that the journal has, newest first: its policy goes on where
    the one before was, and a lost device is not forgotten."""
    past, lost_at = list[PastOrder](), None
    for operation in operations:
        at = now - max(0.0, now_unix - operation.accepted_unix)
        if lost_at is None and operation.lost_devices:
            lost_at = min(now, at + operation.elapsed_s)
        number, planned = operation.policy_order, operation.planned
        is_done = operation.kind in _KINDS and operation.phase == "done" and not operation.lost_devices
        if planned is not None and (number is not None or is_done):
            is_bound = operation.request.reason in _INTO_BOUNDS
            past.append(PastOrder(number, at, planned.replicas_before, planned.replicas_after, is_bound))
    return Autoscaling(policy=remembering(config, reversed(past)), lost_at=lost_at)


def _seen(before: Autoscaling, layout: Layout, last: Operation | None, now: float, *, is_lossy: bool) -> Autoscaling:
    """After a look at what has happened since."""
    after = before
    if layout.dp != before.replicas:
        resized_at = now if before.replicas is not None else None
        after = msgspec.structs.replace(after, replicas=layout.dp, resized_at=resized_at)
    if is_lossy:
        after = msgspec.structs.replace(after, lost_at=now)
    took_s = last.accounting.figures.capacity_s if last is not None else None
    if took_s is not None and last is not None and last.phase == "done":
        after = msgspec.structs.replace(after, reaction_s=took_s)
    return after


def _operation_facts(operation: Operation, now: float) -> OperationFacts:
    planned = operation.planned
    return OperationFacts(
        op_id=operation.op_id,
        kind=_KINDS.get(operation.kind, "other"),
        target=planned.replicas_after if planned is not None else None,
        since_s=now - operation.elapsed_s,
        predicted_s=planned.seconds if planned is not None else 0.0,
        is_committed=operation.leg > 0 or operation.phase not in ("plan", "prepare"),
    )


def _width_facts(load: Load, experts: tuple[int, ...], tp: int, width: int) -> WidthFacts:
    """`experts`: how many each layer has."""
    handles = kv_handles_at(load.sizes, load.memory, experts, width * tp)
    step_width, step = nearest(load.steps, width), None
    if step_width is not None:
        step = load.steps[step_width]
        if load.shares_cores:
            step = step.slowed(_cores_of_rank(load, step_width * tp) / _cores_of_rank(load, width * tp))
    return WidthFacts(
        width=width,
        kv_tokens=max(0, handles) * load.kv_handle_tokens,
        step=step,
        shares_cores=load.shares_cores and _cores_in_use(load, (width + 1) * tp) <= _cores_in_use(load, width * tp),
        prefill_tokens_max=load.step_tokens_max,
        devices=tp,
        step_width=step_width,
    )


def _cores_of_rank(load: Load, num_ranks: int) -> float:
    """That one of so many computes with where they share them. Where it is not known how many there are, ratios count
    alone. Not rounded down to whole threads: what is left over is little, and a width that has run tells of it."""
    return min(load.threads_max, (load.cores or 1) / num_ranks)


def _cores_in_use(load: Load, num_ranks: int) -> float:
    """By all of so many."""
    return min(load.threads_max * num_ranks, load.cores or 1)


def _price(load: Load, layout: Layout, width: int) -> ChangePrice | None:
    """By the planner's dry run."""
    try:
        plan = plan_way(layout, Target(replicas=width), load.sizes, load.memory, load.devices, load.rates)
    except ElasticMoEError:
        return None
    return ChangePrice(plan.seconds, plan.seconds, plan.bytes_copied, plan.pause_ms / 1e3)


def _actions(decision: Decision) -> tuple[Action, ...]:
    if not decision.acts or decision.op_id is None:
        return ()
    if decision.reason is Reason.CANCEL_STUCK:
        return (CancelStuck(decision.op_id),)
    assert decision.target is not None, "an order has a target"
    number, supersedes = decision.state.num_orders, decision.supersedes or ""
    return (ScaleTo(decision.op_id, decision.target, decision.reason.value, supersedes, number),)
