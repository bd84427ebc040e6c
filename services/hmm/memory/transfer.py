"""The work of a transition that takes time: making pages and filling them, in threads of its own, in small pieces.

A thread touches the handles that it was given, and no catalog. Between two pieces it may be stopped, and it sleeps as
the limit asks, so that serving keeps its throughput.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from elasticmoe.common.capacity import LedgerSizes
from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.devices.base import Device, Handle
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.families import record
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.model_spec import ModelSpec, RecordKey
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.services.hmm.loading.reader import Reader
from elasticmoe.services.hmm.memory.ledgers import format_pages

_THREADS: Final = 2  # while there is no limit; a joining replica waits for one device only
_PIECE_BYTES: Final = 4 << 20
_PIECE_BYTES_MIN: Final = 64 << 10  # a multiple of every page size
_PIECES_PER_S: Final = 20  # at the least, where the limit allows pieces of the smallest size


class TransferOp(NamedTuple):
    """One claimed handle to be made: at `address`, and filled from the address `source`, if not 0; from the checkpoint,
    where `key` says which record; else it stays zeros."""

    device: Device
    handle: Handle
    address: int
    source: int = 0
    key: RecordKey | None = None

    @property
    def nbytes(self) -> int:
        """Of the handle."""
        return self.handle.nbytes

    @property
    def is_copied(self) -> bool:
        """Whether it is filled with what is elsewhere."""
        return bool(self.source) or self.key is not None


class LedgerPart(NamedTuple):
    """An empty ledger to be made in `shared`, which has its size."""

    shared: HostShared
    sizes: LedgerSizes

    @property
    def nbytes(self) -> int:
        """Of the ledger."""
        return self.sizes.nbytes


class Peaks:
    """The most real bytes of each device since `begin`. Any thread may sample."""

    def __init__(self, by_device: Mapping[str, int] | None = None) -> None:
        self.by_device: dict[str, int] = dict(by_device or {})
        self._lock = threading.Lock()

    def sample(self, device: Device) -> None:
        """Look at the device now: after pages were made, and before some are given back."""
        pages = device.pages
        with self._lock:
            self.by_device[device.name] = max(self.by_device.get(device.name, 0), pages)


class Transfer:
    """Parts to be made, by device. `run` is called by as many threads as `num_threads` says, `stop` by anybody."""

    def __init__(
        self,
        parts: Mapping[str, Sequence[TransferOp | LedgerPart]],
        bytes_per_s_max: int,
        peaks: Peaks,
        spec: ModelSpec,
        model_path: str,
    ) -> None:
        self.bytes_done = 0
        self.parts = [part for some in parts.values() for part in some]
        self.bytes_total = sum(part.nbytes for part in self.parts if isinstance(part, TransferOp) and part.is_copied)
        self._shares = deque(share for some in parts.values() for share in _shares(some))
        self.num_threads = max(1, min(1 if bytes_per_s_max else _THREADS, len(self._shares)))
        self._peaks = peaks
        self._spec = spec
        self._model_path = model_path
        self._limit = bytes_per_s_max
        self._due = time.monotonic()
        pieces = bytes_per_s_max // _PIECES_PER_S // _PIECE_BYTES_MIN * _PIECE_BYTES_MIN
        self._piece_bytes = min(_PIECE_BYTES, max(_PIECE_BYTES_MIN, pieces)) if bytes_per_s_max else _PIECE_BYTES
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of bytes_done

    def stop(self) -> None:
        """Let `run` end soon, with Unavailable `aborted`."""
        self._stop.set()

    def run(self) -> None:
        """Make shares until none are left. Blocks. Raises DoesNotFit, CheckpointError, Unavailable."""
        try:
            while True:
                try:
                    parts = self._shares.popleft()
                except IndexError:
                    return
                self._make(parts)
        except BaseException:
            self.stop()  # the others' work would be in vain
            raise

    def _make(self, parts: Sequence[TransferOp | LedgerPart]) -> None:
        for part in parts:
            for done in range(0, part.nbytes, self._piece_bytes):
                nbytes = min(self._piece_bytes, part.nbytes - done)
                if isinstance(part, LedgerPart):
                    part.shared.populate(done, nbytes)
                    self._pause(nbytes)
                    continue
                if part.source:
                    part.device.write(part.handle, done, part.source + done, nbytes)
                    failpoint("hmm.copy")
                    self._count(nbytes)
                else:
                    part.device.populate(part.handle, done, nbytes)
                self._peaks.sample(part.device)
                self._pause(nbytes)
            if isinstance(part, LedgerPart):
                format_pages(part.shared, part.sizes)
        self._read([part for part in parts if isinstance(part, TransferOp) and part.key is not None])

    def _read(self, parts: Sequence[TransferOp]) -> None:
        if not parts:
            return
        spec = self._spec
        with Checkpoint(Path(self._model_path), spec) as checkpoint:
            reader = Reader(checkpoint, self._pause, chunk_bytes=self._piece_bytes)
            for part in parts:
                assert part.key is not None, "only records are read"
                reader.add(record(spec, part.key), part.device, part.address)
            reader.read()
        self._count(sum(part.handle.nbytes for part in parts))

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_done += nbytes

    def _pause(self, nbytes: int) -> None:
        """Sleep as the limit asks after `nbytes`; what was not used of it before is not saved up."""
        now = time.monotonic()
        if self._limit:  # then there is one thread
            self._due = max(self._due, now) + nbytes / self._limit
        if self._stop.wait(max(0.0, self._due - now)) if self._limit else self._stop.is_set():
            raise Unavailable("the transition was given up", code="aborted")


def _shares(parts: Sequence[TransferOp | LedgerPart]) -> list[list[TransferOp | LedgerPart]]:
    """One device's parts in as many shares of about the same size as there are threads; what is read from the
    checkpoint stays together, because files are read from their beginning to their end."""
    read: list[TransferOp | LedgerPart] = [
        part for part in parts if isinstance(part, TransferOp) and part.key is not None
    ]
    shares: list[list[TransferOp | LedgerPart]] = [[] for _ in range(_THREADS)]
    sizes = [0] * _THREADS
    for part in sorted(
        (part for part in parts if isinstance(part, LedgerPart) or part.key is None), key=lambda part: -part.nbytes
    ):
        least = sizes.index(min(sizes))
        shares[least].append(part)
        sizes[least] += part.nbytes
    return [share for share in (read, *shares) if share]


def reclaim(parts: Sequence[tuple[Device, Handle]]) -> None:
    """Give back the pages of handles that nobody uses any more, in pieces. Blocks; releasing them is quick then."""
    for device, handle in parts:
        for done in range(0, handle.nbytes, _PIECE_BYTES):
            device.reclaim(handle, done, min(_PIECE_BYTES, handle.nbytes - done))
