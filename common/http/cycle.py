"""One request and its answer, as uvicorn has it, for older clients and for bodies that nobody reads."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class Cycle(RequestResponseCycle):
    """`is_plain`: the answer has no chunks and ends with the connection, for HTTP/1.0. `is_short`: where nobody reads
    the request's body it is passed over to reach the next request; else the connection ends with the answer."""

    is_plain = False
    is_short = False

    async def send(self, message: Any) -> None:
        """The `send` of ASGI."""
        if not self.response_started:
            # RFC 9112 section 9.3. Who waits for a 100 may send the body or not: nobody knows where a request begins.
            if self.more_body and (self.waiting_for_100_continue or not self.is_short):
                self.keep_alive = False
        elif self.is_plain:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)

    def make_plain(self) -> None:
        """Answer a client of HTTP/1.0, which knows no chunks (RFC 9112 section 6.1)."""
        self.is_plain = True
        self.chunked_encoding = False

    def disconnect(self) -> None:
        """Nobody hears the application any more; it sees that."""
        if not self.response_complete:
            self.disconnected = True
            self.message_event.set()
