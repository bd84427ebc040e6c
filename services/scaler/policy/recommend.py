"""The one place where it is decided whether the deployment grows or shrinks. Pure: no clock, no I/O.

In this order; the first that applies decides:

| what | decides |
|---|---|
| mode `off` | nothing |
| recovery | nothing: what is lost or replaced goes first |
| an operation in progress | nothing; one that cannot end is cancelled; before its commit a shrink yields to panic |
| an order without an answer | nothing; it is sent again, as the same, after a while |
| the lower bound | growth into it |
| something unknown | growth by what waits in the routers that are heard; after a while nothing for the load |
| excess, saturation, forecast | growth, as far as it helps |
| the upper bound | shrink into it |
| all else | shrink, as far as every guard agrees |
"""

from __future__ import annotations

import math

import msgspec

from elasticmoe.services.scaler.policy.advice import standing
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import BUCKET_S, Demand, demand_of
from elasticmoe.services.scaler.policy.facts import DeploymentFacts, OperationFacts, Prices, Widths
from elasticmoe.services.scaler.policy.figures import Missing, Signals, Unknown
from elasticmoe.services.scaler.policy.guards import Shrink, Verdict, judge, priced
from elasticmoe.services.scaler.policy.orders import accepted, followed, forgetting, order_id, sent
from elasticmoe.services.scaler.policy.price import NO_PLAN_S
from elasticmoe.services.scaler.policy.recent import RECENT_S, Excess, Past
from elasticmoe.services.scaler.policy.saturation import capacity, measured, predicted, smoothed
from elasticmoe.services.scaler.policy.sizing import has_room, is_of_no_use, most_now, predicted_at, smallest, target_of
from elasticmoe.services.scaler.policy.state import (
    Decision,
    Evidence,
    NoPlan,
    PolicyState,
    Reason,
    RefusedSize,
    ScaleOrder,
)
from elasticmoe.services.scaler.policy.turn import Turn

DRAIN_S_MAX = 60.0
REFUSED_S = 30.0  # after a refused order
SMALLER_S = 300.0  # for so long, what was refused for its size is not asked for again
GAP_S = 10.0  # between two turns: what lasted before a longer one is not known to have lasted over it
_replace = msgspec.structs.replace


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
    is_drained = changed is None or now - changed >= _drain_s(signals, config)
    demand = demand_of(signals)
    raw = measured(signals, widths(deployment.width), demand, config, changed_s=changed, drained=is_drained)
    turn = Turn(config, signals, deployment, widths, prices, demand, raw, now)
    state = _observe(turn, state)
    threshold = _threshold(turn, state)
    evidence = Evidence(
        raw=raw,
        smoothed=state.saturation,
        threshold=threshold,
        excess_s=state.excess.seconds,
        demand=None if isinstance(demand, Unknown) else demand,
        forecast_per_s=state.forecast.after(config.horizon_s),
        silent=signals.silent,
    )
    bounds = range(turn.least, turn.most + 1)
    return standing(config, _decide(turn, state, evidence, threshold), turn.width, bounds, now)


def _drain_s(signals: Signals, config: PolicyConfig) -> float:
    """For how long after a change requests of the size before are there: a request's life. They stay where they are."""
    tokens, itl = signals.output_tokens, signals.itl_s
    if isinstance(tokens, Missing | Unknown) or isinstance(itl, Missing | Unknown):
        return config.settle_s
    return max(config.settle_s, min(DRAIN_S_MAX, tokens * itl))


def _observe(turn: Turn, state: PolicyState) -> PolicyState:
    """The state after seeing, before deciding."""
    now, config = turn.now, turn.config
    elapsed = now - state.at_s if state.at_s is not None else 0.0
    if elapsed > GAP_S:
        state = _replace(state, excess=Excess(), above_since_s=None, known_since_s=None, advice=None)
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
        saturation=smoothed(state.saturation, turn.raw.worst, elapsed, config.rise_s, config.fall_s),
        usual=smoothed(state.usual, turn.raw.lasting, elapsed, config.fall_s, config.fall_s),
        unknown_since_s=unknown_since,
        known_since_s=known_since,
    )
    state = followed(config, _refusals(turn, forgetting(config, state, now)), turn.deployment, now)
    if not isinstance(turn.demand, Unknown):
        state = _loaded(turn, state, turn.demand, elapsed)
    return _answered(turn, state)


