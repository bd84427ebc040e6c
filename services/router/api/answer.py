"""Sends a generation's answer: an ASGI loop of its own, because every token passes here.

One task per request waits for its streams and writes all that has come, in pieces where it is much; another waits for
the client to leave. Whatever can be refused at once is refused with a status: all of admission is done before this
begins, and a rank refuses within a step. So the head of a stream goes out with its first token or after HEAD_S,
whichever comes first; from then on an error is an event. A stream that has nothing to say, because it waits for its
turn, its prompt is computed or its rank is being replaced, says so in a comment from time to time: proxies cut what is
silent.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from starlette.responses import Response

from elasticmoe.common.http.body import Receive
from elasticmoe.common.http.door import Scope, Send
from elasticmoe.common.http.errors import error_response
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.sse import escape_separators
from elasticmoe.services.router.api.generate import Generation
from elasticmoe.services.router.api.logprobs import PIECE_TOKENS
from elasticmoe.services.router.api.pieces import CHUNK_BYTES, send_json, send_pieces
from elasticmoe.services.router.dispatch.streams import Ending, Output, Stream

HEAD_S = 0.5
TICK_S = 0.001  # a timer may come early by so much
SLOW_READER_S = 60.0  # after the deadline of the last stream: for a client that reads slowly
COMMENT = b": keep-alive\n\n"  # clients of server-sent events skip lines that begin with a colon


class Renderer(Protocol):
    """What differs between the endpoints. Nothing that it does in one go takes long."""

    def is_ready(self, generation: Generation, index: int) -> bool:
        """Whether all is there that stands before a choice's first text."""

    async def opening(self, generation: Generation, index: int) -> list[bytes]:
        """Events before a choice's first text, in pieces. Called once, when it `is_ready`."""

    def events(self, index: int, stream: Stream, output: Output, finish_reason: str | None) -> bytes:
        """Events for new output, and for the end where there is one."""

    def ending(self, generation: Generation) -> bytes:
        """The last events of a stream, once all choices have ended."""

    def failing(self, error: ElasticMoEError) -> bytes:
        """The last events of a stream that has begun and fails."""

    async def gather(self, generation: Generation, index: int, output: Output) -> None:
        """Without streaming: take a choice's new output for `body`. Called when it `is_ready`."""

    def body(self, generation: Generation) -> list[bytes]:
        """The whole answer of what was gathered, in pieces."""


