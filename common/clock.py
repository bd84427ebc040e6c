"""Time as an argument: whoever decides or waits by a clock is given it, so that a simulation can give another one."""

from __future__ import annotations

import time
from typing import Final, Protocol


class Clock(Protocol):
    """Any thread may ask it."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment, the same one for all processes of a machine. Never goes back."""

    def monotonic_ns(self) -> int:
        """The same in nanoseconds."""

    def time(self) -> float:
        """Seconds since 1970, for people to read."""


class SystemClock:
    """The machine's. Its methods are the functions themselves, so that asking costs no more than that."""

    monotonic = staticmethod(time.monotonic)
    monotonic_ns = staticmethod(time.monotonic_ns)
    time = staticmethod(time.time)


SYSTEM_CLOCK: Final[Clock] = SystemClock()
