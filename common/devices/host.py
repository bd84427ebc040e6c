"""The host backend: a device is a slice of this machine's memory.

Memory lives in one memfd per space of a device (one per record would run into the limit of open files), and a handle
is an extent of it. Extents are chosen first fit; their pages are made when the handle is created (fallocate), so that
nothing fails later, and punched out when it is released. A memfd's offsets cost nothing, so it may reach far beyond the
budget, and fragmentation cannot refuse what the budget allows.

To make much memory without a pause, an owner divides `create`: `claim` takes the extent at once, `populate` makes its
pages in pieces of the caller's choice, `settle` says that all are there. `punch` gives pages back ahead of `release`.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import stat
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from common.devices.base import Device
from common.devices.extents import FreeList
from common.devices.rules import PROCESS, SPACES, Handle, ProcessRules, Range, Space, Token
from common.machine import group_room
from common.protocol.errors import DeviceError, DoesNotFit
from native import host

if TYPE_CHECKING:
    import torch

_WORTH_A_LOOK = 1 << 20
REACH = 8  # a memfd's offsets end at this multiple of the budget


class Extent(NamedTuple):
    """Where a handle lies: `offset` in the file `fd`. Imported ones name their file by `file`, its identity."""

    fd: int
    offset: int
    file: Hashable = None


class _File:
    """The memfd of one space: owner's side. `fd` is writable; `read_only` another description of the same file."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self.free = FreeList(nbytes)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.read_only)


