"""The scaler's counters, which live as long as the process."""

from __future__ import annotations

import itertools
from typing import get_args

from prometheus_client import CollectorRegistry

from elasticmoe.common.measures import REFUSALS
from elasticmoe.services.scaler import measures
from elasticmoe.services.scaler.operation.operation import (
    FINISHED,
    Operation,
    OperationKind,
    OperationOutcome,
    OperationPhase,
)
from elasticmoe.services.scaler.policy.state import Reason

_PHASE_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_PAUSE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Meters:
    """Counted by the loop's thread and the listener's, read by any: prometheus-client's objects are safe for that.

    What alerts are about is there from the start, at 0: to Prometheus a series that begins at 1 has not grown.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._operations = measures.OPERATIONS.counter(self.registry)
        self._phases = measures.PHASES.histogram(self.registry, _PHASE_BUCKETS)
        self._pauses = measures.PAUSES.histogram(self.registry, _PAUSE_BUCKETS)
        self._bytes = measures.BYTES_MOVED.counter(self.registry)
        self._refused = measures.REFUSED.counter(self.registry)
        self._spans_lost = measures.SPANS_LOST.counter(self.registry)
        self._decisions = measures.DECISIONS.counter(self.registry)
        for kind, outcome in itertools.product(get_args(OperationKind), get_args(OperationOutcome)):
            self._operations.labels(kind, outcome)
        for phase in get_args(OperationPhase):
            if phase not in FINISHED:
                self._phases.labels(phase)
        for status in REFUSALS:
            self._refused.labels(status)
        for reason in Reason:
            self._decisions.labels(reason.value)

    def spans_lost(self, num: int) -> None:
        """The collector of traces did not take so many spans."""
        self._spans_lost.inc(num)

    def refused(self, status: int) -> None:
        """An error was answered."""
        self._refused.labels(str(status)).inc()

    def decision(self, reason: str) -> None:
        """The policy has decided something else than before, or given an order."""
        self._decisions.labels(reason).inc()

    def phase(self, phase: str, seconds: float) -> None:
        """A phase has ended."""
        self._phases.labels(phase).observe(seconds)

    def operation(self, operation: Operation, outcome: str) -> None:
        """An operation has ended."""
        self._operations.labels(operation.kind, outcome).inc()
        self._bytes.inc(operation.accounting.figures.bytes_copied)
        if operation.accounting.figures.flip_s_max is not None:
            self._pauses.observe(operation.accounting.figures.flip_s_max)
