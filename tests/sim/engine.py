"""The product's engine around a model that is a hash: the next token is a function of all tokens so far, as they are
read back from the KV blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from elasticmoe.native import host
from elasticmoe.services.worker.engine import kv_bytes
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.outcome import Choice
from elasticmoe.services.worker.engine.plan import Chunk, StepPlan
from elasticmoe.services.worker.exchange.board import ReplicaBoard
from elasticmoe.services.worker.model.base import StepTimes
from elasticmoe.services.worker.model.batch import Batch
from tests.sim.heap import Violation
from tests.sim.memory import (
    BLOCK_SIZE,
    BLOCKS_PER_HANDLE,
    GEOMETRY,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    MAX_TOKENS,
    RealBytes,
)


def next_token(tokens: Iterable[int]) -> int:
    """The reference: a function of all tokens so far."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return 1 + value % 250


def _write_bytes(address: int, data: memoryview) -> None:
    ctypes.memmove(address, bytes(data), len(data))


def kv_of(memory: RealBytes, num_kv: int) -> Any:
    """What stands for a rank's KvCache: `num_kv` handles of a device are mapped."""
    return SimpleNamespace(
        geometry=GEOMETRY,
        base_addr=ctypes.addressof(memory.buffer),
        address=ctypes.addressof(memory.buffer),
        num_blocks=num_kv * BLOCKS_PER_HANDLE,
        device=SimpleNamespace(copy=host.copy, read_bytes=ctypes.string_at, write_bytes=_write_bytes),
    )


def write_batch(values: memoryview[int], batch: Batch) -> None:
    """Write the tokens of a step to their places in a device's KV."""
    for part, (table, kv_len) in enumerate(_tables(batch)):
        ids = batch.token_ids[batch.row_starts[part] : batch.row_starts[part + 1]]
        for position, token in enumerate(ids, kv_len - len(ids)):
            values[table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE] = token


def read_batch(values: memoryview[int], batch: Batch) -> Iterator[list[int]]:
    """Of the parts whose logits are wanted, all tokens that there are by then."""
    wanted = set(batch.logit_rows)
    for part, (table, kv_len) in enumerate(_tables(batch)):
        if batch.row_starts[part + 1] - 1 in wanted:
            yield [values[table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE] for at in range(kv_len)]


def _tables(batch: Batch) -> Iterator[tuple[Sequence[int], int]]:
    """By part, the blocks and the tokens up to the end of this step."""
    for part, kv_len in enumerate(batch.kv_lens):
        yield batch.blocks[batch.block_starts[part] : batch.block_starts[part + 1]], kv_len


class SimModel:
    """What stands for a follower's model: it writes the tokens that its leader planned."""

    times = StepTimes(0, 0, 0)

    def __init__(self, kv: Any, values: memoryview[int], take_part: Callable[[Callable[[], None]], None]) -> None:
        """`take_part(write)` writes the KV, if it comes to that, and raises what becomes of the step here."""
        self._kv = kv
        self._values = values
        self._take_part = take_part
        self.num_steps = 0

    def forward(self, batch: Batch, exchange: object) -> None:
        """See Model."""
        del exchange
        self.num_steps += 1
        if batch.blocks and max(batch.blocks) >= self._kv.num_blocks:
            raise Violation(f"block {max(batch.blocks)} is computed in, and a follower has not mapped it")
        self._take_part(lambda: write_batch(self._values, batch))


class SimEngine(Engine):
    """`take_part()` is called for each step before anything is computed, and raises what becomes of it. `last_plan`:
    what the rank brings to the next step; `num_steps`: that it has taken part in."""

    def __init__(
        self, memory: RealBytes, num_kv: int, take_part: Callable[[], None], board: ReplicaBoard | None = None
    ) -> None:
        no_model: Any = None
        super().__init__(
            no_model,
            no_model,
            kv_of(memory, num_kv),
            memory.rows,
            max_tokens=MAX_TOKENS,
            max_sequences=MAX_SEQUENCES,
            max_model_len=MAX_MODEL_LEN,
            board=board,
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
        for old, new in plan.moves:
            kv_bytes.copy_block(self.kv, old, new)
        self._take_part()
        if plan.batch is not None:
            write_batch(self._values, plan.batch)
            read = read_batch(self._values, plan.batch)
            return [Choice(next_token(next(read)) if chunk.sample else None) for chunk in plan.chunks]
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