class _Import:
    """A file that handles were imported from: one duplicate for all of them."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)  # close-on-exec
        self.num_handles = 0


class HostDevice(Device):
    """See the module's text. The owner gives a `budget`; after its restart also `files`, the descriptors that `files()`
    gave its predecessor (taken over), and calls `restore` for each handle and `trim`. A process that only imports gives
    neither."""

    def __init__(
        self,
        name: str,
        granularity: int,
        budget: int = 0,
        *,
        files: Mapping[Space, int] | None = None,
        rules: ProcessRules = PROCESS,
    ) -> None:
        """Raises DeviceError bad_granularity unless it is a power of two and a multiple of the page size."""
        page = os.sysconf("SC_PAGESIZE")
        if granularity < page or granularity & (granularity - 1):
            raise DeviceError(
                f"{name}: granularity {granularity} is not a power of two of at least {page}", code="bad_granularity"
            )
        super().__init__(name, granularity, budget, rules)
        self._reach = max(granularity, budget // granularity * granularity * REACH)
        self._files: dict[Space, _File] = {space: _File(fd, self._reach) for space, fd in (files or {}).items()}
        self._imported: dict[Hashable, _Import] = {}
        self._unsettled: set[Handle] = set()  # whose pages are not all there: yet, or any more

    @property
    def reach(self) -> int:
        """Handles of one space lie at offsets below this: the size of a range that can hold each at its own offset."""
        return self._reach

    def files(self) -> dict[Space, int]:
        """The descriptors of the spaces in use, for a successor. They stay the device's."""
        return {space: file.fd for space, file in self._files.items()}

    def create_files(self) -> None:
        """Make the files of all spaces, which is otherwise left to the first `create`."""
        for space in SPACES:
            self._file(space)

    def _file(self, space: Space) -> _File:
        file = self._files.get(space)
        if file is None:
            file = _File(os.memfd_create(f"{self.name}.{space}", os.MFD_CLOEXEC), self._reach)
            self._files[space] = file
        return file

    def offset_of(self, handle: Handle) -> int:
        """Where a handle lies in its space's file."""
        extent: Extent = handle.backing
        return extent.offset

    # ---- Owner's side

    def restore(self, space: Space, offset: int, nbytes: int) -> Handle:
        """The local handle that a predecessor made there. Raises DeviceError invalid_extent."""
        file = self._file(space)
        self._check_size(nbytes)
        try:
            if offset % self.granularity or offset + nbytes > os.fstat(file.fd).st_size:
                raise ValueError(f"extent ({offset}, {nbytes}) is not in the file")
            file.free.take(offset, nbytes)
        except ValueError as error:
            raise DeviceError(f"{self.name}.{space}: {error}", code="invalid_extent") from None
        handle = Handle(self.name, nbytes, "local", space, True, Extent(file.fd, offset))
        self._own(handle, space)
        return handle

    def claim(self, nbytes: int, space: Space) -> Handle:
        """`create` without its pages: `populate` makes them, `settle` ends that. The handle may be mapped meanwhile.

        Raises DoesNotFit beyond the budget, DeviceError not_granular.
        """
        self._check_room(nbytes)
        file = self._file(space)
        offset = self._find(file, nbytes)
        try:
            if os.fstat(file.fd).st_size < offset + nbytes:
                os.ftruncate(file.fd, offset + nbytes)
        except OSError as error:
            file.free.release(offset, nbytes)
            raise DoesNotFit(f"{self.name}: no file of {offset + nbytes} bytes: {error.strerror}") from None
        handle = Handle(self.name, nbytes, "local", space, True, Extent(file.fd, offset))
        self._own(handle, space)
        self._unsettled.add(handle)
        return handle

    def populate(self, handle: Handle, offset: int, nbytes: int) -> None:
        """Make the pages of a part of a claimed handle. Blocks meanwhile; any thread may, while the handle lives.

        Raises DoesNotFit where the machine's memory is short.
        """
        extent: Extent = handle.backing
        self._check_group(nbytes)
        try:
            host.allocate(extent.fd, extent.offset + offset, nbytes)
        except OSError as error:
            raise DoesNotFit(f"{self.name}: the machine has no memory for {nbytes} bytes: {error.strerror}") from None

    def write(self, handle: Handle, offset: int, address: int, nbytes: int) -> None:
        """Make the pages of a part of a claimed handle with what is at `address`. Blocks, and raises, as `populate`."""
        extent: Extent = handle.backing
        self._check_group(nbytes)
        try:
            host.write_from(extent.fd, extent.offset + offset, address, nbytes)
        except OSError as error:
            raise DoesNotFit(f"{self.name}: the machine has no memory for {nbytes} bytes: {error.strerror}") from None

    def retire(self, handle: Handle) -> None:
        """Nobody uses a local handle any more: `punch` may give its pages back, until it is released."""
        self._unsettled.add(handle)

    def punch(self, handle: Handle, offset: int, nbytes: int) -> None:
        """Give back the pages of a part of a retired handle, ahead of its release. Any thread may, while it lives."""
        extent: Extent = handle.backing
        host.punch_hole(extent.fd, extent.offset + offset, nbytes)

    def settle(self, handle: Handle) -> None:
        """All pages of a claimed handle are there."""
        self._unsettled.discard(handle)

    @property
    def pages(self) -> int:
        """Real bytes of all spaces now, whoever made them. Any thread may ask."""
        return sum(os.fstat(file.fd).st_blocks * 512 for file in list(self._files.values()))

    def trim(self) -> None:
        """Give back pages that no handle owns: what a predecessor allocated and did not record."""
        for file in self._files.values():
            size = os.fstat(file.fd).st_size
            for offset, nbytes in file.free.extents:
                if offset < size:
                    host.punch_hole(file.fd, offset, min(nbytes, size - offset))

    def check_integrity(self) -> list[str]:
        """Findings: free + owned = total in every space, and pages of settled handles are there. None: all is well."""
        findings = []
        for space, file in self._files.items():
            owned = sorted((self.offset_of(handle), handle.nbytes) for handle in self._local if handle.space == space)
            end = 0
            for offset, nbytes in sorted(owned + file.free.extents):
                if offset != end:
                    findings.append(f"{self.name}.{space}: [{min(end, offset)}, {max(end, offset)}) is lost or doubled")
                end = offset + nbytes
            if end != self._reach:
                findings.append(f"{self.name}.{space}: free and owned extents end at {end}, not at {self._reach}")
            owned_bytes = sum(nbytes for _, nbytes in owned)
            unsettled_bytes = sum(handle.nbytes for handle in self._unsettled if handle.space == space)
            if owned_bytes != self.used[space]:
                findings.append(f"{self.name}.{space}: {self.used[space]} bytes are counted, {owned_bytes} are owned")
            present = os.fstat(file.fd).st_blocks * 512
            if present < owned_bytes - unsettled_bytes:
                findings.append(f"{self.name}.{space}: {present} bytes are present, {owned_bytes} are owned")
        return findings

    def _create(self, nbytes: int, space: Space) -> Extent:
        self._check_group(nbytes)
        file = self._file(space)
        offset = self._find(file, nbytes)
        try:
            host.allocate(file.fd, offset, nbytes)
        except OSError as error:
            file.free.release(offset, nbytes)
            raise DoesNotFit(f"{self.name}: the machine has no memory for {nbytes} bytes: {error.strerror}") from None
        return Extent(file.fd, offset)

    def _check_group(self, nbytes: int) -> None:
        """Raises DoesNotFit for what a control group cannot hold: beyond its limit the kernel kills processes of the
        group where a device without memory would refuse. Small parts are not worth the look."""
        if nbytes < _WORTH_A_LOOK or (room := group_room()) is None or nbytes <= room:
            return
        raise DoesNotFit(f"{self.name}: no memory for {nbytes} bytes: its control group has room for {room} more")

    def _find(self, file: _File, nbytes: int) -> int:
        offset = file.free.allocate(nbytes)
        if offset is None:
            raise DoesNotFit(f"{self.name}: no gap of {nbytes} bytes is left in {self._reach} bytes of offsets")
        return offset

    def _release(self, handle: Handle) -> None:
        extent: Extent = handle.backing
        self._unsettled.discard(handle)
        if handle.origin == "imported":
            self._drop_file(extent.file)
        elif handle.space is not None:
            host.punch_hole(extent.fd, extent.offset, handle.nbytes)
            self._files[handle.space].free.release(extent.offset, handle.nbytes)

    def _export(self, handle: Handle) -> Token:
        assert handle.space is not None, "only local handles are exported"
        file = self._files[handle.space]
        fd = file.read_only if handle.space == "weights" else file.fd
        return Token(fd, self.offset_of(handle), handle.nbytes)

    # ---- User's side

    def _identity(self, token: Token) -> Hashable:
        status = self._status(token)
        return status.st_dev, status.st_ino, token.offset

    def _status(self, token: Token) -> os.stat_result:
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
        try:
            reservation = host.Reservation(nbytes, self.granularity)
        except OSError as error:
            raise DoesNotFit(f"{self.name}: no address space for {nbytes} bytes: {error.strerror}") from None
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
        range_.backing.unmap(offset, nbytes)

    def view(self, range_: Range, offset: int, nbytes: int) -> memoryview:
        """Bytes of a mapped part as this process sees them, without a copy. Writable where the mapping is; it must be
        gone before `unreserve`. Only this backend has it. Raises DeviceError not_mapped."""
        self._check_range(range_)
        if offset < 0 or not range_.is_mapped(offset, nbytes):
            raise DeviceError(f"{self.name}: [{offset}, {offset + nbytes}) is not all mapped", code="not_mapped")
        return memoryview((ctypes.c_char * nbytes).from_address(range_.address(offset))).cast("B")

    def _wrap(
        self, range_: Range, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str
    ) -> torch.Tensor:
        import torch  # here, because the HMM wraps nothing and starts without it

        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise DeviceError(f"{self.name}: {dtype!r} is not a dtype", code="invalid_dtype")
        strides = strides if strides is not None else tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        if len(strides) != len(shape) or min((*shape, *strides, 0)) < 0:
            raise DeviceError(f"{self.name}: shape {shape} and strides {strides} do not match", code="out_of_range")
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        nbytes = (last + 1) * kind.itemsize if math.prod(shape) else 0
        if offset < 0 or offset % kind.itemsize or offset + nbytes > range_.nbytes:
            raise DeviceError(
                f"{self.name}: a tensor of {nbytes} bytes at {offset} is not in the range of "
                f"{range_.nbytes} bytes, or not aligned",
                code="out_of_range",
            )
        cpu = torch.device("cpu")
        storage = torch._C._construct_storage_from_data_pointer(range_.address(offset), cpu, nbytes)
        return torch.empty(0, dtype=kind, device=cpu).set_(storage, 0, shape, strides)

    def _copy(self, dst: int, src: int, nbytes: int) -> None:
        try:
            host.copy(dst, src, nbytes)
        except ValueError as error:
            raise DeviceError(f"{self.name}: {error}", code="out_of_range") from None

    def fence(self) -> None:
        """Nothing to wait for: operations of the CPU are over when they return."""

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        for imported in self._imported.values():
            os.close(imported.fd)
        self._files.clear()
        self._imported.clear()
