"""What the policy's orders leave behind: how many there were lately, when it grew and shrank, which shrinks were
mistakes. Pure.

Whoever begins anew makes that again from the operations that the journal has, so that a restart neither lets it order
more than is allowed nor shrink sooner than it may.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import DeploymentFacts
from elasticmoe.services.scaler.policy.recent import Excess
from elasticmoe.services.scaler.policy.state import PolicyState, Reason, ScaleOrder, TooSmall

TRY_AGAIN = 0.9  # of the load that a width was too small for
BURST = 2.0  # times the load that there is in the mean
SHOWN_S, SHOWN_S_MAX = 3_600.0, 86_400.0  # for which a flap counts against the width: no more than one an hour
_replace = msgspec.structs.replace


def told(reason: Reason) -> str:
    """The reason that an order of the policy has as an operation."""
    return f"policy: {reason.value}"


def order_id(number: int, now: float) -> str:
    """The name of an order that is given at `now`, and of its operation."""
    return f"policy-{number}-{now:.3f}"


def sent(state: PolicyState, order: ScaleOrder) -> PolicyState:
    """After an order that is to be carried out, and may be refused."""
    state = _replace(state, order=order, num_orders=state.num_orders + 1)
    return _replace(state, above_since_s=None, excess=Excess(), cancelled=order.supersedes or state.cancelled)


def accepted(config: PolicyConfig, state: PolicyState, order: ScaleOrder) -> PolicyState:
    """After an order became an operation: what is only asked for uses nothing up, and is no change. A growth into the
    bounds says nothing of the size before."""
    now = order.sent_s
    state = _replace(state, order=None, sent_s=(*state.sent_s, now), refused=None, no_plan=None)
    if order.is_bound and order.target > order.width:
        return _replace(state, grown_s=now)
    return resized(config, state, order.width, order.target, now)


def resized(config: PolicyConfig, state: PolicyState, width: int, target: int, now: float) -> PolicyState:
    """After a change from a width to another, whoever made it: what a flap teaches does not depend on that."""
    if target < width:
        return _replace(state, shrunk_s=now)
    shrunk = state.shrunk_s
    if shrunk is not None and (state.grown_s is None or state.grown_s < shrunk):  # the first growth after a shrink
        dwell = now - shrunk
        state = _replace(state, dwell_s=dwell if state.dwell_s is None else 0.5 * (state.dwell_s + dwell))
        if dwell <= config.flap_s:
            hold = min(config.hold_max_s, 2 * (state.hold_s or config.hold_s))
            state = _replace(state, flap_s=now, hold_s=hold, too_small=_shown(config, state, width, now))
    return _replace(state, grown_s=now)


def _shown(config: PolicyConfig, state: PolicyState, width: int, now: float) -> tuple[TooSmall, ...]:
    """What flaps have shown, with the one back from `width`. The same once more counts for twice as long: a load that
    stays as it is costs fewer and fewer trials. A burst shows nothing of the load that it came upon."""
    objectives = config.ttft_s, config.itl_s
    others = tuple(shown for shown in state.too_small if shown.width != width)
    before = next((shown for shown in state.too_small if shown.width == width), None)
    if not state.recent.entries:
        return (*others, TooSmall(width, None, now, config.hold_max_s, *objectives))
    level = state.recent.level(now - config.down_over_s)
    if state.recent.entries[-1].requests_per_s > BURST * level:
        return state.too_small
    if before is None or before.requests_per_s is None or (before.ttft_s, before.itl_s) != objectives:
        return (*others, TooSmall(width, level, now, SHOWN_S, *objectives))
    counts = now - before.at_s <= before.for_s
    is_alike = TRY_AGAIN * before.requests_per_s <= level <= before.requests_per_s / TRY_AGAIN
    if counts and level > before.requests_per_s and not is_alike:
        return state.too_small  # it was known already
    for_s = min(SHOWN_S_MAX, 2 * before.for_s) if is_alike else SHOWN_S
    least = min(level, before.requests_per_s) if counts or is_alike else level
    return (*others, TooSmall(width, least, now, for_s, *objectives))


def followed(config: PolicyConfig, state: PolicyState, deployment: DeploymentFacts, now: float) -> PolicyState:
    """After a look at the size, which somebody else may have changed: an operator, or who follows the policy's advice.
    What is lost or replaced is nobody's wish."""
    before, state = state.width, _replace(state, width=deployment.width)
    is_lossy = deployment.lost_s is not None and now - deployment.lost_s < config.loss_hold_s
    if before is None or before == deployment.width or deployment.is_recovering or is_lossy:
        return state
    if deployment.is_own:
        return state
    state = _replace(state, above_since_s=None, excess=Excess())  # of the size before
    return resized(config, state, before, deployment.width, now)


def forgetting(config: PolicyConfig, state: PolicyState, now: float) -> PolicyState:
    """Without what lies too far behind to count."""
    state = _replace(state, sent_s=tuple(at for at in state.sent_s if at > now - config.operations_over_s))
    if any(now - shown.at_s > 2 * shown.for_s for shown in state.too_small):
        kept = tuple(shown for shown in state.too_small if now - shown.at_s <= 2 * shown.for_s)
        state = _replace(state, too_small=kept)
    if state.flap_s is not None and now - state.flap_s > max(config.hold_max_s, state.hold_s or 0.0):
        return _replace(state, flap_s=None, hold_s=None)
    return state


class PastOrder(msgspec.Struct, frozen=True):
    """An order that was carried out by an earlier process: its number, None of somebody else's; when it was accepted,
    by this one's clock, which change it was, and whether it led into the policy's bounds."""

    number: int | None
    at_s: float
    width: int
    target: int
    is_bound: bool = False


def remembering(config: PolicyConfig, orders: Iterable[PastOrder]) -> PolicyState:
    """The state of a policy that has given or seen these orders, oldest first, and knows nothing else. For which work a
    width was too small is not known again."""
    state = PolicyState()
    for past in orders:
        state = forgetting(config, state, past.at_s)
        if past.number is None:
            state = resized(config, state, past.width, past.target, past.at_s)
            continue
        order = ScaleOrder("", past.target, past.at_s, past.width, config, is_bound=past.is_bound)
        state = accepted(config, state, order)
        state = _replace(state, num_orders=past.number)
    return state
