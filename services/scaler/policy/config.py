"""What an operator sets of the policy: objectives, bounds, mode; and its defaults. Pure data.

Times are in seconds by the scaler's clock, never in turns of a loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from elasticmoe.common.described import says
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.protocol.limits import DEVICES_MAX, RANKS_MAX
from elasticmoe.common.wording import read

Mode = Literal["off", "advise", "act"]
# What is divided by stays clear of zero: a quotient by the smallest number there is would be infinite.
Seconds = Annotated[float, Meta(ge=0.001, le=86_400.0)]
Share = Annotated[float, Meta(ge=0.001, le=1.0)]
Replicas = Annotated[int, Meta(ge=1, le=DEVICES_MAX)]


class PolicyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it; a field that is not given has its default."""

    mode: Annotated[Mode, says("`off`: nothing is decided; `advise`: decided and told, not done; `act`: done")] = (
        "advise"
    )
    ttft_s: Annotated[Seconds, says("Objective: seconds to the first token")] = 2.0
    itl_s: Annotated[Seconds, says("Objective: seconds between tokens, in the mean of a request")] = 0.1
    attainment: Annotated[Share, says("Objective: share of requests that keep both")] = 0.99
    attainment_over_s: Annotated[Seconds, says("Over so many seconds")] = 300.0
    quantile: Annotated[Share, says("Of the time to the first token that is watched")] = 0.95
    replicas_min: Annotated[Replicas, says("The fewest replicas")] = 1
    replicas_max: Annotated[Replicas, says("The most replicas")] = RANKS_MAX
    kv_share_max: Annotated[
        Share, says("Used share of the fullest rank's KV above which sequences wait or are computed anew")
    ] = 0.85
    saturation_max: Annotated[
        Annotated[float, Meta(ge=1.0, le=100.0)], says("What a component of the saturation counts at the most")
    ] = 2.0
    rise_s: Annotated[Seconds, says("Half-life of the smoothed saturation while it rises")] = 2.0
    fall_s: Annotated[Seconds, says("Half-life while it falls")] = 30.0
    up_after_s: Annotated[
        Annotated[float, Meta(ge=0.0, le=3_600.0)],
        says("How long it has to be above the threshold, or how many seconds of its work came beyond what it can do"),
    ] = 4.0
    up_min: Annotated[Share, says("The threshold at the least: the faster the load grows, the lower")] = 0.55
    up_max: Annotated[Share, says("The threshold at the most")] = 1.0
    headroom: Annotated[
        Annotated[float, Meta(ge=1.0, le=10.0)], says("The capacity that a growth aims at, over the demand")
    ] = 1.0
    down_share: Annotated[
        Share, says("Of the threshold, below which the predicted saturation of the smaller size has to be")
    ] = 0.95
    down_over_s: Annotated[Seconds, says("The most demand of so many seconds counts for a shrink")] = 30.0
    kv_spare: Annotated[
        Annotated[float, Meta(ge=0.0, lt=1.0)], says("Share of the smaller size's KV that has to stay free")
    ] = 0.15
    hold_s: Annotated[Seconds, says("Between a change and a shrink; each flap doubles it")] = 120.0
    hold_max_s: Annotated[Seconds, says("Up to so much")] = 600.0
    flap_s: Annotated[Seconds, says("A growth that follows a shrink within this time is a flap")] = 120.0
    settle_s: Annotated[
        Annotated[float, Meta(ge=0.0, le=3_600.0)],
        says("After a change, latencies tell of the size before for so long"),
    ] = 3.0
    unknown_after_s: Annotated[Seconds, says("What was not told for so long is unknown")] = 5.0
    blind_after_s: Annotated[
        Seconds, says("After so long unknown, nothing is done for the load, and an alert is raised")
    ] = 30.0
    horizon_s: Annotated[Seconds, says("How far ahead the predicted demand is a floor")] = 30.0
    operations_max: Annotated[Annotated[int, Meta(ge=1, le=1_000)], says("Operations of the policy")] = 8
    operations_over_s: Annotated[Seconds, says("In so many seconds")] = 600.0
    price_factor: Annotated[
        Annotated[float, Meta(ge=0.0, le=1_000.0)], says("How often a shrink has to bring in what it costs")
    ] = 3.0
    accept_s: Annotated[Seconds, says("An order without an answer is sent again, as the same, after so long")] = 10.0
    stuck_factor: Annotated[
        Annotated[float, Meta(ge=1.0, le=1_000.0)],
        says("An operation without a commit is given up after so many times its prediction"),
    ] = 10.0
    stuck_s: Annotated[Seconds, says("But not before so many seconds")] = 120.0
    loss_hold_s: Annotated[
        Annotated[float, Meta(ge=0.0, le=86_400.0)], says("After a lost device only growth is asked for, for so long")
    ] = 600.0

    def __post_init__(self) -> None:
        """Raises ValueError for values that contradict one another."""
        for less, more in (
            ("replicas_min", "replicas_max"),
            ("up_min", "up_max"),
            ("hold_s", "hold_max_s"),
            ("unknown_after_s", "blind_after_s"),
            ("rise_s", "fall_s"),
        ):
            if getattr(self, less) > getattr(self, more):
                raise ValueError(f"{less} is {getattr(self, less):g}, above {more}, which is {getattr(self, more):g}")


def policy_config(raw: Mapping[str, Any]) -> PolicyConfig:
    """The configuration that `raw` describes. Raises ConfigError with the field, the limit and the value."""
    try:
        return msgspec.convert(dict(raw), PolicyConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"policy: {read(error, PolicyConfig).told()}") from None
