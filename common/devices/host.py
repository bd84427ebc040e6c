"""The host backend: a device is a slice of this machine's memory.

Memory lives in one memfd per space of a device (one per record would run into the limit of open files), and a handle
is an extent of it, at the handle's place. Its pages are made when it is created or populated (fallocate), so that
nothing fails later, and punched out when it is reclaimed or released. A memfd's offsets cost nothing, so places may
reach far beyond the budget, and fragmentation cannot refuse what the budget allows.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elasticmoe.common.devices.base import Device
from elasticmoe.common.devices.rules import (
    DONE,
    PROCESS,
    SPACES,
    Completion,
    FdToken,
    Handle,
    ProcessRules,
    Range,
    Space,
    Token,
)
from elasticmoe.common.devices.torch_devices import storage_at
from elasticmoe.common.machine import check_group
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit
from elasticmoe.common.wording import size
from elasticmoe.native import host

# Memory in small pages that nobody has touched is written through its file from here on: to map them first, one by one,
# would take twice as long. What was touched costs the same either way; what was made in large pages is mapped.
_THROUGH_FILE_BYTES = 256 << 10
_STAGED_BYTES = 1 << 20  # of a file, on their way to memory; they stay in the processor's cache


class Extent(NamedTuple):
    """Where a handle lies: `offset` in the file `fd`. Imported ones name their file by `file`, its identity."""

    fd: int
    offset: int
    file: Hashable = None


class _File:
    """The memfd of one space: owner's side. `fd` is writable; `read_only` another description of the same file."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.read_only)


