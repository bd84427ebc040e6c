"""Greedy answers of a deployment, with their logprobs, and how two deployments' differ."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from elasticmoe.cli.chat import first_model
from elasticmoe.cli.http import client as http_client

_PROMPT_TOKENS = (3, 9, 17, 33, 64, 100)
_OUTPUT_TOKENS = 12
_TOKEN_MAX = 200  # ids that every vocabulary has
_TIMEOUT_S = 120.0


class Promise(NamedTuple):
    """What a compute backend promises of its answers. `dtype`: of the deployments in which they are compared with
    torch's on a CPU; `logprobs_max`: how far a logprob may be from that one's; `keeps_bits`: a resize changes no answer
    (ADR 8). Where it may, logprobs stay as near to what they were.
    """

    dtype: str
    logprobs_max: float
    keeps_bits: bool


_PROMISE: Final = Promise("float32", 0.02, keeps_bits=True)  # sums in another order
_OTHER_PROMISES: Final = {"torch_npu": Promise("bfloat16", 0.25, keeps_bits=False)}  # ADR 38: it rounds products


def promise_of(compute: str) -> Promise:
    """Of a compute backend; of an accelerator's own choice where it is empty."""
    return _OTHER_PROMISES.get(compute, _PROMISE)


class GreedyAnswer(NamedTuple):
    """Token by token: the ids as text, and their logprobs."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


def answers_of(url: str) -> list[GreedyAnswer]:
    """To the same prompts each time, one after another, and greedy. Raises ValueError for an answer that is none."""
    draw = random.Random(16)
    with http_client(url, timeout=_TIMEOUT_S) as client:
        model = first_model(client)
        found = []
        for num in _PROMPT_TOKENS:
            prompt = [draw.randrange(3, _TOKEN_MAX) for _ in range(num)]
            body = {"model": model, "prompt": prompt, "max_tokens": _OUTPUT_TOKENS, "temperature": 0}
            body |= {"ignore_eos": True, "logprobs": 1, "return_tokens_as_token_ids": True}
            answer = client.post("/v1/completions", json=body)
            if answer.status_code != 200:
                raise ValueError(f"an answer of status {answer.status_code}: {answer.text[:200]}")
            told: dict[str, Any] = answer.json()["choices"][0]["logprobs"]
            found.append(GreedyAnswer(tuple(told["tokens"]), tuple(told["token_logprobs"])))
    return found


def difference(ours: Sequence[GreedyAnswer], theirs: Sequence[GreedyAnswer]) -> tuple[float, int]:
    """The largest difference of logprobs, and how many answers have the same tokens. An answer counts up to where its
    tokens differ: there two were about as likely, so their logprobs agree too; what follows is another text."""
    most, num_equal = 0.0, 0
    for mine, other in zip(ours, theirs, strict=True):
        num_equal += mine.tokens == other.tokens
        for at, (a, b) in enumerate(zip(mine.logprobs, other.logprobs, strict=True)):
            most = max(most, abs(a - b))
            if mine.tokens[at] != other.tokens[at]:
                break
    return most, num_equal
