"""Permits: how many generations and how many bytes of bodies the router holds at once. Tried before any work."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from common.protocol.errors import InvalidRequest, Overloaded


class Permits:
    """A bounded number of permits, one per running generation (a choice of an answer). For one asyncio loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_held = 0

    def check(self) -> None:
        """Raises Overloaded when none is free: the cheap refusal, before a body is read."""
        if self.num_held >= self.most:
            raise Overloaded(f"{self.num_held} requests are being served; the limit is {self.most}")

    def acquire(self) -> Permit:
        """Take one. Raises Overloaded when none is free; never waits."""
        self.check()
        self.num_held += 1
        return Permit(self)


class Permit:
    """What one HTTP request holds. A context manager: its end gives everything back."""

    def __init__(self, permits: Permits) -> None:
        self._permits = permits
        self._count = 1

    def widen(self, count: int) -> None:
        """Hold `count` permits instead of one, all or nothing.

        Raises Overloaded when they are not free now, InvalidRequest when they never can be.
        """
        permits, extra = self._permits, count - self._count
        if count > permits.most:
            raise InvalidRequest(f"{count} choices in one request exceed the limit of {permits.most}", param="n")
        if permits.num_held + extra > permits.most:
            raise Overloaded(
                f"{permits.num_held} requests are being served and {extra} more are asked for; "
                f"the limit is {permits.most}"
            )
        permits.num_held += extra
        self._count = count

    def release(self) -> None:
        """Give back. Idempotent."""
        self._permits.num_held -= self._count
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class ByteBudget:
    """Bytes of request bodies that are in memory at once, over all connections."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_held = 0

    def take(self, nbytes: int) -> None:
        """Raises Overloaded beyond the budget; then nothing was taken."""
        if self.num_held + nbytes > self.most:
            raise Overloaded(f"request bodies hold {self.num_held} bytes; the limit is {self.most}")
        self.num_held += nbytes

    def give(self, nbytes: int) -> None:
        """Give back what was taken."""
        self.num_held -= nbytes
