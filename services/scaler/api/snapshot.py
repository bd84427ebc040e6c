"""What the scaler knows at one moment, and how the admin surface shows it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from elasticmoe.common.capacity import Sizes
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.protocol.errors import NotFound, Unavailable, Unready
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import DeviceStatus, RankLoad, TransitionStatus
from elasticmoe.services.scaler.api import views
from elasticmoe.services.scaler.api.moves import moves_of
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control.autoscaler import Decided
from elasticmoe.services.scaler.control.state import DeploymentPhase
from elasticmoe.services.scaler.operation.operation import Operation, outcome
from elasticmoe.services.scaler.planning.plan import Plan
from elasticmoe.services.scaler.policy.figures import Signals, Throughput
from elasticmoe.services.scaler.policy.record import PolicyRecord
from elasticmoe.services.scaler.policy.saturation import Saturation
from elasticmoe.services.scaler.store.resume import Resumed


class StatusSnapshot(msgspec.Struct, frozen=True):
    """`config` is the resolved configuration without secrets; `ended`: the last operations, newest first; `loads`:
    by slot, of the ranks that told theirs lately; `resumed`: what was gone on with at the start;
    `instance`: names the deployment, empty before the journal has been read, as `policy` is None; `decision`: the last
    one by it; `decided`: those that were told, newest first; `signals`, `saturation`, `throughput`: the load as it was
    seen last; `sizes`: of the model's records; None until the HMM has loaded it."""

    phase: DeploymentPhase
    reason: str
    error: Refused | None
    layout: Layout | None
    cluster: Cluster | None
    fence: int
    config: dict[str, Any]
    operation: Operation | None = None
    ended: tuple[Operation, ...] = ()
    loads: Mapping[int, RankLoad] = {}
    resumed: Resumed | None = None
    instance: str = ""
    policy: PolicyRecord | None = None
    decided: tuple[Decided, ...] = ()
    signals: Signals | None = None
    saturation: Saturation | None = None
    decision: Decided | None = None
    throughput: Throughput | None = None
    sizes: Sizes | None = None


class StatusCache:
    """Where the loop puts the newest snapshot and the app reads it. Assignment is atomic; no lock is needed."""

    def __init__(self, snapshot: StatusSnapshot) -> None:
        self.snapshot = snapshot


def unready(snapshot: StatusSnapshot, otherwise: str) -> Unready:
    """Why something cannot be told yet: a scaler that waits for the lease has read nothing, and says who holds it."""
    return Unready(snapshot.reason if snapshot.reason and not snapshot.fence else otherwise)


def wanted_replicas(snapshot: StatusSnapshot, layout: Layout) -> int:
    """That there should be: what an operation in progress leads to, else what the policy decided last, else as many as
    there are."""
    operation = snapshot.operation
    if operation is not None and operation.planned is not None and operation.phase not in ("abort", "aborted"):
        return operation.planned.replicas_after
    decided = snapshot.decision
    return decided.target if decided is not None and decided.target is not None else layout.dp


def ready_view(snapshot: StatusSnapshot) -> views.Ready:
    """GET /ready."""
    done, total = snapshot.cluster.bytes_loaded if snapshot.cluster is not None else (0, 0)
    return views.Ready(
        phase=snapshot.phase,
        reason=snapshot.reason,
        bytes_done=done,
        bytes_total=total,
        error=snapshot.error,
        resumed=snapshot.resumed,
    )


