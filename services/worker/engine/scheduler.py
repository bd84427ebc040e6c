"""What to compute in the next step. Pure: no tensors, no clock, no sockets.

Continuous batching with chunked prefill: running sequences decode one token each; what is left of the step's token
budget goes to prompts, oldest first, in chunks. A plan changes nothing but block ownership, so a step that is given up
(its exchange was aborted) is simply planned again; `commit` makes it count.

Invariant: running sequences hold blocks for `kv_len` plus what is planned; waiting ones hold nothing.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from common.protocol.errors import InvalidRequest, Overloaded
from common.protocol.rank import Submit
from services.worker.engine.blocks import BlockManager
from services.worker.engine.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of `sequence` are computed; `sample`: its next token is then chosen."""

    sequence: Sequence
    start: int
    num_tokens: int
    sample: bool


class Plan(NamedTuple):
    """One step. `admitted` run from now on, each in a row of its own; `freed_rows` belonged to sequences that lost
    their blocks and wait again. Admissions and preemptions stand even if the step is given up."""

    chunks: list[Chunk]
    admitted: list[Sequence]
    freed_rows: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank computes."""
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Owns the sequences of one rank and their blocks."""

    def __init__(
        self, blocks: BlockManager, *, max_tokens: int, max_sequences: int, max_model_len: int, max_waiting: int
    ) -> None:
        self.blocks = blocks
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.max_model_len = max_model_len
        self.max_waiting = max_waiting
        self.running: list[Sequence] = []  # in order
        self.waiting: list[Sequence] = []  # in order
        self._by_id: dict[tuple[bytes, str], Sequence] = {}
        self._arrivals = 0
        self._free_rows = list(range(max_sequences - 1, -1, -1))

    def add(self, request: Submit, peer: bytes, now: float) -> Sequence:
        """Accept a request. Raises InvalidRequest for one that can never run here, Overloaded for a full queue."""
        if (peer, request.request_id) in self._by_id:
            raise InvalidRequest(f"request id {request.request_id} is in use", code="duplicate_request_id")
        length = len(request.prompt) + 1
        capacity = min(self.max_model_len, self.blocks.num_blocks * self.blocks.block_size)
        if length > capacity:
            raise InvalidRequest(
                f"{len(request.prompt)} prompt tokens leave no room in a context of {capacity}",
                code="context_length_exceeded",
            )
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests wait; the limit is {self.max_waiting}", code="queue_full")
        self._arrivals += 1
        sequence = Sequence(request, peer, self._arrivals, now + request.deadline_s)
        self._by_id[peer, request.request_id] = sequence
        insort(self.waiting, sequence, key=lambda s: s.order)
        return sequence

    def get(self, peer: bytes, request_id: str) -> Sequence | None:
        """A live sequence by its owner and id."""
        return self._by_id.get((peer, request_id))

    def remove(self, sequence: Sequence) -> int:
        """Forget a sequence, finished or not, and release its blocks. Returns the row it had, or -1."""
        del self._by_id[sequence.peer, sequence.request.request_id]
        if sequence.row < 0:
            self.waiting.remove(sequence)
            return -1
        return self._stop(sequence)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed."""
        return [sequence for sequence in self._by_id.values() if sequence.deadline <= now]

    def sequences(self) -> list[Sequence]:
        """All live sequences."""
        return list(self._by_id.values())

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that this rank can hold."""
        return min(self.max_model_len, self.blocks.num_blocks * self.blocks.block_size)

    @property
    def tokens_queued(self) -> int:
        """Prompt tokens that are still to be computed."""
        return sum(len(s.tokens) - s.kv_len for s in self.waiting) + sum(
            max(0, len(s.tokens) - s.kv_len - 1) for s in self.running
        )

    def plan(self) -> Plan:
        """Choose the next step's work and allocate its blocks."""
        budget = self.max_tokens
        chunks: list[Chunk] = []
        freed_rows: list[int] = []
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            # A prompt leaves one token for each sequence behind it, so that a long one stops nobody's decoding.
            room = max(1, budget - (len(self.running) - index - 1))
            count = min(len(sequence.tokens) - sequence.kv_len, room)
            while not self._grow(sequence, sequence.kv_len + count):
                victim = self.running[-1]
                freed_rows.append(self._stop(victim))
                insort(self.waiting, victim, key=lambda s: s.order)
                if victim is sequence:
                    break
            else:
                budget -= count
                chunks.append(_chunk(sequence, count))
                index += 1
        admitted: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences and not freed_rows:
            sequence = self.waiting[0]
            if not self._admit(sequence, budget):
                break
            admitted.append(sequence)
            count = min(len(sequence.tokens) - sequence.kv_len, budget)
            budget -= count
            chunks.append(_chunk(sequence, count))
        return Plan(chunks, admitted, freed_rows)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self.blocks.blocks_for(num_tokens) - len(sequence.blocks)
        if missing > 0:
            if not self.blocks.can_allocate(missing):
                return False
            sequence.blocks += self.blocks.allocate(missing)
        return True

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        matched = [] if sequence.wants_prompt_logprobs else self.blocks.match(sequence.tokens)
        sequence.blocks = matched
        sequence.kv_len = len(matched) * self.blocks.block_size
        sequence.cached = len(matched)
        count = min(len(sequence.tokens) - sequence.kv_len, budget)
        # One block per running sequence stays in hand, so that an admission does not preempt at the next step.
        reserve = len(self.running)
        missing = self.blocks.blocks_for(sequence.kv_len + count) - len(matched)
        if not self.blocks.can_allocate(missing + reserve):
            self.blocks.release(matched)
            sequence.blocks, sequence.kv_len, sequence.cached = [], 0, 0
            return False
        sequence.blocks += self.blocks.allocate(missing)
        del self.waiting[0]
        insort(self.running, sequence, key=lambda s: s.order)
        sequence.row = self._free_rows.pop()
        return True

    def _stop(self, sequence: Sequence) -> int:
        row = sequence.row
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.kv_len, sequence.cached, sequence.logged, sequence.row = [], 0, 0, 0, -1
        self._free_rows.append(row)
        return row

    def commit(self, chunks: list[Chunk], tokens: list[int]) -> None:
        """The step was computed: KV counts, and `tokens[i]` extends the i-th chunk that sampled."""
        chosen = iter(tokens)
        for sequence, start, count, sample in chunks:
            sequence.kv_len = start + count
            if sample:
                sequence.tokens.append(next(chosen))
            full = sequence.kv_len // self.blocks.block_size
            if full > sequence.cached:
                sequence.cached = self.blocks.register(sequence.blocks, sequence.tokens, sequence.cached, full)

    def check_integrity(self) -> list[str]:
        """Findings, empty when all is well."""
        findings = self.blocks.check_integrity([s.blocks for s in self._by_id.values()])
        if len(self.running) + len(self.waiting) != len(self._by_id):
            findings.append(f"{len(self.running)} running and {len(self.waiting)} waiting of {len(self._by_id)} known")
        for s in self.running:
            if len(s.blocks) < self.blocks.blocks_for(s.kv_len):
                findings.append(f"{s.request.request_id}: {len(s.blocks)} blocks for {s.kv_len} tokens")
        return findings


def _chunk(sequence: Sequence, count: int) -> Chunk:
    return Chunk(sequence, sequence.kv_len, count, sequence.kv_len + count == len(sequence.tokens))
