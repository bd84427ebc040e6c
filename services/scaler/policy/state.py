"""What the policy goes on from, and what it decides: values, a new one in each turn. Pure data."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from elasticmoe.common.described import says
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand, Forecast
from elasticmoe.services.scaler.policy.recent import Excess, Recent
from elasticmoe.services.scaler.policy.saturation import Saturation


class Reason(StrEnum):
    """Why a decision is what it is. The first group changes something, the second one holds."""

    GROW_SATURATED = "grow_saturated"
    GROW_DEMAND = "grow_demand"
    GROW_PANIC = "grow_panic"
    GROW_FORECAST = "grow_forecast"
    GROW_BACKLOG_BLIND = "grow_backlog_blind"
    GROW_BOUND = "grow_bound"
    SUPERSEDE_SHRINK = "supersede_shrink"
    SHRINK_IDLE = "shrink_idle"
    SHRINK_BOUND = "shrink_bound"
    CANCEL_STUCK = "cancel_stuck"
    REPEAT_ORDER = "repeat_order"

    OFF = "off"
    STEADY = "steady"
    ADVISED = "advice_stands"
    AT_MAX = "at_max"
    AT_MIN = "at_min"
    UNKNOWN = "unknown"
    BLIND = "blind"
    OPERATION = "operation_in_progress"
    AWAITING = "awaiting_answer"
    RECOVERING = "recovering"
    OUT_OF_REACH = "objective_out_of_reach"
    AFTER_LOSS = "after_loss"
    AFTER_REFUSAL = "after_refusal"
    TOO_MANY = "too_many_operations"
    HOLDING = "holding"
    WOULD_SATURATE = "smaller_would_saturate"
    WOULD_BE_LATE = "smaller_would_be_late"
    KV_WOULD_NOT_FIT = "smaller_has_no_room"
    FORECAST_FLOOR = "forecast_floor"
    NOT_WORTH = "not_worth_its_price"
    NO_PLAN = "no_plan"


class ScaleOrder(msgspec.Struct, frozen=True):
    """What the policy asked for, of a deployment of `width`. `op_id`: repeated as it is, it is the same operation.
    `supersedes`: the operation that gives way to it. `is_bound`: it leads into the bounds, which is no answer to a
    load. `policy`: that gave it."""

    op_id: str
    target: int
    sent_s: float
    width: int
    policy: PolicyConfig
    supersedes: str | None = None
    is_bound: bool = False


class RefusedSize(msgspec.Struct, frozen=True):
    """That no order led from `width` to `target` at `at_s`, by this policy. `is_of_size`: and that none would."""

    width: int
    target: int
    at_s: float
    policy: PolicyConfig
    is_of_size: bool


class NoPlan(msgspec.Struct, frozen=True):
    """That the planner refused the change from `width` to `target` at `at_s`."""

    width: int
    target: int
    at_s: float


class AdvisedSize(msgspec.Struct, frozen=True):
    """Of the mode `advise`: the size that there should be, and when that was decided last."""

    target: int
    at_s: float


class TooSmall(msgspec.Struct, frozen=True):
    """What a flap has shown at `at_s`: `width` was too small for `requests_per_s` (None where that was not seen) and
    these objectives. It counts for `for_s`."""

    width: int
    requests_per_s: float | None
    at_s: float
    for_s: float
    ttft_s: float
    itl_s: float


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """All that outlives a turn.

    at_s: of the last turn; `width`: replicas then
    saturation: smoothed; `usual`: for longer, alike whether it rises or falls
    excess: of what came beyond what the width can do
    above_since_s: since when it is above the threshold
    forecast: of the demand; `recent`: the load of the last while
    unknown_since_s, known_since_s: since when something is not known, or everything is
    order: sent, and not answered yet
    num_orders: sent so far; they are numbered
    sent_s: of the orders in `operations_over_s` that were accepted
    grown_s, shrunk_s: when the last growth and the last shrink were ordered that were accepted, or, by others, made
    hold_s: before the next shrink, None: as configured
    flap_s: when the last flap was, while it counts for `hold_s`; `too_small`: what flaps have shown, one
        for each width
    cancelled: the operation that was told to give way last
    refused: the last order that was, while that counts
    no_plan: the widest shrink that was found to have none, while that counts
    dwell_s: mean time from a shrink to the growth after it, None before the first
    advice: that stands, in the mode `advise`; `withdrawn_s`: when the last one to shrink was taken back
    """

    at_s: float | None = None
    width: int | None = None
    saturation: float | None = None
    above_since_s: float | None = None
    usual: float | None = None
    excess: Excess = Excess()
    forecast: Forecast = Forecast()
    recent: Recent = Recent()
    unknown_since_s: float | None = None
    known_since_s: float | None = None
    order: ScaleOrder | None = None
    num_orders: int = 0
    sent_s: tuple[float, ...] = ()
    grown_s: float | None = None
    shrunk_s: float | None = None
    hold_s: float | None = None
    flap_s: float | None = None
    too_small: tuple[TooSmall, ...] = ()
    cancelled: str | None = None
    refused: RefusedSize | None = None
    no_plan: NoPlan | None = None
    dwell_s: float | None = None
    advice: AdvisedSize | None = None
    withdrawn_s: float | None = None


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """The figures that a decision rests on."""

    raw: Annotated[Saturation, says("Saturation as it is now, by what limits it")] = Saturation()
    smoothed: Annotated[float | None, says("Its greatest component, smoothed")] = None
    threshold: Annotated[float | None, says("Above which it grows")] = None
    excess_s: Annotated[float, says("Seconds of this size's work that came beyond what it can do")] = 0.0
    demand: Annotated[Demand | None, says("As it is now; null where it is not known")] = None
    forecast_per_s: Annotated[float | None, says("Requests per second `horizon_s` ahead")] = None
    of_width: Annotated[int | None, says("The number of replicas in question")] = None
    predicted: Annotated[Saturation | None, says("Saturation of that, at the demand that it has to stand")] = None
    silent: Annotated[tuple[str, ...], says("Routers and ranks that are not heard of")] = ()
    is_blind: Annotated[bool, says("Nothing is done because of that")] = False
    saved_s: Annotated[float | None, says("Device-seconds that a shrink would save")] = None
    cost_s: Annotated[float | None, says("Device-seconds that it would cost")] = None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What comes of a turn.

    target: replicas to have, also while an order for them waits, or a while passes after its refusal; None: no change
        is wanted
    op_id: of the order for it, or of the operation that is to be cancelled (`CANCEL_STUCK`)
    supersedes: an operation that has to give way first, before its commit
    acts: whether it is to be done; in the mode `advise`, and where it holds, it is not
    """

    target: int | None
    reason: Reason
    evidence: Evidence
    state: PolicyState
    op_id: str | None = None
    supersedes: str | None = None
    acts: bool = False
