"""One step's work, as the scheduler chooses it."""

from __future__ import annotations

from typing import NamedTuple

from elasticmoe.services.worker.engine.sequence import Sequence
from elasticmoe.services.worker.exchange.board import Moves
from elasticmoe.services.worker.model.batch import Batch


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of `sequence` are computed; `sample`: its next token is then chosen."""

    sequence: Sequence
    start: int
    num_tokens: int
    sample: bool


class StepPlan(NamedTuple):
    """One step. `admitted` run from now on, each in a row of its own; `freed_rows` belonged to sequences that lost
    their blocks and wait again. Admissions and preemptions stand even if the step is given up. `is_decode_only`:
    prompts were left out, if there were any; `puts_off`: there were; `is_cut`: they have less than a step may have.
    `is_alone`: of one suspect, to be computed only if no rank brings anything else; without any chunks where it is
    another rank's.
    `leaves_suspects`: some were left out, so that the step must be computed even if nobody has work for it. `moves`: of
    KV blocks, likewise; only where a replica has several ranks. `batch`: what is computed, where other ranks have been
    told of it."""

    chunks: list[Chunk]
    admitted: list[Sequence]
    freed_rows: list[int]
    is_decode_only: bool = False
    is_alone: bool = False
    leaves_suspects: bool = False
    is_cut: bool = False
    puts_off: bool = False
    moves: Moves = ()
    batch: Batch | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank computes."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_prompt(self) -> int:
        """Of these, tokens of prompts: all of chunks that are longer than one."""
        return sum(chunk.num_tokens for chunk in self.chunks if chunk.num_tokens > 1)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out that could have been computed."""
        return not (self.is_decode_only or self.is_cut or self.is_alone or self.leaves_suspects)

    @property
    def num_said(self) -> int:
        """Tokens that this rank says it brings: more than none where the step must be computed."""
        return max(self.num_tokens, int(self.leaves_suspects or bool(self.moves)))


class PlanFailed(Exception):
    """A plan failed while it looked at `subject`; None: at nobody's part. Its cause is what was raised."""

    def __init__(self, subject: Sequence | None) -> None:
        super().__init__("a plan failed")
        self.subject = subject


class Draft:
    """A plan in the making. `budget`: tokens that may still be added; `subject`: whose part is looked at."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: list[Chunk] = []
        self.admitted: list[Sequence] = []
        self.freed_rows: list[int] = []
        self.subject: Sequence | None = None

    def add(self, sequence: Sequence, count: int) -> None:
        """Its next `count` tokens are computed."""
        self.budget -= count
        end = sequence.kv_len + count
        self.chunks.append(Chunk(sequence, sequence.kv_len, count, end == len(sequence.tokens)))

    def finish(
        self,
        *,
        is_decode_only: bool = False,
        is_alone: bool = False,
        leaves_suspects: bool = False,
        is_cut: bool = False,
        puts_off: bool = False,
    ) -> StepPlan:
        """The plan."""
        flags = (is_decode_only, is_alone, leaves_suspects, is_cut, puts_off)
        return StepPlan(self.chunks, self.admitted, self.freed_rows, *flags)
