"""Large pages under what is loaded, where the backend's own are small: made in the background, in pieces.

Weights are read and KV is made in small pages, because that is the quickest way to the first token. Every piece that
lies whole in the handles of the catalog is then collapsed; ranks go on meanwhile, and see the same bytes at the same
addresses. Nothing depends on it.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from contextlib import suppress
from typing import Final

from elasticmoe.common.devices.base import Device, Range
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.telemetry import Logger
from elasticmoe.services.hmm.background import Background
from elasticmoe.services.hmm.memory.catalog import Loaded
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.transfer import Supply

PIECE_BYTES: Final = 32 << 20  # some 30 ms: what is given back waits for the piece in work
_NICE: Final = 10  # of the thread: the ranks' computing comes first


class LargePages:
    """Owned by the HMM's loop, which calls `turn`. At most one piece is in work; no other one begins while memory
    changes hands.

    `large`: by device, bytes of what was there at the last look, in pieces that were collapsed whole by now;
    `bytes_refused`: in those of which the kernel has left some small.
    """

    def __init__(
        self, holdings: Holdings, supply: Supply, background: Background, log: Logger, *, is_wanted: bool
    ) -> None:
        self._is_wanted = is_wanted
        self._holdings = holdings
        self._supply = supply
        self._background = background
        self._log = log
        self._seen: Loaded | None = None
        self._left: deque[tuple[str, Device, Range, int, int]] = deque()
        self.is_at_work = False
        self.large = Counter[str]()
        self.bytes_refused = 0

    def turn(self, *, is_loading: bool) -> None:
        """Begin the next piece, if there is one and memory does not change hands. `is_loading`: a model is."""
        if not self._is_wanted or self.is_at_work:
            return
        holdings = self._holdings
        is_staged = holdings.transition is not None and not holdings.transition.is_over
        if is_loading or is_staged or self._supply.is_releasing:
            self._left.clear()
            self._seen = None
            return
        if holdings.loaded is not self._seen:
            self._seen = holdings.loaded
            self._begin()
        if self._left:
            self._start(*self._left.popleft())

    def _begin(self) -> None:
        self.large.clear()
        self.bytes_refused = 0
        self._left.clear()
        for name, memory in self._holdings.memories.items():
            for range_, offset, nbytes in memory.large_parts():
                for at in range(offset, offset + nbytes, PIECE_BYTES):
                    self._left.append((name, memory.device, range_, at, min(PIECE_BYTES, offset + nbytes - at)))

    def _start(self, name: str, device: Device, range_: Range, offset: int, nbytes: int) -> None:
        def work() -> bool:
            with suppress(OSError):  # a sandbox may forbid it
                os.setpriority(os.PRIO_PROCESS, 0, _NICE)  # of this thread alone
            return device.collapse(range_, offset, nbytes)

        def over(result: bool | ElasticMoEError) -> None:
            self.is_at_work = False
            self._holdings.num_readers -= 1
            if result is True:
                self.large[name] += nbytes
            else:
                self.bytes_refused += nbytes
            if isinstance(result, ElasticMoEError):  # of ours: the kernel's is False
                self._log.error("large pages are given up", code=result.code, reason=result.message)
                self._left.clear()
            if not self._left:
                self._log.info("large pages", bytes=self.large.total(), bytes_refused=self.bytes_refused)

        try:
            self._background.start("large pages", work, over)
        except RuntimeError as error:  # there is no thread to be had: nothing depends on this one
            self._log.warning("large pages are given up", reason=str(error))
            self._left.clear()
            return
        self.is_at_work = True
        self._holdings.num_readers += 1
