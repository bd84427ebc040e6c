"""What all parts of one turn of the policy see. Pure data."""

from __future__ import annotations

from typing import NamedTuple

from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.facts import DeploymentFacts, Prices, Widths
from elasticmoe.services.scaler.policy.figures import Signals, Unknown
from elasticmoe.services.scaler.policy.saturation import Saturation


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
