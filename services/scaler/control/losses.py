"""What is lost with a device: it is lost as a whole, with all devices that its hardware is divided into. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from elasticmoe.common.devices.names import hardware_of
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.services.scaler.operation.operation import Operation


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


def replicas_of(seats: Iterable[Seat]) -> set[int]:
    """The replicas that have these seats."""
    return {seat.rank.replica for seat in seats}
