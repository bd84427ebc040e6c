"""Whether the deployment may become smaller: every guard has to agree. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.facts import Prices, WidthFacts, Widths
from elasticmoe.services.scaler.policy.orders import TRY_AGAIN
from elasticmoe.services.scaler.policy.price import cost, is_worth
from elasticmoe.services.scaler.policy.recent import Abilities
from elasticmoe.services.scaler.policy.saturation import ROUNDS, Saturation, capacity, predicted
from elasticmoe.services.scaler.policy.state import PolicyState, Reason, TooSmall

MISTAKEN_MAX = 1.5  # times: latency that is always there, as from rank to router, is no work, and looks like much of it
UNSEEN_AGAIN = 0.5  # of what it is said to do, where that load was not seen
GROWING = 1.05  # over the horizon; less is noise
DWELL_S = 300.0  # expected before the first growth after a shrink was seen
LATE_SHARE = 0.25  # of what the attainment allows to be late, that shrinks may cost
NOTICE_S = 2.0  # from the need of a growth to the order, beside `up_after_s`
# Objectives so many times as long: with these a width does all that it can.
TTFT_TIMES, ITL_TIMES = 5.0, 2.0
_replace = msgspec.structs.replace


class Shrink(NamedTuple):
    """A shrink in question. `reaction_s`: what the growth that takes it back would take."""

    width: int
    target: int
    reaction_s: float


class Verdict(NamedTuple):
    """`SHRINK_IDLE`, or what speaks against it, with the figures."""

    reason: Reason
    predicted: Saturation | None = None
    saved_s: float | None = None
    cost_s: float | None = None


def judge(
    change: Shrink,
    config: PolicyConfig,
    widths: Widths,
    state: PolicyState,
    demand: Demand,
    threshold: float,
    now: float,
) -> Verdict:
    """Whether the smaller width does: for the most requests of the last while (smoothed), of lengths as those of
    `demand`; by what is measured now, for the share of the load that each replica would have; and by what would have
    come too late in the last minutes."""
    if not is_held_long_enough(config, state, now):
        return Verdict(Reason.HOLDING)
    present, facts = widths(change.width), widths(change.target)
    limit = config.down_share * threshold
    demand = demand.at(state.recent.level(now - config.down_over_s))
    peak = demand.times(mistaken(state, present, demand, config))
    after = predicted(facts, peak, config)
    share = change.width / change.target
    # Where nobody has asked for anything, no objective can be broken, however long a step takes at any width.
    is_asked = peak.requests_per_s > 0.0
    if (is_asked and after.worst >= limit) or repredicted(state, facts, peak, share, config) >= limit:
        return Verdict(Reason.WOULD_SATURATE, after)
    if change.target <= _too_small(state, widths, demand, config, now):
        return Verdict(Reason.WOULD_SATURATE, after)
    if state.recent.kv_tokens(now - max(config.down_over_s, state.hold_s or config.hold_s)) > room(facts, config):
        return Verdict(Reason.KV_WOULD_NOT_FIT, after)
    ahead = state.forecast.after(config.horizon_s)
    if ahead is not None and peak.requests_per_s > 0.0 and facts.step is not None:
        if state.forecast.level is not None and ahead > GROWING * state.forecast.level:
            return Verdict(Reason.FORECAST_FLOOR, after)
        coming = peak.times(max(1.0, ahead / peak.requests_per_s))
        # What a growth would be sized for: a smaller width than that would be left again at once.
        if predicted(facts, coming.times(config.headroom), config).worst >= 1.0:
            return Verdict(Reason.FORECAST_FLOOR, after)
    if late(state, present, facts, demand, config, change.reaction_s) > LATE_SHARE * (1.0 - config.attainment):
        return Verdict(Reason.WOULD_BE_LATE, after)
    return Verdict(Reason.SHRINK_IDLE, after)


def _too_small(state: PolicyState, widths: Widths, demand: Demand, config: PolicyConfig, now: float) -> int:
    """The greatest width that a flap has shown to be too small for this load; 0 for none."""
    if demand.requests_per_s == 0.0:
        return 0

    def forbids(shown: TooSmall) -> bool:
        if now - shown.at_s > shown.for_s or (shown.ttft_s, shown.itl_s) != (config.ttft_s, config.itl_s):
            return False
        if shown.requests_per_s is not None:
            return demand.requests_per_s >= TRY_AGAIN * shown.requests_per_s
        # Before a restart: the model said that it would do, and nobody knows any more how wrong it was.
        again = UNSEEN_AGAIN * capacity(widths(shown.width), demand, config)
        return demand.requests_per_s >= again or again == math.inf

    return max((shown.width for shown in state.too_small if forbids(shown)), default=0)


def priced(
    change: Shrink, config: PolicyConfig, widths: Widths, prices: Prices, state: PolicyState, verdict: Verdict
) -> Verdict:
    """The verdict on a shrink that all other guards agree to, with its price. The planner is asked for it, and takes a
    tenth of a second for hundreds of devices: not for each width that is tried."""
    after, facts = verdict.predicted, widths(change.target)
    price = prices(change.target)
    if price is None:
        return Verdict(Reason.NO_PLAN, after)
    # A flap is a mistake and no dwell: by its few seconds no shrink would ever be worth its price again.
    dwell, devices = max(config.hold_s, DWELL_S if state.dwell_s is None else state.dwell_s), facts.devices
    by = change.width - change.target
    saved, costs = by * dwell * devices, cost(price, change.width, by, devices)
    if not is_worth(price, change.width, by, devices, dwell, config):
        return Verdict(Reason.NOT_WORTH, after, saved, costs)
    return Verdict(Reason.SHRINK_IDLE, after, saved, costs)


def mistaken(state: PolicyState, facts: WidthFacts, demand: Demand, config: PolicyConfig) -> float:
    """How many times the work that the model knows of is being done, 1 at the least: with so much it would predict for
    the present width what is measured."""
    if state.usual is None or not 0.0 < predicted(facts, demand, config).worst < state.usual:
        return 1.0
    least, most = 1.0, MISTAKEN_MAX
    for _ in range(ROUNDS):
        times = (least + most) / 2
        is_less = predicted(facts, demand.times(times), config).worst < state.usual
        least, most = (times, most) if is_less else (least, times)
    return most


def room(facts: WidthFacts, config: PolicyConfig) -> float:
    """Tokens of KV that a width may be made smaller to: the running streams go on there."""
    return facts.kv_tokens * facts.width * (1.0 - config.kv_spare)


def repredicted(state: PolicyState, facts: WidthFacts, peak: Demand, share: float, config: PolicyConfig) -> float:
    """The measured saturation where each replica has `share` times its load: what the load brings grows by that, what
    an idle deployment has as well does not."""
    now = state.usual or 0.0
    idle = min(now, predicted(facts, peak.times(0.0), config).worst)
    return idle + (now - idle) * share


def late(
    state: PolicyState, present: WidthFacts, facts: WidthFacts, demand: Demand, config: PolicyConfig, reaction_s: float
) -> float:
    """The share of the requests of the last minutes that would have come too late with a smaller width: a width that
    does for the load as it is may be far too small for the bursts that come again and again."""
    if predicted(facts, demand.at(state.recent.most()), config).worst < 1.0:
        return 0.0  # nothing was beyond what it keeps up with: no need to look for its limits
    loose = _replace(config, ttft_s=TTFT_TIMES * config.ttft_s, itl_s=ITL_TIMES * config.itl_s)
    small, large = (Abilities(capacity(one, demand, config), capacity(one, demand, loose)) for one in (facts, present))
    return state.recent.late(small, large, config.up_after_s, reaction_s + NOTICE_S, config.ttft_s / 2)


def is_held_long_enough(config: PolicyConfig, state: PolicyState, now: float) -> bool:
    """Whether the last change lies behind for long enough, and demand was seen for as long as it is judged by."""
    if state.known_since_s is None or now - state.known_since_s < config.down_over_s:
        return False
    changes = [at for at in (state.grown_s, state.shrunk_s, state.withdrawn_s) if at is not None]
    return not changes or now - max(changes) >= (state.hold_s or config.hold_s)
