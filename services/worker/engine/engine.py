"""One rank's engine: plan a step, compute it, make it durable, tell what came of it.

Order of a step, which a kill at any instruction must not break: KV is written (model), then the ledger is committed,
then tokens are reported. A step that is repeated writes the same KV again and chooses the same tokens.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec
import torch

from common.protocol.errors import Conflict, ContextLengthExceeded, DeadlineExceeded, ElasticMoEError, InvalidRequest
from common.protocol.rank import HandOver, Submit
from common.protocol.router import Delta, Failed, Logprob
from native.ledger import Ledger
from services.worker.engine import kv_bytes
from services.worker.engine.blocks import BlockManager
from services.worker.engine.rows import encode_entry, entry_bytes_max
from services.worker.engine.sampler import SamplingState, prompt_logprobs, sample
from services.worker.engine.scheduler import Chunk, Plan, Scheduler
from services.worker.engine.sequence import Hold, Sequence
from services.worker.exchange.base import Exchange
from services.worker.model.batch import Batch, Part
from services.worker.model.registry import Model
from services.worker.model.weights import KvCache

NO_TOKENS: tuple[int, ...] = ()


class Outcome(NamedTuple):
    """What a step made, by router: new tokens, and requests that failed."""

    deltas: dict[bytes, list[Delta]]
    failures: list[tuple[bytes, Failed]]


class StepCost(NamedTuple):
    """Nanoseconds of one step: `math` in the model without the exchange, `exchange` without waiting, `wait`."""

    math_ns: int
    exchange_ns: int
    wait_ns: int


class Engine:
    """Owns the sequences, blocks and ledger rows of one rank. Only the rank's loop thread calls it."""

    def __init__(
        self,
        model: Model,
        exchange: Exchange,
        kv: KvCache,
        ledger: Ledger,
        *,
        max_tokens: int,
        max_sequences: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._exchange = exchange
        self._kv = kv
        self._ledger = ledger
        self._block_size = kv.geometry.block_size
        self._prompt_logprobs: dict[int, list[Logprob]] = {}  # by arrival, until the first token is reported
        self.scheduler = Scheduler(
            BlockManager(kv.num_blocks, kv.geometry.block_size),
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            max_waiting=4 * max_sequences,
        )
        self.cost = StepCost(0, 0, 0)

    # ---- requests -------------------------------------------------------------------------------------------------

    def add(self, request: Submit, peer: bytes, now: float) -> None:
        """Accept a request, or raise an ElasticMoEError; then nothing stays of it."""
        self._check_blob(request, peer)
        self.scheduler.add(request, peer, now)

    def _check_blob(self, request: Submit, peer: bytes) -> None:
        blob_bytes = entry_bytes_max(request, peer)
        if blob_bytes > self._ledger.blob_bytes:
            raise InvalidRequest(
                f"request parameters of {blob_bytes} bytes exceed the limit of {self._ledger.blob_bytes}",
                code="parameters_too_large",
            )

    def cancel(self, peer: bytes, request_id: str) -> None:
        """Forget a request, if it is known."""
        sequence = self.scheduler.get(peer, request_id)
        if sequence is not None:
            self.forget(sequence)

    def cancel_peer(self, peer: bytes) -> None:
        """Forget all requests of a router that is gone."""
        for sequence in self.scheduler.sequences():
            if sequence.peer == peer:
                self.forget(sequence)

    def fail_all(self, error: ElasticMoEError) -> list[tuple[bytes, Failed]]:
        """End every request with `error`, but for those that another rank may have taken over."""
        return [self.fail(s, error) for s in self.scheduler.sequences() if s not in self.scheduler.detached]

    def expire(self, now: float) -> list[tuple[bytes, Failed]]:
        """End the requests whose deadline has passed."""
        failures = []
        for sequence in self.scheduler.expired(now):
            limit = sequence.request.deadline_s
            failures.append(self.fail(sequence, DeadlineExceeded(f"request exceeded its deadline of {limit:g} s")))
        return failures

    def end_overlong(self) -> Outcome:
        """End the sequences that no longer fit since the KV has shrunk: with `length`, or failed without any output."""
        outcome = Outcome({}, [])
        capacity = self.scheduler.capacity_tokens
        if capacity == self.scheduler.max_model_len:
            return outcome
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if len(sequence.tokens) <= capacity:
                continue
            if sequence.num_output:
                delta = Delta(sequence.request.request_id, sequence.num_sent, NO_TOKENS, "length")
                outcome.deltas.setdefault(sequence.peer, []).append(delta)
                self.forget(sequence)
            else:
                outcome.failures.append(self.fail(sequence, ContextLengthExceeded(capacity, sequence.num_prompt)))
        return outcome

    def fail(self, sequence: Sequence, error: ElasticMoEError) -> tuple[bytes, Failed]:
        """End a live sequence with `error`."""
        self.forget(sequence)
        return sequence.peer, Failed(sequence.request.request_id, error.code, error.message, error.retryable)

    def forget(self, sequence: Sequence) -> None:
        """Free everything of a live sequence."""
        self._prompt_logprobs.pop(sequence.arrival, None)
        row = self.scheduler.remove(sequence)
        if row >= 0:
            self._ledger.close_row(row)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def plan(self, *, decode_only: bool = False) -> Plan:
        """Choose the next step's work, and write to the ledger which sequences run and which blocks are theirs."""
        plan = self.scheduler.plan(decode_only=decode_only)
        for row in plan.freed_rows:
            self._ledger.close_row(row)
        for sequence in plan.admitted:
            self._open_row(sequence)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if len(sequence.blocks) > sequence.logged:
                self._ledger.append_blocks(sequence.row, sequence.blocks[sequence.logged :])
                sequence.logged = len(sequence.blocks)
        return plan

    def _open_row(self, sequence: Sequence) -> None:
        prompt = sequence.num_prompt
        self._ledger.open_row(sequence.row, encode_entry(sequence), sequence.tokens[:prompt], sequence.blocks)
        self._ledger.commit(sequence.row, sequence.kv_len, sequence.tokens[prompt:])
        sequence.logged = len(sequence.blocks)

    def compute(self, plan: Plan, total_tokens: int, deadline_ms: float) -> Outcome:
        """Run the step that all ranks have agreed on. `total_tokens`: of all ranks together.

        Raises BusAborted or BusTimeout; then nothing is committed and the work is planned again.
        """
        self._exchange.begin_step(total_tokens, deadline_ms)
        batch = Batch([self._part(chunk) for chunk in plan.chunks], self._block_size)
        started = time.perf_counter_ns()
        logits = self._model.forward(batch, self._exchange)
        forward_ns = time.perf_counter_ns() - started
        times = self._model.times
        self.cost = StepCost(forward_ns - times.exchange_ns, times.exchange_ns - times.wait_ns, times.wait_ns)
        return self._finish(plan.chunks, logits)

    def _part(self, chunk: Chunk) -> Part:
        sequence, start, count, is_last = chunk
        if sequence.wants_prompt_logprobs:
            num_logits = count
        else:
            num_logits = 1 if is_last else 0
        tokens = sequence.tokens
        ids = tokens[start:] if start + count == len(tokens) else tokens[start : start + count]
        return Part(ids, start, sequence.blocks, num_logits)

    def _finish(self, chunks: list[Chunk], logits: torch.Tensor) -> Outcome:
        rows: list[int] = []
        states: list[SamplingState] = []
        at = 0
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.wants_prompt_logprobs:
                self._note_prompt(chunk, logits[at : at + chunk.num_tokens])
                at += chunk.num_tokens
            elif chunk.sample:
                at += 1
            if chunk.sample:
                rows.append(at - 1)
                states.append(SamplingState(sequence.request, sequence.tokens))
        if len(rows) < logits.shape[0]:
            logits = logits[rows]
        sampled = sample(logits, states) if states else None
        tokens = sampled.tokens if sampled else []
        self.scheduler.commit(chunks, tokens)
        self._commit_ledger(chunks)
        outcome = Outcome({}, [])
        index = 0
        for chunk in chunks:
            if not chunk.sample:
                continue
            assert sampled is not None
            error = sampled.errors.get(index)
            if error is not None:
                chunk.sequence.tokens.pop()
                outcome.failures.append(self.fail(chunk.sequence, error))
            else:
                self._report(chunk.sequence, sampled.logprobs[index], outcome)
            index += 1
        return outcome

    def _note_prompt(self, chunk: Chunk, logits: torch.Tensor) -> None:
        """Log probabilities of the prompt tokens that this chunk's rows predict."""
        sequence = chunk.sequence
        ids = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, sequence.num_prompt)]
        noted = self._prompt_logprobs.setdefault(sequence.arrival, [])
        del noted[chunk.start :]  # a preempted sequence starts over, a step that was given up is repeated
        if ids:
            noted += prompt_logprobs(logits[: len(ids)], ids, max(0, sequence.request.sampling.logprobs))

    def _commit_ledger(self, chunks: list[Chunk]) -> None:
        # A token below 0 is an error's: nothing of that step counts, and the sequence ends.
        sampled = [c.sequence for c in chunks if c.sample and c.sequence.tokens[-1] >= 0]
        commits = [(sequence.row, sequence.kv_len, sequence.tokens[-1]) for sequence in sampled]
        if commits:
            self._ledger.commit_many(commits)
        for chunk in chunks:
            if not chunk.sample:
                self._ledger.commit(chunk.sequence.row, chunk.sequence.kv_len, NO_TOKENS)

    def _report(self, sequence: Sequence, logprob: Logprob | None, outcome: Outcome) -> None:
        finish = sequence.finish_reason(self.scheduler.capacity_tokens)
        token = sequence.tokens[-1]
        is_stop = finish == "stop"
        delta = Delta(
            sequence.request.request_id,
            sequence.num_sent,
            NO_TOKENS if is_stop else (token,),
            finish,
            token if is_stop else None,
            None if logprob is None or is_stop else (logprob,),
            tuple(self._prompt_logprobs.pop(sequence.arrival)) if sequence.arrival in self._prompt_logprobs else None,
        )
        sequence.num_sent += len(delta.ids)
        outcome.deltas.setdefault(sequence.peer, []).append(delta)
        if finish is not None:
            self.forget(sequence)

    # ---- another number of KV blocks ------------------------------------------------------------------------------

    def resize_kv(self, num_blocks: int, blocks_per_turn: int = 8) -> bool:
        """Bring the rank to `num_blocks` KV blocks; called once between two steps until it returns True.

        More blocks must be mapped before the first call; fewer may be unmapped once it has returned True. Sequences go
        on meanwhile: at most `blocks_per_turn` of their blocks are moved in one call, as lower ones become free. What
        is kept for other ranks' sequences is not moved, since the HMM may be writing there; it ends by itself.
        """
        blocks = self.scheduler.blocks
        if num_blocks > blocks.num_blocks:
            blocks.grow(num_blocks)
        elif num_blocks < blocks.num_blocks:
            blocks.shrink(num_blocks)
        self._kv.num_blocks = max(self._kv.num_blocks, num_blocks)
        held = {block for hold in self.scheduler.holds for block in hold.blocks}
        places: dict[int, int] = {}
        for old in [block for block in blocks.blocks_to_vacate if block not in held][:blocks_per_turn]:
            new = blocks.relocate(old)
            if new is None:
                break
            kv_bytes.copy_block(self._kv, old, new)
            places[old] = new
        if places:
            self._follow(places)
        if blocks.blocks_to_vacate:
            return False
        self._kv.num_blocks = num_blocks
        return True

    def _follow(self, places: dict[int, int]) -> None:
        """Let the sequences name the blocks' new places. The old ones keep their bytes at least until all have: a kill
        in between leaves rows that end before the first moved block, at worst."""
        for sequence in self.scheduler.sequences():
            moved = [index for index, block in enumerate(sequence.blocks) if block in places]
            for index in moved:
                sequence.blocks[index] = places[sequence.blocks[index]]
            if not moved:
                continue
            sequence.relocations += 1
            first = moved[0]
            if first < sequence.logged:
                self._ledger.rewind(sequence.row, min(sequence.kv_len, first * self._block_size), first)
                self._ledger.append_blocks(sequence.row, sequence.blocks[first : sequence.logged])
                self._ledger.commit(sequence.row, sequence.kv_len, NO_TOKENS)

    # ---- to and from other ranks ----------------------------------------------------------------------------------

    @property
    def kv(self) -> KvCache:
        """The rank's KV blocks."""
        return self._kv

    @property
    def ledger(self) -> Ledger:
        """The rank's rows."""
        return self._ledger

    def adopt_in_place(self, sequences: list[Sequence]) -> None:
        """Go on with sequences of the seat's last rank, in their rows, with their blocks. Each row is written anew, so
        that it tells how often it was adopted; a kill in between costs its KV, not its stream."""
        self.scheduler.adopt_rows(sequences)
        for sequence in sequences:
            self._ledger.close_row(sequence.row)
            self._open_row(sequence)

    def adopt_without_kv(self, sequence: Sequence) -> None:
        """Let a sequence of the seat's last rank start over."""
        self._ledger.close_row(sequence.row)
        self.scheduler.adopt_waiting(sequence)

    def hand_over(self, sequence: Sequence, num_copied: int, now: float) -> HandOver:
        """All of a detached sequence, with the KV of its blocks from number `num_copied` on."""
        end = self.scheduler.blocks.blocks_for(sequence.kv_len)
        noted = self._prompt_logprobs.get(sequence.arrival) if sequence.kv_len else None
        return HandOver(
            request=msgspec.structs.replace(sequence.request, deadline_s=sequence.deadline - now),
            router=sequence.peer,
            output=tuple(sequence.tokens[sequence.num_prompt :]),
            num_sent=sequence.num_sent,
            kv_len=sequence.kv_len,
            num_copied=num_copied,
            tail=kv_bytes.read_blocks(self._kv, sequence.blocks[num_copied:end]),
            prompt_logprobs=None if noted is None else tuple(noted),
        )

    def adopt(self, hold: Hold, message: HandOver, now: float) -> None:
        """Go on with another rank's sequence in the place that `hold` keeps. Its KV up to block number
        `message.num_copied` is there already. Raises an ElasticMoEError; then nothing has changed."""
        sequence = Sequence(message.request, message.router, 0, now + message.request.deadline_s)
        sequence.tokens += message.output
        sequence.num_sent = message.num_sent
        sequence.kv_len = sequence.kv_len_max = max(message.kv_len, hold.num_cached * self._block_size)
        self._check_hand_over(hold, message, sequence)
        self.scheduler.adopt(hold, sequence)
        if sequence.kv_len == 0:
            return
        end = self.scheduler.blocks.blocks_for(message.kv_len)
        kv_bytes.write_blocks(self._kv, sequence.blocks[message.num_copied : end], message.tail)
        self._open_row(sequence)
        self.scheduler.register(sequence)
        if sequence.wants_prompt_logprobs:
            self._prompt_logprobs[sequence.arrival] = list(message.prompt_logprobs or ())

    def _check_hand_over(self, hold: Hold, message: HandOver, sequence: Sequence) -> None:
        """Raises Conflict for an id that is in use, InvalidRequest for figures that do not fit together."""
        request_id, size = message.request.request_id, self._block_size
        if self.scheduler.get(message.router, request_id) is not None:
            raise Conflict(f"request id {request_id} is in use", code="duplicate_request_id")
        self._check_blob(message.request, message.router)
        num_tail = max(0, self.scheduler.blocks.blocks_for(message.kv_len) - message.num_copied)
        num_noted = len(message.prompt_logprobs or ())
        for is_wrong, what in (
            (tuple(sequence.tokens[: len(hold.tokens)]) != hold.tokens, "tokens do not begin as was said"),
            (sequence.num_output >= message.request.max_tokens, f"{sequence.num_output} output tokens"),
            (sequence.num_sent > sequence.num_output, f"{sequence.num_sent} tokens sent"),
            (len(sequence.tokens) >= self.scheduler.capacity_tokens, f"{len(sequence.tokens)} tokens"),
            (sequence.kv_len >= len(sequence.tokens), f"KV of {sequence.kv_len} tokens"),
            (sequence.kv_len > 0 and hold.row < 0, "KV without a row"),
            (not hold.num_cached <= message.num_copied <= len(hold.blocks), f"{message.num_copied} blocks copied"),
            (message.num_copied * size > sequence.kv_len, f"{message.num_copied} blocks copied"),
            (len(message.tail) != num_tail * self._kv.geometry.block_bytes, f"a tail of {len(message.tail)} bytes"),
            (
                sequence.wants_prompt_logprobs and num_noted != sequence.kv_len,
                f"log probabilities of {num_noted} prompt tokens",
            ),
        ):
            if is_wrong:
                raise InvalidRequest(f"sequence {request_id} cannot be taken over: {what}", code="bad_hand_over")

    def check_integrity(self) -> list[str]:
        """Findings, empty when all is well."""
        findings = self.scheduler.check_integrity()
        rows = sorted(sequence.row for sequence in self.scheduler.sequences() if sequence.row >= 0)
        if rows != self._ledger.rows():
            findings.append(f"ledger rows {self._ledger.rows()} are live, sequences hold {rows}")
        return findings
