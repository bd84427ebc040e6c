"""From the scheduler's choice to the ledger: the next step's work, on record before it is computed.

A plan that fails while it looks at one sequence ends that one alone. What had been decided by then stands, as it does
for a step that is given up: it is brought on record, and the next attempt goes on from there. Where the rank's books do
not add up afterwards only its process's end helps: the seat's next one goes on from the ledger.
"""

from __future__ import annotations

from elasticmoe.native.ledger import Ledger
from elasticmoe.services.worker.engine.plan import PlanFailed, StepPlan
from elasticmoe.services.worker.engine.rows import encode_entry
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.engine.sequence import Sequence


class Planning:
    """Owned by the engine, to which scheduler and ledger belong."""

    def __init__(self, scheduler: Scheduler, ledger: Ledger) -> None:
        self._scheduler = scheduler
        self._ledger = ledger

    def plan(self, *, decode_only: bool = False, num_clean: int = 0) -> StepPlan:
        """Choose the next step's work, and write to the ledger which sequences run and which blocks are theirs. Raises
        PlanFailed, after which `settle` is due, and MemoryError."""
        plan = self._scheduler.plan(decode_only=decode_only, num_clean=num_clean)
        subject: Sequence | None = None
        try:
            for row in plan.freed_rows:
                self._ledger.close_row(row)
            for subject in plan.admitted:
                self.open_row(subject)
            for chunk in plan.chunks:
                subject = chunk.sequence
                self._log_blocks(subject)
        except MemoryError:
            raise
        except Exception as error:
            raise PlanFailed(subject) from error
        return plan

    def open_row(self, sequence: Sequence) -> None:
        """Write all of a sequence to its row, which is free."""
        prompt = sequence.num_prompt
        entry, mark = encode_entry(sequence), sequence.trial.mark()
        self._ledger.open_row(sequence.row, entry, sequence.tokens[:prompt], sequence.blocks, mark)
        self._ledger.commit(sequence.row, sequence.kv_len, sequence.tokens[prompt:])
        sequence.logged = len(sequence.blocks)

    def _log_blocks(self, sequence: Sequence) -> None:
        if len(sequence.blocks) > sequence.logged:
            self._ledger.append_blocks(sequence.row, sequence.blocks[sequence.logged :])
            sequence.logged = len(sequence.blocks)

    def settle(self, subject: Sequence | None) -> None:
        """Bring on record what a plan that failed had decided: rows that were freed, and rows that were given. (No
        row is both in one plan.) Where the subject, who is to end, has a row, it is open then."""
        holders = {sequence.row: sequence for sequence in self._scheduler.sequences() if sequence.row >= 0}
        open_rows = set(self._ledger.rows())
        for row in open_rows - set(holders):
            self._ledger.close_row(row)
        for row in sorted(set(holders) - open_rows):
            if holders[row] is subject:  # what could not be written of it is not needed
                self._ledger.open_row(row, b"", (), (), 0)
            else:
                self.open_row(holders[row])
