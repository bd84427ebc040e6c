"""The one place where it is decided whether the deployment grows or shrinks. Pure: no clock, no I/O.

In this order; the first that applies decides:

| what | decides |
|---|---|
| mode `off` | nothing |
| recovery | nothing: what is lost or replaced goes first |
| an operation in progress | nothing; one that cannot end is cancelled; before its commit a shrink yields to panic |
| an order without an answer | nothing; it is sent again, as the same, after a while |
| bounds | growth or shrink into them |
| something unknown | growth by what waits in the routers that are heard; after a while nothing at all |
| saturation, forecast | growth |
| all else | shrink by one, where every guard agrees |
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand, demand_of
from elasticmoe.services.scaler.policy.facts import DeploymentFacts, OperationFacts, Prices, WidthFacts, Widths
from elasticmoe.services.scaler.policy.figures import Signals, Unknown
from elasticmoe.services.scaler.policy.guards import shrink
from elasticmoe.services.scaler.policy.orders import forgetting, order_id, sent
from elasticmoe.services.scaler.policy.saturation import Saturation, measured, predicted, smoothed, work
from elasticmoe.services.scaler.policy.state import Decision, Evidence, PolicyState, Reason, ScaleOrder

REFUSED_S = 30.0  # after a refused order
_replace = msgspec.structs.replace


class Turn(NamedTuple):
    """What all parts of one turn see."""

    config: PolicyConfig
    signals: Signals
    deployment: DeploymentFacts
    widths: Widths
    prices: Prices
    demand: Demand | Unknown
    raw: Saturation
    now: float

    @property
    def width(self) -> int:
        """Replicas in force."""
        return self.deployment.width

    @property
    def most(self) -> int:
        """Replicas that there may be."""
        available = self.deployment.available
        return self.config.replicas_max if available is None else min(self.config.replicas_max, available)

    @property
    def least(self) -> int:
        """Replicas that there have to be, as far as devices allow."""
        return min(self.config.replicas_min, self.most)

    @property
    def is_panic(self) -> bool:
        """Whether an objective is broken now, by what does not lie behind."""
        return self.raw.worst >= 1.0


def recommend(
    config: PolicyConfig,
    signals: Signals,
    deployment: DeploymentFacts,
    widths: Widths,
    prices: Prices,
    state: PolicyState,
    now: float,
) -> Decision:
    """The decision of a turn at `now`. `prices` is asked only for a shrink that everything else speaks for."""
    changed = deployment.changed_s
    is_settled = changed is None or now - changed >= config.settle_s
    demand = demand_of(signals)
    raw = measured(signals, widths(deployment.width), demand, config, settled=is_settled)
    turn = Turn(config, signals, deployment, widths, prices, demand, raw, now)
    state = _observe(turn, state)
    threshold = _threshold(turn, state)
    evidence = Evidence(
        raw=raw,
        smoothed=state.saturation,
        threshold=threshold,
        demand=None if isinstance(demand, Unknown) else demand,
        forecast_per_s=state.forecast.after(config.horizon_s),
        silent=signals.silent,
    )
    return _decide(turn, state, evidence, threshold)


def _observe(turn: Turn, state: PolicyState) -> PolicyState:
    """The state after seeing, before deciding."""
    now, config = turn.now, turn.config
    elapsed = now - state.at_s if state.at_s is not None else 0.0
    since = turn.signals.silent_since_s
    unknown_since = None
    if isinstance(turn.demand, Unknown) or turn.signals.silent:
        unknown_since = state.unknown_since_s if state.unknown_since_s is not None else min(now, since or now)
    known_since = None
    if unknown_since is None:
        known_since = state.known_since_s if state.known_since_s is not None else now
    state = _replace(
        state,
        at_s=now,
        saturation=smoothed(state.saturation, turn.raw.worst, elapsed, config),
        unknown_since_s=unknown_since,
        known_since_s=known_since,
    )
    state = forgetting(config, state, now)
    if not isinstance(turn.demand, Unknown):
        step = turn.widths(turn.width).step
        busy = work(step, turn.demand) if step is not None else turn.demand.requests_per_s
        kv_used = turn.signals.kv_used
        kv_tokens = 0.0 if isinstance(kv_used, Unknown) else kv_used
        state = _replace(
            state,
            forecast=state.forecast.seen(turn.demand.requests_per_s, now),
            peaks=state.peaks.seen(now, config.down_over_s, busy, kv_tokens, turn.demand),
        )
    return _answered(turn, state)


def _answered(turn: Turn, state: PolicyState) -> PolicyState:
    """An order is over when its operation is seen, has ended, or was refused; and where another policy would not give
    it, or somebody else's operation has come before it: the size that it was for is no longer that."""
    if state.order is None:
        return state
    is_wanted = turn.config.mode == "act" and turn.least <= state.order.target <= turn.config.replicas_max
    operation = turn.deployment.operation
    is_overtaken = (turn.deployment.changed_s or -math.inf) > state.order.sent_s
    if operation is not None:
        is_overtaken |= operation.op_id not in (state.order.op_id, state.order.supersedes)
    if is_overtaken or not is_wanted:
        return _replace(state, order=None)
    op_id = state.order.op_id
    if turn.deployment.refused == op_id:
        return _replace(state, order=None, refused_until_s=turn.now + REFUSED_S)
    if (operation is not None and operation.op_id == op_id) or turn.deployment.last_op == op_id:
        return _replace(state, order=None)
    return state


