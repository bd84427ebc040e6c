"""A step's work in its order: sections, which a rank computes by itself, between meetings with other ranks.

A model is written down once, when it is built; a step runs through it. A section is what a compute backend may keep
whole and repeat (ComputeBackend.section): it looks at nothing but the step's batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elasticmoe.services.worker.backends.base import BatchOp, ComputeBackend, Op, StepBatch
from elasticmoe.services.worker.exchange.base import Exchange

Meeting = Callable[[Exchange, int], None]
"""Called with the exchange and the step's number of rows; may block for other ranks."""


class Program:
    """Of one model, for steps of at most `max_tokens` rows. Written by the methods, in the order of a step, up to
    `end`; then run with each step's batch."""

    def __init__(self, backend: ComputeBackend, max_tokens: int) -> None:
        self._backend, self._max_tokens = backend, max_tokens
        # The section that is being written, and whether each takes the number of rows.
        self._open: list[tuple[Callable[[Any], None], bool]] = []
        self._parts: list[tuple[BatchOp, Meeting]] = []
        self._last: BatchOp = _nothing

    def compute(self, *operations: Op) -> None:
        """Of the step's rows."""
        self._open += [(operation, True) for operation in operations]

    def compute_batch(self, *operations: BatchOp) -> None:
        """Of the step's batch."""
        self._open += [(operation, False) for operation in operations]

    def meet(self, meeting: Meeting) -> None:
        """With what has been computed by then."""
        self._parts.append((self._section(), meeting))

    def end(self) -> None:
        """All is written."""
        self._last = self._section()

    def run(self, step: StepBatch, exchange: Exchange, n: int) -> None:
        """Compute a step of a batch of `n` rows. Raises what operations and meetings raise."""
        for section, meeting in self._parts:
            section(step)
            meeting(exchange, n)
        self._last(step)

    def _section(self) -> BatchOp:
        operations, self._open = tuple(self._open), []
        if not operations:
            return _nothing

        def run(step: StepBatch) -> None:
            n = step.num_rows
            for operation, takes_rows in operations:
                operation(n if takes_rows else step)

        return self._backend.section(run, self._max_tokens)


def _nothing(step: StepBatch) -> None:
    """Between two meetings there is nothing to compute."""