def layout_view(snapshot: StatusSnapshot) -> views.Layout:
    """GET /v1/layout. Raises Unready before the first layout is known."""
    layout = snapshot.layout
    if layout is None:
        raise unready(snapshot, "no layout has been made yet")
    cluster = snapshot.cluster
    by_device = {status.device: status for status in cluster.devices} if cluster is not None else {}
    processes = cluster.ranks if cluster is not None else {}
    states = seat_states(snapshot)
    ranks, counts = [], layout.num_experts()
    for seat in seats_shown(snapshot):
        device, rank = by_device.get(seat.device), processes.get(seat.slot)
        load = snapshot.loads.get(seat.slot)
        ranks.append(
            views.Rank(
                replica=seat.rank.replica,
                tp=seat.rank.tp,
                slot=seat.slot,
                device=seat.device,
                state=states.get(seat.device, "used"),
                incarnation=rank.incarnation if rank else None,
                pid=rank.pid if rank else None,
                ready=bool(rank and rank.ready),
                attach_ms=rank.attach_ms if rank else None,
                experts=counts[seat.slot],
                kv_blocks=device.kv_blocks if device else 0,
                kv_blocks_free=load.blocks_free if load and seat.rank.tp == 0 else None,
                memory=memory_view(device) if device else None,
            )
        )
    return views.Layout(
        epoch=layout.epoch,
        fence=snapshot.fence,
        phase=snapshot.phase,
        reason=snapshot.reason,
        tp=layout.tp,
        replicas=layout.dp,
        operation=snapshot.operation.op_id if snapshot.operation else None,
        computes_by=sorted({rank.computes_by for rank in processes.values() if rank.computes_by}),
        ranks=ranks,
        experts=layout.homes,
    )


def devices_view(snapshot: StatusSnapshot) -> views.Devices:
    """GET /v1/devices. Raises Unavailable while the HMM does not answer."""
    cluster = snapshot.cluster
    if cluster is None or cluster.phase is None:
        raise Unavailable("the HMM does not answer")
    states = seat_states(snapshot)
    return views.Devices(
        standby_processes=cluster.standby,
        devices=[
            views.Device(
                device=status.device,
                state=state_of(status, states),
                failure=status.failure,
                attached=status.attached,
                memory=memory_view(status),
                pages=status.pages,
                large_pages=status.large_pages,
            )
            for status in cluster.devices
        ],
    )


def operation_view(operation: Operation, cluster: Cluster | None = None) -> views.Operation:
    """One operation, with the HMM's progress where it is about this one."""
    transition = _transition_of(operation, cluster)
    progress = None
    if transition is not None:
        progress = views.Progress(
            hmm_phase=transition.phase,
            bytes_done=transition.bytes_done,
            bytes_total=transition.bytes_total,
            slots_prepared=transition.prepared,
        )
    return views.Operation(
        op_id=operation.op_id,
        kind=operation.kind,
        phase=operation.phase,
        outcome=outcome(operation) if operation.is_finished else None,
        reason=operation.why,
        leg=_leg_of(operation),
        legs=operation.num_legs,
        attempt=operation.progress.attempt + 1,
        request=operation.request,
        by="operator" if operation.policy_order is None else "policy",
        accepted_unix=operation.accepted_unix,
        deadline_s=operation.deadline_s,
        elapsed_s=round(operation.elapsed_s, 4),
        is_late=operation.is_late,
        is_cancelled=operation.is_cancelled,
        timings=operation.accounting.timings,
        progress=progress,
        planned=operation.planned,
        figures=operation.accounting.figures,
        error=operation.error,
    )


def progress_view(operation: Operation, cluster: Cluster | None) -> views.NowProgress:
    """How far an operation is, as `operation_view` tells it."""
    transition, figures = _transition_of(operation, cluster), operation.accounting.figures
    return views.NowProgress(
        phase=operation.phase,
        leg=_leg_of(operation),
        elapsed_s=round(operation.elapsed_s, 4),
        hmm_phase=transition.phase if transition is not None else None,
        bytes_done=transition.bytes_done if transition is not None else 0,
        bytes_total=transition.bytes_total if transition is not None else 0,
        bytes_copied=figures.bytes_copied,
        sequences_moved=figures.sequences_moved,
    )


def _transition_of(operation: Operation, cluster: Cluster | None) -> TransitionStatus | None:
    """What the HMM does for the operation's present leg."""
    transition = cluster.transition if cluster is not None else None
    if transition is None or operation.is_finished or transition.id != operation.transition_id:
        return None
    return transition


def _leg_of(operation: Operation) -> int:
    return operation.leg + 1 if operation.num_legs else 0


