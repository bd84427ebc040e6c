"""What is lost with a device: it is lost as a whole, with all devices that its hardware is divided into. And which
devices can be used: those that are not lost, and that have not failed by the HMM's word. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from elasticmoe.common.devices.names import hardware_of
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.planning.plan import Plan


def lost_devices(current: Operation | None, ended: Sequence[Operation]) -> set[str]:
    """Devices, as wholes, that have been lost and to which no replica has come since. Each operation keeps what was
    lost before it, so the newest one tells, however many have been forgotten."""
    newest = current or (ended[0] if ended else None)
    if newest is None:
        return set()
    changes = newest.planned.devices if newest.planned is not None and newest.phase != "aborted" else {}
    taken = {hardware_of(device) for device, change in changes.items() if change.kv_handles_after}
    return (set(newest.lost_before) - taken) | set(map(hardware_of, newest.lost_devices))


def lost_with(replicas: Iterable[int], layout: Layout) -> tuple[int, ...]:
    """Further replicas that have a device on the hardware of these, or of those that are lost with them; ascending."""
    lost = set(replicas)
    while True:
        hardware = {hardware_of(seat.device) for seat in layout.seats if seat.rank.replica in lost}
        found = lost | replicas_of(seat for seat in layout.seats if hardware_of(seat.device) in hardware)
        if found == lost:
            return tuple(sorted(lost.difference(replicas)))
        lost = found


def usable_devices(cluster: Cluster, lost: Collection[str], named: Collection[str] = ()) -> tuple[str, ...]:
    """Devices that new replicas may take, in the order that plans take them in: a lost one only where it is `named`."""
    return tuple(
        device.device
        for device in cluster.devices
        if not device.failure and (device.device in named or hardware_of(device.device) not in lost)
    )


def needed_of(plan: Plan) -> set[str]:
    """Devices that the plan reads from, writes to, or seats ranks on."""
    copied = {device for leg in plan.legs for copy in leg.copies for device in (copy.source, copy.target)}
    return copied | {seat.device for leg in plan.legs for seat in leg.joining}


def failure_of(device: str, reason: str, layout: Layout) -> str:
    """Why an order that needs a failed device is refused, and what helps."""
    seat, text = layout.seat_on(device), f"{device} cannot be used: {reason}"
    if seat is None:
        return text
    return f"{text}. Leave it out first: `elasticmoe scale --remove r{seat.rank.replica} --lost`"


def replicas_of(seats: Iterable[Seat]) -> set[int]:
    """The replicas that have these seats."""
    return {seat.rank.replica for seat in seats}
