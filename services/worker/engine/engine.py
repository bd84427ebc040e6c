"""One rank's engine: plan a step, compute it, make it durable, tell what came of it.

Order of a step, which a kill at any instruction must not break: KV is written (model), then the ledger is committed,
then tokens are reported. A step that is repeated writes the same KV again and chooses the same tokens.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec
import torch

from common.protocol.errors import DeadlineExceeded, ElasticMoEError, InvalidRequest
from common.protocol.rank import Submit
from common.protocol.router import Delta, Failed, Logprob
from native.ledger import Ledger
from services.worker.engine.blocks import BlockManager
from services.worker.engine.sampler import SamplingState, prompt_logprobs, sample
from services.worker.engine.scheduler import Chunk, Plan, Scheduler
from services.worker.engine.sequence import Sequence
from services.worker.exchange.base import Exchange
from services.worker.model.batch import Batch, Part
from services.worker.model.registry import Model
from services.worker.model.weights import KvCache

NO_TOKENS: tuple[int, ...] = ()


class LedgerEntry(msgspec.Struct, frozen=True, array_like=True):
    """What a ledger row's blob holds: whom to answer, and the request without its prompt (the row has the tokens)."""

    peer: bytes
    request: Submit


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
        blob_bytes = len(_blob(request, peer))
        if blob_bytes > self._ledger.blob_bytes:
            raise InvalidRequest(
                f"request parameters of {blob_bytes} bytes exceed the limit of {self._ledger.blob_bytes}",
                code="parameters_too_large",
            )
        self.scheduler.add(request, peer, now)

    def cancel(self, peer: bytes, request_id: str) -> None:
        """Forget a request, if it is known."""
        sequence = self.scheduler.get(peer, request_id)
        if sequence is not None:
            self._remove(sequence)

    def cancel_peer(self, peer: bytes) -> None:
        """Forget all requests of a router that is gone."""
        for sequence in self.scheduler.sequences():
            if sequence.peer == peer:
                self._remove(sequence)

    def fail_all(self, error: ElasticMoEError) -> list[tuple[bytes, Failed]]:
        """End every request with `error`."""
        return [self._fail(sequence, error) for sequence in self.scheduler.sequences()]

    def expire(self, now: float) -> list[tuple[bytes, Failed]]:
        """End the requests whose deadline has passed."""
        failures = []
        for sequence in self.scheduler.expired(now):
            limit = sequence.request.deadline_s
            failures.append(self._fail(sequence, DeadlineExceeded(f"request exceeded its deadline of {limit:g} s")))
        return failures

    def _fail(self, sequence: Sequence, error: ElasticMoEError) -> tuple[bytes, Failed]:
        self._remove(sequence)
        return sequence.peer, Failed(sequence.request.request_id, error.code, error.message, error.retryable)

    def _remove(self, sequence: Sequence) -> None:
        self._prompt_logprobs.pop(sequence.arrival, None)
        row = self.scheduler.remove(sequence)
        if row >= 0:
            self._ledger.close_row(row)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Choose the next step's work, and write to the ledger which sequences run and which blocks are theirs."""
        plan = self.scheduler.plan()
        for row in plan.freed_rows:
            self._ledger.close_row(row)
        for sequence in plan.admitted:
            prompt = sequence.num_prompt
            blob = _blob(sequence.request, sequence.peer)
            self._ledger.open_row(sequence.row, blob, sequence.tokens[:prompt], sequence.blocks)
            self._ledger.commit(sequence.row, sequence.kv_len, sequence.tokens[prompt:])
            sequence.logged = len(sequence.blocks)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if len(sequence.blocks) > sequence.logged:
                self._ledger.append_blocks(sequence.row, sequence.blocks[sequence.logged :])
                sequence.logged = len(sequence.blocks)
        return plan

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
                outcome.failures.append(self._fail(chunk.sequence, error))
            else:
                self._report(chunk.sequence, sampled.logprobs[index], outcome)
            index += 1
        return outcome

    def _note_prompt(self, chunk: Chunk, logits: torch.Tensor) -> None:
        """Log probabilities of the prompt tokens that this chunk's rows predict."""
        sequence = chunk.sequence
        ids = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, sequence.num_prompt)]
        noted = self._prompt_logprobs.setdefault(sequence.arrival, [])
        if chunk.start == 0:
            noted.clear()  # a preempted sequence starts over
        if ids:
            noted += prompt_logprobs(logits[: len(ids)], ids, max(0, sequence.request.sampling.logprobs))

    def _commit_ledger(self, chunks: list[Chunk]) -> None:
        commits = [(c.sequence.row, c.sequence.kv_len, max(0, c.sequence.tokens[-1])) for c in chunks if c.sample]
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
            self._remove(sequence)

    def check_integrity(self) -> list[str]:
        """Findings, empty when all is well."""
        findings = self.scheduler.check_integrity()
        rows = sorted(sequence.row for sequence in self.scheduler.running)
        if rows != self._ledger.rows():
            findings.append(f"ledger rows {self._ledger.rows()} are live, sequences hold {rows}")
        return findings


def _blob(request: Submit, peer: bytes) -> bytes:
    return msgspec.msgpack.encode(LedgerEntry(peer, msgspec.structs.replace(request, prompt=request.prompt[:1])))
