"""Reading tensors of a verified checkpoint to their places in memory, each byte once: straight, where the stored dtype
is the served one, else through a small staging buffer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.devices.base import Device
from elasticmoe.common.model_spec import DTYPE_BYTES, Dtype, RecordSpec
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.safetensors import DTYPE_BYTES as STORED_BYTES
from elasticmoe.common.safetensors import TensorFile
from elasticmoe.native import host
from elasticmoe.services.hmm.loading.convert import SAME, convert

_CHUNK_BYTES: Final = 16 << 20  # read at once: also how long an abort may wait
_STAGING_BYTES: Final = 8 << 20  # of source elements that wait for conversion
_DROP_BYTES: Final = 32 << 20  # read before the file's cached pages are dropped


class _Piece(NamedTuple):
    """A stored tensor, or a part of one, and the address of a device where it goes."""

    file: TensorFile
    begin: int
    nbytes: int
    stored: str
    served: Dtype
    device: Device
    address: int


class Reader:
    """Reads records of `checkpoint`, in the thread that calls it. `progress` is called before and after each part that
    was read, with its bytes (0 before); what it raises ends the reading."""

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int], None], *, chunk_bytes: int = 0) -> None:
        self._checkpoint = checkpoint
        self._progress = progress
        self._chunk_bytes = chunk_bytes or _CHUNK_BYTES
        self._staging_bytes = min(self._chunk_bytes, _STAGING_BYTES)
        self._pieces: list[_Piece] = []

    def add(self, record: RecordSpec, device: Device, address: int) -> None:
        """Let `record` be read to `address`, where `device` has mapped its handle."""
        for tensor in record.tensors:
            at = address + tensor.offset
            for file, begin, nbytes, stored in self._checkpoint.pieces(tensor):
                self._pieces.append(_Piece(file, begin, nbytes, stored, tensor.dtype, device, at))
                at += nbytes // STORED_BYTES[stored] * DTYPE_BYTES[tensor.dtype]

    @property
    def nbytes(self) -> int:
        """Stored bytes of all that was added."""
        return sum(piece.nbytes for piece in self._pieces)

    def read(self) -> None:
        """Read all that was added, in the files' order. Blocks. Raises CheckpointError, also where a file was changed
        since it was verified."""
        files = list(self._checkpoint.files)
        order = {file: at for at, file in enumerate(files)}
        self._pieces.sort(key=lambda piece: (order[piece.file], piece.begin))
        self._read(files, self._pieces)
        for file in files:
            file.check_unchanged()

    def _read(self, files: Iterable[TensorFile], pieces: Sequence[_Piece]) -> None:
        for file in files:
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        staging = np.empty(self._staging_bytes, np.uint8)
        dropped_to = dict.fromkeys(files, 0)
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
        for file in files:
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _read_straight(self, piece: _Piece) -> None:
        for done in range(0, piece.nbytes, self._chunk_bytes):
            self._progress(0)
            nbytes = min(self._chunk_bytes, piece.nbytes - done)
            piece.device.read_into(piece.address + done, piece.file.fd, piece.begin + done, nbytes)
            self._count(piece.file, nbytes)

    def _read_converted(self, piece: _Piece, staging: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        size, served_size = STORED_BYTES[piece.stored], DTYPE_BYTES[piece.served]
        for done in range(0, piece.nbytes, self._staging_bytes):
            self._progress(0)
            nbytes = min(self._staging_bytes, piece.nbytes - done)
            host.read_into(piece.file.fd, piece.begin + done, staging.ctypes.data, nbytes)
            self._count(piece.file, nbytes)
            count = nbytes // size
            address = piece.address + done // size * served_size
            with piece.device.fill(address, count * served_size) as target:
                convert(staging.data[:nbytes], piece.stored, piece.served, target)

    def _count(self, file: TensorFile, nbytes: int) -> None:
        file.bytes_read += nbytes
        self._progress(nbytes)
