"""Reading tensors of a verified checkpoint to their places in memory, each byte once: straight, where the stored dtype
is the served one, else through small staging buffers. Two threads do that, each a chunk at a time.

What several ranks of a replica have, or parts of the same rows, is read once and given to each. The files stay in the
kernel's page cache, for the next start, where the machine has plenty of room; else they are dropped as they are read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elasticmoe.common.checkpoint import Checkpoint, ColumnRange, Part, Piece
from elasticmoe.common.devices.base import Device
from elasticmoe.common.machine import available_bytes, group_room
from elasticmoe.common.model_spec import DTYPE_BYTES, Dtype, RecordSpec
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.safetensors import DTYPE_BYTES as STORED_BYTES
from elasticmoe.common.safetensors import TensorFile
from elasticmoe.native import host
from elasticmoe.services.hmm.loading.convert import SAME, convert, decode_scales, dequantize

_CHUNK_BYTES: Final = 16 << 20  # read at once by a thread: also how long an abort may wait
_STAGING_BYTES: Final = 4 << 20  # of source elements that wait for conversion, in the buffer of each thread
_THREADS: Final = 2  # one may wait for the disk, or both make the pages of what they fill
_DROP_BYTES: Final = 32 << 20  # read before the file's cached pages are dropped
_PLENTY: Final = 2  # times the room for the files and what is filled from them: there is KV to be made besides

_ScalesOf = dict[Part, NDArray[np.float32]]  # by where they are stored


class _Taker(NamedTuple):
    """An address of a device where what is read goes; `columns`: what of its rows, None: all."""

    device: Device
    address: int
    columns: ColumnRange | None


class _Target(NamedTuple):
    """A stored tensor, or a part of one, and where it goes: to several ranks of a replica, or a part of it to each."""

    piece: Piece
    served: Dtype
    takers: Sequence[_Taker]

    @property
    def part(self) -> Part:
        """What is read, without its scales."""
        return self.piece.part

    @property
    def end(self) -> int:
        """Where that ends in its file."""
        return self.part.begin + self.part.nbytes

    @property
    def is_straight(self) -> bool:
        """Whether its bytes are those that are served."""
        is_whole = all(taker.columns is None for taker in self.takers)
        return is_whole and (self.part.dtype, self.served) in SAME

    @property
    def unit(self) -> int:
        """Bytes that are read together: an element, or a row of which somebody takes some columns."""
        size = STORED_BYTES[self.part.dtype]
        return size * max((taker.columns.of for taker in self.takers if taker.columns is not None), default=1)


class _Span(NamedTuple):
    """Bytes [begin, end) of a file: whole units of `target`."""

    target: _Target
    begin: int
    end: int


class _ReadJob(NamedTuple):
    """What a thread does at once: `nbytes` of a file, up to `end` in it."""

    work: Callable[[], None]
    nbytes: int
    end: int


class Reader:
    """Reads records of `checkpoint`. `progress` is called in the thread that calls `read`, before and after each part
    that was read, with its bytes (0 before); what it raises ends the reading."""

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int], None], *, chunk_bytes: int = 0) -> None:
        self._checkpoint = checkpoint
        self._progress = progress
        self._chunk_bytes = chunk_bytes or _CHUNK_BYTES
        self._staging_bytes = min(self._chunk_bytes, _STAGING_BYTES)
        self._takers: dict[tuple[Piece, Dtype], list[_Taker]] = {}  # by what is read, whatever they take of its rows
        self._filled_bytes = 0  # of handles

    def add(self, record: RecordSpec, device: Device, address: int) -> None:
        """Let `record` be read to `address`, where `device` has mapped its handle."""
        self._filled_bytes += record.nbytes
        for tensor in record.tensors:
            at = address + tensor.offset
            for piece in self._checkpoint.pieces(tensor):
                read, columns = piece._replace(columns=None), piece.columns
                self._takers.setdefault((read, tensor.dtype), []).append(_Taker(device, at, columns))
                count = piece.part.nbytes // STORED_BYTES[piece.part.dtype]
                if columns is not None:
                    count = count // columns.of * (columns.end - columns.begin)
                at += count * DTYPE_BYTES[tensor.dtype]

    @property
    def nbytes(self) -> int:
        """Stored bytes of all that was added, each counted once."""
        scales = {piece.scales for piece, _ in self._takers if piece.scales is not None}
        return sum(piece.part.nbytes for piece, _ in self._takers) + sum(one.part.nbytes for one in scales)

    def read(self) -> None:
        """Read all that was added, in the files' order. Blocks. Raises CheckpointError, also for a weight or a scale
        that is not finite in FP8, and where a file was changed since it was verified."""
        files = list(self._checkpoint.files)
        order = {file: at for at, file in enumerate(files)}
        all_targets = [_Target(piece, served, takers) for (piece, served), takers in self._takers.items()]
        all_targets.sort(key=lambda target: (order[target.part.file], target.part.begin))
        is_dropped = not self._has_plenty()
        for file in files:
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        with ThreadPoolExecutor(_THREADS, "reader") as threads:
            for file, targets in groupby(all_targets, key=lambda target: target.part.file):
                self._read_file(file, list(targets), threads, is_dropped=is_dropped)
        for file in files:
            if is_dropped:
                os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            file.check_unchanged()

    def _has_plenty(self) -> bool:
        """Whether memory has room for the files, too: another start finds them there. In a control group with a limit
        they would count as used once they were read twice."""
        try:
            return group_room() is None and available_bytes() >= _PLENTY * (self.nbytes + self._filled_bytes)
        except OSError:
            return False

    def _read_file(
        self, file: TensorFile, targets: Sequence[_Target], threads: ThreadPoolExecutor, *, is_dropped: bool
    ) -> None:
        scales = self._read_scales(targets)
        dropped_to = 0
        for is_straight, group in groupby(targets, key=lambda target: target.is_straight):
            run = list(group)
            jobs = self._straight(run) if is_straight else self._converted(run, scales)
            for end in self._run(file, jobs, threads):
                if is_dropped and end - dropped_to >= _DROP_BYTES:
                    # What was read is in the handles now: a second copy in the page cache would double the peak.
                    os.posix_fadvise(file.fd, 0, end, os.POSIX_FADV_DONTNEED)
                    dropped_to = end

    def _run(self, file: TensorFile, jobs: Iterable[_ReadJob], threads: ThreadPoolExecutor) -> Iterator[int]:
        """Do them, as many at a time as there are threads. Gives, in their order, up to where the file was read."""
        running: deque[tuple[_ReadJob, Future[None]]] = deque()
        for job in jobs:
            if len(running) == _THREADS:
                yield self._finish(file, *running.popleft())
            self._progress(0)
            running.append((job, threads.submit(job.work)))
        while running:
            yield self._finish(file, *running.popleft())

    def _finish(self, file: TensorFile, job: _ReadJob, running: Future[None]) -> int:
        running.result()
        self._count(file, job.nbytes)
        return job.end

    def _read_scales(self, targets: Iterable[_Target]) -> _ScalesOf:
        """All scales of one file's weights, wherever they are stored: a few thousandths of the weights' bytes."""
        found = {target.piece.scales for target in targets if target.piece.scales is not None}
        values: _ScalesOf = {}
        for scales in sorted(found, key=lambda scales: (scales.part.file.name, scales.part.begin)):
            self._progress(0)
            raw = np.empty(scales.part.nbytes, np.uint8)
            _read_into(scales.part.file, scales.part.begin, raw)
            self._count(scales.part.file, raw.nbytes)
            values[scales.part] = decode_scales(raw.data, scales)
        return values

    def _straight(self, targets: Iterable[_Target]) -> Iterator[_ReadJob]:
        for target in targets:
            begin, nbytes_all = target.part.begin, target.part.nbytes
            for done in range(0, nbytes_all, self._chunk_bytes):
                nbytes = min(self._chunk_bytes, nbytes_all - done)
                yield _ReadJob(partial(_read_chunk, target, done, nbytes), nbytes, begin + done + nbytes)

    def _converted(self, targets: Sequence[_Target], scales: _ScalesOf) -> Iterator[_ReadJob]:
        """Each thread has a buffer for what is read, and one for what becomes of it."""
        staging_bytes = max(self._staging_bytes, *(target.unit for target in targets))
        staging = np.empty((_THREADS, staging_bytes), np.uint8)
        widening = max(DTYPE_BYTES[target.served] / STORED_BYTES[target.part.dtype] for target in targets)
        out = np.empty((_THREADS, int(staging_bytes * max(1, widening))), np.uint8)
        for number, chunk in enumerate(_chunks(targets, staging_bytes)):
            at, nbytes = number % _THREADS, chunk[-1].end - chunk[0].begin
            work = partial(_convert_chunk, chunk, staging[at, :nbytes], scales, out[at])
            yield _ReadJob(work, nbytes, chunk[-1].end)

    def _count(self, file: TensorFile, nbytes: int) -> None:
        file.bytes_read += nbytes
        self._progress(nbytes)


def _chunks(targets: Iterable[_Target], nbytes_max: int) -> Iterator[list[_Span]]:
    """Targets, in their order, cut and put together to spans that follow each other in the file, to be read at once."""
    chunk: list[_Span] = []
    room = nbytes_max
    for target in targets:
        unit, at = target.unit, target.part.begin
        while at < target.end:
            if chunk and (chunk[-1].end != at or room < unit):
                yield chunk
                chunk, room = [], nbytes_max
            end = min(target.end, at + room // unit * unit)
            chunk.append(_Span(target, at, end))
            room -= end - at
            at = end
    if chunk:
        yield chunk


def _read_chunk(target: _Target, done: int, nbytes: int) -> None:
    """Read a part of a tensor straight to its places."""
    file, (taker, *others) = target.part.file, target.takers
    try:
        taker.device.read_into(taker.address + done, file.fd, target.part.begin + done, nbytes)
    except OSError as error:
        raise _unreadable(file, error) from None
    for other in others:
        other.device.copy(other.address + done, taker.address + done, nbytes)


def _convert_chunk(chunk: Sequence[_Span], raw: NDArray[np.uint8], scales: _ScalesOf, out: NDArray[np.uint8]) -> None:
    """Read a chunk into `raw`, and bring it to its places by way of `out`."""
    begin = chunk[0].begin
    _read_into(chunk[0].target.part.file, begin, raw)
    for span in chunk:
        _convert(span, raw.data[span.begin - begin : span.end - begin], scales, out)


def _convert(span: _Span, raw: memoryview, scales: _ScalesOf, out: NDArray[np.uint8]) -> None:
    """Bring the elements in `raw` to their takers; `out` is room for them as they are served."""
    piece, served, takers = span.target
    size, width = STORED_BYTES[piece.part.dtype], DTYPE_BYTES[served]
    first, count = (span.begin - piece.part.begin) // size, len(raw) // size
    served_raw = np.frombuffer(raw, np.uint8)
    if piece.scales is not None or (piece.part.dtype, served) not in SAME:
        served_raw = out[: count * width]
        _convert_into(served_raw.data, piece, first, raw, served, scales)
    for taker in takers:
        _give(taker, first, served_raw, width)


def _convert_into(out: memoryview, piece: Piece, first: int, raw: memoryview, served: Dtype, scales: _ScalesOf) -> None:
    """Convert the elements in `raw`, of which the first is number `first` of the piece's."""
    if piece.scales is None:
        convert(raw, piece.part.dtype, served, out)
    elif not dequantize(raw, piece.first + first, piece.scales, scales[piece.scales.part], served, out):
        raise CheckpointError(f"{piece.part.file.name}: tensor {piece.name!r:.200} has a weight that is not a number")


def _give(taker: _Taker, first: int, raw: NDArray[np.uint8], width: int) -> None:
    """Bring what the taker wants of served elements of `width` bytes, the first of which is number `first` of the
    part's, to its place."""
    begin, end, of = taker.columns or ColumnRange(0, 1, 1)
    rows = raw.reshape(-1, of * width)[:, begin * width : end * width]
    address = taker.address + first // of * rows.shape[1]
    taker.device.write_bytes(address, np.ascontiguousarray(rows).reshape(-1).data)


def _read_into(file: TensorFile, begin: int, raw: NDArray[np.uint8]) -> None:
    try:
        host.read_into(file.fd, begin, raw.ctypes.data, raw.nbytes)
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: TensorFile, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file.name} cannot be read: {error.strerror}")
