"""The scaler's metrics: counters that live as long as the process, and gauges of the newest snapshot."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from services.scaler.operation import Operation
from services.scaler.snapshot import Snapshot, memory_of_device

_PHASE_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_PAUSE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Meters:
    """Counted by the loop's thread and the listener's, read by any: prometheus-client's objects are safe for that."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._operations = Counter(
            "elasticmoe:scale_operations",
            "Operations that ended",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self._phases = Histogram(
            "elasticmoe:scale_phase_seconds",
            "Time of each phase",
            ["phase"],
            buckets=_PHASE_BUCKETS,
            registry=self.registry,
        )
        self._pauses = Histogram(
            "elasticmoe:scale_pause_seconds",
            "From a commit until all ranks flipped: an upper bound of a stream's pause",
            buckets=_PAUSE_BUCKETS,
            registry=self.registry,
        )
        self._bytes = Counter("elasticmoe:scale_bytes_moved", "Bytes copied between devices", registry=self.registry)
        self._refused = Counter(
            "elasticmoe:requests_refused",
            "Requests that were answered with an error, by HTTP status",
            ["status"],
            registry=self.registry,
        )

    def refused(self, status: int) -> None:
        """An error was answered."""
        self._refused.labels(str(status)).inc()

    def phase(self, phase: str, seconds: float) -> None:
        """A phase has ended."""
        self._phases.labels(phase).observe(seconds)

    def operation(self, operation: Operation, outcome: str) -> None:
        """An operation has ended."""
        self._operations.labels(operation.kind, outcome).inc()
        self._bytes.inc(operation.figures.bytes_copied)
        if operation.figures.flip_s_max is not None:
            self._pauses.observe(operation.figures.flip_s_max)


def render_metrics(snapshot: Snapshot, meters: Meters) -> bytes:
    """Prometheus text of the counters and of the snapshot."""
    registry = CollectorRegistry()
    epoch = Gauge("elasticmoe:epoch", "Epoch of the layout", registry=registry)
    fence = Gauge("elasticmoe:fence", "Fencing epoch of this scaler", registry=registry)
    serving = Gauge("elasticmoe:serving", "1 while all ranks of the layout step", registry=registry)
    busy = Gauge("elasticmoe:scale_in_progress", "1 while an operation is in progress", registry=registry)
    experts = Gauge("elasticmoe:experts_per_rank", "Expert records of a rank's device", ["rank"], registry=registry)
    memory = Gauge("elasticmoe:device_bytes", "Device memory", ["device", "state"], registry=registry)
    blocks = Gauge("elasticmoe:kv_blocks", "KV blocks of the ranks that tell them", ["state"], registry=registry)
    standby = Gauge("elasticmoe:standby_ranks", "Processes that wait for a seat", registry=registry)
    fence.set(snapshot.fence)
    serving.set(snapshot.phase == "serving")
    busy.set(snapshot.operation is not None)
    if snapshot.layout:
        epoch.set(snapshot.layout.epoch)
        for seat in snapshot.layout.seats:
            experts.labels(str(seat.rank)).set(snapshot.layout.num_experts_on(seat.slot))
    for device in snapshot.hmm.devices if snapshot.hmm else ():
        for state, nbytes in memory_of_device(device).items():
            memory.labels(device.device, state).set(nbytes)
    free = sum(left for left, _ in snapshot.blocks.values())
    blocks.labels("free").set(free)
    blocks.labels("used").set(sum(total for _, total in snapshot.blocks.values()) - free)
    standby.set(snapshot.pool.standby if snapshot.pool else 0)
    return generate_latest(registry) + generate_latest(meters.registry)
