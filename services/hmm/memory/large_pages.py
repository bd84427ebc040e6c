"""Large pages under what is loaded, where the backend's own are small: made in the background, in pieces.

Most memory is made in large pages (new_pages.py). Of the rest, every piece that lies whole in the handles of the
catalog is collapsed; ranks go on meanwhile, and see the same bytes at the same addresses. Nothing depends on it. A
piece that is large already costs next to nothing.

The kernel refuses a piece where it finds no 2 MiB of free memory in one place, which may come later: pieces that were
refused are tried again, after pauses that grow as long as nothing is gained by it. One piece ends a try that is
refused again, so that a machine whose memory stays in pieces pays for one in each pause.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from contextlib import suppress
from typing import Final, NamedTuple

from elasticmoe.common.devices.base import Device, Range
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.telemetry import Logger
from elasticmoe.services.hmm.background import Background
from elasticmoe.services.hmm.memory.catalog import Loaded
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.transfer import Supply

PIECE_BYTES: Final = 32 << 20  # some 30 ms: what is given back waits for the piece in work
RETRY_S: Final = 10.0  # before refused pieces are tried again; twice as long after each try that gained nothing,
RETRY_S_MAX: Final = 300.0  # at the most
_NICE: Final = 10  # of the thread: the ranks' computing comes first


class LargePiece(NamedTuple):
    """A part of a device's mapped range."""

    name: str
    device: Device
    range: Range
    offset: int
    nbytes: int


class LargePages:
    """Owned by the HMM's loop, which calls `turn`, at least once in a second. At most one piece is in work; no other
    one begins while memory changes hands.

    `large`: by device, bytes of what was there at the last look, in pieces that were collapsed whole by now.
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
        self._left: deque[LargePiece] = deque()
        self._refused: deque[LargePiece] = deque()
        self._retry_at: float | None = None  # when these are tried again; None: pieces are being tried
        self._retry_s = RETRY_S
        self._is_retry = False  # what is being tried was refused before
        self._num_gained = 0  # pieces, by the present try
        self.is_at_work = False
        self.large = Counter[str]()

    @property
    def bytes_refused(self) -> int:
        """In pieces of which the kernel has left some small."""
        return sum(piece.nbytes for piece in self._refused)

    def turn(self, now: float, *, is_loading: bool) -> None:
        """Begin the next piece, if there is one and memory does not change hands. `is_loading`: a model is."""
        if not self._is_wanted or self.is_at_work:
            return
        holdings = self._holdings
        is_staged = holdings.transition is not None and not holdings.transition.is_over
        if is_loading or is_staged or self._supply.is_releasing:
            self._forget()
            self._seen = None
            return
        if holdings.loaded is not self._seen:
            self._seen = holdings.loaded
            self._begin()
        if not self._left and self._refused:
            self._try_again(now)
        if self._left:
            self._start(self._left.popleft())

    def _forget(self) -> None:
        self._left.clear()
        self._refused.clear()
        self._retry_at, self._retry_s, self._is_retry, self._num_gained = None, RETRY_S, False, 0

    def _try_again(self, now: float) -> None:
        """A try has ended, and some pieces were refused: wait, then let them be tried."""
        if self._retry_at is None:
            if self._is_retry:
                self._retry_s = RETRY_S if self._num_gained else min(2 * self._retry_s, RETRY_S_MAX)
            self._retry_at = now + self._retry_s
        elif now >= self._retry_at:
            self._retry_at, self._is_retry, self._num_gained = None, True, 0
            self._left, self._refused = self._refused, deque()

    def _begin(self) -> None:
        self.large.clear()
        self._forget()
        for name, memory in self._holdings.memories.items():
            for range_, offset, nbytes in memory.large_parts():
                for at in range(offset, offset + nbytes, PIECE_BYTES):
                    self._left.append(
                        LargePiece(name, memory.device, range_, at, min(PIECE_BYTES, offset + nbytes - at))
                    )

    def _start(self, piece: LargePiece) -> None:
        def work() -> bool:
            with suppress(OSError):  # a sandbox may forbid it
                os.setpriority(os.PRIO_PROCESS, 0, _NICE)  # of this thread alone
            return piece.device.collapse(piece.range, piece.offset, piece.nbytes)

        def over(result: bool | ElasticMoEError) -> None:
            self.is_at_work = False
            self._holdings.num_readers -= 1
            if isinstance(result, ElasticMoEError):  # of ours: the kernel's is False
                self._log.error("large pages are given up", code=result.code, reason=result.message)
                self._forget()
                return
            if result:
                self.large[piece.name] += piece.nbytes
                self._num_gained += 1
            elif self._is_retry:  # nor is there room for the others, for the most part: they come first next time
                self._refused, self._left = deque((*self._left, piece)), deque()
            else:
                self._refused.append(piece)
            if not self._left and (self._num_gained or not self._is_retry):
                self._log.info("large pages", bytes=self.large.total(), bytes_refused=self.bytes_refused)

        try:
            self._background.start("large pages", work, over)
        except RuntimeError as error:  # there is no thread to be had: nothing depends on this one
            self._log.warning("large pages are given up", reason=str(error))
            self._forget()
            return
        self.is_at_work = True
        self._holdings.num_readers += 1
