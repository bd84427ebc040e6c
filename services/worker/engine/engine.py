"""One rank's engine: plan a step, compute it, make it durable, tell what came of it.

Order of a step, which a kill at any instruction must not break: its rows are marked, KV is written (model), then the
ledger is committed, then tokens are reported, then the marks go. A step that is repeated writes the same KV again and
chooses the same tokens; up to the commit it may be repeated by this process, after that only by the seat's next one.

What fails in one sequence's own part of a step ends that sequence alone. Whose fault another failure is: trial.py.
"""

from __future__ import annotations

import msgspec
import torch

from elasticmoe.common.protocol.errors import (
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    ElasticMoEError,
    InvalidRequest,
)
from elasticmoe.common.protocol.limits import PROMPT_LOGPROBS_BYTES_MAX
from elasticmoe.common.protocol.rank import HandOver, Submit
from elasticmoe.common.protocol.router import Delta, Failed, Logprob, logprob_bytes
from elasticmoe.common.seat_sizes import MOVES_MAX
from elasticmoe.native.ledger import Ledger
from elasticmoe.services.worker.engine import kv_bytes
from elasticmoe.services.worker.engine.blocks import BlockManager
from elasticmoe.services.worker.engine.failure import failure_of, plan_error
from elasticmoe.services.worker.engine.hand_over import check_hand_over
from elasticmoe.services.worker.engine.kv_room import KvRoom
from elasticmoe.services.worker.engine.outcome import Choice, Outcome, StepCost
from elasticmoe.services.worker.engine.plan import Chunk, PlanFailed, StepPlan
from elasticmoe.services.worker.engine.planning import Planning
from elasticmoe.services.worker.engine.rows import entry_bytes_max
from elasticmoe.services.worker.engine.sampler import SamplingState, prompt_logprobs, sample
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.engine.sequence import BlockHold, Sequence
from elasticmoe.services.worker.engine.trials import Trials
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.exchange.board import ReplicaBoard, ReplicaPlan
from elasticmoe.services.worker.grammar.grammars import Grammars
from elasticmoe.services.worker.model.batch import Batch, BatchPart
from elasticmoe.services.worker.model.registry import Model
from elasticmoe.services.worker.model.weights import KvCache

NO_TOKENS: tuple[int, ...] = ()


