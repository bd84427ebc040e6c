"""Whether a shrink is worth what it costs. Pure.

Both are counted in device-seconds. A change holds the devices that come or go for its whole time, and all streams pause
for its longest gap; whoever shrinks grows again later, and pays twice.
"""

from __future__ import annotations

from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import ChangePrice

NO_PLAN_S = 30.0  # for so long, a change that has no plan is not priced again


def cost(price: ChangePrice, width: int, change: int, devices: int) -> float:
    """Device-seconds of a change by `change` replicas of a deployment of `width`, and of its way back."""
    once = price.seconds * abs(change) * devices + price.pause_s * width * devices
    return 2 * once


def is_worth(price: ChangePrice, width: int, change: int, devices: int, dwell_s: float, config: PolicyConfig) -> bool:
    """Whether a shrink that lasts for `dwell_s` saves `price_factor` times what it costs."""
    saved = abs(change) * devices * dwell_s
    return saved > config.price_factor * cost(price, width, change, devices)
