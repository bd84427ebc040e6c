"""The deployment's hosts as they answered last, and which layout is in force. Pure.

A deployment has one host today, LOCAL_HOST. What the scaler asks of hosts, it asks of a Cluster:

| kind | what |
|---|---|
| of each host, put together | `devices`, `failed`, `attached`, `ranks`, `pools_answer`, `standby`, `startable` |
| the same | `cores`, `threads_max` |
| of the deployment, told by its one host | `phase`, `error`, `memory`, `members`, `transition`, `in_force` |

The second kind takes one host for granted, in `_only`: several would have to agree on it (docs/adr/0029).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from elasticmoe.common.devices.names import HostId
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import (
    DeviceStatus,
    HmmStatus,
    MemoryFacts,
    PoolRank,
    PoolStatus,
    TransitionStatus,
)

Authority = Literal["hmm", "last_seen", "beginning"]


class HostStatus(msgspec.Struct, frozen=True):
    """What one host's HMM and worker pool say; None while they do not answer."""

    hmm: HmmStatus | None = None
    pool: PoolStatus | None = None


class InForce(msgspec.Struct, frozen=True):
    """The layout that the deployment goes by, and who says so."""

    layout: Layout
    authority: Authority

    @property
    def committed(self) -> Layout | None:
        """The layout, where it is known to be committed now. What depends on that waits while it is not known."""
        return self.layout if self.authority == "hmm" else None


def in_force(hosts: Mapping[HostId, HostStatus], last: Layout | None, beginning: Layout) -> InForce:
    """Which layout is in force. The only place that says so; nobody looks into a host's answer for it.

    | authority | the layout | when |
    |---|---|---|
    | `hmm` | that the HMM holds: it commits | it answers and holds one, whatever this scaler's settings are |
    | `last_seen` | `last`: what was in force when the HMM last answered | else |
    | `beginning` | what was committed last by the store, or a first one (store/resume.py) | it has not answered yet |
    """
    hmm = _only(hosts).hmm
    if hmm is not None and hmm.layout is not None:
        return InForce(hmm.layout, "hmm")
    return InForce(last, "last_seen") if last is not None else InForce(beginning, "beginning")


def _only(hosts: Mapping[HostId, HostStatus]) -> HostStatus:
    if len(hosts) != 1:
        raise ValueError(f"a deployment has one host, and this one has {len(hosts)}")
    return next(iter(hosts.values()))


class Cluster(msgspec.Struct, frozen=True):
    """What was seen of all hosts in one turn. Where an HMM is silent there are no devices of its host, where a pool is,
    no ranks."""

    hosts: dict[HostId, HostStatus]
    in_force: InForce

    # ---- of each host, put together

    @property
    def devices(self) -> tuple[DeviceStatus, ...]:
        """Of all hosts, in the order that plans take them in."""
        return tuple(device for host in self.hosts.values() if host.hmm is not None for device in host.hmm.devices)

    @property
    def failed(self) -> dict[str, str]:
        """Devices that cannot be used, with the reason."""
        return {device.device: device.failure for device in self.devices if device.failure}

    @property
    def attached(self) -> dict[str, str]:
        """By device, the incarnation of the rank that is attached to it."""
        return {device.device: device.attached for device in self.devices if device.attached}

    @property
    def ranks(self) -> dict[int, PoolRank]:
        """Living ranks, by slot."""
        return {rank.slot: rank for host in self.hosts.values() if host.pool is not None for rank in host.pool.ranks}

    @property
    def pools_answer(self) -> bool:
        """Whether all living ranks are known."""
        return all(host.pool is not None for host in self.hosts.values())

    @property
    def standby(self) -> int:
        """Processes that wait for a seat."""
        return sum(host.pool.standby for host in self.hosts.values() if host.pool is not None)

    @property
    def cores(self) -> int:
        """That ranks may share; 0 where no pool says."""
        return sum(host.pool.cores for host in self.hosts.values() if host.pool is not None)

    @property
    def threads_max(self) -> int:
        """That a rank computes with."""
        return min((host.pool.threads_max for host in self.hosts.values() if host.pool is not None), default=1)

    def startable(self, seats: Sequence[Seat]) -> list[Seat]:
        """Those of `seats` that can be filled now: their HMM has let go of their last holders, and standbys wait."""
        attached, found = self.attached, []
        for name, host in self.hosts.items():
            free = [seat for seat in seats if seat.host == name and seat.device not in attached]
            found += free[: host.pool.num_startable] if host.pool is not None else []
        return found

    # ---- of the deployment

    @property
    def phase(self) -> Literal["empty", "loading", "ready", "failed"] | None:
        """Of the model's load; None while that is not known."""
        return self._hmm.phase if self._hmm is not None else None

    @property
    def error(self) -> Refused | None:
        """Why it failed."""
        return self._hmm.error if self._hmm is not None else None

    @property
    def bytes_loaded(self) -> tuple[int, int]:
        """Bytes that were read of the checkpoint, and all that are to be."""
        return (self._hmm.bytes_done, self._hmm.bytes_total) if self._hmm is not None else (0, 0)

    @property
    def memory(self) -> MemoryFacts | None:
        """What plans must know of memory, where a model is loaded."""
        return self._hmm.memory if self._hmm is not None else None

    @property
    def members(self) -> tuple[int, ...]:
        """Slots that take part in steps, or did before they were parked."""
        return self._hmm.members if self._hmm is not None else ()

    @property
    def is_running(self) -> bool:
        """Whether they are let step."""
        return self._hmm is not None and self._hmm.running

    @property
    def transition(self) -> TransitionStatus | None:
        """The latest one, also when it is over."""
        return self._hmm.transition if self._hmm is not None else None

    @property
    def _hmm(self) -> HmmStatus | None:
        return _only(self.hosts).hmm