class Engine:
    """Owns the sequences, blocks and ledger rows of one rank. Only the rank's loop thread calls it. `kv`: where its
    blocks are; `ledger`: its rows; `board`: leads to the other ranks of its replica, where there are any: they compute
    what this one plans."""

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
        board: ReplicaBoard | None = None,
    ) -> None:
        self._model = model
        self._exchange = exchange
        self.kv = kv
        self.ledger = ledger
        self._block_size = kv.geometry.block_size
        self._prompt_logprobs: dict[int, list[Logprob]] = {}  # by arrival, until the first token is reported
        self._board = board
        num_blocks = kv.num_blocks if board is None else min(kv.num_blocks, board.blocks_of_followers)
        self.scheduler = Scheduler(
            BlockManager(num_blocks, kv.geometry.block_size),
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            max_waiting=4 * max_sequences,
        )
        self._planning = Planning(self.scheduler, ledger)
        self._room = KvRoom(self.scheduler, ledger, kv, board)
        self.trials = Trials(self.scheduler, ledger)
        self.grammars = Grammars()
        self.cost = StepCost(0, 0, 0)

    # ---- requests -------------------------------------------------------------------------------------------------

    def add(self, request: Submit, peer: bytes, now: float) -> None:
        """Accept a request, or raise an ElasticMoEError; then nothing stays of it."""
        self._check_size(request, peer)
        self.scheduler.add(request, peer, now)

    def _check_size(self, request: Submit, peer: bytes) -> None:
        """Whether its row and its longest message have room for it. Raises InvalidRequest."""
        nbytes = len(request.prompt) * logprob_bytes(request.sampling.logprobs) if request.prompt_logprobs else 0
        for what, size, limit in (
            ("request parameters", entry_bytes_max(request, peer), self.ledger.blob_bytes),
            ("log probabilities of the prompt", nbytes, PROMPT_LOGPROBS_BYTES_MAX),
        ):
            if size > limit:
                text = f"{what} of {size} bytes exceed the limit of {limit}"
                raise InvalidRequest(text, code="parameters_too_large")

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
        self.grammars.forget(sequence)
        row = self.scheduler.remove(sequence)
        if row >= 0:
            self.ledger.close_row(row)

    def prepare_grammars(self) -> list[tuple[bytes, Failed]]:
        """Let those run whose grammar is ready by now. Returns those that end of theirs."""
        scheduler = self.scheduler
        prepared = self.grammars.prepare([s for s in scheduler.unready if s not in scheduler.detached])
        for sequence in prepared.ready:
            scheduler.unready.remove(sequence)
        return [self.fail(sequence, error) for sequence, error in prepared.failed]

    # ---- steps ----------------------------------------------------------------------------------------------------

    def plan(self, *, decode_only: bool = False, num_clean: int = 0) -> StepPlan:
        """See Planning. Raises PlanFailed, after which `settle_plan` is due, and MemoryError."""
        if self._board is None:
            return self._planning.plan(decode_only=decode_only, num_clean=num_clean)
        self._room.adapt()
        plan = self._planning.plan(decode_only=decode_only, num_clean=num_clean)
        return plan if plan.is_alone else plan._replace(moves=self._room.plan_moves())

    def announce(self, plan: StepPlan) -> StepPlan:
        """Let the other ranks of the replica, where there are any, know of the plan, before this rank says that it has
        come to the step. Returns what `compute` is to be called with. What it raises has changed nothing."""
        if self._board is None:
            return plan
        batch = self._batch(plan)
        self._board.write(ReplicaPlan(plan.moves, batch))
        return plan._replace(batch=batch)

    def settle_plan(self, failed: PlanFailed) -> list[tuple[bytes, Failed]]:
        """Live on after a plan that failed: who it failed of ends. Raises what it failed of where the books do not add
        up afterwards."""
        self._planning.settle(failed.subject)
        ended = [self.fail(failed.subject, plan_error())] if failed.subject is not None else []
        if self.check_integrity():
            raise failed
        return ended

    def compute(self, plan: StepPlan, total_tokens: int, deadline_ms: float) -> list[Choice]:
        """Run the step that all ranks have agreed on: what came of each chunk. `total_tokens`: of all ranks together.

        Raises StepAborted or StepTimedOut, or what went wrong; then nothing has changed but KV behind the committed
        position, and the work may be planned again.
        """
        self._exchange.begin_step(total_tokens, deadline_ms)
        for old, new in plan.moves:
            kv_bytes.copy_block(self.kv, old, new)
        batch = plan.batch if plan.batch is not None else self._batch(plan)
        logits = self._model.forward(batch, self._exchange)
        times = self._model.times
        self.cost = StepCost.of(times)
        self.scheduler.budget.note(plan.num_prompt, plan.num_tokens, total_tokens, times.total_ns / 1e9)
        return self._choose(plan.chunks, logits)

    def _batch(self, plan: StepPlan) -> Batch:
        places = dict(plan.moves)
        return Batch([self._part(chunk, places) for chunk in plan.chunks], self._block_size)

    def _part(self, chunk: Chunk, places: dict[int, int]) -> BatchPart:
        sequence, start, count, is_last = chunk
        if sequence.wants_prompt_logprobs:
            num_logits = count
        else:
            num_logits = 1 if is_last else 0
        tokens = sequence.tokens
        ids = tokens[start:] if start + count == len(tokens) else tokens[start : start + count]
        blocks = [places.get(block, block) for block in sequence.blocks] if places else sequence.blocks
        return BatchPart(ids, start, blocks, num_logits)

    def _choose(self, chunks: list[Chunk], logits: torch.Tensor) -> list[Choice]:
        choices = [Choice() for _ in chunks]
        rows: list[int] = []
        sampling: list[int] = []  # indices of chunks
        at = 0
        for index, chunk in enumerate(chunks):
            if chunk.sequence.wants_prompt_logprobs:
                choices[index] = self._note_prompt(chunk, logits[at : at + chunk.num_tokens])
                at += chunk.num_tokens
            elif chunk.sample:
                at += 1
            if chunk.sample and choices[index].error is None:
                rows.append(at - 1)
                sampling.append(index)
        if self.scheduler.guided:
            before = self.grammars.choices_before([chunks[index].sequence for index in sampling])
            for index, choice in zip(list(sampling), before, strict=True):
                choices[index] = choice
                if not choice.counts:
                    del rows[sampling.index(index)]
                    sampling.remove(index)
        if not rows:
            return choices
        if len(rows) < logits.shape[0]:
            logits = logits[rows]
        sequences = [chunks[index].sequence for index in sampling]
        states = [SamplingState(s.request, s.tokens, s.allowed) for s in sequences]
        sampled = sample(self._model.backend, logits, states)
        for row, index in enumerate(sampling):
            error = sampled.errors.get(row)
            choices[index] = Choice(error=error) if error else Choice(sampled.tokens[row], sampled.logprobs[row])
        return choices

    def commit(self, plan: StepPlan, choices: list[Choice]) -> Outcome:
        """Make what `compute` returned count: in memory, in the ledger, and in what is to be told. Whatever this raises
        can only be mended by the seat's next rank."""
        if plan.moves:
            self._room.settle_moves()
        done = [(chunk, choice) for chunk, choice in zip(plan.chunks, choices, strict=True) if choice.counts]
        chunks = [chunk for chunk, _ in done]
        self.scheduler.commit(chunks, [choice.token for _, choice in done if choice.token is not None])
        self._commit_ledger(chunks)
        outcome = Outcome({}, [])
        for chunk, choice in zip(plan.chunks, choices, strict=True):
            error = choice.error
            if choice.is_late:
                self.scheduler.unready.append(chunk.sequence)
            elif chunk.sample and error is None:
                try:
                    self._report(chunk.sequence, choice, outcome)
                except Exception as problem:
                    error = failure_of(problem, "reporting the request's token", **chunk.sequence.request.names)
            if error is not None:
                outcome.failures.append(self.fail(chunk.sequence, error))
        if self.scheduler.guided:
            self.grammars.advance([c.sequence for c in chunks if c.sample and c.sequence.row >= 0])
        return outcome

    def _note_prompt(self, chunk: Chunk, logits: torch.Tensor) -> Choice:
        """Note the log probabilities of the prompt tokens that this chunk's rows predict. Nothing, or the error."""
        sequence = chunk.sequence
        ids = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, sequence.num_prompt)]
        noted = self._prompt_logprobs.setdefault(sequence.arrival, [])
        del noted[chunk.start :]  # a preempted sequence starts over, a step that was given up is repeated
        try:
            num_top = max(0, sequence.request.sampling.logprobs)
            noted += prompt_logprobs(self._model.backend, logits[: len(ids)], ids, num_top)
        except Exception as error:
            return Choice(error=failure_of(error, "judging the prompt's tokens", **sequence.request.names))
        return Choice()

    def _commit_ledger(self, chunks: list[Chunk]) -> None:
        sampled = [chunk.sequence for chunk in chunks if chunk.sample]
        commits = [(sequence.row, sequence.kv_len, sequence.tokens[-1]) for sequence in sampled]
        if commits:
            self.ledger.commit_many(commits)
        for chunk in chunks:
            if not chunk.sample:
                self.ledger.commit(chunk.sequence.row, chunk.sequence.kv_len, NO_TOKENS)

    def _report(self, sequence: Sequence, choice: Choice, outcome: Outcome) -> None:
        finish = "stop" if choice.is_over else sequence.finish_reason(self.scheduler.capacity_tokens)
        token, logprob = sequence.tokens[-1], choice.logprob
        is_stop = finish == "stop"
        delta = Delta(
            sequence.request.request_id,
            sequence.num_sent,
            NO_TOKENS if is_stop else (token,),
            finish,
            token if is_stop and not choice.is_over else None,
            None if logprob is None or is_stop else (logprob,),
            tuple(self._prompt_logprobs.pop(sequence.arrival)) if sequence.arrival in self._prompt_logprobs else None,
        )
        sequence.num_sent += len(delta.ids)
        outcome.deltas.setdefault(sequence.peer, []).append(delta)
        if finish is not None:
            self.forget(sequence)

    # ---- another number of KV blocks ------------------------------------------------------------------------------

    def resize_kv(self, num_blocks: int, blocks_per_turn: int = MOVES_MAX) -> bool:
        """See KvRoom.resize."""
        return self._room.resize(num_blocks, blocks_per_turn)

    # ---- to and from other ranks ----------------------------------------------------------------------------------

    @property
    def has_followers(self) -> bool:
        """Whether other ranks have parts of this replica's KV, which this one can neither read nor write."""
        return self._board is not None

    def adopt_in_place(self, sequences: list[Sequence]) -> None:
        """Go on with sequences of the seat's last rank, in their rows, with their blocks."""
        self.scheduler.adopt_rows(sequences)
        for sequence in sequences:  # blocks that were for a longer step go
            self.ledger.rewind(sequence.row, sequence.kv_len, len(sequence.blocks))
            sequence.logged = len(sequence.blocks)
        self.trials.note(sequences)

    def adopt_without_kv(self, sequence: Sequence) -> None:
        """Let a sequence of the seat's last rank start over."""
        self.ledger.close_row(sequence.row)
        self.scheduler.adopt_waiting(sequence)

    def hand_over(self, sequence: Sequence, num_copied: int, now: float) -> HandOver:
        """All of a detached sequence, with the KV of its blocks from number `num_copied` on."""
        end = self.scheduler.blocks.blocks_for(sequence.kv_len)
        noted = self._prompt_logprobs.get(sequence.arrival) if sequence.kv_len else None
        return HandOver(
            request=msgspec.structs.replace(
                sequence.request,
                deadline_s=sequence.deadline - now,
                suspicion=sequence.trial.suspicion,
            ),
            router=sequence.peer,
            output=tuple(sequence.tokens[sequence.num_prompt :]),
            num_sent=sequence.num_sent,
            kv_len=sequence.kv_len,
            num_copied=num_copied,
            tail=kv_bytes.read_blocks(self.kv, sequence.blocks[num_copied:end]),
            prompt_logprobs=None if noted is None else tuple(noted),
        )

    def adopt(self, hold: BlockHold, message: HandOver, now: float) -> None:
        """Go on with another rank's sequence in the place that `hold` keeps. Its KV up to block number
        `message.num_copied` is there already. Raises an ElasticMoEError; then nothing has changed."""
        sequence = Sequence(message.request, message.router, 0, now + message.request.deadline_s)
        sequence.tokens += message.output
        sequence.num_sent = message.num_sent
        sequence.kv_len = sequence.kv_len_max = max(message.kv_len, hold.num_cached * self._block_size)
        request_id = message.request.request_id
        if self.scheduler.get(message.router, request_id) is not None:
            raise Conflict(f"request id {request_id} is in use", code="duplicate_request_id")
        self._check_size(message.request, message.router)
        check_hand_over(self.scheduler, self.kv.geometry, hold, message, sequence, has_followers=self.has_followers)
        self.scheduler.adopt(hold, sequence)
        if sequence.kv_len == 0:
            return
        end = self.scheduler.blocks.blocks_for(message.kv_len)
        kv_bytes.write_blocks(self.kv, sequence.blocks[message.num_copied : end], message.tail)
        self._planning.open_row(sequence)
        self.scheduler.register(sequence)
        if sequence.wants_prompt_logprobs:
            self._prompt_logprobs[sequence.arrival] = list(message.prompt_logprobs or ())

    def check_integrity(self) -> list[str]:
        """Findings, empty when all is well."""
        findings = self.scheduler.check_integrity(self._room.places)
        rows = sorted(sequence.row for sequence in self.scheduler.sequences() if sequence.row >= 0)
        if rows != self.ledger.rows():
            findings.append(f"ledger rows {self.ledger.rows()} are live, sequences hold {rows}")
        return findings
