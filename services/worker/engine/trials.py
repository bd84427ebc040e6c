"""The trials of one rank's sequences (trial.py), kept up to date step by step, in memory and in the ledger."""

from __future__ import annotations

from common.protocol.errors import RequestFailed
from native.ledger import Ledger
from services.worker.engine.plan import Plan
from services.worker.engine.scheduler import Scheduler
from services.worker.engine.sequence import Sequence
from services.worker.engine.trial import COMPUTED, COMPUTED_ALONE, GUILTY_FAILURES, INNOCENT, LEFT_OUT


class Trials:
    """Owned by the engine, to which scheduler and ledger belong. Between `begin` and the first of the other three
    whoever finds the rows knows that a step did not end, and which part they had in it."""

    def __init__(self, scheduler: Scheduler, ledger: Ledger) -> None:
        self._scheduler = scheduler
        self._ledger = ledger

    def begin(self, plan: Plan) -> None:
        """The step is about to be computed."""
        state = COMPUTED_ALONE if plan.is_alone else COMPUTED
        plain = INNOCENT.mark(state)
        marks = [
            (sequence.row, sequence.trial.mark(state) if sequence.trial.failures else plain)
            for sequence, *_ in plan.chunks
        ]
        if self._scheduler.struck and not plan.is_alone:
            marks += [(s.row, s.trial.mark(LEFT_OUT)) for s in self._left_out(plan) if s.row >= 0]
        self._ledger.mark_rows(marks)

    def end(self, plan: Plan) -> None:
        """What came of the step was told: all that were in it, and live, are above suspicion."""
        marks = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.row < 0:
                continue
            if sequence.trial != INNOCENT:
                self._scheduler.note_trial(sequence, INNOCENT)
            marks.append((sequence.row, INNOCENT.mark()))
        if self._scheduler.struck:
            marks += [(s.row, s.trial.mark()) for s in self._scheduler.struck if s.row >= 0]
        self._ledger.mark_rows(marks)

    def fail(self, plan: Plan) -> list[Sequence]:
        """The step failed, with `plan` as this rank's part. Returns those that were found to be the cause."""
        computed = [chunk.sequence for chunk in plan.chunks]
        if not plan.is_alone:
            for sequence in self._left_out(plan):
                self._scheduler.note_trial(sequence, sequence.trial.voided())
        for sequence in computed:
            self._scheduler.note_trial(sequence, sequence.trial.failed(is_alone=plan.is_alone))
        self.drop(plan)
        return [sequence for sequence in computed if sequence.trial.is_guilty]

    def drop(self, plan: Plan) -> None:
        """The step is given up for reasons that no request has."""
        marked = {id(sequence): sequence for sequence in self._scheduler.struck}
        marked |= {id(chunk.sequence): chunk.sequence for chunk in plan.chunks}
        self._ledger.mark_rows([(s.row, s.trial.mark()) for s in marked.values() if s.row >= 0])

    def _left_out(self, plan: Plan) -> list[Sequence]:
        """Those that failed steps are known of, and that are not in this one."""
        computed = {id(chunk.sequence) for chunk in plan.chunks}
        return [sequence for sequence in self._scheduler.struck if id(sequence) not in computed]


def guilty_error() -> RequestFailed:
    """The end of the request that makes steps fail."""
    return RequestFailed(
        f"the engine failed {GUILTY_FAILURES} times in a row while it computed this request alone; "
        "other requests are not affected"
    )
