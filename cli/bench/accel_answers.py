"""Greedy answers of a deployment, with their logprobs, and how two deployments' differ."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from elasticmoe.cli.chat import first_model
from elasticmoe.cli.http import client as http_client

_PROMPT_TOKENS = (3, 9, 17, 33, 64, 100)
_OUTPUT_TOKENS = 12
_TOKEN_MAX = 200  # ids that every vocabulary has
_TIMEOUT_S = 120.0
_LIKELY = 5  # tokens at each place: where two are about as likely, each is among them
UNLIKELY: Final = 100.0  # nats


class Promise(NamedTuple):
    """What a compute backend promises of its answers. They are compared with those of torch on a CPU: `dtype`, of both
    deployments, and `activations`, of torch's. `logprobs_max`: how far logprobs may be apart; `keeps_bits`: a resize
    changes no answer (ADR 8). Where it may, logprobs stay as near to what they were.
    """

    dtype: str
    activations: str
    logprobs_max: float
    keeps_bits: bool


_PROMISE: Final = Promise("float32", "float32", 0.02, keeps_bits=True)  # sums in another order
_OTHER_PROMISES: Final = {  # ADR 38: it rounds what it multiplies, and products; 0.085 was seen on the tests' operators
    "torch_npu": Promise("bfloat16", "bfloat16", 0.25, keeps_bits=False)
}


def promise_of(compute: str) -> Promise:
    """Of a compute backend; of an accelerator's own choice where it is empty."""
    return _OTHER_PROMISES.get(compute, _PROMISE)


class GreedyAnswer(NamedTuple):
    """Token by token: the ids as text, their logprobs, and those of the likeliest ones at that place."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    likely: tuple[Mapping[str, float], ...]

    def logprob(self, at: int, token: str) -> float | None:
        """Of a token at a place; None where it is not among the likeliest."""
        return self.logprobs[at] if token == self.tokens[at] else self.likely[at].get(token)


def answers_of(url: str) -> list[GreedyAnswer]:
    """To the same prompts each time, one after another, and greedy. Raises ValueError for an answer that is none."""
    draw = random.Random(16)
    with http_client(url, timeout=_TIMEOUT_S) as client:
        model = first_model(client)
        found = []
        for num in _PROMPT_TOKENS:
            prompt = [draw.randrange(3, _TOKEN_MAX) for _ in range(num)]
            body = {"model": model, "prompt": prompt, "max_tokens": _OUTPUT_TOKENS, "temperature": 0}
            body |= {"ignore_eos": True, "logprobs": _LIKELY, "return_tokens_as_token_ids": True}
            answer = client.post("/v1/completions", json=body)
            if answer.status_code != 200:
                raise ValueError(f"an answer of status {answer.status_code}: {answer.text[:200]}")
            told: dict[str, Any] = answer.json()["choices"][0]["logprobs"]
            parts = (tuple(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs"))
            found.append(GreedyAnswer(*parts))
    return found


def difference(ours: Sequence[GreedyAnswer], theirs: Sequence[GreedyAnswer]) -> tuple[float, int]:
    """The largest difference of a token's logprobs, UNLIKELY where one side has none of it, and how many answers have
    the same tokens. An answer counts up to where its tokens differ, with both of them: there two are about as likely.
    What follows is another text."""
    most, num_equal = 0.0, 0
    for mine, other in zip(ours, theirs, strict=True):
        num_equal += mine.tokens == other.tokens
        for at, tokens in enumerate(zip(mine.tokens, other.tokens, strict=True)):
            for token in tokens:
                one, another = mine.logprob(at, token), other.logprob(at, token)
                most = max(most, UNLIKELY if one is None or another is None else abs(one - another))
            if tokens[0] != tokens[1]:
                break
    return most, num_equal
