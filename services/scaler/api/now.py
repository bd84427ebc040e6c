"""What `GET /v1/now` answers: the deployment at a glance, and of devices and ranks only what has changed since the
asker's last call. The listener's thread only: without somebody who looks it costs nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from elasticmoe.services.scaler.api import views
from elasticmoe.services.scaler.api.snapshot import (
    StatusSnapshot,
    progress_view,
    seat_states,
    seats_shown,
    state_of,
    wanted_replicas,
)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Changes(Generic[K, V]):
    """Rows by their keys, each with the version in which it became what it is."""

    def __init__(self) -> None:
        self._rows: dict[K, tuple[int, V]] = {}

    def put(self, rows: dict[K, V], version: int) -> bool:
        """These are the rows of `version`. Whether one has gone, which no change tells."""
        before = self._rows
        self._rows = {
            key: old if (old := before.get(key)) is not None and old[1] == row else (version, row)
            for key, row in rows.items()
        }
        return not before.keys() <= rows.keys()

    def after(self, version: int) -> list[V]:
        """Rows that have changed after it."""
        return [row for changed, row in self._rows.values() if changed > version]


class Board:
    """`origin`: names this process; places of another one mean nothing here."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._snapshot: StatusSnapshot | None = None
        self._version = 0
        self._whole_since = 0  # a place before that is answered with everything
        self._devices: _Changes[str, views.NowDevice] = _Changes()
        self._ranks: _Changes[int, views.NowRank] = _Changes()

    def read(self, snapshot: StatusSnapshot, since: str) -> views.Now:
        """What has changed after the place `since`."""
        if snapshot is not self._snapshot:
            self._take(snapshot)
        known = self._version_of(since)
        cluster, layout = snapshot.cluster, snapshot.layout
        is_whole = known is None or known < self._whole_since
        after = 0 if known is None or is_whole else known
        hosts = list(cluster.hosts.values()) if cluster is not None else None
        operation = snapshot.operation
        return views.Now(
            cursor=f"{self._origin}.{self._version}",
            is_whole=is_whole,
            phase=snapshot.phase,
            reason=snapshot.reason,
            error=snapshot.error,
            instance=snapshot.instance,
            fence=snapshot.fence,
            epoch=layout.epoch if layout is not None else None,
            replicas=layout.dp if layout is not None else None,
            target=wanted_replicas(snapshot, layout) if layout is not None else None,
            tp=layout.tp if layout is not None else 1,
            operation=operation.op_id if operation is not None else None,
            progress=progress_view(operation, cluster) if operation is not None else None,
            hmm_answers=all(host.hmm is not None for host in hosts) if hosts else None,
            pool_answers=all(host.pool is not None for host in hosts) if hosts else None,
            standby_processes=cluster.standby if cluster is not None else None,
            num_devices=len(cluster.devices) if cluster is not None else None,
            devices=self._devices.after(after),
            ranks=self._ranks.after(after),
        )

    def _take(self, snapshot: StatusSnapshot) -> None:
        self._snapshot = snapshot
        self._version += 1
        is_one_gone = self._devices.put(_devices_of(snapshot), self._version)
        is_one_gone |= self._ranks.put(_ranks_of(snapshot), self._version)
        if is_one_gone:
            self._whole_since = self._version

    def _version_of(self, since: str) -> int | None:
        origin, _, place = since.rpartition(".")
        if origin != self._origin or not place.isascii() or not place.isdigit() or len(place) > 18:
            return None
        return min(int(place), self._version)


def _devices_of(snapshot: StatusSnapshot) -> dict[str, views.NowDevice]:
    cluster, layout = snapshot.cluster, snapshot.layout
    if cluster is None:
        return {}
    states, ranks = seat_states(snapshot), cluster.ranks
    seats = {seat.device: seat for seat in seats_shown(snapshot)}
    counts = layout.num_experts() if layout is not None else {}
    rows = {}
    for device in cluster.devices:
        seat = seats.get(device.device)
        process = ranks.get(seat.slot) if seat is not None else None
        rows[device.device] = views.NowDevice(
            device=device.device,
            state=state_of(device, states),
            slot=seat.slot if seat is not None else None,
            rank=str(seat.rank) if seat is not None else None,
            is_ready=process is not None and process.ready,
            experts=counts.get(seat.slot, 0) if seat is not None else 0,
            budget=device.budget,
            weights=device.weights,
            kv=device.kv,
            other=device.other,
            free=device.free,
            failure=device.failure,
        )
    return rows


def _ranks_of(snapshot: StatusSnapshot) -> dict[int, views.NowRank]:
    loads = snapshot.loads
    # A block has one number on all ranks of a replica: which are free, its leader knows.
    free = {load.rank.replica: load.blocks_free for load in loads.values() if load.rank.tp == 0}
    return {
        slot: views.NowRank(
            slot, load.blocks_total, free.get(load.rank.replica, 0), load.running, load.waiting, load.moving
        )
        for slot, load in loads.items()
    }
