"""Load of requests that look alike: closed-loop clients or Poisson arrivals, on endpoints that may change meanwhile.

One asyncio loop carries all of it, so that the clients take one process's share of the cores. Prompts are token ids,
different in every request, so that no prefix is shared.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

from elasticmoe.cli.load.endpoint import Endpoint, Shape, endpoint_of
from elasticmoe.cli.load.prompts import random_prompt
from elasticmoe.cli.load.sample import NO_CONNECTION, REFUSED, Sample
from elasticmoe.cli.load.stream import complete

RETRY_S = 0.1


class Target(msgspec.Struct, frozen=True):
    """A deployment that takes requests."""

    label: str
    url: str


async def run_clients(
    url: str, shape: Shape, concurrency: int, num_requests: int, seed: int, *, traceparent: str = ""
) -> list[Sample]:
    """`num_requests` requests by `concurrency` clients, each of which sends its next when its last has ended; samples
    in order of their ends. `traceparent`: of all of them, where they are to be traced. Raises OSError when the server
    takes no connection."""
    rng, endpoint = random.Random(seed), endpoint_of(url, traceparent=traceparent)
    requests = [endpoint.request(shape, random_prompt(rng, shape.prompt_tokens)) for _ in range(num_requests)]
    samples: list[Sample] = []

    async def client() -> None:
        while requests:
            sample = Sample(asked=time.monotonic())
            await complete(endpoint, requests.pop(), sample)
            samples.append(sample)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return samples


class Load:
    """Requests until `stop`. `requests` holds every one of them, also those under way; read it at any time.

    `set_targets` says where new requests go from now on, in turn. Output lengths are drawn evenly between half and one
    and a half times the shape's, so that clients do not keep step; everything follows from the seed. `is_patient`: a
    client whose connection is refused, or who is told to come back (429, 503), tries again until it is served, and its
    patience counts as waiting; else each request is sent once.
    """

    def __init__(self, shape: Shape, seed: int, *, is_patient: bool = True) -> None:
        self.requests: list[Sample] = []
        self._shape = shape
        self._seed = seed
        self._rng = random.Random(seed)  # of arrivals
        self._is_patient = is_patient
        self._targets: list[tuple[str, Endpoint]] = []
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    def set_targets(self, *targets: Target) -> None:
        """New requests go to these, in turn."""
        self._targets = [(target.label, endpoint_of(target.url)) for target in targets]

    def set_model(self, name: str) -> None:
        """Requests ask for the model of that name. Before the load starts."""
        self._shape = msgspec.structs.replace(self._shape, model=name)

    def running_on(self, label: str) -> int:
        """Requests under way on that deployment."""
        return sum(request.target == label and request.error is None for request in self.requests)

    def start_closed(self, clients: int) -> None:
        """Begin with so many clients, each of which always has one request under way."""
        for number in range(clients):
            self._spawn(self._client(random.Random(f"{self._seed} {number}")))

    def start_open(self, rate: float) -> None:
        """Begin with Poisson arrivals, `rate` requests per second, whatever becomes of those before."""
        self._spawn(self.arrive(rate))

    async def arrive(self, rate: float, seconds: float | None = None) -> None:
        """Let requests arrive by a Poisson process, `rate` per second, for so long; for ever without a time."""
        now = time.monotonic()
        until, due = None if seconds is None else now + seconds, now + self._rng.expovariate(rate)
        while until is None or due < until:
            await asyncio.sleep(due - time.monotonic())
            self._spawn(self._serve(random.Random(self._rng.random()), self._length(self._rng)))
            due += self._rng.expovariate(rate)
        await asyncio.sleep(until - time.monotonic())

    async def drain(self, timeout_s: float) -> None:
        """Wait until all requests have ended; those that have not by then stay without an end. For a load that has no
        clients and no arrivals any more. Raises as `stop` does."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)
        await self.stop()

    async def stop(self) -> None:
        """Leave; requests under way stay without an end. Raises what went wrong in a client, once. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()

    async def _client(self, rng: random.Random) -> None:
        first = rng.randint(1, self._shape.output_tokens)  # spreads the ends of the first requests
        await self._serve(rng, first)
        while True:
            await self._serve(rng, self._length(rng))

    def _length(self, rng: random.Random) -> int:
        mean = self._shape.output_tokens
        return rng.randint(max(1, mean // 2), mean + mean // 2)

    async def _serve(self, rng: random.Random, output_tokens: int) -> None:
        """One request, from the wish to its end; refused attempts are repeated by a patient client."""
        shape = msgspec.structs.replace(self._shape, output_tokens=output_tokens)
        sample = Sample(asked=time.monotonic())
        self.requests.append(sample)
        prompt = random_prompt(rng, shape.prompt_tokens)
        while True:
            sample.target, endpoint = self._targets[self._turn % len(self._targets)]
            self._turn += 1
            try:
                await complete(endpoint, endpoint.request(shape, prompt), sample)
            except OSError:
                sample.error, sample.ended = NO_CONNECTION, time.monotonic()
            if not self._is_patient or (sample.status not in REFUSED and sample.error != NO_CONNECTION):
                return
            sample.refusals += 1
            sample.error = None
            await asyncio.sleep(RETRY_S)
