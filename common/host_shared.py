"""Memory that processes of one host share and that their CPUs address: the bus and the ledgers.

It is no device memory: where a device has memory of its own, the CPU cannot touch that, and these it must. What a
ledger takes is counted in its device's budget all the same (capacity.py): a seat's memory is planned as a whole.
"""

from __future__ import annotations

import os

from elasticmoe.common.machine import check_group
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit
from elasticmoe.common.wording import size
from elasticmoe.native import host
from elasticmoe.native.host import Reservation


class HostShared:
    """A memfd and its mapping, of `nbytes` at `address`; 0 both until it has a size. Owns the descriptor `fd`, a
    duplicate of which lets another process `open` the same memory. `close` ends this process's part."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.nbytes = 0
        self.address = 0
        self._mapping: Reservation | None = None

    @classmethod
    def create(cls, name: str) -> HostShared:
        """One without a size. Raises OSError at the limit of open files."""
        return cls(os.memfd_create(name, os.MFD_CLOEXEC))

    @classmethod
    def open(cls, fd: int, nbytes: int) -> HostShared:
        """What another process made and sized; `fd` is taken over, also by an error. Raises DeviceError invalid_extent
        where there is no such memory."""
        shared = cls(fd)
        try:
            shared._map(nbytes)
        except (OSError, ValueError) as error:
            shared.close()
            reason = error.strerror if isinstance(error, OSError) else error
            text = f"shared memory of {nbytes} bytes cannot be opened: {reason}"
            raise DeviceError(text, code="invalid_extent") from None
        return shared

    def resize(self, nbytes: int) -> None:
        """Give it its size, once: zeros, whose pages are made when they are touched or populated. Raises DoesNotFit."""
        try:
            os.ftruncate(self.fd, nbytes)
            self._map(nbytes)
        except OSError as error:
            raise DoesNotFit(f"no shared memory of {size(nbytes)}: {error.strerror}") from None

    def populate(self, offset: int, nbytes: int) -> None:
        """Make the pages of a part now, so that touching it cannot fail. Blocks meanwhile; any thread may. Raises
        DoesNotFit."""
        check_group(nbytes)
        try:
            host.allocate(self.fd, offset, nbytes)
        except OSError as error:
            raise DoesNotFit(f"the machine has no memory for {size(nbytes)}: {error.strerror}") from None

    @property
    def pages(self) -> int:
        """Real bytes that it takes now."""
        return os.fstat(self.fd).st_blocks * 512

    def _map(self, nbytes: int) -> None:
        mapping = Reservation(nbytes)
        mapping.map(0, self.fd, 0, nbytes, True)
        self._mapping, self.nbytes, self.address = mapping, nbytes, mapping.base

    def close(self) -> None:
        """Unmap and close; nothing may be touching it. Idempotent."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping, self.address = None, 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
