"""One request of a trace. Pure: nothing here knows the time."""

from __future__ import annotations

import msgspec

# What one prefix id stands for, in tokens of the trace as it was recorded (Mooncake, arXiv:2407.00079).
PREFIX_BLOCK_TOKENS = 512


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A request that comes at `at_s`, in seconds after the begin of its trace; traces are ordered by it.

    `input_tokens`: of its prompt, 1 or more. `output_tokens`: that it wants, 1 or more. `prefixes`: one id for each
    block of its prompt, from the first on, where the trace tells; prompts that begin with the same ids begin with the
    same tokens. An id stands for PREFIX_BLOCK_TOKENS tokens, the last one for what is left.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    prefixes: tuple[int, ...] = ()


class Trace(msgspec.Struct, frozen=True):
    """A trace that was read. `form`: by its publisher's name. `num_without_output`: requests that made no token where
    they were recorded (BurstGPT says: failures); they are not among the arrivals."""

    form: str
    arrivals: list[Arrival]
    num_without_output: int