def _refusals(turn: Turn, state: PolicyState) -> PolicyState:
    """Without those that count no more: they are of another size, by another policy, or lie behind."""
    refused, no_plan = state.refused, state.no_plan
    if refused is not None:
        kept_s = SMALLER_S if refused.is_of_size else REFUSED_S
        if (refused.width, refused.policy) != (turn.width, turn.config) or turn.now - refused.at_s >= kept_s:
            state = _replace(state, refused=None)
    if no_plan is not None and (no_plan.width != turn.width or turn.now - no_plan.at_s >= NO_PLAN_S):
        state = _replace(state, no_plan=None)
    return state


def _loaded(turn: Turn, state: PolicyState, demand: Demand, elapsed_s: float) -> PolicyState:
    """After seeing the load, which is known."""
    config, burst, kv_used = turn.config, turn.signals.burst_per_s, turn.signals.kv_used
    rate = demand.requests_per_s if isinstance(burst, Unknown) else burst
    last = turn.signals.last_per_s  # what gathers needs no mean over moments, which would only come later
    excess = state.excess
    if turn.deployment.operation is None:
        elapsed_s = min(elapsed_s, RECENT_S)  # a rate of the last moments tells nothing of the time before
        came = rate if isinstance(last, Unknown) else last
        excess = excess.seen(came / capacity(turn.widths(turn.width), demand, config), elapsed_s)
    forecast = state.forecast.seen(demand.requests_per_s, turn.now)
    level = demand.requests_per_s if forecast.level is None else max(0.0, forecast.level)
    over_s = max(config.hold_max_s, config.down_over_s)
    past = Past(turn.now, rate, level, 0.0 if isinstance(kv_used, Unknown) else kv_used)
    return _replace(state, excess=excess, forecast=forecast, recent=state.recent.seen(past, over_s))


def _answered(turn: Turn, state: PolicyState) -> PolicyState:
    """An order is over when it was accepted or refused; and where another policy would not give
    it, there are no more devices for it, or somebody else's operation has come before it: the size that it was for is
    no longer that."""
    order, operation, refused = state.order, turn.deployment.operation, turn.deployment.refused
    if order is None:
        return state
    if order.op_id in (turn.deployment.accepted, operation.op_id if operation is not None else None):
        return accepted(turn.config, state, order)
    least = (
        order.width + 1 if order.is_bound and turn.width < turn.least else turn.least
    )  # part of the way is refused less
    is_wanted = turn.config.mode == "act" and least <= order.target <= turn.most
    is_overtaken = (turn.deployment.changed_s or -math.inf) > order.sent_s
    if operation is not None:
        is_overtaken |= operation.op_id != order.supersedes
    if is_overtaken or not is_wanted:
        return _replace(state, order=None)
    if refused is None or refused.op_id != order.op_id:
        return state
    size = RefusedSize(turn.width, order.target, turn.now, order.policy, refused.is_of_size)
    return _replace(state, order=None, refused=size if order.policy == turn.config else None)


def _threshold(turn: Turn, state: PolicyState) -> float:
    """Above which saturation it grows: the faster the load grows, and the longer the answer takes, the lower."""
    reaction = turn.config.up_after_s + turn.deployment.reaction_s
    threshold = 1.0 / (1.0 + state.forecast.growth_per_s() * reaction)
    return max(turn.config.up_min, min(turn.config.up_max, threshold))


