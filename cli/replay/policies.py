"""Who decides the size in a replay: our policy, by the windows that routers and ranks would send, and a fixed size."""

from __future__ import annotations

from typing import Protocol

from elasticmoe.cli.replay.plant import Plant, Seen
from elasticmoe.cli.replay.replica import Replica
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow
from elasticmoe.common.sketch import JointSketch, Sketch
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.facts import ChangePrice, DeploymentFacts, OperationFacts, WidthFacts
from elasticmoe.services.scaler.policy.recommend import recommend
from elasticmoe.services.scaler.policy.signals import Intake
from elasticmoe.services.scaler.policy.state import Decision, PolicyState
from elasticmoe.services.scaler.policy.step_model import StepModels

ASKED_TOKENS = 1_024  # that every request may get: a router does not know how many it will get
_ROUTER = "router"


class Scaler(Protocol):
    """Turns come once a second."""

    def turn(self, plant: Plant, seen: Seen, /) -> int:
        """Replicas that are to be, the present ones included."""


class Fixed:
    """The size at which it begins."""

    def turn(self, plant: Plant, _: Seen, /) -> int:
        """As there are."""
        return plant.wanted


class Ours:
    """The policy of the scaler, as the scaler calls it: with what windows tell, and nothing else of the plant. Step
    models are learned in the replay."""

    def __init__(self, config: PolicyConfig) -> None:
        self.decisions: list[tuple[float, Decision]] = []  # that changed something
        self._config = config
        self._intake = Intake(config)
        self.models = StepModels()
        self._state = PolicyState()
        self._number = 0
        self._operation: tuple[str, int, float] | None = None  # (id, target, since) of a growth in progress
        self._accepted: str | None = None
        self._changed_s: float | None = None

    def turn(self, plant: Plant, seen: Seen, /) -> int:
        """One turn of the reconciler."""
        now = seen.at_s
        if self._operation is not None and plant.width == plant.wanted:
            self._changed_s, self._operation = now, None
        self._hear(plant, seen)
        facts = DeploymentFacts(
            width=plant.width,
            changed_s=self._changed_s,
            operation=self._operation_facts(plant),
            accepted=self._accepted,
            is_own=True,  # nobody else is there
            reaction_s=plant.actuation.delay_s,
        )

        def widths(width: int) -> WidthFacts:
            model = plant.model
            step, step_width = self.models.of(width), self.models.nearest(width)
            return WidthFacts(width, model.kv_tokens(width), step, model.step_tokens_max, model.devices, step_width)

        def prices(_: int) -> ChangePrice:
            seconds = plant.actuation.delay_s
            return ChangePrice(seconds=seconds, capacity_s=seconds, nbytes=0, pause_s=0.0)

        signals = self._intake.signals(now)
        decision = recommend(self._config, signals, facts, widths, prices, self._state, now)
        self._state = decision.state
        if not decision.acts or decision.target is None or decision.op_id is None:
            return plant.wanted
        self.decisions.append((now, decision))
        self._accepted = decision.op_id
        if decision.target > plant.width:
            self._operation = (decision.op_id, decision.target, now)
        else:
            self._changed_s = now
        return decision.target

    def _operation_facts(self, plant: Plant) -> OperationFacts | None:
        if self._operation is None:
            return None
        op_id, target, since = self._operation
        return OperationFacts(op_id, "grow", target, since, plant.actuation.delay_s)

    def _hear(self, plant: Plant, seen: Seen) -> None:
        self._number += 1
        now = seen.at_s
        ranks = {RankId(at, 0): _incarnation(replica) for at, replica in enumerate(plant.replicas)}
        self._intake.expect({_ROUTER}, ranks, plant.epoch, now)
        self._intake.take_router(_router_window(seen, self._number, plant.epoch), now)
        for at, replica in enumerate(plant.replicas):
            self._intake.take_rank(_rank_window(replica, at, seen, self._number, plant.epoch), now)
        self.models.learn(plant.width, self._intake.take_steps())


def _incarnation(replica: Replica) -> str:
    return f"replica-{replica.number}"


def _router_window(seen: Seen, number: int, epoch: int) -> RouterWindow:
    ttft, gaps, joint = Sketch(), Sketch(), JointSketch()
    for stream in seen.firsts:
        ttft.add(stream.ttft_s)
    for seconds, num in seen.gaps:
        gaps.add(seconds, num)
    for stream in seen.ended:
        joint.add(stream.ttft_s, stream.gap_s)
    return RouterWindow(
        router=_ROUTER,
        number=number,
        epoch=epoch,
        ended_s=seen.at_s,
        span_s=seen.span_s,
        admitted=len(seen.admitted),
        prompt_tokens=sum(arrival.input_tokens for arrival in seen.admitted),
        max_tokens=ASKED_TOKENS * len(seen.admitted),
        finished=len(seen.ended),
        output_tokens=sum(stream.arrival.output_tokens for stream in seen.ended),
        open=seen.open,
        queued=seen.waiting,
        oldest_queued_s=seen.oldest_s,
        oldest_prompt_tokens=seen.oldest_tokens,
        ttft=ttft.take(),
        gaps=gaps.take(),
        joint=joint.take(),
    )


def _rank_window(replica: Replica, at: int, seen: Seen, number: int, epoch: int) -> RankWindow:
    told = replica.tell()
    return RankWindow(
        rank=RankId(at, 0),
        incarnation=_incarnation(replica),
        number=number,
        epoch=epoch,
        ended_s=seen.at_s,
        span_s=seen.span_s,
        running=replica.num_running,
        waiting=len(replica.waiting),
        queued_prefill_tokens=replica.queued_prefill,
        kv_used=min(replica.kv_used, replica.kv_total),
        kv_total=replica.kv_total,
        uncached_tokens=told.prefilled,
        generated=told.generated,
        num_steps=told.num_steps,
        steps=told.samples,
    )
