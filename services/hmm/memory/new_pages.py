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
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.hmm.memory.memory import DeviceMemory

_THREADS: Final = 2  # the kernel clears pages on one core for each
_PIECE_BYTES: Final = 32 << 20  # for which the machine is asked for room at once, and after which an abort is heard

log = get_logger("hmm")


class NewPages:
    """Of these claimed handles, which nobody else fills meanwhile. Made by who owns their memories; any thread calls
    `make`."""

    def __init__(self, handles: Iterable[tuple[DeviceMemory, Handle]]) -> None:
        self._changed = threading.Condition()  # guards `_left` and `_at_work`
        self._left: dict[Range, set[int]] = {}  # offsets of large pages that are wholly of these handles
        self._at_work: set[tuple[Range, int]] = set()  # those that some thread makes just now
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
        """Make those that hold a part of `handle` and are not there yet; one that another thread makes is waited for,
        which takes no longer than that: who waits has none at work. Blocks. Raises DoesNotFit."""
        if handle not in self._where:
            return
        device, range_, start = self._where[handle]
        large = device.large_page_bytes
        pages = range((start + offset) // large * large, start + offset + nbytes, large)
        with self._changed:
            left = self._left.get(range_, set())
            taken = [at for at in pages if at in left]
            left.difference_update(taken)
            at_work = {(range_, at) for at in taken}
            self._at_work |= at_work
        try:
            self._make_taken(device, range_, taken)
        finally:
            with self._changed:
                self._at_work -= at_work
                self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: self._at_work.isdisjoint((range_, at) for at in pages))

    def _make_taken(self, device: Device, range_: Range, taken: list[int]) -> None:
        large = device.large_page_bytes
        while taken:
            count = next((n for n, at in enumerate(taken) if at != taken[0] + n * large), len(taken))
            if not device.make_large(range_, taken[0], count * large):
                with self._changed:
                    num_left = sum(map(len, self._left.values()))
                    self._left.clear()
                log.info("the kernel makes no large pages now", device=device.name, bytes_left=num_left * large)
                return
            taken = taken[count:]


def make_zeros(handles: Sequence[tuple[DeviceMemory, Handle]], check: Callable[[], None]) -> None:
    """Make all memory of claimed `handles` and settle them. Blocks; `check` is called before each piece, in threads,
    and what it raises ends it. Raises DoesNotFit, DeviceError."""
    pages = NewPages(handles)

    def make(claimed: tuple[DeviceMemory, Handle]) -> None:
        memory, handle = claimed
        for done in range(0, handle.nbytes, _PIECE_BYTES):
            check()
            nbytes = min(_PIECE_BYTES, handle.nbytes - done)
            pages.make(handle, done, nbytes)
            memory.device.populate(handle, done, nbytes)

    with ThreadPoolExecutor(_THREADS, "pages") as threads:
        try:
            for _ in threads.map(make, handles):
                pass
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    for memory, handle in handles:
        memory.device.settle(handle)
