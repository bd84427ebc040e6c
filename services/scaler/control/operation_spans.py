"""An operation as a trace: a span of the whole, one for each phase, and one for each thing that the HMM does for it.

All of it is seen anyhow, turn by turn; spans are written when it is over. Ids follow from the operation's id, and from
the trace of whoever ordered it, so a scaler that goes on with what another has begun goes on with its trace.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from elasticmoe.common.clock import Clock
from elasticmoe.common.protocol.scaler import TransitionStatus
from elasticmoe.services.scaler.operation.operation import Operation, outcome

if TYPE_CHECKING:
    from elasticmoe.common.protocol.ids import TransitionId
    from elasticmoe.common.tracing.spans import OpenSpan, Spans

# What the HMM does in a phase of its transition.
_WORK: Final = {
    "vacating": "hmm vacate",
    "copying": "hmm copy",
    "staged": "hmm map",
    "committed": "hmm flip",
    "releasing": "hmm give back",
    "aborting": "hmm give back",
}
_PAIRS_MAX: Final = 64


class OperationSpans:
    """For the loop's thread. Times come from `clock`: what is seen is as old as a turn takes."""

    def __init__(self, spans: Spans, clock: Clock) -> None:
        self._spans = spans
        self._clock = clock
        self._seen: tuple[TransitionId, str] | None = None
        self._since = self._looked = 0.0

    def changed(self, before: Operation, after: Operation) -> None:
        """The operation has gone on. What it is over with is written."""
        now, root = self._clock.time(), self._root(after)
        if root is None:
            return
        if after.phase != before.phase:
            facts = {"elasticmoe.leg": before.leg + 1, "elasticmoe.attempt": before.progress.attempt + 1}
            error = after.error.code if after.error is not None and after.phase in ("abort", "aborted") else ""
            why = {"elasticmoe.why": after.why}
            seconds = after.accounting.timings[-1].seconds  # of the phase that is over
            self._spans.write(root, before.phase, now - seconds, now, {**facts, **why}, error=error)
        if after.is_finished:
            self._write_whole(after, root, now)

    def _root(self, operation: Operation) -> OpenSpan | None:
        """None where whoever ordered it does not record."""
        return self._spans.named(f"operation {operation.op_id}", operation.caller.carrier)

    def _write_whole(self, operation: Operation, root: OpenSpan, now: float) -> None:
        planned, figures = operation.planned, operation.accounting.figures
        facts: dict[str, str | int | float | tuple[str, ...]] = {
            "elasticmoe.operation_id": operation.op_id,
            "elasticmoe.reason": operation.request.reason,
            "elasticmoe.outcome": outcome(operation),
            "elasticmoe.bytes_copied": figures.bytes_copied,
            "elasticmoe.sequences_moved": figures.sequences_moved,
        }
        if planned is not None:
            facts |= {
                "elasticmoe.replicas_before": planned.replicas_before,
                "elasticmoe.replicas_after": planned.replicas_after,
                "elasticmoe.joining": planned.joining,
                "elasticmoe.leaving": planned.leaving,
                "elasticmoe.experts_moved": planned.experts_moved,
            }
        if figures.flip_s_max is not None:
            facts["elasticmoe.flip_s_max"] = figures.flip_s_max
        error = operation.error.code if operation.error is not None and outcome(operation) != "done" else ""
        if error:
            facts["error.type"] = error
        self._spans.end(root, f"operation {operation.kind}", operation.accepted_unix, now, facts, error=error)

    def look(self, operation: Operation, transition: TransitionStatus | None) -> None:
        """What the HMM does for the operation, as it was seen in this turn."""
        now, looked = self._clock.time(), self._looked
        self._looked = now
        if transition is None or transition.id.op != operation.op_id:
            self._seen = None
            return
        seen = transition.id, transition.phase
        if seen == self._seen:
            return
        before, since = self._seen, self._since
        self._seen, self._since = seen, now
        is_new = before is None or before[0] != transition.id
        phase, since = ("vacating", looked) if is_new or before is None else (before[1], since)
        if phase == "vacating" and transition.bytes_done and transition.phase != "copying":
            phase = "copying"  # all of that was over within a turn
        if phase in _WORK and not (is_new and phase == "vacating"):
            self._write_work(operation, transition, phase, since, now)

    def _write_work(
        self, operation: Operation, transition: TransitionStatus, phase: str, since: float, now: float
    ) -> None:
        facts: dict[str, str | int | tuple[str, ...]] = {"elasticmoe.attempt": str(transition.id)}
        if phase == "copying":
            facts |= {"elasticmoe.bytes": transition.bytes_done, "elasticmoe.copies": _copies(operation)}
        error = transition.error.code if transition.error is not None and transition.phase == "failed" else ""
        root = self._root(operation)
        if root is not None:
            self._spans.write(root, _WORK[phase], since, now, facts, error=error)


def _copies(operation: Operation) -> tuple[str, ...]:
    """From where to where the present leg copies how many records."""
    if not operation.num_legs or operation.plan is None:
        return ()
    pairs = Counter((copy.source or "checkpoint", copy.target) for copy in operation.current_leg().copies)
    return tuple(f"{source} > {target}: {num}" for (source, target), num in pairs.most_common(_PAIRS_MAX))
