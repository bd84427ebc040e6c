"""From logits to tokens. Counter-based: the same (seed, position, logits) always choose the same token.

Order of what changes a row: bias, penalties, tokens that may not come yet, temperature, min-p, top-k, top-p. Reported
log probabilities are those of the logits as the model gave them.

Whatever the logits and the options, a row gets a token of its vocabulary or an error of its own. A changed logit is
brought back to a finite number after the last change, and what was chosen is looked at once more.

Shape suffixes: B sequences, V vocabulary, N rows of a prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import NamedTuple

import torch

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.limits import LOGPROB_MIN
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Logprob
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.engine.failure import failure_of

GREEDY_BELOW = 1e-5  # temperatures that float32 logits would overflow under choose the greatest logit
LARGEST = 3e38  # of a logit that was changed, either sign
NEVER = -3.4e38  # the logit of a token that may not come: finite, as all logits must be, and less than any that may

_MASK = (1 << 64) - 1


class BadLogits(ElasticMoEError):
    """The model gave a sequence logits that no token can be chosen from; only that sequence fails."""

    code = "bad_logits"

    def __init__(self, text: str = "the model's output for this sequence is not finite") -> None:
        super().__init__(text)


class SamplingState(NamedTuple):
    """What the choice of a sequence's next token depends on beside the logits.

    `tokens`: prompt, then output so far. Their number is the position that the random number is drawn for.
    """

    request: Submit
    tokens: Seq[int]


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
    tokens = backend.greatest(logits_BV)
    logprobs: list[Logprob | None] = [None] * len(states)
    errors: dict[int, ElasticMoEError] = {row: BadLogits() for row, token in enumerate(tokens) if token < 0}
    for row, state in enumerate(states):
        if row in errors:
            continue
        sampling = state.request.sampling
        is_changed = _changes_logits(state)
        if sampling.temperature < GREEDY_BELOW and sampling.logprobs < 0 and not is_changed:
            continue
        try:
            tokens[row], logprobs[row] = _choose(backend, logits_BV, state, row, is_changed=is_changed)
        except Exception as error:
            errors[row] = failure_of(error, state.request.request_id, "choosing the request's next token")
            tokens[row] = -1
    return Sampled(tokens, logprobs, errors)


def _choose(
    backend: ComputeBackend, logits_BV: torch.Tensor, state: SamplingState, row: int, *, is_changed: bool
) -> tuple[int, Logprob | None]:
    """A token of a row of finite logits, with its log probability where it is asked for. Raises BadLogits."""
    sampling, vocab = state.request.sampling, logits_BV.shape[1]
    if not is_changed and sampling.logprobs < 0:
        return _draw(backend, logits_BV, row, sampling, len(state.tokens)), None
    row_V = logits_BV[row]
    raw_V = row_V.clone() if is_changed and sampling.logprobs >= 0 else row_V
    if is_changed:
        _change_logits(row_V, state)
    if sampling.temperature < GREEDY_BELOW:
        token = backend.greatest(logits_BV[row : row + 1])[0]
    else:
        token = _draw(backend, logits_BV, row, sampling, len(state.tokens))
    if not 0 <= token < vocab:
        raise BadLogits
    if _is_banned_now(state) and token in state.request.stop_token_ids:
        raise BadLogits("the model's output leaves no token that may come yet")
    return token, _logprob(backend, raw_V, token, sampling.logprobs) if sampling.logprobs >= 0 else None


def prompt_logprobs(
    backend: ComputeBackend, logits_NV: torch.Tensor, token_ids: Seq[int], num_top: int
) -> list[Logprob]:
    """Log probability of `token_ids[i]` under row i of `logits` (float32), with the `num_top` best alternatives.

    Raises BadLogits for a row that is not finite.
    """
    _check(logits_NV)
    return [_logprob(backend, row_V, token, num_top) for row_V, token in zip(logits_NV, token_ids, strict=True)]


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


def _draw(backend: ComputeBackend, logits_BV: torch.Tensor, row: int, sampling: Sampling, position: int) -> int:
    """A token by its probability. Raises BadLogits where no token has one."""
    token = backend.draw(logits_BV, row, sampling, uniform(sampling.seed, position))
    if not 0 <= token < logits_BV.shape[1]:
        raise BadLogits
    return token


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


def _change_logits(row_V: torch.Tensor, state: SamplingState) -> None:
    """Apply bias, penalties and bans in place. Token ids beyond the vocabulary are ignored."""
    sampling, vocab = state.request.sampling, row_V.shape[0]
    biases = [(token, bias) for token, bias in sampling.logit_bias if token < vocab]
    if biases:
        ids = torch.tensor([token for token, _ in biases], device=row_V.device)
        values = torch.tensor([bias for _, bias in biases], dtype=torch.float32, device=row_V.device)
        row_V.index_add_(0, ids, values)
        row_V[ids] = row_V[ids].clamp_(-LARGEST, LARGEST)
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(state.tokens)), device=row_V.device)
        values = row_V[seen]
        factor = sampling.repetition_penalty
        row_V[seen] = torch.where(values > 0, values / factor, values * factor).clamp_(-LARGEST, LARGEST)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        counts = Counter(state.tokens[len(state.request.prompt) :])
        if counts:
            ids = torch.tensor(list(counts), device=row_V.device)
            times = torch.tensor(list(counts.values()), dtype=torch.float32, device=row_V.device)
            penalties = times * sampling.frequency_penalty + sampling.presence_penalty
            row_V[ids] = (row_V[ids] - penalties).clamp_(-LARGEST, LARGEST)
    if _is_banned_now(state):
        row_V[[token for token in state.request.stop_token_ids if token < vocab]] = NEVER


def _logprob(backend: ComputeBackend, row_V: torch.Tensor, token: int, num_top: int) -> Logprob:
    total = backend.log_total(row_V)
    if math.isnan(total):
        raise BadLogits
    top = backend.top_tokens(row_V, num_top)
    own, *others = (min(0.0, max(LOGPROB_MIN, value - total)) for value in row_V[[token, *top]].tolist())
    return Logprob(own, tuple(zip(top, others, strict=True)))


def _check(logits: torch.Tensor) -> None:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits are {logits.dtype} with strides {logits.stride()}; must be contiguous float32")
