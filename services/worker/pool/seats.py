"""Who sits where, on file: one record for each seat of a pool, locked and written by the seat's rank.

A rank outlives its pool (ADR 16). The next pool finds it here: the kernel says which process holds a record's lock, as
long as that process lives and whatever state it is in, and the record says what it is to be taken for. Nobody has to
introduce himself, and no seat can be held by two processes: that is what the lock refuses.

Locks are POSIX record locks (fcntl(2), F_SETLK). They are the process's: one that opens and closes the file once more
drops its lock, so a rank opens it once. The file's room is taken when it is made: a full disk is no hindrance later.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from pathlib import Path
from typing import Final

import msgspec

from elasticmoe.common.protocol.codec import encode
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, ProtocolError, Unavailable
from elasticmoe.common.protocol.limits import RANKS_MAX
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.replies import refusal
from elasticmoe.common.protocol.scaler import RankReady
from elasticmoe.common.protocol.standby import ON_FILE, SeatRecord

RECORD_BYTES: Final = 16 * 1024  # the longest text of an error fits, with all names
_HEAD = struct.Struct("<II")  # length and CRC-32 of the message that follows
_FLOCK = struct.Struct("hhqqi4x")  # of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid


def path_of(state_dir: Path, pool_name: str) -> Path:
    """The file of a pool's seats."""
    return state_dir / f"seats-{pool_name}"


class Seats:
    """A pool's view of its file. Owns a descriptor until `close`, and no lock."""

    def __init__(self, path: Path) -> None:
        """Make the file, unless it is there. Raises Unavailable `storage_full` where it finds no room."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Unavailable(f"{path.name} cannot be made: {error.strerror}", code="storage_full") from None
        try:
            if os.fstat(self._fd).st_size < RANKS_MAX * RECORD_BYTES:
                os.posix_fallocate(self._fd, 0, RANKS_MAX * RECORD_BYTES)
        except OSError as error:
            os.close(self._fd)
            raise Unavailable(f"{path.name} finds no room: {error.strerror}", code="storage_full") from None

    def holder(self, slot: int) -> int:
        """Process id of the living rank of `slot`; 0 for none."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, slot * RECORD_BYTES, RECORD_BYTES, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else int(pid)

    def read(self, slot: int) -> SeatRecord | None:
        """The seat's record, of a rank that lives or was the last; None where there is none that can be read."""
        raw = os.pread(self._fd, RECORD_BYTES, slot * RECORD_BYTES)
        if len(raw) < _HEAD.size:
            return None
        length, checksum = _HEAD.unpack_from(raw)
        message = raw[_HEAD.size : _HEAD.size + length]
        if not length or zlib.crc32(message) != checksum:
            return None
        try:
            return ON_FILE.decode(message).body
        except ProtocolError:  # of another version
            return None

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SeatLock:
    """A rank's hold of its seat, from now to the end of its process."""

    def __init__(self, path: Path, seat: StartRank) -> None:
        """Take the seat. Raises Conflict `seat_taken` where another process holds it, Unavailable."""
        self._start = seat.slot * RECORD_BYTES
        self._record = SeatRecord(os.getpid(), seat)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, RECORD_BYTES, self._start)
        except BlockingIOError:
            raise Conflict(f"slot {seat.slot} is held by another living process", code="seat_taken") from None
        except OSError as error:
            raise Unavailable(f"{path.name} cannot be locked: {error.strerror}") from None
        self._write(self._record)

    def tell_ready(self, ready: RankReady) -> None:
        """Put on file that the rank serves. Raises Unavailable."""
        self._write(msgspec.structs.replace(self._record, ready=ready))

    def tell_failure(self, error: ElasticMoEError) -> None:
        """Put on file why the process is about to end. Raises Unavailable."""
        self._write(msgspec.structs.replace(self._record, failure=refusal(error)))

    def _write(self, record: SeatRecord) -> None:
        message = encode(record, sender=record.seat.incarnation)
        try:
            os.pwrite(self._fd, _HEAD.pack(len(message), zlib.crc32(message)) + message, self._start)
        except OSError as error:
            raise Unavailable(f"the seat's record cannot be written: {error.strerror}", code="storage_full") from None
        self._record = record
