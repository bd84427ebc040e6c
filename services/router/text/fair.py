"""A queue that is fair to clients: each has its turn, however many entries another has in it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from elasticmoe.common.protocol.errors import Overloaded

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out for each client; the clients take turns. No bound: whoever enters holds a permit."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def push(self, client: str, entry: T) -> None:
        """Enter at the end of the client's line."""
        self._entries.setdefault(client, deque()).append(entry)

    def pop(self) -> T | None:
        """The entry whose turn it is; None for an empty queue."""
        if not self._entries:
            return None
        client, line = next(iter(self._entries.items()))
        entry = line.popleft()
        del self._entries[client]
        if line:
            self._entries[client] = line  # behind the others
        return entry

    def discard(self, client: str, entry: T) -> None:
        """Leave without a turn."""
        line = self._entries.get(client)
        if line is not None and entry in line:
            line.remove(entry)
            if not line:
                del self._entries[client]


class FairTurns:
    """At most `most` holders at once; the others wait in a fair queue. For one asyncio loop."""

    def __init__(self, most: int, wait_seconds_max: float) -> None:
        self._free = most
        self._wait_seconds_max = wait_seconds_max
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn, and give it back at the end. Raises Overloaded after `wait_seconds_max`."""
        await self.take(client)
        try:
            yield
        finally:
            self.give_back()

    async def take(self, client: str) -> None:
        """Wait for a turn; it must be given back. Raises Overloaded after `wait_seconds_max`."""
        if self._free and not self._queue:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.push(client, turn)
        try:
            async with asyncio.timeout(self._wait_seconds_max):
                await turn
        except TimeoutError:
            self._leave(client, turn)
            raise Overloaded(
                f"the prompt waited {self._wait_seconds_max:g} s for its turn to be tokenized, the limit",
                code="queue_full",
            ) from None
        except BaseException:
            self._leave(client, turn)
            raise

    def _leave(self, client: str, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self.give_back()  # it came at the same moment
        else:
            self._queue.discard(client, turn)

    def give_back(self) -> None:
        """The turn goes to the next in line."""
        while (turn := self._queue.pop()) is not None:
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
