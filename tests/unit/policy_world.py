"""A deployment as the policy sees it: figures, facts and turns, with a plant that answers orders."""

from __future__ import annotations

from typing import Any

import msgspec

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.facts import (
    ChangePrice,
    DeploymentFacts,
    OperationFacts,
    RefusedOrder,
    WidthFacts,
)
from elasticmoe.services.scaler.policy.figures import Signals
from elasticmoe.services.scaler.policy.recommend import recommend
from elasticmoe.services.scaler.policy.saturation import predicted
from elasticmoe.services.scaler.policy.state import Decision, PolicyState
from elasticmoe.services.scaler.policy.step_model import StepModel

STEP = StepModel(a=0.025, b=1e-4, c=3e-7, d=8e-4)
CONFIG = PolicyConfig(mode="act", replicas_max=8)


def widths(width: int, step: StepModel | None = STEP, kv_tokens: int = 200_000) -> WidthFacts:
    """The same at every width."""
    return WidthFacts(width, kv_tokens, step, 2048)


def prices(_: int) -> ChangePrice:
    """Of a change that is cheap."""
    return ChangePrice(seconds=1.0, capacity_s=1.0, nbytes=1 << 30, pause_s=0.1)


def demand(requests_per_s: float) -> Demand:
    """Of conversations."""
    return Demand(requests_per_s, 1_200.0, 220.0, 1_200.0)


def signals(at_s: float, requests_per_s: float = 1.0, **other: Any) -> Signals:
    """Of a deployment that is heard, with no trouble."""
    figures: dict[str, Any] = dict(
        at_s=at_s,
        admitted_per_s=requests_per_s,
        burst_per_s=requests_per_s,
        prompt_tokens=1_200.0,
        output_tokens=220.0,
        uncached_share=1.0,
        ttft_s=0.3,
        itl_s=0.03,
        step_s=0.03,
        queued_prefill_tokens=0.0,
        running=5.0,
        kv_used=5_000.0,
        kv_share_most=0.05,
        attainment=1.0,
    )
    return Signals(**(figures | other))


class Plant:
    """A deployment that does what it is told, and whose latencies are those of the model for `scale` times the work.
    `delay_s`: of an operation. Turns are a second."""

    def __init__(
        self, width: int, config: PolicyConfig = CONFIG, scale: float = 1.0, delay_s: float = 2.0, **facts: Any
    ) -> None:
        self.width, self.config, self.scale, self.delay_s = width, config, scale, delay_s
        self.widths_args = facts
        self.now = 1_000.0
        self.state = PolicyState()
        self.changed_s: float | None = None
        self.operation: OperationFacts | None = None
        self.last_op: str | None = None  # that ended
        self.accepted: str | None = None
        self.refused: RefusedOrder | None = None
        self.decisions: list[Decision] = []
        self.sizes: list[int] = []
        self.unreachable: set[int] = set()  # orders for so many are refused
        self.unplanned: set[int] = set()  # and no plan leads there
        self.num_priced = 0

    def widths(self, width: int) -> WidthFacts:
        """What the policy is told."""
        return widths(width, **self.widths_args)

    def refuses(self, target: int) -> bool:
        """Whether an order for so many is refused, as it does not fit."""
        return target in self.unreachable

    def prices(self, width: int) -> ChangePrice | None:
        """What the planner says."""
        self.num_priced += 1
        return None if width in self.unplanned else prices(width)

    def facts(self) -> DeploymentFacts:
        """What the policy is told."""
        by = self.last_op if self.operation is None else self.operation.op_id
        return DeploymentFacts(
            width=self.width,
            changed_s=self.changed_s,
            operation=self.operation,
            accepted=self.accepted,
            refused=self.refused,
            is_own=by is not None and not by.startswith("theirs"),
        )

    def load(self, requests_per_s: float) -> Signals:
        """Figures of the present width for a load."""
        parts = predicted(self.widths(self.width), demand(requests_per_s).times(self.scale), self.config)
        figures: dict[str, Any] = {}
        if parts.itl is not None:
            figures = {
                "itl_s": parts.itl * self.config.itl_s,
                "step_s": parts.itl * self.config.itl_s,
                "ttft_s": (parts.ttft or 0.0) * self.config.ttft_s,
                "kv_share_most": min(1.0, (parts.kv or 0.0) * self.config.kv_share_max),
                "kv_used": min(1.0, (parts.kv or 0.0) * self.config.kv_share_max)
                * self.width
                * self.widths(self.width).kv_tokens,
            }
        return signals(self.now, requests_per_s, **figures)

    def turn(self, seen: Signals) -> Decision:
        """One second."""
        running = self.operation
        if running is not None and self.now - running.since_s >= self.delay_s and running.target is not None:
            self.width, self.changed_s, self.last_op = running.target, self.now, running.op_id
            self.operation = None
        decision = recommend(self.config, seen, self.facts(), self.widths, self.prices, self.state, self.now)
        self.state = decision.state
        self.decisions.append(decision)
        self.sizes.append(self.width)
        if decision.acts and decision.target is not None and decision.op_id is not None:
            kind = "grow" if decision.target > self.width else "shrink"
            if self.refuses(decision.target):
                self.refused = RefusedOrder(decision.op_id, is_of_size=True)
            else:
                self.accepted = decision.op_id
                self.operation = OperationFacts(decision.op_id, kind, decision.target, self.now, self.delay_s)
        self.now += 1.0
        return decision

    def run(self, seconds: int, requests_per_s: float, **other: Any) -> list[Decision]:
        """Turns with a constant load; `other` figures are as given."""
        return [
            self.turn(msgspec.structs.replace(self.load(requests_per_s), at_s=self.now, **other))
            for _ in range(seconds)
        ]

    @property
    def targets(self) -> list[int]:
        """That were asked for."""
        return [one.target for one in self.decisions if one.target is not None]


def router_window(number: int, ended_s: float, **other: Any) -> RouterWindow:
    """A window of one second."""
    fields: dict[str, Any] = dict(router="router:1", number=number, epoch=1, ended_s=ended_s, span_s=1.0)
    return RouterWindow(**(fields | other))


def rank_window(number: int, ended_s: float, **other: Any) -> RankWindow:
    """A window of one second of the first rank."""
    fields: dict[str, Any] = dict(
        rank=RankId(0, 0), incarnation="rank:1", number=number, epoch=1, ended_s=ended_s, span_s=1.0, kv_total=1_000
    )
    return RankWindow(**(fields | other))
