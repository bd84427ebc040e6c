"""The scaler's metrics as Prometheus text."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from elasticmoe.services.scaler import measures
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot, memory_view, wanted_replicas
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.policy.figures import Missing, Unknown


def render_metrics(snapshot: StatusSnapshot, meters: Meters) -> bytes:
    """Prometheus text of the counters and of the snapshot."""
    registry = CollectorRegistry()
    epoch, fence, serving, busy, experts, memory, large, failed, blocks, standby, wanted = (
        measure.gauge(registry) for measure in measures.SEEN
    )
    fence.set(snapshot.fence)
    serving.set(snapshot.phase == "serving")
    busy.set(snapshot.operation is not None)
    if snapshot.layout:
        epoch.set(snapshot.layout.epoch)
        counts = snapshot.layout.num_experts()
        for seat in snapshot.layout.seats:
            experts.labels(str(seat.rank)).set(counts[seat.slot])
    for device in snapshot.cluster.devices if snapshot.cluster else ():
        for state, nbytes in msgspec.structs.asdict(memory_view(device)).items():
            if nbytes is not None:  # no driver tells a total
                memory.labels(device.device, state).set(nbytes)
        large.labels(device.device).set(device.large_pages)
        failed.labels(device.device).set(bool(device.failure))
    leaders = [load for load in snapshot.loads.values() if load.rank.tp == 0]  # of a block, the others have parts
    free = sum(load.blocks_free for load in leaders)
    blocks.labels("free").set(free)
    blocks.labels("used").set(sum(load.blocks_total for load in leaders) - free)
    if snapshot.cluster:  # before, nobody has looked
        standby.set(snapshot.cluster.standby)
        wanted.set(len(snapshot.cluster.hosts) * snapshot.config["standbys"])
    _add_load(registry, snapshot)
    return generate_latest(registry) + generate_latest(meters.registry)


def _add_load(registry: CollectorRegistry, snapshot: StatusSnapshot) -> None:
    """What the policy sees and wants. A figure that is not known is left out: no sample is no zero."""
    if snapshot.layout is None or snapshot.policy is None:
        return
    measures.REPLICAS.gauge(registry).set(snapshot.layout.dp)
    if snapshot.saturation is not None:
        measures.DESIRED.gauge(registry).set(wanted_replicas(snapshot, snapshot.layout))
        saturation = measures.SATURATION.gauge(registry)
        for component, value in snapshot.saturation.parts.items():
            if value is not None:
                saturation.labels(component).set(value)
    if snapshot.signals is not None:
        measures.BLIND.gauge(registry).set(len(snapshot.signals.silent))
        attainment = snapshot.signals.attainment
        if not isinstance(attainment, Missing | Unknown):
            measures.ATTAINMENT.gauge(registry).set(attainment)
            budget = max(1e-6, 1.0 - snapshot.policy.config.attainment)
            measures.BURN.gauge(registry).set((1.0 - attainment) / budget)
    last = snapshot.ended[0] if snapshot.ended else None
    if last is not None and last.planned is not None:
        measures.PREDICTED_S.gauge(registry).set(last.planned.seconds)
        measures.ACTUAL_S.gauge(registry).set(last.elapsed_s)
