"""A connection that ends in order: the peer hears the last answer, and has a bounded time for everything.

A socket that is closed while bytes are unread resets the connection, and the peer may lose an answer that it has not
read yet. So the end is told first, and what still comes is thrown away for a while (RFC 9112 section 9.6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

STALLED_SECONDS_MAX = 60.0  # for a peer that has stopped reading
LINGER_SECONDS = 2.0  # for a peer that has been told the end


class OrderlyProtocol(HttpToolsProtocol):
    """uvicorn's protocol with deadlines for peers that only wait, and an end without resets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_closing = False
        self._waiting: asyncio.TimerHandle | None = None  # for the peer to finish what it sends, or to close
        self._stalled: asyncio.TimerHandle | None = None  # for the peer to read

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self.is_closing = True
        self._stop_waiting()
        self._resumed()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The peer does not read: give it a while."""
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_SECONDS_MAX, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """The peer reads again."""
        self._resumed()
        super().resume_writing()

    def _resumed(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _await(self, seconds: float, then: Callable[[], None]) -> None:
        """Call `then` in a while, unless something is awaited already."""
        if self._waiting is None:
            self._waiting = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _tell_end(self) -> None:
        """Send what was written, tell the peer that it was all, and wait for it to close, LINGER_SECONDS at most."""
        self.transport.write_eof()
        self.flow.resume_reading()  # only so is the peer's end seen
        self._linger(self.transport.get_write_buffer_size(), self.loop.time())

    def _linger(self, unsent: int, since: float) -> None:
        self._waiting = self.loop.call_later(LINGER_SECONDS, self._end, unsent, since)

    def _end(self, unsent_before: int, since: float) -> None:
        """The peer has had its time. Where it still reads what was written it has more, as long as it goes on."""
        unsent, now = self.transport.get_write_buffer_size(), self.loop.time()
        if not unsent_before or (unsent == unsent_before and now - since > STALLED_SECONDS_MAX):
            self.transport.abort()
        else:
            self._linger(unsent, since if unsent == unsent_before else now)


class Outlet:
    """A transport as applications' answers see it: to close it is to close the connection in order."""

    __slots__ = ("_connection", "close", "write")

    def __init__(self, connection: OrderlyProtocol, close: Callable[[], None]) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.close = close

    def is_closing(self) -> bool:
        """Nothing can be written any more."""
        return self._connection.is_closing