def _decide(turn: Turn, state: PolicyState, evidence: Evidence, threshold: float) -> Decision:
    config, deployment = turn.config, turn.deployment
    saturated = turn.raw.worst > threshold
    above_since = (state.above_since_s if state.above_since_s is not None else turn.now) if saturated else None
    state = _replace(state, above_since_s=above_since)

    def hold(reason: Reason, target: int | None = None) -> Decision:
        return Decision(target=target, reason=reason, evidence=evidence, state=state)

    if config.mode == "off":
        return hold(Reason.OFF)
    if deployment.operation is not None:
        return _meanwhile(turn, state, evidence, deployment.operation)
    if deployment.is_recovering:
        return hold(Reason.RECOVERING)
    if state.order is not None:
        if turn.now - state.order.sent_s < config.accept_s:
            return hold(Reason.AWAITING, state.order.target)
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
    if state.refused is not None and turn.now - state.refused.at_s < REFUSED_S:
        return hold(Reason.AFTER_REFUSAL, state.refused.target)
    if turn.width < turn.least:
        return _order(turn, state, evidence, min(turn.least, most_now(turn, state)), Reason.GROW_BOUND)
    if state.unknown_since_s is not None:
        return _blind(turn, state, evidence)
    grown = _grow(turn, state, evidence)
    if grown is not None and grown.reason is not Reason.OUT_OF_REACH:
        return grown
    if deployment.lost_s is not None and turn.now - deployment.lost_s < config.loss_hold_s:
        return hold(Reason.AFTER_LOSS)
    if turn.width > config.replicas_max:
        if not has_room(turn, config.replicas_max):
            return hold(Reason.KV_WOULD_NOT_FIT)
        if turn.prices(config.replicas_max) is None:
            return hold(Reason.NO_PLAN)
        return _order(turn, state, evidence, config.replicas_max, Reason.SHRINK_BOUND)
    if grown is not None:
        return grown
    if above_since is not None:
        return hold(Reason.AT_MAX if turn.width >= turn.most else Reason.STEADY)
    if turn.width < config.replicas_min:
        return hold(Reason.AT_MAX)
    if turn.width == config.replicas_min:
        return hold(Reason.AT_MIN)
    assert not isinstance(turn.demand, Unknown), "which is what blind turns are for"
    target, verdict = _smaller(turn, state, turn.demand, threshold)
    evidence = _replace(
        evidence,
        of_width=target,
        predicted=verdict.predicted,
        saved_s=verdict.saved_s,
        cost_s=verdict.cost_s,
    )
    if verdict.reason is Reason.NO_PLAN and (state.no_plan is None or state.no_plan.target < target):
        state = _replace(state, no_plan=NoPlan(turn.width, target, turn.now))
    if verdict.reason is not Reason.SHRINK_IDLE:
        return hold(verdict.reason)
    return _order(turn, state, evidence, target, Reason.SHRINK_IDLE)


