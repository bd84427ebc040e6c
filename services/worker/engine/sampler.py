"""From logits to tokens. Counter-based: the same (seed, position, logits) always choose the same token.

Order of what changes a row: bias, tokens that may not come yet, penalties, temperature, min-p, top-k, top-p. Reported
log probabilities are those of the logits as the model gave them.

Shape suffixes: B sequences, V vocabulary, N rows of a prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

from common.protocol.errors import ElasticMoEError
from common.protocol.rank import Sampling, Submit
from common.protocol.router import Logprob
from native import kernels

GREEDY_BELOW = 1e-5  # temperatures that float32 logits would overflow under choose the greatest logit
NEVER = -3e38  # the logit of a token that may not come: finite, as all logits must be

_MASK = (1 << 64) - 1


class BadLogits(ElasticMoEError):
    """The model gave a sequence a logit that is not a finite number; only that sequence fails."""

    code = "bad_logits"

    def __init__(self) -> None:
        super().__init__("the model's output for this sequence is not finite")


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
    errors: dict[int, BadLogits]


def sample(logits_BV: torch.Tensor, states: Seq[SamplingState]) -> Sampled:
    """Choose one token per row of `logits` (float32, contiguous), which may be changed in place.

    A row's choice does not depend on the other rows. Raises ValueError unless there is one row per state.
    """
    if len(states) != logits_BV.shape[0]:
        raise ValueError(f"{logits_BV.shape[0]} rows of logits for {len(states)} sequences")
    address, vocab = _address(logits_BV), logits_BV.shape[1]
    tokens = kernels.greatest(address, len(states), vocab)
    logprobs: list[Logprob | None] = [None] * len(states)
    errors = {row: BadLogits() for row, token in enumerate(tokens) if token < 0}
    for row, state in enumerate(states):
        sampling = state.request.sampling
        is_greedy = sampling.temperature < GREEDY_BELOW
        is_changed = _changes_logits(state)
        if row in errors or (is_greedy and not is_changed and sampling.logprobs < 0):
            continue
        row_address = address + row * vocab * logits_BV.element_size()
        # The top ones are noted before the row is changed; the chosen one is not known yet.
        raw_V = logits_BV[row].clone() if is_changed and sampling.logprobs >= 0 else logits_BV[row]
        if is_changed:
            _change_logits(logits_BV[row], state)
        if not is_greedy:
            tokens[row] = _draw(row_address, vocab, sampling, len(state.tokens))
        elif is_changed:
            tokens[row] = kernels.greatest(row_address, 1, vocab)[0]
        if sampling.logprobs >= 0:
            logprobs[row] = _logprob(raw_V, tokens[row], sampling.logprobs)
    return Sampled(tokens, logprobs, errors)


def prompt_logprobs(logits_NV: torch.Tensor, token_ids: Seq[int], num_top: int) -> list[Logprob]:
    """Log probability of `token_ids[i]` under row i of `logits` (float32), with the `num_top` best alternatives.

    A row that is not finite gives NaN.
    """
    return [_logprob(row_V, token, num_top) for row_V, token in zip(logits_NV, token_ids, strict=True)]


def uniform(seed: int, position: int) -> float:
    """The random number of a position: in [0, 1), a function of both arguments alone.

    Two rounds of splitmix64's finalizer (Steele, Lea and Flood 2014) over seed and position.
    """
    return (_mix((_mix(seed) + position * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _draw(row_address: int, vocab: int, sampling: Sampling, position: int) -> int:
    return kernels.draw(
        row_address,
        vocab,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        uniform(sampling.seed, position),
    )


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
    """Apply bias, bans and penalties in place. Token ids beyond the vocabulary are ignored."""
    sampling, vocab = state.request.sampling, row_V.shape[0]
    for token, bias in sampling.logit_bias:
        if token < vocab:
            row_V[token] += bias
    if _is_banned_now(state):
        row_V[[token for token in state.request.stop_token_ids if token < vocab]] = NEVER
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(state.tokens)))
        values = row_V[seen]
        factor = sampling.repetition_penalty
        row_V[seen] = torch.where(values > 0, values / factor, values * factor).clamp_(min=NEVER)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        counts = Counter(state.tokens[len(state.request.prompt) :])
        if counts:
            times = torch.tensor(list(counts.values()), dtype=torch.float32)
            row_V[torch.tensor(list(counts))] -= times * sampling.frequency_penalty + sampling.presence_penalty


def _logprob(row_V: torch.Tensor, token: int, num_top: int) -> Logprob:
    address, vocab = _address(row_V), row_V.shape[0]
    total = kernels.log_total(address, vocab)
    top = kernels.top_tokens(address, vocab, num_top)
    values = row_V[[token, *top]].tolist()
    return Logprob(values[0] - total, tuple((i, value - total) for i, value in zip(top, values[1:], strict=True)))


def _address(logits: torch.Tensor) -> int:
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits are {logits.dtype} with strides {logits.stride()}; must be contiguous float32")
    return logits.data_ptr()
