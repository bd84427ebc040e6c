"""The receiving side: keep a place, take a sequence over, or let go of either.

What another rank may have written, or may have the HMM write, belongs to nobody else meanwhile: a place ends with the
hand-over, with the sender's word, or RESERVATION_S after its last one. The sender does not let the HMM write later than
that (outgoing.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.errors import Conflict, Unavailable
from elasticmoe.common.protocol.peer import Reserved, Taken
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.rank import HandOver, Reserve, Unreserve
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.sequence import BlockHold, RequestKey

log = get_logger("migration")

RESERVATION_S = 30.0
REMEMBERED_MAX = 4096  # sequences taken over, for hand-overs that are repeated


class _Reservation:
    """A place and since when nothing was heard; None until the next turn."""

    __slots__ = ("heard_at", "hold")

    def __init__(self, hold: BlockHold) -> None:
        self.hold = hold
        self.heard_at: float | None = None


class Incoming:
    """Owns the reservations that others have here. `release(router, request_id)` ends a sequence wherever it is now."""

    def __init__(self, seat: StartRank, engine: Engine, release: Callable[[bytes, str], None]) -> None:
        self._rank: RankId = seat.rank
        self._slot = seat.slot
        self._incarnation = seat.incarnation
        self._engine = engine
        self._release = release
        self._reservations: dict[tuple[str, RequestKey], _Reservation] = {}
        self._senders: OrderedDict[RequestKey, str] = OrderedDict()  # of what was taken over
        self.taken_over = 0

    @property
    def num_places(self) -> int:
        """Places that are kept."""
        return len(self._reservations)

    def reserve(self, sender: str, message: Reserve, *, is_leaving: bool) -> Reserved:
        """Keep a place. Raises Unavailable `leaving`, Conflict, or what the scheduler refuses."""
        key = (message.router, message.request_id)
        if self._senders.get(key) == sender:
            del self._senders[key]  # the sender has it again: what it says from now on is not about what it gave before
        reservation = self._reservations.get((sender, key))
        if reservation is None:
            if is_leaving:
                raise Unavailable(f"rank {self._rank} hands its own sequences over", code="leaving")
            if self._engine.scheduler.get(*key) is not None:
                raise Conflict(f"request id {message.request_id} is in use", code="duplicate_request_id")
            reservation = _Reservation(self._engine.scheduler.hold(message.tokens, message.num_blocks))
            self._reservations[sender, key] = reservation
        else:
            self._engine.scheduler.extend(reservation.hold, message.num_blocks)
        reservation.heard_at = None
        hold = reservation.hold
        return Reserved(message.request_id, self._incarnation, self._slot, tuple(hold.blocks), hold.num_cached)

    def unreserve(self, sender: str, message: Unreserve) -> None:
        """The sequence is not for this rank: free its place, or the sequence itself where it came from `sender`."""
        key = (message.router, message.request_id)
        reservation = self._reservations.pop((sender, key), None)
        if reservation is not None:
            self._engine.scheduler.release_hold(reservation.hold)
        if self._senders.get(key) == sender:
            del self._senders[key]
            self._release(*key)

    def take(self, sender: str, message: HandOver, now: float) -> Taken:
        """Go on with a sequence. Raises Conflict (`not_reserved`) or what the engine refuses, and changes nothing."""
        key = (message.router, message.request.request_id)
        if self._senders.get(key) == sender:
            return Taken(message.request.request_id)  # said before: the answer was lost
        reservation = self._reservations.get((sender, key))
        here = self._engine.scheduler.get(*key)
        if reservation is None and here is not None and here.num_output >= len(message.output):
            self._senders[key] = sender  # taken by this rank's predecessor, whose answer was lost with it
            return Taken(message.request.request_id)
        if reservation is None:
            raise Conflict(f"no place is kept for request {message.request.request_id}", code="not_reserved")
        failpoint("rank.take.before")
        self._engine.adopt(reservation.hold, message, now)
        failpoint("rank.take.after")
        del self._reservations[sender, key]
        self._senders[key] = sender
        if len(self._senders) > REMEMBERED_MAX:
            self._senders.popitem(last=False)
        self.taken_over += 1
        return Taken(message.request.request_id)

    def expire(self, now: float) -> None:
        """Free the places whose senders have said nothing for RESERVATION_S."""
        for name, reservation in list(self._reservations.items()):
            if reservation.heard_at is None:
                reservation.heard_at = now
            elif now - reservation.heard_at > RESERVATION_S:
                log.warning("reservation expired", sender=name[0], stream=name[1][1])
                self._engine.scheduler.release_hold(reservation.hold)
                del self._reservations[name]
