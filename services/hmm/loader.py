"""Loading: from a checkpoint to final weights in page handles, ready to be mapped.

Each tensor is read from disk once, into the record's handle on its first device: straight, where the stored dtype is
the served one, else through a small staging buffer. Records that live on several devices are then copied between them.
Nothing is created before the whole checkpoint and the sizes are verified; on any failure everything is given back.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from common.devices.base import Handle
from common.families import load_spec, records
from common.model_spec import DTYPE_BYTES, Dtype, KvGeometry, RecordKey, RecordSpec, kv_geometry, round_up
from common.protocol.errors import CheckpointError, Unavailable
from common.protocol.hmm import LoadModel
from native import host
from native.ledger import format_ledger
from services.hmm.catalog import Loaded
from services.hmm.checkpoint import SOURCE_BYTES, Checkpoint, CheckpointFile
from services.hmm.convert import SAME, convert
from services.hmm.memory import BusSegment, DeviceMemory
from services.hmm.sizing import (
    LEDGER_BLOB_BYTES,
    DeviceSizes,
    LedgerSizes,
    check_layout,
    size_bus,
    size_devices,
    size_ledger,
)

_CHUNK_BYTES: Final = 16 << 20  # read at once: also how long an abort may wait
_STAGING_BYTES: Final = 8 << 20  # of source elements that wait for conversion
_DROP_BYTES: Final = 32 << 20  # read before the file's cached pages are dropped


class _Piece(NamedTuple):
    """One stored tensor and where it goes: `offset` bytes into `handle` of `memory`."""

    file: CheckpointFile
    begin: int
    nbytes: int
    stored: str
    served: Dtype
    memory: DeviceMemory
    handle: Handle
    offset: int


class Load:
    """One load, run once, by a thread of its own. `bytes_done` and `bytes_total` count tensor bytes of the checkpoint
    and may be read by other threads; `abort` may be called by them."""

    def __init__(
        self, request: LoadModel, memories: Mapping[str, DeviceMemory], segment: BusSegment, granularity: int
    ) -> None:
        self.request = request
        self.bytes_done = 0
        self.bytes_total = 0
        self.bytes_read: dict[str, int] = {}  # by file; set at the end
        self._memories = memories
        self._segment = segment
        self._granularity = granularity
        self._abort = threading.Event()

    def abort(self) -> None:
        """Let `run` end soon with Unavailable."""
        self._abort.set()

    def _check_abort(self) -> None:
        if self._abort.is_set():
            raise Unavailable("the load was aborted", code="aborted")

    def run(self) -> Loaded:
        """Load. Blocks until all memory is filled. Raises CheckpointError, DoesNotFit, InvalidRequest, Unavailable."""
        try:
            return self._run()
        except BaseException:
            for memory in self._memories.values():
                memory.clear()
            raise

    def _run(self) -> Loaded:
        load, granularity = self.request, self._granularity
        directory = _existing(load.model_path)
        spec = load_spec(directory, load.dtype)
        check_layout(load, spec)
        specs = list(records(spec))
        geometry = kv_geometry(spec, load.block_size, granularity)
        ledger = size_ledger(load, granularity)
        bus = size_bus(load, spec, len(self._memories), granularity)
        budgets = {name: memory.device.budget for name, memory in self._memories.items()}
        sizes = size_devices(load, specs, geometry, ledger, granularity, budgets)
        with Checkpoint(directory, specs, tied_head=spec.tie_embeddings) as checkpoint:
            self._create(specs, sizes, geometry)
            self._read(checkpoint, self._pieces(checkpoint, specs))
            for file in checkpoint.files():
                file.check_unchanged()
            self.bytes_read = checkpoint.bytes_read
        self._replicate(specs)
        self._format(sizes, ledger)
        self._segment.format(bus)
        return Loaded(load, spec, geometry, bus.nbytes)

    def _create(self, specs: Sequence[RecordSpec], sizes: Mapping[str, DeviceSizes], geometry: KvGeometry) -> None:
        nbytes = {spec.key: round_up(spec.nbytes, self._granularity) for spec in specs}
        for name, size in sizes.items():
            memory = self._memories[name]
            memory.create_ledger(size.ledger_bytes)
            for key in size.keys:
                self._check_abort()
                memory.create_record(key, nbytes[key])
            for _ in range(size.num_kv_handles):
                self._check_abort()
                memory.create_kv(geometry.handle_bytes)

    def _holders(self, key: RecordKey) -> list[DeviceMemory]:
        seats = sorted(self.request.layout.seats, key=lambda seat: seat.slot)
        memories = [self._memories[seat.device] for seat in seats]
        return [memory for memory in memories if key in memory.records]

    def _pieces(self, checkpoint: Checkpoint, specs: Sequence[RecordSpec]) -> list[_Piece]:
        pieces = []
        for record in specs:
            memory = self._holders(record.key)[0]
            for tensor in record.tensors:
                offset = tensor.offset
                for source in tensor.sources:
                    file, stored = checkpoint.find(source)
                    pieces.append(
                        _Piece(
                            file,
                            stored.begin,
                            stored.nbytes,
                            stored.dtype,
                            tensor.dtype,
                            memory,
                            memory.records[record.key],
                            offset,
                        )
                    )
                    offset += math.prod(source.shape) * DTYPE_BYTES[tensor.dtype]
        order = {file: at for at, file in enumerate(checkpoint.files())}
        pieces.sort(key=lambda piece: (order[piece.file], piece.begin))
        self.bytes_total = sum(piece.nbytes for piece in pieces)
        return pieces

    def _read(self, checkpoint: Checkpoint, pieces: Sequence[_Piece]) -> None:
        for file in checkpoint.files():
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        staging = np.empty(_STAGING_BYTES, np.uint8)
        dropped_to = dict.fromkeys(checkpoint.files(), 0)
        for piece in pieces:
            try:
                if (piece.stored, piece.served) in SAME:
                    self._read_straight(piece)
                else:
                    self._read_converted(piece, staging)
            except OSError as error:
                raise CheckpointError(f"{piece.file.name} cannot be read: {error.strerror}") from None
            end = piece.begin + piece.nbytes
            if end - dropped_to[piece.file] >= _DROP_BYTES:
                # What was read is in the handles now: a second copy in the page cache would double the peak.
                os.posix_fadvise(piece.file.fd, 0, end, os.POSIX_FADV_DONTNEED)
                dropped_to[piece.file] = end
        for file in checkpoint.files():
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _read_straight(self, piece: _Piece) -> None:
        address = piece.memory.address(piece.handle) + piece.offset
        for done in range(0, piece.nbytes, _CHUNK_BYTES):
            self._check_abort()
            nbytes = min(_CHUNK_BYTES, piece.nbytes - done)
            host.read_into(piece.file.fd, piece.begin + done, address + done, nbytes)
            self._count(piece.file, nbytes)

    def _read_converted(self, piece: _Piece, staging: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        size, served_size = SOURCE_BYTES[piece.stored], DTYPE_BYTES[piece.served]
        for done in range(0, piece.nbytes, _STAGING_BYTES):
            self._check_abort()
            nbytes = min(_STAGING_BYTES, piece.nbytes - done)
            host.read_into(piece.file.fd, piece.begin + done, staging.ctypes.data, nbytes)
            self._count(piece.file, nbytes)
            count = nbytes // size
            target = piece.memory.view(piece.handle, piece.offset + done // size * served_size, count * served_size)
            convert(staging.data[:nbytes], piece.stored, piece.served, target)

    def _count(self, file: CheckpointFile, nbytes: int) -> None:
        file.bytes_read += nbytes
        self.bytes_done += nbytes

    def _replicate(self, specs: Sequence[RecordSpec]) -> None:
        for record in specs:
            first, *others = self._holders(record.key)
            source = first.records[record.key]
            for other in others:
                self._check_abort()
                target = other.records[record.key]
                other.device.copy(other.address(target), first.address(source), source.nbytes)

    def _format(self, sizes: Mapping[str, DeviceSizes], ledger: LedgerSizes) -> None:
        for name in sizes:
            memory = self._memories[name]
            assert memory.ledger is not None, "every seat's device has a ledger by now"
            format_ledger(
                memory.address(memory.ledger),
                ledger.nbytes,
                ledger.num_rows,
                ledger.max_tokens,
                ledger.max_blocks,
                LEDGER_BLOB_BYTES,
            )


def _existing(path: str) -> Path:
    directory = Path(path)
    try:
        exists = directory.is_dir()
    except (OSError, ValueError):  # a name that is too long, a folder that may not be entered
        exists = False
    if not exists:
        raise CheckpointError(f"checkpoint {directory.name!r:.200} is not a directory that can be read")
    return directory
