"""What to compute in the next step. Pure: no tensors, no clock, no sockets.

Continuous batching with chunked prefill: running sequences decode one token each; what is left of the step's token
budget (budget.py) goes to prompts, oldest first, in chunks. A plan changes nothing but block ownership, so a step that
is given up (its exchange was aborted) is simply planned again; `commit` makes it count.

Sequences whose grammar is not ready are left out of steps, and so are suspects (trial.py).

Invariant: running sequences hold blocks for `kv_len` plus what is planned; waiting ones hold nothing. Detached ones, on
their way to another rank, keep what they had and are not planned; a hold keeps a place for one that comes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Seq

from elasticmoe.common.protocol.errors import ContextLengthExceeded, DoesNotFit, InvalidRequest, Overloaded
from elasticmoe.common.protocol.rank import Submit
from elasticmoe.common.wording import counted
from elasticmoe.services.worker.engine.blocks import BlockManager
from elasticmoe.services.worker.engine.budget import StepBudget
from elasticmoe.services.worker.engine.plan import Chunk, Draft, PlanFailed, StepPlan
from elasticmoe.services.worker.engine.sequence import BlockHold, RequestKey, Sequence
from elasticmoe.services.worker.engine.trial import INNOCENT, Trial


class Scheduler:
    """Owns the sequences of one rank and their blocks."""

    def __init__(
        self, blocks: BlockManager, *, max_tokens: int, max_sequences: int, max_model_len: int, max_waiting: int
    ) -> None:
        self.blocks = blocks
        self.max_tokens = max_tokens
        self.budget = StepBudget(max_tokens)
        self.max_sequences = max_sequences
        self.max_model_len = max_model_len
        self.max_waiting = max_waiting
        self.running: list[Sequence] = []  # in order
        self.waiting: list[Sequence] = []  # in order
        self.detached: list[Sequence] = []
        self.holds: list[BlockHold] = []
        self.struck: list[Sequence] = []  # in steps that failed since their last one that was completed
        self.guided: list[Sequence] = []  # with a grammar
        self.unready: list[Sequence] = []  # of these, those that what may follow is not known of
        self._by_id: dict[RequestKey, Sequence] = {}
        self.recomputed = 0  # tokens whose KV was written before and lost
        self.tokens_uncached = 0  # of those that began to run, tokens to be computed
        self.tokens_cached = 0  # and ones whose KV was found in the prefix cache
        self._arrivals = 0
        self._adoptions = 0
        self._free_rows = list(range(max_sequences - 1, -1, -1))

    def add(self, request: Submit, peer: bytes, now: float) -> Sequence:
        """Accept a request. Raises InvalidRequest for one that can never run here, Overloaded for a full queue."""
        if (peer, request.request_id) in self._by_id:
            raise InvalidRequest(f"request id {request.request_id} is in use", code="duplicate_request_id")
        length = len(request.prompt) + len(request.output) + 1
        capacity = self.capacity_tokens
        if length > capacity:
            raise ContextLengthExceeded(capacity, length - 1)
        if len(self.waiting) >= self.max_waiting:
            raise self._full(len(self.waiting))
        sequence = Sequence(request, peer, 0, now + request.deadline_s)
        self._enter(sequence, self.waiting)
        return sequence

    def _full(self, num_waiting: int) -> Overloaded:
        waiting = f"{counted(num_waiting, 'request')} {'waits' if num_waiting == 1 else 'wait'}"
        return Overloaded(f"{waiting}; the limit is {self.max_waiting}", code="queue_full")

    def has_room(self, request: Submit) -> bool:
        """Whether a request with output so far may have another token here."""
        num_tokens = len(request.prompt) + len(request.output)
        return num_tokens < self.capacity_tokens and len(request.output) < request.max_tokens

    def get(self, peer: bytes, request_id: str) -> Sequence | None:
        """A live sequence by its owner and id."""
        return self._by_id.get((peer, request_id))

    def remove(self, sequence: Sequence) -> int:
        """Forget a sequence, finished or not, and release its blocks. Returns the row it had, or -1."""
        del self._by_id[sequence.peer, sequence.request.request_id]
        for listed in (self.struck, self.guided, self.unready):
            if listed and sequence in listed:
                listed.remove(sequence)
        if sequence.row < 0:
            (self.detached if sequence in self.detached else self.waiting).remove(sequence)
            return -1
        return self._stop(sequence)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed. Of a detached one the other rank decides."""
        return [s for s in self._by_id.values() if s.deadline <= now and s not in self.detached]

    def sequences(self) -> list[Sequence]:
        """All live sequences, detached ones too."""
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

    def plan(self, *, decode_only: bool = False, num_clean: int = 0) -> StepPlan:
        """Choose the next step's work and allocate its blocks. `decode_only`: prompts wait for the next step.
        `num_clean`: see Trial.may_be_alone; if there are suspects, this is one's own step, or they are left out. Raises
        PlanFailed, and MemoryError."""
        draft = Draft(self.max_tokens)
        try:
            return self._plan(draft, decode_only=decode_only, num_clean=num_clean)
        except MemoryError:
            raise
        except Exception as error:
            raise PlanFailed(draft.subject) from error

    def _plan(self, draft: Draft, *, decode_only: bool, num_clean: int) -> StepPlan:
        suspects = [s for s in self.struck if s.is_suspect and s not in self.detached] if self.struck else []
        if self.unready:
            suspects = [s for s in suspects if s not in self.unready]
        if not decode_only:
            # Who is about to be found guilty or innocent comes first.
            for suspect in sorted(suspects, key=lambda s: (-s.trial.failures_alone, s.order)):
                draft.subject = suspect
                if suspect.trial.may_be_alone(num_clean):
                    self._draft_alone(draft, suspect)
                if draft.chunks:
                    return draft.finish(is_alone=True)
        left_out = suspects + self.unready if self.unready else suspects
        waiting = self.waiting if self._free_rows or not decode_only else ()  # a step puts off who could come in it
        puts_off = self.budget.note_prompts(self.running, waiting, left_out, are_left_out=decode_only)
        if not (decode_only or self.budget.is_fixed):
            draft.budget = min(draft.budget, self._tokens_of_step(left_out))
        self._draft_running(draft, left_out, decode_only=decode_only)
        if not decode_only:
            self._draft_waiting(draft, left_out)
        draft.subject = None
        is_cut, leaves_suspects = self.budget.divides, bool(suspects)
        return draft.finish(
            is_decode_only=decode_only, leaves_suspects=leaves_suspects, is_cut=is_cut, puts_off=puts_off
        )

    def _tokens_of_step(self, left_out: list[Sequence]) -> int:
        missing = [len(s.tokens) - s.kv_len for s in self.running if not (left_out and s in left_out)]
        prompts: list[float] = [count for count in missing if count > 1]
        num_decoding = len(missing) - len(prompts)
        known = self.tokens_uncached + self.tokens_cached
        fresh = self.tokens_uncached / known if known else 1.0  # of who begins, so much is not in the prefix cache
        prompts += [len(s.tokens) * fresh for s in self.waiting if not (left_out and s in left_out)]
        return self.budget.tokens(prompts, num_decoding)

    def _draft_running(self, draft: Draft, left_out: list[Sequence], *, decode_only: bool) -> None:
        index = 0
        while index < len(self.running) and draft.budget > 0:
            sequence = draft.subject = self.running[index]
            missing = len(sequence.tokens) - sequence.kv_len
            if (decode_only and missing > 1) or (left_out and sequence in left_out):
                index += 1
                continue
            # A prompt leaves one token for each sequence behind it, so that a long one stops nobody's decoding.
            room = max(1, draft.budget - (len(self.running) - index - 1))
            if self._draft_one(draft, sequence, min(missing, room)):
                index += 1

    def _draft_one(self, draft: Draft, sequence: Sequence, count: int) -> bool:
        """Plan tokens of a running sequence, if need be in the blocks of the last ones. False when it was the last."""
        while not self._grow(sequence, sequence.kv_len + count):
            victim = self.running[-1]
            draft.freed_rows.append(self._stop(victim))
            insort(self.waiting, victim, key=lambda s: s.order)
            if victim is sequence:
                return False
        draft.add(sequence, count)
        return True

    def _draft_waiting(self, draft: Draft, left_out: list[Sequence]) -> None:
        index = 0
        while index < len(self.waiting) and draft.budget > 0 and self._free_rows and not draft.freed_rows:
            sequence = draft.subject = self.waiting[index]
            if left_out and sequence in left_out:
                index += 1
                continue
            if not self._admit(sequence, draft.budget):
                return
            draft.admitted.append(sequence)
            draft.add(sequence, min(len(sequence.tokens) - sequence.kv_len, draft.budget))

    def _draft_alone(self, draft: Draft, suspect: Sequence) -> None:
        """Plan the suspect's next tokens, where there is room for them."""
        if suspect.row < 0:
            if not self._free_rows or draft.freed_rows or not self._admit(suspect, draft.budget):
                return
            draft.admitted.append(suspect)
        self._draft_one(draft, suspect, min(len(suspect.tokens) - suspect.kv_len, draft.budget))

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
        reserve = self._blocks_in_hand
        missing = self.blocks.blocks_for(sequence.kv_len + count) - len(matched)
        if not self.blocks.can_allocate(missing + reserve):
            self.blocks.release(matched)
            sequence.blocks, sequence.kv_len, sequence.cached = [], 0, 0
            return False
        sequence.blocks += self.blocks.allocate(missing)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.order)
        sequence.row = self._free_rows.pop()
        if not sequence.stops:  # one that lost its blocks is no new demand
            self.tokens_uncached += len(sequence.tokens) - sequence.kv_len
            self.tokens_cached += sequence.kv_len
        return True

    @property
    def _blocks_in_hand(self) -> int:
        return len(self.running) + sum(1 for hold in self.holds if hold.row >= 0)

    def _stop(self, sequence: Sequence) -> int:
        row = sequence.row
        (self.detached if sequence in self.detached else self.running).remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.kv_len, sequence.cached, sequence.logged, sequence.row = [], 0, 0, 0, -1
        sequence.stops += 1
        self._free_rows.append(row)
        return row

    def commit(self, chunks: list[Chunk], tokens: list[int]) -> None:
        """The step was computed: KV counts, and `tokens[i]` extends the i-th chunk that sampled."""
        chosen = iter(tokens)
        for sequence, start, count, sample in chunks:
            sequence.kv_len = start + count
            self.recomputed += max(0, min(sequence.kv_len_max, sequence.kv_len) - start)
            sequence.kv_len_max = max(sequence.kv_len_max, sequence.kv_len)
            if sample:
                sequence.tokens.append(next(chosen))
            self.register(sequence)

    def note_trial(self, sequence: Sequence, trial: Trial) -> None:
        """Remember what is known of its steps that failed."""
        sequence.trial = trial
        if sequence in self.struck:
            self.struck.remove(sequence)
        if trial != INNOCENT:
            self.struck.append(sequence)

    # ---- to and from other ranks ----------------------------------------------------------------------------------

    def detach(self, sequence: Sequence) -> None:
        """Plan the sequence no more. It keeps its row and blocks until `restore` or `remove`."""
        (self.running if sequence.row >= 0 else self.waiting).remove(sequence)
        self.detached.append(sequence)

    def restore(self, sequence: Sequence) -> None:
        """Undo `detach`."""
        self.detached.remove(sequence)
        insort(self.running if sequence.row >= 0 else self.waiting, sequence, key=lambda s: s.order)

    def hold(self, tokens: tuple[int, ...], num_blocks: int) -> BlockHold:
        """Keep a place for a sequence that begins with `tokens`; with KV where `num_blocks` > 0: a row and blocks, the
        first of them from the prefix cache. Raises Overloaded and DoesNotFit; then nothing is kept."""
        hold = BlockHold(tokens)
        if num_blocks:
            hold.blocks = self.blocks.match(tokens)
            hold.num_cached = len(hold.blocks)
        try:
            self.extend(hold, num_blocks)
        except (Overloaded, DoesNotFit):
            self.blocks.release(hold.blocks)
            raise
        self.holds.append(hold)
        return hold

    def extend(self, hold: BlockHold, num_blocks: int) -> None:
        """Let a hold have `num_blocks` blocks, if it has fewer. Raises as `hold`; then it is as it was."""
        if max(len(hold.tokens) + 1, (num_blocks - 1) * self.blocks.block_size) > self.capacity_tokens:
            raise DoesNotFit(
                f"{len(hold.tokens)} tokens in {num_blocks} blocks leave no room in a context of {self.capacity_tokens}"
            )
        if num_blocks == 0:
            num_waiting = len(self.waiting) + sum(1 for other in self.holds if other.row < 0)
            if num_waiting >= self.max_waiting:
                raise self._full(num_waiting)
            return
        if hold.row < 0 and not self._free_rows:
            raise Overloaded(f"all {self.max_sequences} rows are in use", code="rows_exhausted")
        missing = max(0, num_blocks - len(hold.blocks))
        if not self.blocks.can_allocate(missing + self._blocks_in_hand):
            raise Overloaded(
                f"{missing} KV blocks wanted, {self.blocks.num_free} of {self.blocks.num_blocks} free, "
                f"{self._blocks_in_hand} of them in hand",
                code="kv_exhausted",
            )
        hold.blocks += self.blocks.allocate(missing)
        if hold.row < 0:
            hold.row = self._free_rows.pop()

    def release_hold(self, hold: BlockHold) -> None:
        """Undo `hold`."""
        self.holds.remove(hold)
        self.blocks.release(hold.blocks)
        if hold.row >= 0:
            self._free_rows.append(hold.row)

    def adopt(self, hold: BlockHold, sequence: Sequence) -> None:
        """Let `sequence`, whose `tokens` and `kv_len` are set, take the place of `hold`, which ends.

        With KV it runs, before those that were here first: it has been served already. Else it waits. Raises Overloaded
        when it has grown beyond what was held and no blocks are free; then nothing has changed.
        """
        blocks = self.blocks
        if sequence.kv_len == 0:
            self.release_hold(hold)
            self._arrivals += 1
            sequence.arrival = self._arrivals
            insort(self.waiting, sequence, key=lambda s: s.order)
        else:
            missing = blocks.blocks_for(sequence.kv_len) - len(hold.blocks)
            sequence.blocks = hold.blocks + (blocks.allocate(missing) if missing > 0 else [])
            useful = blocks.blocks_for(len(sequence.tokens))
            blocks.release(sequence.blocks[useful:])
            del sequence.blocks[useful:]
            self.holds.remove(hold)
            sequence.row = hold.row
            sequence.cached = hold.num_cached
            self._adoptions -= 1
            sequence.arrival = self._adoptions
            insort(self.running, sequence, key=lambda s: s.order)
        self._note_new(sequence)

    def adopt_rows(self, sequences: list[Sequence]) -> None:
        """Let sequences of this seat's last rank, oldest first, run in the rows and blocks that they have. Only before
        anything else was added."""
        self.blocks.claim([sequence.blocks for sequence in sequences])
        rows = {sequence.row for sequence in sequences}
        self._free_rows = [row for row in self._free_rows if row not in rows]
        for sequence in sequences:
            self._enter(sequence, self.running)
            self.register(sequence)

    def adopt_waiting(self, sequence: Sequence) -> None:
        """Let a sequence of this seat's last rank start over, without row and blocks."""
        sequence.blocks, sequence.kv_len, sequence.row = [], 0, -1
        self._enter(sequence, self.waiting)

    def _enter(self, sequence: Sequence, queue: list[Sequence]) -> None:
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._note_new(sequence)
        insort(queue, sequence, key=lambda s: s.order)

    def _note_new(self, sequence: Sequence) -> None:
        self._by_id[sequence.peer, sequence.request.request_id] = sequence
        self.note_trial(sequence, sequence.trial)
        if sequence.request.sampling.grammar is not None:
            self.guided.append(sequence)
            self.unready.append(sequence)

    def register(self, sequence: Sequence) -> None:
        """Enter its full blocks in the prefix cache."""
        full = sequence.kv_len // self.blocks.block_size
        if full > sequence.cached:
            sequence.cached = self.blocks.register(sequence.blocks, sequence.tokens, sequence.cached, full)

    def check_integrity(self, places: Seq[int] = ()) -> list[str]:
        """Findings, empty when all is well. `places`: blocks that were allocated for ones that are to move."""
        tables = [s.blocks for s in self._by_id.values()] + [hold.blocks for hold in self.holds] + [places]
        findings = self.blocks.check_integrity(tables)
        listed = [*self.running, *self.waiting, *self.detached]
        if len(listed) != len(self._by_id):
            findings.append(
                f"{len(self.running)} running, {len(self.waiting)} waiting and {len(self.detached)} detached "
                f"of {len(self._by_id)} known"
            )
        for s in listed:
            if len(s.blocks) < self.blocks.blocks_for(s.kv_len):
                findings.append(f"{s.request.request_id}: {len(s.blocks)} blocks for {s.kv_len} tokens")
        rows = [s.row for s in listed if s.row >= 0] + [hold.row for hold in self.holds if hold.row >= 0]
        if sorted(rows + self._free_rows) != list(range(self.max_sequences)):
            findings.append(f"rows {sorted(rows)} are used and {sorted(self._free_rows)} free of {self.max_sequences}")
        return findings
