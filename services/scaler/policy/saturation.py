"""How near the deployment is to breaking its objectives, by what limits it: 1 is at the objective. Pure.

Measured: latencies against their objectives, what waits, and KV. Predicted, for a width and a demand: with λ requests
per second and replica, of p tokens to be computed before the first token, o after it and k of KV, a step of a + b·P +
c·K + d·S seconds keeps up with S = λ·o·T sequences when T = a / (1 - ρ), ρ = λ·(b·p + o·(d + c·k)): each second of a
replica, ρ of it goes into work that has to be done whatever the step, the rest into the steps' own time a. A prompt
takes a step of its own for each chunk, and waits for those before it.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import msgspec

from elasticmoe.common.described import says
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand
from elasticmoe.services.scaler.policy.facts import WidthFacts
from elasticmoe.services.scaler.policy.figures import Figure, Missing, Signals, Unknown
from elasticmoe.services.scaler.policy.step_model import StepModel

RATE_MAX = 1e6  # requests per second
ROUNDS = 12  # halvings: a 4 000th is near enough
DOUBLINGS = 5  # before them, at the most
VARIABILITY = 2.0  # (1 + the square of the prompts' coefficient of variation) / 2, of traffic as it is recorded
TAIL = 3.0  # the 95th percentile of an exponential distribution is three times its mean


class Saturation(msgspec.Struct, frozen=True):
    """The components; each from 0 to `PolicyConfig.saturation_max`. None where it cannot be told."""

    ttft: Annotated[float | None, says("Time to the first token, over its objective")] = None
    itl: Annotated[float | None, says("Time between tokens, over its objective")] = None
    backlog: Annotated[
        float | None, says("Seconds of prompts that wait, over what the objective leaves for waiting")
    ] = None
    queue_age: Annotated[
        float | None, says("How long the oldest request has waited beyond its own prompt, over half the objective")
    ] = None
    kv: Annotated[float | None, says("Used share of the fullest rank's KV, over the most")] = None

    @property
    def worst(self) -> float:
        """The greatest, 0 where there is none."""
        return max(self.ttft or 0.0, self.itl or 0.0, self.backlog or 0.0, self.queue_age or 0.0, self.kv or 0.0)

    @property
    def lasting(self) -> float:
        """The greatest of those that a single moment does not make."""
        return max(self.ttft or 0.0, self.itl or 0.0, self.kv or 0.0)

    @property
    def parts(self) -> dict[str, float | None]:
        """By name."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


def measured(
    signals: Signals,
    facts: WidthFacts,
    demand: Demand | Unknown,
    config: PolicyConfig,
    *,
    changed_s: float | None,
    drained: bool,
) -> Saturation:
    """Of what was told. `changed_s`: since when the width is what it is; `drained`: the requests of the one before have
    ended, whose ranks stay slow for so long."""
    itl = max((gap for gap in (_number(signals.itl_s), _number(signals.step_s)) if gap is not None), default=None)
    return Saturation(
        ttft=_clamped(_over(_number(signals.ttft_s), config.ttft_s), config),
        itl=_clamped(_over(itl, config.itl_s), config) if drained else None,
        backlog=_clamped(_backlog(signals, facts, demand, config), config),
        queue_age=_clamped(_queue_age(signals, facts, config, changed_s), config),
        kv=_clamped(_over(_number(signals.kv_share_most), config.kv_share_max), config),
    )


def work(step: StepModel, demand: Demand, per_s: float) -> float:
    """Seconds of one replica's time that `per_s` requests as those of `demand` take, without the steps' own time: ρ of
    a width of 1."""
    per_request = step.b * demand.prefill_tokens + demand.output_tokens * (step.d + step.c * demand.kv_tokens)
    return per_s * per_request


class _InTheLongRun(NamedTuple):
    """What a replica comes to: seconds to the first token and between tokens, used share of KV."""

    ttft_s: float
    itl_s: float
    kv_share: float


def predicted(facts: WidthFacts, demand: Demand, config: PolicyConfig) -> Saturation:
    """In the long run, at this width; without a step model nothing is known but that."""
    if facts.step is None:
        return Saturation()
    most = config.saturation_max
    found = _in_the_long_run(facts, facts.step, demand, demand.requests_per_s)
    if found is None:
        return Saturation(most, most, most, most, most)
    return Saturation(
        ttft=_clamped(found.ttft_s / config.ttft_s, config),
        itl=_clamped(found.itl_s / config.itl_s, config),
        kv=_clamped(found.kv_share / config.kv_share_max, config),
    )


def reached(facts: WidthFacts, demand: Demand, config: PolicyConfig) -> tuple[float, float, float] | None:
    """What `predicted` says, not clamped: time to the first token, between tokens, KV, each over its objective. None
    where nothing is known, or the work grows without end."""
    found = _in_the_long_run(facts, facts.step, demand, demand.requests_per_s) if facts.step is not None else None
    if found is None:
        return None
    return found.ttft_s / config.ttft_s, found.itl_s / config.itl_s, found.kv_share / config.kv_share_max


