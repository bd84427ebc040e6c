"""Room on the store's disk for all records of an operation, taken before it begins.

A file beside the store's own, whose blocks are allocated: where the disk fills up meanwhile it is given up, and the
store finds the room that it left. It serves one operation, and is there only while that runs. The store keeps no such
promise itself: it refuses all writes from the first one that its disk did not take until that has been written. Who
fills the disk may be faster than the store; then the operation is undone, or waits, as operation/prepare.py says.

The store's memory needs no reserve: the record of an operation takes the place of the one before (common/store.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.wording import size
from elasticmoe.services.scaler.operation.operation import Operation

FILE_NAME: Final = "reserve"
_STORE_FILES: Final = "appendonlydir"  # what the embedded server makes in its folder

_RECORDS_PER_LEG: Final = 5  # prepare, commit, migrate, release, and the layout for the routers
_RECORDS_MORE: Final = 8  # accepted, cancelled, given up, ended, and four further attempts to stage
_GROWTH_BYTES: Final = 16 * 1024  # what a record gains until the end: times, moves, figures
_BESIDE_BYTES: Final = 512 * 1024  # the plan's inputs (DECISION_BYTES_MAX), decisions, events, renewals of the lease


def bytes_of(operation: Operation) -> int:
    """Bytes that all records of an operation may take, by its first one."""
    num_records = _RECORDS_MORE + _RECORDS_PER_LEG * operation.num_legs
    return num_records * (len(msgspec.msgpack.encode(operation)) + _GROWTH_BYTES) + _BESIDE_BYTES


class DiskReserve:
    """The file in the store's `folder`. Where the store's files are elsewhere (a server that was named, a container of
    its own) nothing can be reserved, and nothing is. Any thread; each call is a few system calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / FILE_NAME

    def take(self, nbytes: int) -> None:
        """Allocate that many bytes. Raises Unavailable `storage_full`, and holds nothing then."""
        if not (self._folder / _STORE_FILES).is_dir():
            return
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, nbytes)
            finally:
                os.close(fd)
        except OSError as error:
            self.give_up()
            needed = f"an operation's records need {size(nbytes)} on the store's disk, in {self._folder}"
            text = f"{needed}: {error.strerror}; make room there, and ask again"
            raise Unavailable(text, code="storage_full") from None

    def give_up(self) -> bool:
        """Leave the room to the store. True where there was any. Idempotent."""
        try:
            os.unlink(self._path)
        except OSError:
            return False
        return True
