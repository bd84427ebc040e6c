"""From logits to tokens. Counter-based: the same (seed, position, logits) always choose the same token.

Order of what changes a row: the grammar's mask, bias, penalties, tokens that may not come yet, temperature, min-p,
top-k, top-p. Reported log probabilities are those of the logits as the model gave them, among the tokens that the
grammar allows, as vLLM's are.

Whatever the logits and the options, a row gets a token of its vocabulary or an error of its own. A changed logit is
brought back to a finite number after the last change, and what was chosen is looked at once more.

Shape suffixes: B sequences, V vocabulary, N rows of a prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import torch

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.limits import LOGPROB_MIN
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Logprob
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.choice import Chosen, Edits, Judged, TokenChoice
from elasticmoe.services.worker.engine.failure import failure_of

if TYPE_CHECKING:
    from elasticmoe.common.grammar import Bits

GREEDY_BELOW = 1e-5  # temperatures that float32 logits would overflow under choose the greatest logit

_MASK = (1 << 64) - 1
_GREATEST: Final = TokenChoice(Sampling(seed=0), None, None, -1)

T = TypeVar("T")


class BadLogits(ElasticMoEError):
    """The model gave a sequence logits that no token can be chosen from; only that sequence fails."""

    code = "bad_logits"

    def __init__(self, text: str = "the model's output for this sequence is not finite") -> None:
        super().__init__(text)


class SamplingState(NamedTuple):
    """What the choice of a sequence's next token depends on beside the logits.

    `tokens`: prompt, then output so far. Their number is the position that the random number is drawn for. `allowed`:
    what its grammar allows; None without one.
    """

    request: Submit
    tokens: Seq[int]
    allowed: Bits | None = None


class Sampled(NamedTuple):
    """The choice for each row. `tokens[i]` is -1 where `errors` has row i; `logprobs[i]` is None unless asked for."""

    tokens: list[int]
    logprobs: list[Logprob | None]
    errors: dict[int, ElasticMoEError]


def sample(backend: ComputeBackend, logits_BV: torch.Tensor, states: Seq[SamplingState]) -> Sampled:
    """Choose one token per row of `logits` (float32, contiguous, the backend's), which may be changed in place.

    A row's choice does not depend on the other rows, nor does its failure touch them. Raises ValueError unless there is
    one row per state, and want of memory.
    """
    if len(states) != logits_BV.shape[0]:
        raise ValueError(f"{logits_BV.shape[0]} rows of logits for {len(states)} sequences")
    _check(logits_BV)
    errors: dict[int, ElasticMoEError] = {}

    def alone(row: int, part: Callable[[], T], otherwise: T) -> T:
        """A row's own part. Its failure is the row's."""
        try:
            return part()
        except Exception as error:
            errors[row] = failure_of(error, "choosing the request's next token", **states[row].request.names)
            return otherwise

    choices = [alone(row, partial(_choice_of, state), _GREATEST) for row, state in enumerate(states)]
    chosen = backend.choose(logits_BV, choices)
    logprobs = [
        None if row in errors else alone(row, partial(_accept, one, states[row], logits_BV.shape[1]), None)
        for row, one in enumerate(chosen)
    ]
    return Sampled([-1 if row in errors else one.token for row, one in enumerate(chosen)], logprobs, errors)


def _choice_of(state: SamplingState) -> TokenChoice:
    sampling = state.request.sampling
    draws = not sampling.temperature < GREEDY_BELOW  # also where it is NaN, which is refused
    number = uniform(sampling.seed, len(state.tokens)) if draws else None
    edits = _edits_of(state) if _changes_logits(state) else None
    return TokenChoice(sampling, number, edits, sampling.logprobs, state.allowed)


def _accept(chosen: Chosen, state: SamplingState, vocab: int) -> Logprob | None:
    """The token's log probability, where it is asked for. Raises BadLogits for a token that may not be, and what the
    choice raised."""
    if chosen.error is not None:
        raise chosen.error
    if not 0 <= chosen.token < vocab:
        raise BadLogits
    is_allowed = state.allowed is None or state.allowed[chosen.token >> 3] >> (chosen.token & 7) & 1
    if not is_allowed or (_is_banned_now(state) and chosen.token in state.request.stop_token_ids):
        raise BadLogits("the model's output leaves no token that may come yet")
    return None if chosen.judged is None else _logprob(chosen.judged)


def prompt_logprobs(
    backend: ComputeBackend, logits_NV: torch.Tensor, token_ids: Seq[int], num_top: int
) -> list[Logprob]:
    """Log probability of `token_ids[i]` under row i of `logits` (float32), with the `num_top` best alternatives.

    Raises BadLogits for a row that is not finite.
    """
    _check(logits_NV)
    if not len(token_ids):
        return []
    return [_logprob(judged) for judged in backend.judge(logits_NV, token_ids, num_top)]


def uniform(seed: int, position: int) -> float:
    """The random number of a position: in [0, 1), a function of both arguments alone.

    Two rounds of splitmix64's finalizer (Steele, Lea and Flood 2014) over seed and position.
    """
    return (_mix((_mixed_seed(seed) + position * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


@lru_cache(4_096)
def _mixed_seed(seed: int) -> int:
    return _mix(seed)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _is_banned_now(state: SamplingState) -> bool:
    """Whether the tokens that end the sequence may not come yet."""
    request = state.request
    return bool(request.stop_token_ids) and len(state.tokens) - len(request.prompt) < request.min_tokens


def _changes_logits(state: SamplingState) -> bool:
    sampling = state.request.sampling
    return (
        bool(sampling.logit_bias)
        or sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
        or _is_banned_now(state)
    )


def _edits_of(state: SamplingState) -> Edits:
    """Penalties count output only, repetition counts the prompt too."""
    request, sampling = state.request, state.request.sampling
    penalties: list[tuple[int, float]] = []
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        counts = Counter(state.tokens[len(request.prompt) :])
        penalties = [
            (token, times * sampling.frequency_penalty + sampling.presence_penalty) for token, times in counts.items()
        ]
    seen = sorted(set(state.tokens)) if sampling.repetition_penalty != 1.0 else ()
    banned = request.stop_token_ids if _is_banned_now(state) else ()
    return Edits(sampling.logit_bias, sampling.repetition_penalty, seen, penalties, banned)


def _logprob(judged: Judged) -> Logprob:
    if math.isnan(judged.log_total):
        raise BadLogits

    def told(logit: float) -> float:
        return min(0.0, max(LOGPROB_MIN, logit - judged.log_total))

    return Logprob(told(judged.token), tuple((token, told(logit)) for token, logit in judged.top))


def _check(logits: torch.Tensor) -> None:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits are {logits.dtype} with strides {logits.stride()}; must be contiguous float32")
