"""Signals that ask a process to end, as a descriptor that its loop waits for beside all else.

A Python handler alone does not end a wait: the interpreter goes on with it (PEP 475), for up to a second in a quiet
loop.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType


class StopSignals:
    """SIGTERM and SIGINT, from `listen` to `close`. The main thread's. `on_stop` is called for each, between two
    instructions of that thread, also in a wait: it records, and may wake a loop that waits for something else than
    `fileno`."""

    def __init__(self, on_stop: Callable[[], None]) -> None:
        self._on_stop = on_stop
        self._out = self._in = -1

    def listen(self) -> None:
        """Take the signals from now on; one that is ignored, by the word of whoever made this process, stays so."""
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, _: int, __: FrameType | None) -> None:
        self._on_stop()

    def fileno(self) -> int:
        """Readable once one has come, until `close`. -1 before `listen`."""
        return self._out

    def close(self) -> None:
        """Signals that come later are recorded and wake nobody. Idempotent."""
        if self._in < 0:
            return
        signal.set_wakeup_fd(-1)
        os.close(self._in)
        os.close(self._out)
        self._in = self._out = -1
