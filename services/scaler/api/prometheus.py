"""The scaler's metrics as Prometheus text."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from elasticmoe.services.scaler import measures
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot, memory_view
from elasticmoe.services.scaler.metrics import Meters


def render_metrics(snapshot: StatusSnapshot, meters: Meters) -> bytes:
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