class _Import:
    """A file that handles were imported from: one duplicate for all of them."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)  # close-on-exec
        self.num_handles = 0


class HostDevice(Device):
    """See the module's text. The owner gives a `budget`; after its restart also `descriptors`, those that its
    predecessor named (taken over), and calls `restore` for each handle and `trim`. A process that only imports gives
    neither."""

    token_kind = FdToken
    granularity_min = os.sysconf("SC_PAGESIZE")
    kv_handle_bytes_min = 2 << 20
    large_page_bytes = 2 << 20

    def __init__(
        self,
        name: str,
        granularity: int,
        budget: int = 0,
        *,
        descriptors: Mapping[str, int] | None = None,
        rules: ProcessRules = PROCESS,
    ) -> None:
        super().__init__(name, granularity, budget, rules=rules)
        self._files: dict[str, _File] = {space: _File(fd) for space, fd in (descriptors or {}).items()}
        self._imported: dict[Hashable, _Import] = {}
        self._large: set[int] = set()  # addresses of large pages that `make_large` has mapped

    @classmethod
    def check(cls, index: int) -> None:
        """Nothing is needed: there are as many devices as anybody names."""

    def descriptors(self) -> Mapping[str, int]:
        """The file of each space in use, by the space's name."""
        return {space: file.fd for space, file in self._files.items()}

    def prepare(self) -> None:
        """Make the files of all spaces, which is otherwise left to their first handles. Raises OSError."""
        for space in SPACES:
            self._file(space)

    def _file(self, space: Space) -> _File:
        file = self._files.get(space)
        if file is None:
            file = self._files[space] = _File(os.memfd_create(f"{self.name}.{space}", os.MFD_CLOEXEC))
        return file

    # ---- Owner's side

    def _create(self, nbytes: int, space: Space, place: int) -> tuple[Extent, int]:
        self._check_group(nbytes)
        file = self._file(space)
        try:
            host.allocate(file.fd, place, nbytes)
        except OSError as error:
            raise self._no_memory(nbytes, error) from None
        return Extent(file.fd, place), 0

    def _claim(self, nbytes: int, space: Space, place: int) -> tuple[Extent, int]:
        file = self._file(space)
        try:
            if os.fstat(file.fd).st_size < place + nbytes:
                os.ftruncate(file.fd, place + nbytes)
        except OSError as error:
            raise DoesNotFit(f"{self.name}: no file of {size(place + nbytes)}: {error.strerror}") from None
        return Extent(file.fd, place), 0

    def _restore(self, nbytes: int, space: Space, place: int, key: int) -> Extent:
        del key  # places say all
        file = self._file(space)
        if place + nbytes > os.fstat(file.fd).st_size:
            raise self._broken(f"{space}: extent ({place}, {nbytes}) is not in the file", code="invalid_extent")
        return Extent(file.fd, place)

    def _populate(self, handle: Handle, offset: int, nbytes: int) -> None:
        extent: Extent = handle.backing
        self._check_group(nbytes)
        try:
            host.allocate(extent.fd, extent.offset + offset, nbytes)
        except OSError as error:
            raise self._no_memory(nbytes, error) from None

    def _write(self, handle: Handle, offset: int, address: int, nbytes: int) -> None:
        extent: Extent = handle.backing
        self._check_group(nbytes)
        try:
            host.write_from(extent.fd, extent.offset + offset, address, nbytes)
        except OSError as error:
            raise self._no_memory(nbytes, error) from None

    def _check_group(self, nbytes: int) -> None:
        try:
            check_group(nbytes)
        except DoesNotFit as error:
            raise DoesNotFit(f"{self.name}: {error.message}") from None

    def _no_memory(self, nbytes: int, error: OSError) -> DoesNotFit:
        return DoesNotFit(f"{self.name}: the machine has no memory for {size(nbytes)}: {error.strerror}")

    def _reclaim(self, handle: Handle, offset: int, nbytes: int) -> None:
        extent: Extent = handle.backing
        host.punch_hole(extent.fd, extent.offset + offset, nbytes)

    def _release(self, handle: Handle) -> None:
        extent: Extent = handle.backing
        if handle.origin == "imported":
            self._drop_file(extent.file)
        else:
            self._punch(extent.fd, extent.offset, handle.nbytes)

    def _punch(self, fd: int, offset: int, nbytes: int) -> None:
        if not host.punch_hole(fd, offset, nbytes):
            self.has_leftovers = True

    def _export(self, handle: Handle) -> FdToken:
        assert handle.space is not None, "only local handles are exported"
        file = self._files[handle.space]
        return FdToken(file.read_only if handle.space == "weights" else file.fd, handle.place, handle.nbytes)

    def _present(self, space: Space) -> int:
        file = self._files.get(space)
        return os.fstat(file.fd).st_blocks * 512 if file is not None else 0

    def _trim(self, space: Space, free: list[tuple[int, int]]) -> None:
        if space not in self._files:
            return
        fd = self._files[space].fd
        nbytes_max = os.fstat(fd).st_size
        for offset, nbytes in free:
            if offset < nbytes_max:
                self._punch(fd, offset, min(nbytes, nbytes_max - offset))

    # ---- User's side

    def _identity(self, token: Token) -> Hashable:
        assert isinstance(token, FdToken), "import_ has looked"
        status = self._status(token)
        return status.st_dev, status.st_ino, token.offset

    def _status(self, token: FdToken) -> os.stat_result:
        try:
            status = os.fstat(token.fd)
        except OSError as error:
            raise DeviceError(
                f"{self.name}: the token's descriptor is not usable: {error.strerror}", code="invalid_token"
            ) from None
        if not stat.S_ISREG(status.st_mode) or token.offset + token.nbytes > status.st_size:
            raise DeviceError(
                f"{self.name}: the token names [{token.offset}, {token.offset + token.nbytes}) of "
                f"{status.st_size} bytes",
                code="invalid_token",
            )
        return status

    def _import(self, token: Token) -> tuple[Extent, bool]:
        assert isinstance(token, FdToken), "import_ has looked"
        status = self._status(token)
        writable = fcntl.fcntl(token.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        name = (status.st_dev, status.st_ino, writable)
        file = self._imported.get(name)
        if file is None:
            file = self._imported[name] = _Import(token.fd)
        file.num_handles += 1
        return Extent(file.fd, token.offset, name), writable

    def _drop_file(self, name: Hashable) -> None:
        file = self._imported[name]
        file.num_handles -= 1
        if not file.num_handles:
            os.close(file.fd)
            del self._imported[name]

    # ---- Both

    def _reserve(self, nbytes: int) -> tuple[int, host.Reservation]:
        is_large = nbytes >= self.large_page_bytes
        try:
            reservation = host.Reservation(nbytes, max(self.granularity, self.large_page_bytes * is_large))
        except OSError as error:
            raise DoesNotFit(f"{self.name}: no address space for {size(nbytes)}: {error.strerror}") from None
        return reservation.base, reservation

    def _unreserve(self, range_: Range) -> None:
        range_.backing.close()

    def _map_many(self, range_: Range, parts: list[tuple[int, Handle]], writable: bool, populate: bool) -> None:
        native_parts = [(at, part.backing.fd, part.backing.offset, part.nbytes) for at, part in parts]
        try:
            range_.backing.map_many(native_parts, writable, populate)
        except OSError as error:
            raise DeviceError(f"{self.name}: {len(parts)} handles cannot be mapped: {error.strerror}") from None

    def _unmap(self, range_: Range, offset: int, nbytes: int) -> None:
        try:
            range_.backing.unmap(offset, nbytes)
        except OSError as error:
            raise DeviceError(f"{self.name}: {nbytes} bytes cannot be unmapped: {error.strerror}") from None
        self._large.difference_update(self._large_pages(range_.address(offset), nbytes))

    def _collapse(self, range_: Range, offset: int, nbytes: int) -> bool:
        reservation: host.Reservation = range_.backing
        return reservation.collapse(offset, nbytes)

    def _make_large(self, range_: Range, offset: int, nbytes: int) -> bool:
        reservation: host.Reservation = range_.backing
        self._check_group(nbytes)
        try:
            is_made = reservation.make_large(offset, nbytes, self.large_page_bytes)
        except OSError as error:
            raise self._no_memory(nbytes, error) from None
        if is_made:
            self._large.update(self._large_pages(range_.address(offset), nbytes))
        return is_made

    def _large_pages(self, address: int, nbytes: int) -> range:
        """The addresses of those that would hold these bytes."""
        large = self.large_page_bytes
        return range(address // large * large, address + nbytes, large)

    def _is_mapped_quickly(self, address: int, nbytes: int) -> bool:
        return nbytes < _THROUGH_FILE_BYTES or self._large.issuperset(self._large_pages(address, nbytes))

    def _storage(self, range_: Range, offset: int, nbytes: int) -> Any:
        return storage_at(range_.address(offset), self.open_torch(), nbytes)

    def _copy_async(self, parts: Sequence[tuple[int, int, int]]) -> Completion:
        for dst, src, nbytes in parts:
            host.copy(dst, src, nbytes)
        return DONE

    def _read_into(self, address: int, fd: int, file_offset: int, nbytes: int) -> None:
        if self._is_mapped_quickly(address, nbytes):
            host.read_into(fd, file_offset, address, nbytes)
            return
        buffer = (ctypes.c_char * min(nbytes, _STAGED_BYTES))()
        for done in range(0, nbytes, len(buffer)):
            num = min(len(buffer), nbytes - done)
            host.read_into(fd, file_offset + done, ctypes.addressof(buffer), num)
            self._write_to_files(address + done, memoryview(buffer).cast("B")[:num])

    def _write_bytes(self, address: int, data: memoryview) -> None:
        if len(data) < _THROUGH_FILE_BYTES:
            memoryview((ctypes.c_char * len(data)).from_address(address)).cast("B")[:] = data
        elif self._is_mapped_quickly(address, len(data)):
            host.copy(address, np.frombuffer(data, np.uint8).ctypes.data, len(data))  # other threads go on meanwhile
        else:
            self._write_to_files(address, data)

    def _write_to_files(self, address: int, data: memoryview) -> None:
        for handle, offset, nbytes in self._rules.parts(address, len(data)):
            extent: Extent = handle.backing
            part, data = data[:nbytes], data[nbytes:]
            at = extent.offset + offset
            while part:
                try:
                    num = os.pwrite(extent.fd, part, at)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.ENOMEM):
                        raise self._no_memory(len(part), error) from None
                    raise DeviceError(f"{self.name}: {len(part)} bytes cannot be written: {error.strerror}") from None
                part, at = part[num:], at + num

    def _read_bytes(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def _checksum(self, address: int, nbytes: int) -> int:
        return host.checksum(address, nbytes)

    def fence(self) -> None:
        """Nothing to wait for: operations of the CPU are over when they return."""

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        for imported in self._imported.values():
            os.close(imported.fd)
        self._files.clear()
        self._imported.clear()
