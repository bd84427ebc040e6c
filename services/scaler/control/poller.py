"""Where the scaler's loop sleeps."""

from __future__ import annotations

import math
import os
import select
from collections.abc import Iterable


class Poller:
    """Belongs to the loop's thread but for `wake`. Never closed: other threads may wake a loop that has ended."""

    def __init__(self) -> None:
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """Let `poll` return. Any thread."""
        os.eventfd_write(self._woken, 1)

    def poll(self, fds: Iterable[int], timeout_s: float) -> bool:
        """Wait until one of the descriptors is readable, or for `wake`, at most so long; whether it was woken. Whole
        milliseconds, not one less: else the rest would be waited for by itself."""
        poller = select.poll()
        for fd in (self._woken, *fds):
            poller.register(fd, select.POLLIN)
        is_woken = self._woken in {fd for fd, _ in poller.poll(math.ceil(timeout_s * 1e3))}
        if is_woken:
            os.eventfd_read(self._woken)
        return is_woken
