"""Large pages for memory that is claimed and not made yet: each is made once, just before what lies there is filled.

Made so, they cost a fifth of what small pages do, and nothing has to gather them later (large_pages.py, ADR 48). Small
pages are made of the rest: the ends of what lies one behind the other, and all of it once the kernel has refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from elasticmoe.common.devices.base import Device, Handle, Range
from elasticmoe.services.hmm.memory.memory import DeviceMemory

_THREADS: Final = 2  # the kernel clears pages on one core for each


class NewPages:
    """Of these claimed handles, which nobody else fills meanwhile. Made by who owns their memories; any thread calls
    `make`."""

    def __init__(self, handles: Iterable[tuple[DeviceMemory, Handle]]) -> None:
        self._lock = threading.Lock()  # of `_left`
        self._left: dict[Range, set[int]] = {}  # offsets of large pages that are wholly of these handles
        self._where: dict[Handle, tuple[Device, Range, int]] = {}
        by_memory: dict[DeviceMemory, list[Handle]] = {}
        for memory, handle in handles:
            by_memory.setdefault(memory, []).append(handle)
        for memory, some in by_memory.items():
            parts = memory.large_parts(some)
            for range_, offset, nbytes in parts:
                pages = range(offset, offset + nbytes, memory.device.large_page_bytes)
                self._left.setdefault(range_, set()).update(pages)
            for handle in some if parts else ():
                self._where[handle] = (memory.device, *memory.where(handle))

    def make(self, handle: Handle, offset: int, nbytes: int) -> None:
        """Make those that hold a part of `handle` and are not there yet. Blocks. Raises DoesNotFit."""
        if handle not in self._where:
            return
        device, range_, start = self._where[handle]
        large = device.large_page_bytes
        begin, end = (start + offset) // large * large, start + offset + nbytes
        with self._lock:
            left = self._left.get(range_, set())
            taken = [at for at in range(begin, end, large) if at in left]
            left.difference_update(taken)
        while taken:
            count = next((n for n, at in enumerate(taken) if at != taken[0] + n * large), len(taken))
            if not device.make_large(range_, taken[0], count * large):
                with self._lock:
                    self._left.clear()
                return
            taken = taken[count:]


def make_zeros(handles: Sequence[tuple[DeviceMemory, Handle]], check: Callable[[], None]) -> None:
    """Make all memory of claimed `handles` and settle them. Blocks; `check` is called before each, in threads, and what
    it raises ends it. Raises DoesNotFit, DeviceError."""
    pages = NewPages(handles)

    def make(claimed: tuple[DeviceMemory, Handle]) -> None:
        check()
        memory, handle = claimed
        pages.make(handle, 0, handle.nbytes)
        memory.device.populate(handle, 0, handle.nbytes)

    with ThreadPoolExecutor(_THREADS, "pages") as threads:
        try:
            for _ in threads.map(make, handles):
                pass
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    for memory, handle in handles:
        memory.device.settle(handle)
