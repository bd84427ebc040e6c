"""A request's body, read whole within its bounds of size and time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Protocol

from elasticmoe.common.protocol.errors import InvalidRequest, PayloadTooLarge

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

SMALL_BYTES = 64 * 1024  # of each body that the budget leaves out: large ones keep no small one out


class ClientLeft(Exception):
    """The client disconnected while its body was awaited; there is nobody to answer."""


class Budget(Protocol):
    """Bytes of all bodies that are in memory at once."""

    def take(self, nbytes: int, /) -> None:
        """Raises Overloaded beyond the budget; then nothing was taken."""

    def give(self, nbytes: int, /) -> None:
        """Give back what was taken."""


class Body:
    """One request's body, read whole and then replayed to the application. `budget`: for what is beyond its first
    SMALL_BYTES, whose bound is the number of connections; None: no common bound."""

    def __init__(self, receive: Receive, bytes_max: int, seconds_max: float, budget: Budget | None = None) -> None:
        self._receive = receive
        self._bytes_max = bytes_max
        self._seconds_max = seconds_max
        self._budget = budget
        self._chunks: list[bytes] = []
        self._held = 0
        self._is_replayed = False

    async def read(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises PayloadTooLarge, Overloaded, InvalidRequest when it takes too long, ClientLeft."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._bytes_max:
            raise self._too_large(length.decode()[:20])
        try:
            async with asyncio.timeout(self._seconds_max):
                await self._read_all()
        except TimeoutError:
            text = f"the body did not arrive within {self._seconds_max:g} s"
            raise InvalidRequest(text, code="request_timeout") from None

    async def _read_all(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk = message.get("body", b"")
            if self._held + len(chunk) > self._bytes_max:
                raise self._too_large(f"at least {self._held + len(chunk)}")
            if self._budget is not None:
                self._budget.take(_large_part(self._held + len(chunk)) - _large_part(self._held))
            self._held += len(chunk)
            self._chunks.append(chunk)
            if not message.get("more_body", False):
                return

    async def replay(self) -> MutableMapping[str, Any]:
        """The `receive` that the application sees: the body once, then whatever the server says."""
        if self._is_replayed:
            return await self._receive()
        self._is_replayed = True
        body, self._chunks = b"".join(self._chunks), []
        return {"type": "http.request", "body": body, "more_body": False}

    def release(self) -> None:
        """The request has ended."""
        if self._budget is not None:
            self._budget.give(_large_part(self._held))
        self._held = 0
        self._chunks = []

    def _too_large(self, size: str) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body has {size} bytes, which exceeds the limit of {self._bytes_max}")


def _large_part(nbytes: int) -> int:
    return max(0, nbytes - SMALL_BYTES)
