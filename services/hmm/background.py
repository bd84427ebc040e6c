"""Work that would hold up the service's loop: a thread per job, its result handed back to the loop."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.telemetry import Logger

T = TypeVar("T")
Then = Callable[[ElasticMoEError | None], None]
"""Called in the loop's thread when work is over, with what went wrong."""


class Background:
    """Runs jobs; `fileno` is readable when one is done. Owned by the loop's thread."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads: list[threading.Thread] = []

    def fileno(self) -> int:
        """For polling."""
        return self._wake

    def start(self, name: str, work: Callable[[], T], then: Callable[[T | ElasticMoEError], None]) -> None:
        """Call `work()` in a thread, then `then(its result or its error)` in the loop's thread, from `finish`."""

        def run() -> None:
            result: T | ElasticMoEError
            try:
                result = work()
            except ElasticMoEError as error:
                result = error
            except Exception as error:  # a defect in one job must not leave its requester without an answer
                self._log.exception("job failed", job=name)
                result = ElasticMoEError(f"{name} failed with {type(error).__name__}")
            self._done.put(lambda: then(result))
            os.eventfd_write(self._wake, 1)

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def finish(self) -> None:
        """Hand over the results of jobs that are done. Does not wait."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        while not self._done.empty():
            self._done.get()()

    def join(self, timeout_s: float) -> bool:
        """Wait for running jobs; whether all ended."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Close the descriptor, unless a job may still write to it."""
        if self.join(0.0):
            os.close(self._wake)
