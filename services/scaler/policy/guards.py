"""Whether the deployment may become smaller by one replica: every guard has to agree. Pure."""

from __future__ import annotations

from typing import NamedTuple

from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.facts import Prices, WidthFacts, Widths
from elasticmoe.services.scaler.policy.price import cost, is_worth
from elasticmoe.services.scaler.policy.saturation import Saturation, predicted
from elasticmoe.services.scaler.policy.state import PolicyState, Reason

TRY_AGAIN = 0.9  # of the work that a width was too small for
GROWING = 1.05  # over the horizon; less is noise
DWELL_S = 300.0  # expected before the first growth after a shrink was seen


class Verdict(NamedTuple):
    """`SHRINK_IDLE`, or what speaks against it, with the figures."""

    reason: Reason
    predicted: Saturation | None = None
    saved_s: float | None = None
    cost_s: float | None = None


def shrink(
    config: PolicyConfig,
    widths: Widths,
    prices: Prices,
    state: PolicyState,
    width: int,
    threshold: float,
    now: float,
) -> Verdict:
    """Whether `width` - 1 replicas do: predicted for the most demand of the last while, and what is measured now
    re-predicted for the share of the load that each one would have."""
    if not is_held_long_enough(config, state, now):
        return Verdict(Reason.HOLDING)
    facts, limit = widths(width - 1), config.down_share * threshold
    peak = state.peaks.demand.times(mistaken(state, widths(width), config))
    after = predicted(facts, peak, config)
    # Where nobody has asked for anything, no objective can be broken, however long a step takes at any width.
    is_asked = peak.requests_per_s > 0.0
    if (is_asked and after.worst >= limit) or repredicted(state, facts, peak, width, config) >= limit:
        return Verdict(Reason.WOULD_SATURATE, after)
    if state.too_small is not None:
        small, failed_at = state.too_small
        if width - 1 <= small and state.peaks.work >= TRY_AGAIN * failed_at:
            return Verdict(Reason.WOULD_SATURATE, after)
    if state.peaks.kv_tokens > room(facts, config):
        return Verdict(Reason.KV_WOULD_NOT_FIT, after)
    ahead = state.forecast.after(config.horizon_s)
    if ahead is not None and peak.requests_per_s > 0.0 and facts.step is not None:
        if state.forecast.level is not None and ahead > GROWING * state.forecast.level:
            return Verdict(Reason.FORECAST_FLOOR, after)
        coming = peak.times(max(1.0, ahead / peak.requests_per_s))
        # What a growth would be sized for: a smaller width than that would be left again at once.
        if predicted(facts, coming.times(config.headroom), config).worst >= 1.0:
            return Verdict(Reason.FORECAST_FLOOR, after)
    price = prices(width - 1)
    if price is None:
        return Verdict(Reason.NO_PLAN, after)
    # A flap is a mistake and no dwell: by its few seconds no shrink would ever be worth its price again.
    dwell, devices = max(config.hold_s, DWELL_S if state.dwell_s is None else state.dwell_s), facts.devices
    saved, costs = dwell * devices, cost(price, width, 1, devices)
    if not is_worth(price, width, 1, devices, dwell, config):
        return Verdict(Reason.NOT_WORTH, after, saved, costs)
    return Verdict(Reason.SHRINK_IDLE, after, saved, costs)


def mistaken(state: PolicyState, facts: WidthFacts, config: PolicyConfig) -> float:
    """How many times the work that the model knows of is being done, 1 at the least: what is measured at the present
    width over what was predicted for it."""
    expected = predicted(facts, state.peaks.demand, config).worst
    if state.saturation is None or expected <= 0.0:
        return 1.0
    return min(config.saturation_max, max(1.0, state.saturation / expected))


def room(facts: WidthFacts, config: PolicyConfig) -> float:
    """Tokens of KV that a width may be made smaller to: the running streams go on there."""
    return facts.kv_tokens * facts.width * (1.0 - config.kv_spare)


def repredicted(state: PolicyState, facts: WidthFacts, peak: Demand, width: int, config: PolicyConfig) -> float:
    """The measured saturation with one replica fewer: what the load brings grows by N / (N - 1), what an idle
    deployment has as well does not."""
    now = state.saturation or 0.0
    idle = min(now, predicted(facts, peak.times(0.0), config).worst)
    return idle + (now - idle) * width / (width - 1)


def is_held_long_enough(config: PolicyConfig, state: PolicyState, now: float) -> bool:
    """Whether the last change lies behind for long enough, and demand was seen for as long as it is judged by."""
    if state.known_since_s is None or now - state.known_since_s < config.down_over_s or not state.peaks.entries:
        return False
    changes = [at for at in (state.grown_s, state.shrunk_s) if at is not None]
    return not changes or now - max(changes) >= (state.hold_s or config.hold_s)
