"""How near the deployment is to breaking its objectives, by what limits it: 1 is at the objective. Pure.

Measured: latencies against their objectives, what waits, and KV. Predicted, for a width and a demand: with λ requests
per second and replica, of p tokens to be computed before the first token, o after it and k of KV, a step of a + b·P +
c·K + d·S seconds keeps up with S = λ·o·T sequences when T = a / (1 - ρ), ρ = λ·(b·p + o·(d + c·k)): each second of a
replica, ρ of it goes into work that has to be done whatever the step, the rest into the steps' own time a. A prompt
takes a step of its own for each chunk, and waits for those before it.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from elasticmoe.common.described import says
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.facts import WidthFacts
from elasticmoe.services.scaler.policy.figures import Figure, Missing, Signals, Unknown
from elasticmoe.services.scaler.policy.step_model import StepModel

TAIL = 3.0  # the 95th percentile of an exponential distribution is three times its mean


class Saturation(msgspec.Struct, frozen=True):
    """The components; each from 0 to `PolicyConfig.saturation_max`. None where it cannot be told."""

    ttft: Annotated[float | None, says("Time to the first token, over its objective")] = None
    itl: Annotated[float | None, says("Time between tokens, over its objective")] = None
    backlog: Annotated[
        float | None, says("Seconds of prompts that wait, over what the objective leaves for waiting")
    ] = None
    queue_age: Annotated[float | None, says("How long the oldest request has waited, over half the objective")] = None
    kv: Annotated[float | None, says("Used share of the fullest rank's KV, over the most")] = None

    @property
    def worst(self) -> float:
        """The greatest, 0 where there is none."""
        return max((part for part in self.parts.values() if part is not None), default=0.0)

    @property
    def parts(self) -> dict[str, float | None]:
        """By name."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


def measured(
    signals: Signals, facts: WidthFacts, demand: Demand | Unknown, config: PolicyConfig, *, settled: bool
) -> Saturation:
    """Of what was told. `settled`: the queue's age tells of the present width."""
    itl = max((gap for gap in (_number(signals.itl_s), _number(signals.step_s)) if gap is not None), default=None)
    return Saturation(
        ttft=_clamped(_over(_number(signals.ttft_s), config.ttft_s), config),
        itl=_clamped(_over(itl, config.itl_s), config),
        backlog=_clamped(_backlog(signals, facts, demand, config), config),
        queue_age=_clamped(signals.oldest_queued_s / (config.ttft_s / 2), config) if settled else None,
        kv=_clamped(_over(_number(signals.kv_share_most), config.kv_share_max), config),
    )


def work(step: StepModel, demand: Demand) -> float:
    """Seconds of one replica's time that a second's requests take, without the steps' own time: ρ of a width of 1."""
    per_request = step.b * demand.prefill_tokens + demand.output_tokens * (step.d + step.c * demand.kv_tokens)
    return demand.requests_per_s * per_request


def predicted(facts: WidthFacts, demand: Demand, config: PolicyConfig) -> Saturation:
    """In the long run, at this width; without a step model nothing is known but that."""
    step = facts.step
    if step is None:
        return Saturation()
    most = config.saturation_max
    rho = work(step, demand) / facts.width
    if rho >= 1.0:
        return Saturation(most, most, most, most, most)
    seconds = step.a / (1 - rho)
    rate = demand.requests_per_s / facts.width
    kv_tokens = rate * demand.output_tokens * seconds * demand.kv_tokens
    sequences = rate * demand.output_tokens * seconds
    chunks = max(1.0, demand.prefill_tokens / facts.prefill_tokens_max)
    prefill = chunks * step.seconds(0.0, kv_tokens, sequences) + step.b * demand.prefill_tokens
    busy = min(0.99, rate * prefill)
    return Saturation(
        ttft=_clamped(TAIL * prefill / (1 - busy) / config.ttft_s, config),
        itl=_clamped(seconds / config.itl_s, config),
        kv=_clamped(kv_tokens / facts.kv_tokens / config.kv_share_max, config) if facts.kv_tokens else most,
    )


def _backlog(signals: Signals, facts: WidthFacts, demand: Demand | Unknown, config: PolicyConfig) -> float | None:
    """Seconds until the fullest rank has computed what waits, over what the objective leaves for waiting."""
    queued, step = _number(signals.queued_prefill_most), facts.step
    if queued is None or step is None:
        return None
    prompt = 0.0 if isinstance(demand, Unknown) else demand.prefill_tokens
    running = _number(signals.running) or 0.0
    kv_used = _number(signals.kv_used) or 0.0
    decoding = step.seconds(0.0, kv_used / facts.width, running / facts.width)
    seconds = math.ceil(queued / facts.prefill_tokens_max) * decoding + step.b * queued
    floor = decoding + step.b * prompt
    return seconds / max(config.ttft_s - floor, 0.1 * config.ttft_s)


def _number(figure: Figure) -> float | None:
    return None if isinstance(figure, Missing | Unknown) else figure


def _over(figure: float | None, limit: float) -> float | None:
    return None if figure is None else figure / limit


def _clamped(figure: float | None, config: PolicyConfig) -> float | None:
    """At the knee a latency is many times its objective: let through, it would keep the smoothed figure up for long."""
    return None if figure is None else min(config.saturation_max, max(0.0, figure))


def smoothed(before: float | None, raw: float, elapsed_s: float, config: PolicyConfig) -> float:
    """The saturation after `elapsed_s` with the half-lives of the configuration."""
    if before is None:
        return raw
    half_life = config.rise_s if raw > before else config.fall_s
    return before + (raw - before) * (1.0 - math.exp2(-elapsed_s / half_life))
