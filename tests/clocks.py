"""Clocks that tests set."""

from __future__ import annotations

from collections.abc import Callable


class PlayedClock:
    """A Clock (common/clock.py) that says what `now` does: seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now

    def monotonic(self) -> float:
        """See Clock."""
        return self._now()

    def monotonic_ns(self) -> int:
        """See Clock."""
        return int(self._now() * 1e9)

    def time(self) -> float:
        """See Clock."""
        return self._now()
