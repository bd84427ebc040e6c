"""From logits to tokens. Counter-based: the same (seed, position, logits) always choose the same token.

Shape suffixes: B sequences, V vocabulary, N rows of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

from common.protocol.errors import ElasticMoEError
from common.protocol.rank import Submit
from common.protocol.router import Logprob


class BadLogits(ElasticMoEError):
    """The model gave a sequence a logit that is not a finite number; only that sequence fails."""

    code = "bad_logits"


class SamplingState:
    """What choosing a sequence's next token depends on beside the logits.

    `tokens` is the sequence's own list (prompt, then output), read at each call: it may only grow. Its length is the
    position that the random number is drawn for, so nothing is lost when a replacement rank builds the state anew.
    """

    def __init__(self, request: Submit, tokens: list[int]) -> None:
        self.request = request
        self.tokens = tokens


class Sampled(NamedTuple):
    """The choice for each row. `tokens[i]` is -1 where `errors` has row i; `logprobs[i]` is None unless asked for."""

    tokens: list[int]
    logprobs: list[Logprob | None]
    errors: dict[int, BadLogits]


def sample(logits_BV: torch.Tensor, states: Seq[SamplingState]) -> Sampled:
    """Choose one token per row of `logits` (float32, contiguous; rows may be changed in place)."""
    raise NotImplementedError


def prompt_logprobs(logits_NV: torch.Tensor, token_ids: Seq[int], num_top: int) -> list[Logprob]:
    """Log probability of `token_ids[i]` under row i of `logits`, with the `num_top` best alternatives."""
    raise NotImplementedError
