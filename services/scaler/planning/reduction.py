"""A layout without the replicas of devices that have failed, for where nothing of it is in memory. Pure."""

from __future__ import annotations

from collections.abc import Collection

from elasticmoe.common.layout import Layout
from elasticmoe.services.scaler.planning.placement import place


def without_failed(layout: Layout, failed: Collection[str], epoch: int) -> Layout | None:
    """The layout of `epoch` that is left of `layout` where these devices have failed: whole replicas, with all experts
    spread over them. None where it uses none of the devices, or nothing would be left."""
    leaving = {seat.rank.replica for seat in layout.seats if seat.device in failed}
    seats = tuple(seat for seat in layout.seats if seat.rank.replica not in leaving)
    if not leaving or not seats:
        return None
    devices = {seat.slot: seat.device for seat in layout.seats}
    # All is read from the checkpoint, wherever it comes to: what an expert weighs does not count.
    homes, _ = place(layout.homes, [seat.slot for seat in seats], [1] * len(layout.homes), devices)
    return Layout(epoch, layout.tp, seats, homes)