def _in_the_long_run(facts: WidthFacts, step: StepModel, demand: Demand, per_s: float) -> _InTheLongRun | None:
    """Of so many requests per second, as those of `demand`; None where the work grows without end."""
    rho = work(step, demand, per_s) / facts.width
    if rho >= 1.0:
        return None
    seconds = step.a / (1 - rho)
    rate = per_s / facts.width
    kv_tokens = rate * demand.output_tokens * seconds * demand.kv_tokens
    sequences = rate * demand.output_tokens * seconds
    prefill = _prefill_s(step, facts, demand.prefill_tokens, kv_tokens, sequences)
    busy = min(0.99, rate * prefill)
    # Sakasegawa's approximation of the wait for one of `width` servers: whoever comes goes where least is to be done.
    wait = VARIABILITY * prefill * busy ** (math.sqrt(2 * (facts.width + 1)) - 1) / (facts.width * (1 - busy))
    return _InTheLongRun(TAIL * (prefill + wait), seconds, kv_tokens / facts.kv_tokens if facts.kv_tokens else math.inf)


def work_rate(facts: WidthFacts, demand: Demand) -> float:
    """Requests per second of this kind that a width computes in steps so full that what each one does besides counts
    for nothing. Infinite where nothing is known of it."""
    seconds = work(facts.step, demand, 1.0) if facts.step is not None else 0.0
    return facts.width / seconds if seconds else math.inf


def capacity(facts: WidthFacts, demand: Demand, config: PolicyConfig) -> float:
    """Requests per second of this kind with which the width is predicted to be at an objective. Infinite where nothing
    is known of it, and where not even one request at a time keeps the objectives: no width is too small then."""
    step = facts.step
    if step is None:
        return math.inf

    def keeps(per_s: float) -> bool:
        found = _in_the_long_run(facts, step, demand, per_s)
        if found is None:
            return False
        is_in_time = found.ttft_s < config.ttft_s and found.itl_s < config.itl_s
        return is_in_time and found.kv_share < config.kv_share_max

    if not keeps(0.0):
        return math.inf
    alone = work(step, demand, 1.0) / facts.width  # of which the work of all is less than 1 together
    least, most = 0.0, 1.0 / alone / 2**DOUBLINGS if alone * RATE_MAX > 1.0 else 1.0
    while keeps(most):
        least, most = most, 2 * most
        if most > RATE_MAX:
            return math.inf
    for _ in range(ROUNDS):
        rate = (least + most) / 2
        least, most = (rate, most) if keeps(rate) else (least, rate)
    return most


def _prefill_s(step: StepModel, facts: WidthFacts, tokens: float, kv_tokens: float, sequences: float) -> float:
    """Seconds from the begin of a prompt's computing to its first token, beside what decodes."""
    return max(1.0, tokens / facts.prefill_tokens_max) * step.seconds(0.0, kv_tokens, sequences) + step.b * tokens


def _at_hand(signals: Signals, width: int) -> tuple[float, float]:
    """KV tokens and sequences of a replica, on average."""
    return (_number(signals.kv_used) or 0.0) / width, (_number(signals.running) or 0.0) / width


def _backlog(signals: Signals, facts: WidthFacts, demand: Demand | Unknown, config: PolicyConfig) -> float | None:
    """Seconds until the ranks have computed what waits, over what the objective leaves for waiting."""
    queued, step = _number(signals.queued_prefill_tokens), facts.step
    if queued is None or step is None:
        return None
    at_hand = _at_hand(signals, facts.width)
    prompt = 0.0 if isinstance(demand, Unknown) else demand.prefill_tokens
    seconds = _prefill_s(step, facts, queued / facts.width, *at_hand) if queued else 0.0
    floor = _prefill_s(step, facts, prompt, *at_hand)
    return seconds / max(config.ttft_s - floor, 0.1 * config.ttft_s)


def _queue_age(signals: Signals, facts: WidthFacts, config: PolicyConfig, changed_s: float | None) -> float:
    """How long the oldest request waits, without what its own prompt takes on any width, over half the objective."""
    own = 0.0
    if facts.step is not None:
        own = _prefill_s(facts.step, facts, signals.oldest_prompt_tokens, *_at_hand(signals, facts.width))
    waits = signals.oldest_queued_s if changed_s is None else min(signals.oldest_queued_s, signals.at_s - changed_s)
    return max(0.0, waits - own) / (config.ttft_s / 2)


def _number(figure: Figure) -> float | None:
    return None if isinstance(figure, Missing | Unknown) else figure


def _over(figure: float | None, limit: float) -> float | None:
    return None if figure is None else figure / limit


def _clamped(figure: float | None, config: PolicyConfig) -> float | None:
    """At the knee a latency is many times its objective: let through, it would keep the smoothed figure up for long."""
    return None if figure is None else min(config.saturation_max, max(0.0, figure))


def smoothed(before: float | None, raw: float, elapsed_s: float, rise_s: float, fall_s: float) -> float:
    """The saturation after `elapsed_s`, with half-lives for a rise and for a fall."""
    if before is None:
        return raw
    half_life = rise_s if raw > before else fall_s
    return before + (raw - before) * (1.0 - math.exp2(-elapsed_s / half_life))
