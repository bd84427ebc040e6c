"""Prompts of a wanted number of token ids, drawn from a seed. Ids are below 256, which every tokenizer here has."""

from __future__ import annotations

import random

from elasticmoe.cli.traces.arrival import Arrival


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """A prompt that shares nothing with another one."""
    return list(rng.randbytes(num_tokens))


class Prompts:
    """The prompts of one trace. `block_tokens`: what a prefix id stands for, in tokens."""

    def __init__(self, seed: int, block_tokens: int) -> None:
        self._seed = seed
        self._block_tokens = block_tokens

    def make(self, number: int, arrival: Arrival) -> list[int]:
        """The prompt of the arrival at place `number`: its prefixes' blocks, which the same ids make again; what they
        do not fill is its own."""
        tokens: list[int] = []
        for prefix in arrival.prefixes:
            if len(tokens) >= arrival.input_tokens:
                break
            tokens += random.Random(f"{self._seed} prefix {prefix}").randbytes(self._block_tokens)
        left = arrival.input_tokens - len(tokens)
        if left <= 0:
            return tokens[: arrival.input_tokens]
        return tokens + list(random.Random(f"{self._seed} request {number}").randbytes(left))