def _smaller(turn: Turn, state: PolicyState, demand: Demand, threshold: float) -> tuple[int, Verdict]:
    """The smallest width that every guard agrees to, but no less than a half of the present one; or the next smaller
    one, with what speaks against it. Of widths without a plan, one in the middle between those and the present one: one
    is priced in a turn, so a few turns find one that has a plan."""
    config, reaction_s = turn.config, turn.deployment.reaction_s

    def verdict_on(target: int) -> Verdict:
        change = Shrink(turn.width, target, reaction_s)
        return judge(change, config, turn.widths, state, demand, threshold, turn.now)

    target, least = turn.width - 1, max(config.replicas_min, (turn.width + 1) // 2)
    verdict = verdict_on(target)
    while verdict.reason is Reason.SHRINK_IDLE and least < target:  # what does for one width does for all wider ones
        middle = (least + target) // 2
        further = verdict_on(middle)
        if further.reason is Reason.SHRINK_IDLE:
            target, verdict = middle, further
        else:
            least = middle + 1
    barred = _barred(turn, state)
    if verdict.reason is Reason.SHRINK_IDLE and target <= barred:
        if barred == turn.width - 1:
            return turn.width - 1, verdict_on(turn.width - 1)._replace(reason=Reason.NO_PLAN)
        target = (barred + turn.width) // 2
        verdict = verdict_on(target)
    if verdict.reason is Reason.SHRINK_IDLE:
        verdict = priced(Shrink(turn.width, target, reaction_s), config, turn.widths, turn.prices, state, verdict)
    return target, verdict


def _barred(turn: Turn, state: PolicyState) -> int:
    """The widest shrink that had no plan, or was refused for its size; 0 for none."""
    no_plan, refused = state.no_plan, state.refused
    planned = no_plan.target if no_plan is not None else 0
    return max(planned, refused.target if refused is not None and refused.target < turn.width else 0)


def _meanwhile(turn: Turn, state: PolicyState, evidence: Evidence, operation: OperationFacts) -> Decision:
    """While an operation is in progress."""
    config = turn.config
    decision = Decision(target=None, reason=Reason.OPERATION, evidence=evidence, state=state)
    if operation.is_committed or state.cancelled == operation.op_id or turn.deployment.is_recovering:
        return decision
    # Who is behind for want of a rank is no load; and a shrink into the bounds goes on.
    may_grow = state.unknown_since_s is None and not turn.deployment.is_degraded and turn.width <= turn.most
    if operation.kind == "shrink" and turn.is_panic and may_grow and state.order is None and _helps(turn, operation):
        target = max(turn.width, target_of(turn, state, evidence))
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


def _helps(turn: Turn, shrink: OperationFacts) -> bool:
    """Whether the present width keeps an objective better than the one that it shrinks to."""
    return shrink.target is None or not is_of_no_use(turn, shrink.target, turn.width)


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
    """Growth for what is measured, or for what comes beyond what the width can do; None where none is wanted or
    possible."""
    config = turn.config
    if turn.width >= turn.most:
        return None
    is_long_enough = state.above_since_s is not None and turn.now - state.above_since_s >= config.up_after_s
    if state.excess.is_too_much(config.up_after_s):
        reason = Reason.GROW_DEMAND
    elif is_long_enough:
        reason = Reason.GROW_PANIC if turn.is_panic else Reason.GROW_SATURATED
    else:
        return _grow_ahead(turn, state, evidence)
    target = target_of(turn, state, evidence)
    if target <= turn.width:
        evidence = _replace(evidence, of_width=turn.most, predicted=predicted_at(turn, turn.most))
        return Decision(target=None, reason=Reason.OUT_OF_REACH, evidence=evidence, state=state)
    return _order(turn, state, _replace(evidence, of_width=target), target, reason)


def _grow_ahead(turn: Turn, state: PolicyState, evidence: Evidence) -> Decision | None:
    """Growth by the forecast, where it is beyond what the width can do by more than chance makes of arrivals."""
    ahead, level, config = state.forecast.after(turn.config.horizon_s), state.forecast.level, turn.config
    if ahead is None or level is None or isinstance(turn.demand, Unknown) or ahead <= turn.demand.requests_per_s:
        return None
    chance = 2 * math.sqrt(max(0.0, level) / BUCKET_S)
    if ahead - chance <= capacity(turn.widths(turn.width), turn.demand, config):
        return None
    coming = turn.demand.at(ahead)
    target = smallest(turn, state, coming, config.headroom)
    if target <= turn.width:
        return None
    evidence = _replace(evidence, of_width=target, predicted=predicted(turn.widths(target), coming, config))
    return _order(turn, state, evidence, target, Reason.GROW_FORECAST)


def _order(
    turn: Turn, state: PolicyState, evidence: Evidence, target: int, reason: Reason, supersedes: str | None = None
) -> Decision:
    """The decision for a target, and the state after it; a hold where there were too many."""
    config = turn.config
    if len(state.sent_s) >= config.operations_max:
        return Decision(target=None, reason=Reason.TOO_MANY, evidence=evidence, state=state)
    op_id = order_id(state.num_orders + 1, turn.now)
    if config.mode == "act":
        is_bound = reason in (Reason.GROW_BOUND, Reason.SHRINK_BOUND)
        state = sent(state, ScaleOrder(op_id, target, turn.now, turn.width, config, supersedes, is_bound))
    return Decision(
        target=target,
        reason=reason,
        evidence=evidence,
        state=state,
        op_id=op_id,
        supersedes=supersedes,
        acts=config.mode == "act",
    )
