"""Who may stay connected: a bounded number of places, which idle connections leave first. Pure: time is an argument.

A connection that finds no place becomes a guest. A guest's request is read: health checks are answered, everything
else is refused with a status, so that nobody is turned away without a word.
"""

from __future__ import annotations

from typing import Generic, TypeVar

C = TypeVar("C")

GRACE_S = 1.0  # for a connection to send its first request before another one may take its place


class Places(Generic[C]):
    """The connections of one listener, for one asyncio loop. `most`: places. `guests_max`: of guests, and also of
    connections that wait for their peer to hear the last answer."""

    def __init__(self, most: int, guests_max: int) -> None:
        self.most = most
        self.guests_max = guests_max
        # Each in the order of their times: dicts keep the order of insertion.
        self._idle: dict[C, None] = {}
        self._fresh: dict[C, float] = {}
        self._guests: dict[C, None] = {}
        self._working: set[C] = set()
        self._lingering: set[C] = set()

    @property
    def num_taken(self) -> int:
        """Connections that have a place."""
        return len(self._idle) + len(self._fresh) + len(self._working)

    def enter(self, connection: C, now: float) -> tuple[bool, C | None]:
        """Give a new connection a place, or make it a guest. Returns whether it has a place, and the connection that
        must give way for it. Where all places are taken the one that has been idle longest leaves, else the one that
        has been sending its request longest, GRACE_S at least."""
        has_room, victim = self._make_room(now)
        if has_room:
            self._fresh[connection] = now
            return True, victim
        return False, self.demote(connection)

    def demote(self, connection: C) -> C | None:
        """Make a connection without a place a guest. Returns the guest that must be closed for it: the oldest one."""
        victim = None
        if len(self._guests) >= self.guests_max:
            victim = next(iter(self._guests))
            del self._guests[victim]
        self._guests[connection] = None
        return victim

    def promote(self, guest: C, now: float) -> tuple[bool, C | None]:
        """Give a guest, whose request has come, a place if there is one by now; as `enter` else."""
        has_room, victim = self._make_room(now)
        if has_room:
            self._guests.pop(guest, None)
            self._fresh[guest] = now
        return has_room, victim

    def begin(self, connection: C, now: float) -> None:
        """An idle connection begins to send a request."""
        if connection in self._idle:
            del self._idle[connection]
            self._fresh[connection] = now

    def work(self, connection: C) -> None:
        """A request has come whole: the connection keeps its place until `rest`."""
        if self._fresh.pop(connection, None) is not None:
            self._working.add(connection)

    def rest(self, connection: C) -> None:
        """All requests of the connection are answered; it waits for the next one."""
        if connection in self._working:
            self._working.remove(connection)
            self._idle[connection] = None

    def linger(self, connection: C) -> bool:
        """The connection's place is free; whether it may stay until its peer has heard the last answer."""
        self.leave(connection)
        if len(self._lingering) >= self.guests_max:
            return False
        self._lingering.add(connection)
        return True

    def leave(self, connection: C) -> None:
        """The connection has ended. Idempotent."""
        self._idle.pop(connection, None)
        self._fresh.pop(connection, None)
        self._guests.pop(connection, None)
        self._working.discard(connection)
        self._lingering.discard(connection)

    def _make_room(self, now: float) -> tuple[bool, C | None]:
        if self.num_taken < self.most:
            return True, None
        if self._idle:
            victim = next(iter(self._idle))
            del self._idle[victim]
            return True, victim
        if self._fresh:
            victim, since = next(iter(self._fresh.items()))
            if now - since >= GRACE_S:
                del self._fresh[victim]
                return True, victim
        return False, None
