"""What the policy is told of the deployment beside its load: sizes, operations, prices. Pure data.

A *width* is a number of replicas. A growth adds devices to expert parallelism and attention replicas alike: each device
then holds fewer weights and more KV, and takes a smaller share of the requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from elasticmoe.services.scaler.policy.step_model import StepModel


class WidthFacts(msgspec.Struct, frozen=True):
    """What one replica is capable of in a deployment of `width` of them.

    kv_tokens: that its KV blocks hold
    step: what one of its steps takes; None where that is not known yet, of no width
    step_width: the width that `step` was learned at; None: this one
    prefill_tokens_max: of one step
    devices: of one replica
    shares_cores: replicas share the machine's cores, and one more of them would bring none that nobody uses yet
    """

    width: int
    kv_tokens: int
    step: StepModel | None
    prefill_tokens_max: int
    devices: int = 1
    step_width: int | None = None
    shares_cores: bool = False


Widths = Callable[[int], WidthFacts]
"""Facts of any width of at least 1."""


class OperationFacts(msgspec.Struct, frozen=True):
    """The operation in progress. `since_s`: of its acceptance; `predicted_s`: what the planner said that it takes;
    `is_committed`: there is only forward."""

    op_id: str
    kind: Literal["grow", "shrink", "other"]
    target: int | None
    since_s: float
    predicted_s: float
    is_committed: bool = False


class RefusedOrder(msgspec.Struct, frozen=True):
    """Of an order of the policy. `is_of_size`: the target cannot be reached, as it does not fit; else it is the moment
    that does not suit."""

    op_id: str
    is_of_size: bool


class DeploymentFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the deployment is at this moment.

    width: replicas of the layout in force
    changed_s: when that layout came into force, None for the first
    operation: the one in progress
    is_recovering: devices are left out, or, without an operation, ranks are replaced or it does not serve yet
    is_degraded: ranks are replaced, whatever else is in progress
    lost_s: when a device was lost last
    is_own: the operation in progress, or without one the newest that ended, is an order of the policy
    accepted, refused: the newest order of the policy that was
    reaction_s: what a growth takes from the order until the new replicas serve
    available: replicas that the devices which work allow at the most; None for no such limit
    """

    width: int
    changed_s: float | None = None
    operation: OperationFacts | None = None
    is_recovering: bool = False
    is_degraded: bool = False
    lost_s: float | None = None
    is_own: bool = False
    accepted: str | None = None
    refused: RefusedOrder | None = None
    reaction_s: float = 1.0
    available: int | None = None


class ChangePrice(msgspec.Struct, frozen=True):
    """What the planner's dry run says of a change. `seconds`: from the order to the release; `capacity_s`: until new
    replicas serve; `nbytes`: that are copied; `pause_s`: the longest gap of every stream."""

    seconds: float
    capacity_s: float
    nbytes: int
    pause_s: float


Prices = Callable[[int], ChangePrice | None]
"""Of the change to a width; None where the planner refuses it."""