def _threshold(turn: Turn, state: PolicyState) -> float:
    """Above which saturation it grows: the faster the load grows, and the longer the answer takes, the lower."""
    reaction = turn.config.up_after_s + turn.deployment.reaction_s
    threshold = 1.0 / (1.0 + state.forecast.growth_per_s() * reaction)
    return max(turn.config.up_min, min(turn.config.up_max, threshold))


def _decide(turn: Turn, state: PolicyState, evidence: Evidence, threshold: float) -> Decision:
    config, deployment = turn.config, turn.deployment
    # The smoothed figure falls slowly: after a growth it still tells of the size before.
    saturated = min(state.saturation or 0.0, turn.raw.worst) > threshold
    above_since = (state.above_since_s if state.above_since_s is not None else turn.now) if saturated else None
    state = _replace(state, above_since_s=above_since)

    def hold(reason: Reason) -> Decision:
        return Decision(target=None, reason=reason, evidence=evidence, state=state)

    if config.mode == "off":
        return hold(Reason.OFF)
    if deployment.operation is not None:
        return _meanwhile(turn, state, evidence, deployment.operation)
    if deployment.is_recovering:
        return hold(Reason.RECOVERING)
    if state.order is not None:
        if turn.now - state.order.sent_s < config.accept_s:
            return hold(Reason.AWAITING)
        order = _replace(state.order, sent_s=turn.now)
        return Decision(
            target=order.target,
            reason=Reason.REPEAT_ORDER,
            evidence=evidence,
            state=_replace(state, order=order),
            op_id=order.op_id,
            supersedes=order.supersedes,
            acts=config.mode == "act",
        )
    if state.refused_until_s is not None and turn.now < state.refused_until_s:
        return hold(Reason.AFTER_REFUSAL)
    if turn.width < turn.least:
        return _order(turn, state, evidence, turn.least, Reason.GROW_BOUND)
    if state.unknown_since_s is not None:
        return _blind(turn, state, evidence)
    grown = _grow(turn, state, evidence)
    if grown is not None:
        return grown
    if deployment.lost_s is not None and turn.now - deployment.lost_s < config.loss_hold_s:
        return hold(Reason.AFTER_LOSS)
    if turn.width > config.replicas_max:
        if not _has_room(turn, config.replicas_max):
            return hold(Reason.KV_WOULD_NOT_FIT)
        return _order(turn, state, evidence, config.replicas_max, Reason.SHRINK_BOUND)
    if above_since is not None:
        return hold(Reason.AT_MAX if turn.width >= turn.most else Reason.STEADY)
    if turn.width < config.replicas_min:
        return hold(Reason.AT_MAX)
    if turn.width == config.replicas_min:
        return hold(Reason.AT_MIN)
    verdict = shrink(config, turn.widths, turn.prices, state, turn.width, threshold, turn.now)
    evidence = _replace(
        evidence,
        of_width=turn.width - 1,
        predicted=verdict.predicted,
        saved_s=verdict.saved_s,
        cost_s=verdict.cost_s,
    )
    if verdict.reason is not Reason.SHRINK_IDLE:
        return hold(verdict.reason)
    return _order(turn, state, evidence, turn.width - 1, Reason.SHRINK_IDLE)


def _meanwhile(turn: Turn, state: PolicyState, evidence: Evidence, operation: OperationFacts) -> Decision:
    """While an operation is in progress."""
    config = turn.config
    decision = Decision(target=None, reason=Reason.OPERATION, evidence=evidence, state=state)
    if operation.is_committed or state.cancelled == operation.op_id or turn.deployment.is_recovering:
        return decision
    # Who is behind for want of a rank is no load; and a shrink into the bounds goes on.
    may_grow = state.unknown_since_s is None and not turn.deployment.is_degraded and turn.width <= turn.most
    if operation.kind == "shrink" and turn.is_panic and may_grow and state.order is None:
        target = max(turn.width, _target(turn, state, evidence))
        return _order(turn, state, evidence, target, Reason.SUPERSEDE_SHRINK, operation.op_id)
    if is_stuck(config, operation, turn.now):
        if config.mode == "act":
            state = _replace(state, cancelled=operation.op_id)
        return Decision(
            target=None,
            reason=Reason.CANCEL_STUCK,
            evidence=evidence,
            state=state,
            op_id=operation.op_id,
            acts=config.mode == "act",
        )
    return decision


