"""What the reconciler goes on from: one value, a new one in each turn. Pure data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from elasticmoe.common.devices.names import hardware_of
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.control.autoscaling import Autoscaling
from elasticmoe.services.scaler.control.watchdog import Watched
from elasticmoe.services.scaler.operation.operation import Operation

DeploymentPhase = Literal["starting", "loading", "attaching", "serving", "degraded", "failed"]


class Status(msgspec.Struct, frozen=True):
    """The deployment's phase, and why. `error` is set in the phase `failed`. `reload`: since ranks were ended to make
    room for a load, or may have been before this scaler began, until when that is tried, and when next; else zeros.
    `without`: failed devices that the latest load leaves out."""

    phase: DeploymentPhase
    reason: str
    error: Refused | None = None
    reload: tuple[float, float] = (0.0, 0.0)
    without: tuple[str, ...] = ()


class Orphans(msgspec.Struct, frozen=True):
    """What no operation answers for, and since when that has been seen."""

    since: float
    reason: str


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What decisions are made from and outlives a turn.

    status: of the deployment
    ever_served: it has been serving since this scaler began
    operation: the one in progress; one that has just ended is in it for the end of its turn
    last: the newest one that ended
    committed_at: since when the HMM has had a committed layout that the ranks have not flipped to
    orphans: ranks or a transition that no operation answers for
    leave_out_at: lost devices are left out not before
    watched: the progress of ranks
    stall_s: how long that may stand
    autoscaling: what the policy goes on from
    """

    status: Status = Status("starting", "")
    ever_served: bool = False
    operation: Operation | None = None
    last: Operation | None = None
    committed_at: float | None = None
    orphans: Orphans | None = None
    leave_out_at: float = 0.0
    watched: Watched = Watched()
    stall_s: float
    autoscaling: Autoscaling = Autoscaling()

    @property
    def is_quiet(self) -> bool:
        """Whether it serves and nobody computes."""
        return self.status.phase == "serving" and self.watched.is_quiet

    def lost_slots(self, committed: Layout | None) -> frozenset[int]:
        """Slots of the committed layout, where it is known, whose devices have been lost, and which an operation leaves
        out or is about to: no rank is seated there."""
        seats = committed.seats if committed is not None else ()
        if self.operation is not None:  # a rebalance, which has no legs, knows the device and not its seat
            meanwhile = _on(seats, self.operation.lost_meanwhile)
            return meanwhile | {seat.slot for seat in self.operation.lost}
        return _on(seats, self.last.lost_devices if self.last is not None else ())


def _on(seats: Iterable[Seat], devices: Iterable[str]) -> frozenset[int]:
    """Slots of the seats on the hardware that these devices are of: it is lost as a whole."""
    lost = set(map(hardware_of, devices))
    return frozenset(seat.slot for seat in seats if hardware_of(seat.device) in lost)
