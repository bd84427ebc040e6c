"""What to do next to bring the deployment to its layout. Pure: no sockets, no store, no clock.

The scaler is level-triggered: it observes what is, compares it with the layout that should be, and takes the next
steps. So a restart of any part needs no memory of what was in flight: the next observation says what is missing.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Literal

import msgspec

from common.layout import Layout, Seat
from common.protocol.replies import Refused
from common.protocol.scaler import HmmStatus, PoolStatus

FLIP_SECONDS_MAX = 5.0
Phase = Literal["starting", "loading", "attaching", "serving", "degraded", "failed"]


class Load(msgspec.Struct, frozen=True, tag=True):
    """Let the HMM create and fill the layout's memory."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """Seat a standby."""

    seat: Seat


class Publish(msgspec.Struct, frozen=True, tag=True):
    """Let the ranks of all seats step together, or park them."""

    running: bool


class AnnounceLayout(msgspec.Struct, frozen=True, tag=True):
    """The layout serves: write it to the store, where the routers see it."""


Action = Load | Start | Publish | AnnounceLayout


class Observed(msgspec.Struct, frozen=True):
    """What the scaler saw last; None for a part that does not answer.

    `starting`: seats whose rank was asked for and has neither come nor failed. `restarts_left`: ranks that may still be
    replaced in this window; `is_backing_off`: not yet the next one; `last_exit`: why the last one ended.
    `committed_for_s`: for how long the HMM has had a committed layout that the ranks have not flipped to. `lost`: slots
    whose devices have lost their memory, and which an operation takes out of the layout. `refusal`: why nothing may be
    loaded.
    """

    hmm: HmmStatus | None
    pool: PoolStatus | None
    announced_epoch: int
    starting: frozenset[int]
    ever_served: bool
    restarts_left: int
    is_backing_off: bool = False
    last_exit: str = ""
    committed_for_s: float = 0.0
    lost: frozenset[int] = frozenset()
    refusal: Refused | None = None


class Decision(msgspec.Struct, frozen=True):
    """The next steps, the phase they belong to, and why. `error` is set in the phase `failed`."""

    actions: tuple[Action, ...]
    phase: Phase
    reason: str
    error: Refused | None = None


def decide(layout: Layout, seen: Observed) -> Decision:
    """The next steps toward `layout`."""
    if seen.hmm is None:
        return Decision((), _waiting(seen), "the HMM does not answer")
    if seen.hmm.phase == "failed":
        return Decision((), "failed", "the HMM could not load the model", seen.hmm.error)
    if seen.hmm.phase == "empty" and seen.refusal is not None:
        return Decision((), "failed", "what an earlier run has left is of other settings", seen.refusal)
    if seen.hmm.phase == "empty":
        return Decision((Load(),), "loading", "the HMM holds nothing")
    if seen.hmm.phase == "loading":
        return Decision((), "loading", "the HMM loads the model")
    if seen.pool is None:
        return Decision((), _waiting(seen), "the worker pool does not answer")
    return _decide_ranks(layout, seen, seen.hmm, seen.pool)


def _decide_ranks(layout: Layout, seen: Observed, hmm: HmmStatus, pool: PoolStatus) -> Decision:
    ranks = {rank.slot: rank for rank in pool.ranks}
    lost = [seat for seat in layout.seats if seat.slot in seen.lost]
    empty = [seat for seat in layout.seats if seat.slot not in ranks and seat.slot not in seen.starting | seen.lost]
    ready = all(seat.slot in ranks and ranks[seat.slot].ready for seat in layout.seats)
    if empty:
        if seen.restarts_left <= 0:
            error = Refused(
                "rank_crash_loop", f"ranks {_names(empty)} died too often, last of: {seen.last_exit}", False
            )
            return Decision((), "failed", error.message, error)
        if seen.is_backing_off:
            return Decision((), _waiting(seen), f"ranks {_names(empty)} died again; the next start waits")
        # A seat is filled only after the HMM has let go of its last holder.
        attached = {device.device for device in hmm.devices if device.attached}
        free = [seat for seat in empty if seat.device not in attached]
        starts = tuple(Start(seat) for seat in free[: pool.num_startable])
        return Decision(starts, _waiting(seen), f"seats {_names(empty)} have no rank; {pool.standby} standbys")
    if lost and _has_to_park(hmm, lost, ranks):
        return Decision((Publish(False),), _waiting(seen), f"nobody steps by layout {layout.epoch} for now")
    if lost:
        return Decision((), _waiting(seen), f"the devices of {_names(lost)} are lost; the layout goes on without them")
    if not ready:
        return Decision((), _waiting(seen), "ranks attach")
    if not hmm.running or hmm.members != layout.slots:
        if hmm.running and _is_flipping(hmm) and seen.committed_for_s < FLIP_SECONDS_MAX:
            # The ranks are about to take the new membership themselves, at a step that they agree on.
            return Decision((), "serving", "the ranks flip to the new layout")
        return Decision((Publish(True),), _waiting(seen), "all ranks are ready")
    if seen.announced_epoch != layout.epoch:
        return Decision((AnnounceLayout(),), "serving", f"layout {layout.epoch} serves")
    return Decision((), "serving", "nothing to do")


def _has_to_park(hmm: HmmStatus, lost: Sequence[Seat], ranks: Container[int]) -> bool:
    """Whether ranks wait for something that will not come, with a seat lost that nobody fills."""
    if not hmm.running:
        return _is_flipping(hmm)  # who does not step cannot flip; parked anew, what was committed is in force
    # A member ended while no HMM looked: the others wait for it.
    attached = {device.device for device in hmm.devices if device.attached}
    return any(seat.slot in hmm.members and seat.slot not in ranks and seat.device not in attached for seat in lost)


def _is_flipping(hmm: HmmStatus) -> bool:
    return hmm.transition is not None and hmm.transition.phase == "committed"


def _waiting(seen: Observed) -> Phase:
    return "degraded" if seen.ever_served else "attaching"


def _names(seats: Sequence[Seat]) -> str:
    return ", ".join(str(seat.rank) for seat in seats)
