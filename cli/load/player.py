"""Plays a trace: sends each arrival at its time, whatever has become of those before it (an open loop).

The schedule waits for nothing but the clock. Where the client is late by itself it says so: with each request, and
with all of them, because then the figures are its own and not the server's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from elasticmoe.cli.load.endpoint import Endpoint, Shape, body_of
from elasticmoe.cli.load.prompts import Prompts
from elasticmoe.cli.load.result import Result, gaps_of, not_sent, result_of
from elasticmoe.cli.load.sample import NO_CONNECTION, REFUSED, TIMED_OUT, Sample
from elasticmoe.cli.load.stream import complete
from elasticmoe.cli.traces.arrival import Arrival

OnResult = Callable[[Result, list[float]], None]


class Player:
    """One load. `on_result`: is told of each request once, with the gaps of its stream in seconds. `connections_max`:
    arrivals beyond so many under way are not sent, and told as such. `silence_s`: without a byte for so long a request
    has failed. `retry_s`: a request whose connection is refused, or that is told to come back (429, 503), is sent again
    so much later, until it is taken; its time counts from when it was due all the same. None: each is sent once. For
    one asyncio loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        prompts: Prompts,
        on_result: OnResult,
        *,
        connections_max: int,
        silence_s: float,
        retry_s: float | None = None,
    ) -> None:
        self._endpoints: tuple[Endpoint, ...] = (endpoint,)
        self._turn = 0
        self._model = model
        self._prompts = prompts
        self._on_result = on_result
        self._connections_max = connections_max
        self._silence_s = silence_s
        self._retry_s = retry_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._schedule: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._error: BaseException | None = None
        self._unbegun: dict[int, tuple[Arrival, float]] = {}  # a task that is cancelled before it ran tells nothing
        self.begun = 0.0
        self.num_retries = 0

    def set_endpoints(self, *endpoints: Endpoint) -> None:
        """Requests that are sent from now on go to these, in turn."""
        self._endpoints = endpoints

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return sum(task is not self._schedule for task in self._tasks)

    async def play(self, arrivals: Iterable[Arrival]) -> None:
        """Send all `arrivals`, ordered by time, and wait until the last one has ended; or until `stop`. Raises what
        `on_result` raises, when all others were cut off. Once."""
        self.begun = time.monotonic()
        self._schedule = self._spawn(self._send_all(arrivals))
        try:
            await self._over.wait()
        finally:
            self.stop()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._error is not None:
            raise self._error
        for number, (arrival, due) in self._unbegun.items():
            lag = max(0.0, time.monotonic() - due)
            self._on_result(result_of(number, arrival, Sample(asked=due), self.begun, lag), [])

    def stop(self) -> None:
        """Send nothing more, and cut off what is under way; it is told as interrupted. Idempotent."""
        self._over.set()
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()
            self._over.set()
        if not self._tasks:
            self._over.set()

    async def _send_all(self, arrivals: Iterable[Arrival]) -> None:
        for number, arrival in enumerate(arrivals):
            # Made before its time comes, so that making it makes nothing late.
            shape = Shape(self._model, arrival.input_tokens, arrival.output_tokens)
            body = body_of(shape, self._prompts.make(number, arrival))
            due = self.begun + arrival.at_s
            while (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            if len(self._tasks) > self._connections_max:  # this one is among them
                self._on_result(not_sent(number, arrival, time.monotonic() - due), [])
            else:
                self._unbegun[number] = (arrival, due)
                self._spawn(self._send(number, arrival, body, due))
            await asyncio.sleep(0)  # it begins before the next one is made; so does what came meanwhile

    async def _send(self, number: int, arrival: Arrival, body: bytes, due: float) -> None:
        lag = max(0.0, time.monotonic() - due)
        del self._unbegun[number]
        sample = Sample(asked=due)
        try:
            await self._attempt(body, sample)
            while self._retry_s is not None and (sample.status in REFUSED or sample.error == NO_CONNECTION):
                self.num_retries += 1
                sample.error = None  # it goes on
                await asyncio.sleep(self._retry_s)
                await self._attempt(body, sample)
        finally:
            self._on_result(result_of(number, arrival, sample, self.begun, lag), gaps_of(sample))

    async def _attempt(self, body: bytes, sample: Sample) -> None:
        endpoint = self._endpoints[self._turn % len(self._endpoints)]
        self._turn += 1
        try:
            await complete(endpoint, endpoint.addressed(body), sample, silence_s=self._silence_s)
        except TimeoutError:
            sample.error, sample.ended = TIMED_OUT, time.monotonic()
        except OSError:
            sample.error, sample.ended = NO_CONNECTION, time.monotonic()