class _Silence:
    """Wakes a stream's task when its client has heard nothing for a while: first for HEAD_S, then for `every_s` (0:
    never again). One timer that looks seldom, whatever number of tokens passes in between."""

    def __init__(self, wake: asyncio.Event, every_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = wake
        self._every_s = every_s
        self._patience_s = HEAD_S
        self._heard_at = self._loop.time()
        first_s = min(HEAD_S, every_s or HEAD_S)  # which may begin to count before HEAD_S has passed
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(first_s, self._look)
        self.is_due = False

    def broken(self) -> None:
        """The client hears something now."""
        self.is_due = False
        self._heard_at = self._loop.time()
        self._patience_s = self._every_s

    def end(self) -> None:
        """Look no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if not self._patience_s:
            return
        left_s = self._patience_s - (self._loop.time() - self._heard_at)
        if left_s < TICK_S:
            self.is_due = True
            self._wake.set()
            left_s = self._every_s
        if left_s > 0.0:
            self._timer = self._loop.call_later(left_s, self._look)


class Answer(Response):
    """The response of one generation; owns it. `keepalive_s`: how long a stream is silent at most; 0: for ever."""

    def __init__(
        self, generation: Generation, renderer: Renderer, *, is_stream: bool, keepalive_s: float = 0.0
    ) -> None:
        super().__init__()
        self._generation = generation
        self._renderer = renderer
        self._is_stream = is_stream
        self._keepalive_s = keepalive_s
        self._num_rendered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until everything has ended or the client has left."""
        watcher = asyncio.create_task(_watch(receive, self._generation))
        last = max(stream.deadline for stream in self._generation.streams)
        try:
            async with asyncio.timeout(last - time.monotonic() + SLOW_READER_S):
                error = await (self._stream(send) if self._is_stream else self._collect(send))
                if error is not None:
                    await error_response(error)(scope, receive, send)
        except TimeoutError:
            pass  # the answer stays incomplete, so the server closes the connection
        finally:
            watcher.cancel()
            self._generation.close()

    async def _collect(self, send: Send) -> ElasticMoEError | None:
        """Wait for all choices and send them; or return the error that the answer is to be."""
        generation = self._generation
        running = dict(enumerate(generation.streams))
        while running:
            await _woken(generation)
            await self._gather(running)
            if generation.is_abandoned:
                return None
            error = _first_error(generation)
            if error is not None:
                return error
        await send_json(send, self._renderer.body(generation), generation.turns, self._is_gone)
        return None

    async def _gather(self, running: dict[int, Stream]) -> None:
        """Take what has come where that is much; those that have ended leave `running`. Else all comes at the end."""
        renderer, generation = self._renderer, self._generation
        for index, stream in list(running.items()):
            while stream.has_ended or stream.num_infos >= PIECE_TOKENS:
                if generation.is_abandoned or not renderer.is_ready(generation, index):
                    break
                output = stream.take(PIECE_TOKENS)
                await renderer.gather(generation, index, output)
                if self._is_due_to_pause(output):
                    await generation.turns.wait()
                if stream.has_ended and not stream.has_output:
                    del running[index]
                    break

    def _is_gone(self) -> bool:
        return self._generation.is_abandoned

    def _is_due_to_pause(self, output: Output) -> bool:
        """Whether others shall have their turn now: PIECE_TOKENS were rendered, of whichever choices."""
        self._num_rendered += len(output.tokens)
        if self._num_rendered < PIECE_TOKENS:
            return False
        self._num_rendered = 0
        return True

    async def _stream(self, send: Send) -> ElasticMoEError | None:
        """Send what comes; or return the error of a request that failed before anything was sent."""
        silence = _Silence(self._generation.wake, self._keepalive_s)
        try:
            return await self._send_events(send, silence)
        finally:
            silence.end()

    async def _send_events(self, send: Send, silence: _Silence) -> ElasticMoEError | None:
        generation = self._generation
        running = dict(enumerate(generation.streams))
        opened: set[int] = set()
        has_begun = False
        while running:
            await _woken(generation)
            if generation.is_abandoned:
                return None
            events = await self._take_events(running, opened)
            error = _first_error(generation)
            if error is not None:
                if not has_begun:
                    return error
                events.append(self._renderer.failing(error))
                running.clear()
            elif not running:
                events.append(self._renderer.ending(generation))
            data = escape_separators(b"".join(events))
            if silence.is_due and has_begun and not data:
                data = COMMENT
            if not (data or silence.is_due):
                continue
            silence.broken()
            if not has_begun:
                has_begun = True
                await _begin(send)
            if len(data) > CHUNK_BYTES:
                await send_pieces(send, [data], generation.turns, self._is_gone, is_last=not running)
            elif data:
                await send({"type": "http.response.body", "body": data, "more_body": bool(running)})
        return None

    async def _take_events(self, running: dict[int, Stream], opened: set[int]) -> list[bytes]:
        """What has come for the choices in `running`; those that have ended leave it."""
        renderer, generation = self._renderer, self._generation
        events: list[bytes] = []
        size = 0
        for index, stream in list(running.items()):
            if index not in opened:
                if not (stream.num_tokens or stream.has_ended) or not renderer.is_ready(generation, index):
                    continue
                opened.add(index)
                opening = await renderer.opening(generation, index)
                events += opening
                size += sum(map(len, opening))
            output = stream.take(PIECE_TOKENS)
            has_more = stream.has_output
            is_last = stream.ending is not None and not has_more
            event = renderer.events(index, stream, output, _finish_reason(stream.ending) if is_last else None)
            events.append(event)
            size += len(event)
            if is_last:
                del running[index]
            if output.tokens and self._is_due_to_pause(output):
                await generation.turns.wait()
            if has_more or size > CHUNK_BYTES:
                generation.wake.set()  # send that first; the rest in the next round
                if size > CHUNK_BYTES:
                    break
        return events


def _finish_reason(ending: Ending | None) -> str | None:
    return ending.reason if ending is not None and ending.kind == "finish" else None


def _first_error(generation: Generation) -> ElasticMoEError | None:
    """The first choice's error, in order of the choices."""
    for stream in generation.streams:
        if stream.ending is not None and stream.ending.kind == "error":
            return stream.ending.error or Unavailable("the request failed")
    return None


async def _begin(send: Send) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _woken(generation: Generation) -> None:
    await generation.wake.wait()
    generation.wake.clear()


async def _watch(receive: Receive, generation: Generation) -> None:
    """Notice that the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.abandon()
