"""One streaming completion: sent on a connection of its own, its events noted as they come.

A parser in C (httptools) on asyncio's protocol, because the client shares cores with what it measures: some 10 µs of a
core per event, where httpx takes several times that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

import httptools
import msgspec

from elasticmoe.cli.load.endpoint import Endpoint
from elasticmoe.cli.load.sample import BAD_STREAM, CUT_OFF, TIMED_OUT, Sample
from elasticmoe.cli.sse import EventReader
from elasticmoe.common.protocol.errors import ElasticMoEError

CONNECT_S_MAX = 10.0
_EVENT_BYTES_MAX = 1 << 20
_ERROR_BYTES_MAX = 64 << 10
_CODE_CHARS_MAX = 64
_DONE = b"[DONE]"

OnText = Callable[[float, str], None]


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    code: str | int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_decoder = msgspec.json.Decoder(_Event)


async def complete(
    endpoint: Endpoint,
    request: bytes,
    sample: Sample,
    *,
    silence_s: float | None = None,
    on_text: OnText | None = None,
) -> None:
    """Send `request` (Endpoint.request) and note in `sample` what came of it, until the answer's end.

    `on_text`: is told of each part of the answer, with its time. A server that says nothing for `silence_s` seconds
    has failed. Raises OSError when no connection can be made; what happens after that is in `sample.error`. The
    connection is closed at the end, also when the caller is cancelled; then the sample has no error.
    """
    loop = asyncio.get_running_loop()
    sample.error, sample.status = None, 0  # another attempt may have left its own
    async with asyncio.timeout(CONNECT_S_MAX):
        _, answer = await loop.create_connection(
            lambda: _Answer(loop, request, sample, on_text), endpoint.host, endpoint.port, ssl=endpoint.tls
        )
    try:
        sample.error = await answer.over(silence_s)
    finally:
        sample.ended = time.monotonic()
        sample.tokens = sample.tokens or len(sample.arrivals)
        answer.close()


class _Answer(asyncio.Protocol):
    """Reads one answer. httptools calls the `on_` methods; an exception in them would lose its meaning, so they only
    keep what came."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request: bytes, sample: Sample, on_text: OnText | None) -> None:
        self._loop = loop
        self._request = request
        self._sample = sample
        self._on_text = on_text
        self._over: asyncio.Future[str] = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._bodies: list[bytes] = []
        self._events = EventReader(_EVENT_BYTES_MAX)
        self._rest = b""  # of what is no stream of events
        self._is_complete = False
        self._is_whole = False
        self._heard = 0.0

    async def over(self, silence_s: float | None) -> str:
        """Wait for the end; the error, empty for none."""
        if silence_s is None:
            return await self._over
        while not self._over.done():
            left = self._heard + silence_s - time.monotonic()
            if left <= 0:
                return TIMED_OUT
            await asyncio.wait([self._over], timeout=left)
        return self._over.result()

    def close(self) -> None:
        """Let the connection go. Idempotent."""
        if self._transport is not None:
            self._transport.close() if self._over.done() else self._transport.abort()

    # ---- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._heard = self._sample.sent = time.monotonic()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the events in it."""
        if self._over.done():
            return
        now = self._heard = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._finish(BAD_STREAM)
            return
        bodies, self._bodies = self._bodies, []
        for body in bodies:
            self._take(body, now)
        if self._is_complete:
            self._finish(self._verdict())

    def connection_lost(self, _: Exception | None) -> None:
        """The end of an answer without a length, or of one that was cut off."""
        self._finish(self._verdict())

    def _finish(self, error: str) -> None:
        if not self._over.done():
            self._over.set_result(error)

    # ---- httptools

    def on_headers_complete(self) -> None:
        """The status is known."""
        self._sample.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """A part of the body, whose borders mean nothing."""
        self._bodies.append(body)

    def on_message_complete(self) -> None:
        """The answer's end, unless it only said to wait for another."""
        self._is_complete = self._sample.status >= 200

    # ---- events

    def _take(self, body: bytes, now: float) -> None:
        if self._sample.status != 200:
            self._rest = (self._rest + body)[:_ERROR_BYTES_MAX]
            return
        try:
            for event in self._events.feed(body):
                if event.comment is None and event.data != _DONE and not self._over.done():
                    self._note(event.data, now)
        except ElasticMoEError:
            self._finish(BAD_STREAM)

    def _note(self, raw: bytes, now: float) -> None:
        try:
            event = _decoder.decode(raw)
        except msgspec.DecodeError:
            self._finish(BAD_STREAM)
            return
        if event.error is not None:
            self._finish(_code(event.error, "stream_error"))
        if event.choices:
            self._sample.arrivals.append(now)
            choice = event.choices[0]
            self._is_whole = self._is_whole or choice.finish_reason is not None
            if self._on_text is not None:
                self._on_text(now, choice.text)
        if event.usage is not None:
            self._sample.tokens = event.usage.completion_tokens
            self._is_whole = True

    def _verdict(self) -> str:
        """What the answer was, now that nothing more comes of it."""
        status = self._sample.status
        if status == 200:
            return "" if self._is_whole else CUT_OFF
        if not status:
            return CUT_OFF
        try:
            error = _decoder.decode(self._rest).error
        except msgspec.DecodeError:
            error = None  # not OpenAI's: a proxy's page
        return _code(error, f"http_{status}")


def _code(error: _Error | None, otherwise: str) -> str:
    return str(error.code)[:_CODE_CHARS_MAX] if error is not None and error.code else otherwise
