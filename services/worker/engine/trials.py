"""The trials of one rank's sequences (trial.py), kept up to date step by step, in memory and in the ledger."""

from __future__ import annotations

from collections.abc import Iterable

from elasticmoe.common.protocol.errors import RequestFailed
from elasticmoe.native.ledger import Ledger
from elasticmoe.services.worker.engine.plan import StepPlan
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.engine.sequence import Sequence
from elasticmoe.services.worker.engine.trial import (
    COMPUTED,
    COMPUTED_ALONE,
    GUILTY_FAILURES,
    INNOCENT,
    LEFT_OUT,
    NOTHING,
)


class Trials:
    """Owned by the engine, to which scheduler and ledger belong. Between `begin` and the first of the other three
    whoever finds the rows knows that a step did not end, and which part they had in it."""

    def __init__(self, scheduler: Scheduler, ledger: Ledger) -> None:
        self._scheduler = scheduler
        self._ledger = ledger

    def begin(self, plan: StepPlan) -> None:
        """The step is about to be computed."""
        state = COMPUTED_ALONE if plan.is_alone else COMPUTED
        plain = []
        for sequence, start, count, is_last in plan.chunks:
            if is_last and not sequence.trial.failures:
                plain.append(sequence.row)
            else:
                self._ledger.mark_rows([sequence.row], sequence.trial.mark(state, start + count))
        self._ledger.mark_rows(plain, INNOCENT.mark(state))
        if self._scheduler.struck and not plan.is_alone:
            self.note(self._left_out(plan), LEFT_OUT)

    def end(self, plan: StepPlan) -> None:
        """What came of the step was told."""
        going = [sequence for sequence, *_ in plan.chunks if sequence.row >= 0]
        if self._scheduler.struck:
            for sequence in going:
                self._scheduler.note_trial(sequence, sequence.trial.computed(sequence.kv_len))
            self.note(self._scheduler.struck)
        self._ledger.mark_rows([s.row for s in going if not s.trial.failures], INNOCENT.mark())

    def fail(self, plan: StepPlan) -> list[Sequence]:
        """The step failed, with `plan` as this rank's part. Returns those that were found to be the cause."""
        computed = [chunk.sequence for chunk in plan.chunks]
        if not plan.is_alone:
            for sequence in self._left_out(plan):
                self._scheduler.note_trial(sequence, sequence.trial.voided())
        for sequence, start, count, _ in plan.chunks:
            self._scheduler.note_trial(sequence, sequence.trial.failed(start + count, is_alone=plan.is_alone))
        self.drop(plan)
        return [sequence for sequence in computed if sequence.trial.is_guilty]

    def drop(self, plan: StepPlan) -> None:
        """The step is given up for reasons that no request has."""
        self.note([chunk.sequence for chunk in plan.chunks])
        self.note(self._left_out(plan))

    def note(self, sequences: Iterable[Sequence], state: int = NOTHING) -> None:
        """Write to the ledger what is known of sequences, and their part in the step that has begun."""
        for sequence in sequences:
            if sequence.row >= 0:
                self._ledger.mark_rows([sequence.row], sequence.trial.mark(state))

    def _left_out(self, plan: StepPlan) -> list[Sequence]:
        """Those that failed steps are known of, and that are not in this one."""
        computed = {id(chunk.sequence) for chunk in plan.chunks}
        return [sequence for sequence in self._scheduler.struck if id(sequence) not in computed]


def guilty_error() -> RequestFailed:
    """The end of the request that makes steps fail."""
    return RequestFailed(
        f"the engine failed {GUILTY_FAILURES} times in a row while it computed this request alone; "
        "other requests are not affected"
    )
