"""uvicorn's HTTP protocol with the bounds that it lacks: on connections, on headers, and on peers that only wait.

uvicorn alone gives a client all the time in the world to send its headers, any number of them, and never gives up on
one that does not read its answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.router.api.schemas import ErrorBody, ErrorDetail

HEADER_SECONDS_MAX = 10.0
HEADER_BYTES_MAX = 64 * 1024
STALLED_SECONDS_MAX = 60.0  # for a client that has stopped reading
FRAMING_FACTOR = 8  # bytes on the wire per byte of a body, at worst: chunks of one byte


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Subclasses made by `guarded` set the limits that depend on the configuration."""

    connections_max = 1_024
    body_bytes_max = 8 * 1024 * 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: asyncio.TimerHandle | None = None  # for the peer to finish what it sends
        self._stalled: asyncio.TimerHandle | None = None  # for the peer to read
        self._is_in_headers = False
        self._num_bytes = 0  # of the present request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse a connection too many at once: it costs nothing that way."""
        super().connection_made(transport)
        if len(self.connections) > self.connections_max:
            transport.close()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_waiting()
        self._resumed()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count before and after parsing: whoever sends headers or framing without end is cut off."""
        if not self._is_answering:
            self._wait()
        self._num_bytes += len(data)
        super().data_received(data)
        most = HEADER_BYTES_MAX if self._is_in_headers else HEADER_BYTES_MAX + FRAMING_FACTOR * self.body_bytes_max
        if self._num_bytes > most and not self.transport.is_closing():
            self._refuse(431, "the request's headers are too large")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_in_headers = True
        self._num_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers, which come after a chunked body, are ignored: nobody reads them and they have no bound."""
        if self._is_in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers are complete; from here the body has its own deadline."""
        self._is_in_headers = False
        self._stop_waiting()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The peer does not read: give it a while."""
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_SECONDS_MAX, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """The peer reads again."""
        self._resumed()
        super().resume_writing()

    def send_400_response(self, _msg: str) -> None:
        """What cannot be parsed is answered in the same shape as every other error."""
        self._refuse(400, "the request is not valid HTTP")

    def _refuse(self, status: int, text: str) -> None:
        code = "bad_http" if status == 400 else "headers_too_large"
        body = msgspec.json.encode(ErrorBody(ErrorDetail(text, "invalid_request_error", None, code)))
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        if not self._is_answering or not self.cycle.response_started:  # never into the middle of an answer
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        """An endpoint works for this connection."""
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, whatever its declared type
        return cycle is not None and not cycle.response_complete

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS_MAX, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _resumed(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def guarded(connections_max: int, body_bytes_max: int) -> type[GuardedProtocol]:
    """The protocol with these limits, for uvicorn's `http` option."""
    limits = {"connections_max": connections_max, "body_bytes_max": body_bytes_max}
    return type("ConfiguredProtocol", (GuardedProtocol,), limits)
