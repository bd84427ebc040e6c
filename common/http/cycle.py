"""One request and its answer, as uvicorn has it, for bodies that nobody reads and for clients of HTTP/1.0."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class Cycle(RequestResponseCycle):
    """`keep_alive`: whether another request may follow. An answer that begins before its request has come whole ends
    the connection, unless the rest is short enough to be passed over (RFC 9112 section 9.3); where the client waits for
    a 100 nobody knows whether it sends the rest at all."""

    may_keep_alive = False

    @property
    def is_reading(self) -> bool:
        """The request asks for no work, and its answer has not begun."""
        return self.scope["method"] in _READING and not self.response_started

    def expect_rest(self, *, is_short: bool) -> None:
        """The head has come."""
        self.may_keep_alive = self.keep_alive
        self.keep_alive = self.keep_alive and is_short and not self.waiting_for_100_continue

    def complete(self) -> None:
        """The request has come whole."""
        if not self.response_started:
            self.keep_alive = self.may_keep_alive
        if not self.response_complete:
            self.more_body = False
            self.message_event.set()

    def disconnect(self) -> None:
        """Nobody hears the application any more; it sees that."""
        if not self.response_complete:
            self.disconnected = True
            self.message_event.set()


class PlainCycle(Cycle):
    """For HTTP/1.0, which knows no chunks: the answer ends with the connection (RFC 9112 section 6.1)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chunked_encoding = False

    async def send(self, message: Any) -> None:
        """The `send` of ASGI, for a body of any length."""
        if self.response_started:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