def operations_view(snapshot: StatusSnapshot, limit: int) -> views.Operations:
    """GET /v1/operations: the one in progress first, then the last that ended, newest first; `limit` of them."""
    current = [snapshot.operation] if snapshot.operation else []
    shown = (*current, *snapshot.ended)[:limit]
    return views.Operations([operation_view(operation, snapshot.cluster) for operation in shown])


def find_operation(snapshot: StatusSnapshot, op_id: str) -> views.Operation:
    """GET /v1/operations/{op_id}. Raises NotFound; Unready while it is not known what there was."""
    current = [snapshot.operation] if snapshot.operation else []
    for operation in (*current, *snapshot.ended):
        if operation.op_id == op_id:
            return operation_view(operation, snapshot.cluster)
    if snapshot.phase == "starting":  # a scaler that waits for its lease has not read the journal
        raise unready(snapshot, "the journal has not been read yet")
    raise NotFound(f"no operation {op_id}", code="unknown_operation")


def operation_moves(snapshot: StatusSnapshot, op_id: str) -> views.Moves:
    """GET /v1/operations/{op_id}/moves. Raises what find_operation raises, and Unready while the model's records are
    not known."""
    find_operation(snapshot, op_id)
    operation = snapshot.operation
    if operation is None or operation.op_id != op_id or operation.plan is None:
        return views.Moves(op_id, None)
    if snapshot.sizes is None:
        raise unready(snapshot, "the HMM does not answer")
    return views.Moves(op_id, [moves_of(leg, snapshot.sizes) for leg in operation.plan.legs])


def plan_view(plan: Plan, operation: Operation, sizes: Sizes) -> views.Plan:
    """The answer to a dry run: the plan in short, and each leg with its copies as [record, from, to]."""
    return views.Plan(
        kind=plan.kind,
        planned=operation.planned,
        legs=[
            views.Leg(
                epoch=leg.layout.epoch,
                joining=leg.joining,
                leaving=leg.leaving,
                bytes_copied=leg.bytes_copied,
                peak_bytes=leg.peak_bytes,
                kv_handles=leg.kv_handles,
                kv_handles_after=leg.kv_handles_after,
                copies=[(str(copy.key), copy.source, copy.target) for copy in leg.copies],
                moves=moves_of(leg, sizes),
            )
            for leg in plan.legs
        ],
    )


def memory_view(device: DeviceStatus) -> views.Memory:
    """A device's bytes by class; they add up to its budget."""
    return views.Memory(device.budget, device.weights, device.kv, device.other, device.free, device.total or None)


def seats_shown(snapshot: StatusSnapshot) -> list[Seat]:
    """Those of the layout, and of the operation's present leg those that join or leave."""
    seats = list(snapshot.layout.seats) if snapshot.layout is not None else []
    slots = {seat.slot for seat in seats}
    return [*seats, *(seat for seat in _other_seats(snapshot) if seat.slot not in slots)]


def _other_seats(snapshot: StatusSnapshot) -> tuple[Seat, ...]:
    """Seats of the operation's present leg that join or leave."""
    operation = snapshot.operation
    if operation is None or operation.plan is None or not operation.num_legs:
        return ()
    leg = operation.current_leg()
    return (*leg.joining, *leg.leaving)


def state_of(device: DeviceStatus, states: Mapping[str, views.DeviceState]) -> views.DeviceState:
    """Of any device, by the `seat_states`."""
    return states.get(device.device, "failed" if device.failure else "free")


def seat_states(snapshot: StatusSnapshot) -> dict[str, views.DeviceState]:
    """used, joining, leaving by device; those without an entry no seat is on."""
    used = set(snapshot.layout.slots) if snapshot.layout else set()
    seats = snapshot.layout.seats if snapshot.layout else ()
    states: dict[str, views.DeviceState] = {seat.device: "used" for seat in seats}
    operation = snapshot.operation
    if operation is None or operation.plan is None or not operation.num_legs:
        return states
    leg = operation.current_leg()
    states |= {seat.device: "joining" for seat in leg.joining if seat.slot not in used}
    living = set(snapshot.cluster.ranks) if snapshot.cluster is not None else set()
    states |= {seat.device: "leaving" for seat in leg.leaving if seat.slot in used or seat.slot in living}
    return states
