"""The load of `bench scaling`: closed-loop clients or Poisson arrivals, on endpoints that may change while it runs.

One asyncio loop carries all of it, so that the clients take one process's share of the cores. A client whose connection
is refused, or who is told to come back (429, 503), tries again until it is served; its patience counts as waiting.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

from elasticmoe.cli.bench.load import Sample, Shape, one_request

RETRY_S = 0.1
_RETRIED = (429, 503)


class Request(Sample):
    """A sample of the scaling benchmark. `asked`: when its client first wanted it. `refusals`: attempts that were not
    taken. `target`: the label of the deployment that took it."""

    asked: float = 0.0
    refusals: int = 0
    target: str = ""


class Target(msgspec.Struct, frozen=True):
    """A deployment that takes requests."""

    label: str
    url: str


class Load:
    """Requests until `stop`. `requests` holds every one of them, also those under way; read it at any time.

    `set_targets` says where new requests go from now on, in turn. Output lengths are drawn evenly between half and one
    and a half times the shape's, so that clients do not keep step; everything follows from the seed.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        self.requests: list[Request] = []
        self._shape = shape
        self._seed = seed
        self._targets: list[Target] = []
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    def set_targets(self, *targets: Target) -> None:
        """New requests go to these, in turn."""
        self._targets = list(targets)

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
        self._spawn(self._arrivals(rate, random.Random(self._seed)))

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

    async def _arrivals(self, rate: float, rng: random.Random) -> None:
        due = time.monotonic()
        while True:
            due += rng.expovariate(rate)
            await asyncio.sleep(due - time.monotonic())
            self._spawn(self._serve(random.Random(rng.random()), self._length(rng)))

    def _length(self, rng: random.Random) -> int:
        mean = self._shape.output_tokens
        return rng.randint(max(1, mean // 2), mean + mean // 2)

    async def _serve(self, rng: random.Random, output_tokens: int) -> None:
        """One request, from the wish to its end; refused attempts are repeated."""
        shape = msgspec.structs.replace(self._shape, output_tokens=output_tokens)
        prompt = [rng.randrange(shape.vocab) for _ in range(shape.prompt_tokens)]
        request = Request(asked=time.monotonic())
        self.requests.append(request)
        while True:
            target = self._targets[self._turn % len(self._targets)]
            self._turn += 1
            request.target = target.label
            try:
                await one_request(target.url, prompt, shape, request)
            except OSError:
                pass  # nobody listens; counted below
            else:
                if request.status not in _RETRIED:
                    return
            request.refusals += 1
            request.error = None
            await asyncio.sleep(RETRY_S)