def is_stuck(config: PolicyConfig, operation: OperationFacts, now: float) -> bool:
    """Whether an operation has taken so long that it will not come to its commit."""
    return now - operation.since_s > max(config.stuck_s, config.stuck_factor * operation.predicted_s)


def _blind(turn: Turn, state: PolicyState, evidence: Evidence) -> Decision:
    """While something is unknown: what is heard may ask for more, nobody's silence for less."""
    assert state.unknown_since_s is not None
    if turn.now - state.unknown_since_s >= turn.config.blind_after_s:
        return Decision(target=None, reason=Reason.BLIND, evidence=_replace(evidence, is_blind=True), state=state)
    ages = (turn.raw.queue_age, turn.raw.backlog)
    if max((age for age in ages if age is not None), default=0.0) >= 1.0 and turn.width < turn.most:
        return _order(turn, state, evidence, turn.width + 1, Reason.GROW_BACKLOG_BLIND)
    return Decision(target=None, reason=Reason.UNKNOWN, evidence=evidence, state=state)


def _grow(turn: Turn, state: PolicyState, evidence: Evidence) -> Decision | None:
    """Growth for saturation or by the forecast; None where none is wanted or possible."""
    config = turn.config
    if turn.width >= turn.most:
        return None
    is_long_enough = state.above_since_s is not None and turn.now - state.above_since_s >= config.up_after_s
    if turn.is_panic or is_long_enough:
        target = _target(turn, state, evidence)
        evidence = _replace(evidence, of_width=target)
        reason = Reason.GROW_PANIC if turn.is_panic else Reason.GROW_SATURATED
        return _order(turn, state, evidence, target, reason)
    ahead = state.forecast.after(config.horizon_s)
    if ahead is None or isinstance(turn.demand, Unknown) or turn.demand.requests_per_s <= 0.0:
        return None
    coming = turn.demand.times(ahead / turn.demand.requests_per_s)
    if ahead <= turn.demand.requests_per_s or _fits(turn.widths(turn.width), coming, config, 1.0):
        return None
    target = _smallest(turn, coming, config.headroom)
    evidence = _replace(evidence, of_width=target, predicted=predicted(turn.widths(target), coming, config))
    return _order(turn, state, evidence, target, Reason.GROW_FORECAST)


def _target(turn: Turn, state: PolicyState, evidence: Evidence) -> int:
    """How far up: the smallest width that keeps up with the demand and what waits, at most twice the present one."""
    config, demand = turn.config, turn.demand
    if isinstance(demand, Unknown) or turn.widths(turn.width).step is None:
        ratio = max(turn.raw.worst, state.saturation or 0.0) / (evidence.threshold or config.up_max)
        return min(max(turn.width + 1, math.ceil(turn.width * ratio)), 2 * turn.width, turn.most)
    waiting = turn.signals.queued / config.ttft_s
    if demand.requests_per_s > 0.0:
        demand = demand.times((demand.requests_per_s + waiting) / demand.requests_per_s)
    return _smallest(turn, demand, config.headroom)


def _smallest(turn: Turn, demand: Demand, headroom: float) -> int:
    """The smallest width above the present one that the demand fits in, or the largest allowed."""
    largest = min(2 * turn.width, turn.most)
    for width in range(turn.width + 1, largest):
        if _fits(turn.widths(width), demand, turn.config, headroom) and _has_room(turn, width):
            return width
    return largest


def _fits(facts: WidthFacts, demand: Demand, config: PolicyConfig, headroom: float) -> bool:
    return predicted(facts, demand.times(headroom), config).worst < 1.0


def _has_room(turn: Turn, width: int) -> bool:
    used = turn.signals.kv_used
    room = turn.widths(width).kv_tokens * width * turn.config.kv_share_max
    return isinstance(used, Unknown) or used <= room


def _order(
    turn: Turn, state: PolicyState, evidence: Evidence, target: int, reason: Reason, supersedes: str | None = None
) -> Decision:
    """The decision for a target, and the state after it; a hold where there were too many."""
    config = turn.config
    if len(state.sent_s) >= config.operations_max:
        return Decision(target=None, reason=Reason.TOO_MANY, evidence=evidence, state=state)
    op_id = order_id(state.num_orders + 1, turn.now)
    if config.mode == "act":
        state = sent(config, turn.width, state, ScaleOrder(op_id, target, turn.now, supersedes))
    return Decision(
        target=target,
        reason=reason,
        evidence=evidence,
        state=state,
        op_id=op_id,
        supersedes=supersedes,
        acts=config.mode == "act",
    )
