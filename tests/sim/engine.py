"""The product's engine around a model that is a hash: the next token is a function of all tokens so far, as they are
read back from the KV blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from elasticmoe.native import host
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.outcome import Choice
from elasticmoe.services.worker.engine.plan import Chunk, StepPlan
from tests.sim.hmm import (
    BLOCK_SIZE,
    BLOCKS_PER_HANDLE,
    GEOMETRY,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    MAX_TOKENS,
    Memory,
)


def next_token(tokens: Iterable[int]) -> int:
    """The reference: a function of all tokens so far."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return 1 + value % 250


def _write_bytes(address: int, data: memoryview) -> None:
    ctypes.memmove(address, bytes(data), len(data))


class SimEngine(Engine):
    """`take_part()` is called for each step before anything is computed, and raises what becomes of it. `last_plan`:
    what the rank brings to the next step; `num_steps`: that it has taken part in."""

    def __init__(self, memory: Memory, num_kv: int, take_part: Callable[[], None]) -> None:
        kv: Any = SimpleNamespace(
            geometry=GEOMETRY,
            base_addr=ctypes.addressof(memory.buffer),
            address=ctypes.addressof(memory.buffer),
            num_blocks=num_kv * BLOCKS_PER_HANDLE,
            device=SimpleNamespace(copy=host.copy, read_bytes=ctypes.string_at, write_bytes=_write_bytes),
        )
        no_model: Any = None
        super().__init__(
            no_model,
            no_model,
            kv,
            memory.rows,
            max_tokens=MAX_TOKENS,
            max_sequences=MAX_SEQUENCES,
            max_model_len=MAX_MODEL_LEN,
        )
        self._values = memory.values
        self._take_part = take_part
        self.last_plan = StepPlan([], [], [])
        self.num_steps = 0

    def plan(self, *, decode_only: bool = False, num_clean: int = 0) -> StepPlan:
        """See Engine."""
        self.last_plan = super().plan(decode_only=decode_only, num_clean=num_clean)
        return self.last_plan

    def compute(self, plan: StepPlan, total_tokens: int, deadline_ms: float) -> list[Choice]:
        """See Engine."""
        del total_tokens, deadline_ms
        self.num_steps += 1
        self._take_part()
        choices = []
        for chunk in plan.chunks:
            self._write(chunk)
            choices.append(Choice(next_token(self._read(chunk)) if chunk.sample else None))
        return choices

    def _write(self, chunk: Chunk) -> None:
        sequence, start, count, _ = chunk
        for position in range(start, start + count):
            place = sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            self._values[place] = sequence.tokens[position]

    def _read(self, chunk: Chunk) -> list[int]:
        sequence, start, count, _ = chunk
        values, blocks = self._values, sequence.blocks
        found: list[int] = []
        for index in range((start + count + BLOCK_SIZE - 1) // BLOCK_SIZE):
            found += values[blocks[index] * BLOCK_SIZE : (blocks[index] + 1) * BLOCK_SIZE]
        return found[: start + count]
