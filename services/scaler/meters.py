"""The scaler's metrics: counters that live as long as the process, and gauges of the newest snapshot."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from services.scaler import measures
from services.scaler.operation import Operation
from services.scaler.snapshot import Snapshot, memory_view

_PHASE_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_PAUSE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Meters:
    """Counted by the loop's thread and the listener's, read by any: prometheus-client's objects are safe for that."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._operations = measures.OPERATIONS.counter(self.registry)
        self._phases = measures.PHASES.histogram(self.registry, _PHASE_BUCKETS)
        self._pauses = measures.PAUSES.histogram(self.registry, _PAUSE_BUCKETS)
        self._bytes = measures.BYTES_MOVED.counter(self.registry)
        self._refused = measures.REFUSED.counter(self.registry)

    def refused(self, status: int) -> None:
        """An error was answered."""
        self._refused.labels(str(status)).inc()

    def phase(self, phase: str, seconds: float) -> None:
        """A phase has ended."""
        self._phases.labels(phase).observe(seconds)

    def operation(self, operation: Operation, outcome: str) -> None:
        """An operation has ended."""
        self._operations.labels(operation.kind, outcome).inc()
        self._bytes.inc(operation.accounting.figures.bytes_copied)
        if operation.accounting.figures.flip_s_max is not None:
            self._pauses.observe(operation.accounting.figures.flip_s_max)


def render_metrics(snapshot: Snapshot, meters: Meters) -> bytes:
    """Prometheus text of the counters and of the snapshot."""
    registry = CollectorRegistry()
    epoch, fence, serving, busy, experts, memory, blocks, standby = (m.gauge(registry) for m in measures.SEEN)
    fence.set(snapshot.fence)
    serving.set(snapshot.phase == "serving")
    busy.set(snapshot.operation is not None)
    if snapshot.layout:
        epoch.set(snapshot.layout.epoch)
        for seat in snapshot.layout.seats:
            experts.labels(str(seat.rank)).set(snapshot.layout.num_experts_on(seat.slot))
    for device in snapshot.hmm.devices if snapshot.hmm else ():
        for state, nbytes in msgspec.structs.asdict(memory_view(device)).items():
            memory.labels(device.device, state).set(nbytes)
    free = sum(left for left, _ in snapshot.blocks.values())
    blocks.labels("free").set(free)
    blocks.labels("used").set(sum(total for _, total in snapshot.blocks.values()) - free)
    standby.set(snapshot.pool.standby if snapshot.pool else 0)
    return generate_latest(registry) + generate_latest(meters.registry)
