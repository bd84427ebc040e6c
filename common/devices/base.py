"""The interface of all device backends, and the rules of device memory, enforced here for every backend.

Owner and users of memory are different processes: the HMM *creates* handles and *exports* them, a rank *imports* and
*maps* them. Both *reserve* address ranges and map whole handles into them. A rule that some accelerator has holds on
all of them, so that a test on the host finds what would break on a device. Each breach is a DeviceError with a code:

| code                | rule                                                                              |
|---------------------|-----------------------------------------------------------------------------------|
| not_granular        | sizes and offsets are positive multiples of the granularity                       |
| out_of_range        | a mapping, tensor or access lies inside its handle or reserved range              |
| range_too_large     | a range is no larger than the backend's largest                                   |
| mapping_live        | nothing is mapped over a live mapping                                             |
| mixed_range         | a range holds handles of one origin: made here, a predecessor's, or imported      |
| other_device        | a range holds handles of its own device only: those that it made, or imported     |
| already_imported    | a handle is imported once per process                                             |
| export_and_import   | one process exports or imports, never both                                        |
| not_local           | only local handles are exported and retired                                       |
| not_claimed         | memory is made for claimed handles only                                           |
| not_populated       | a handle is settled once all its memory is there                                  |
| not_settled         | what is still being made is not exported                                          |
| not_retired         | memory of a handle that may be in use is not given back                           |
| not_mapped          | unmap undoes exactly one map; only mapped memory is read, written and copied      |
| still_mapped        | a mapped handle is not released, a range with mappings is not given back          |
| released            | a retired or released handle, a range or device that is gone, is not used again   |
| read_only           | what was exported read-only is mapped read-only, and not written where it is      |
| other_hardware      | owner and users of a device mean the same hardware by its name                    |

Addresses are the device's: of those that are mapped here, this interface reads, writes and copies. Whether the CPU may
touch them is the backend's affair, and nobody else does; what computes on them are the tensors of `wrap`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

from elasticmoe.common.devices.driver import Lost, MemoryInfo
from elasticmoe.common.devices.handles import Handles
from elasticmoe.common.devices.rules import Completion, FdToken, Handle, KeyToken, ProcessRules, Range, Space, Token
from elasticmoe.common.devices.torch_devices import open_torch
from elasticmoe.common.protocol.errors import ElasticMoEError

if TYPE_CHECKING:
    import torch

__all__ = ["Completion", "Device", "FdToken", "Handle", "KeyToken", "ProcessRules", "Range", "Space", "Token"]


class Device(Handles):
    """One device's memory, as this process uses it: handles (handles.py), ranges, and what is done with the bytes.

    Belongs to one thread at a time, but for reading, writing, copying, checksums, `collapse` and `make_large`: any
    thread may do these with memory that stays mapped meanwhile. Nothing here blocks for long but where it says so.
    """

    @classmethod
    def memory(cls, index: int) -> MemoryInfo | None:  # noqa: ARG003
        """What the driver says of the memory of device `index`, which this process opens for it; None where a device's
        memory is the machine's. Raises DeviceError no_driver, no_device."""
        return None

    @classmethod
    def give_up(cls, index: int, reason: str) -> None:
        """Use device `index` no more in this process, which could not open it. `open_device` makes it all the same, and
        its owner can take over by name what a predecessor recorded of it; whatever needs the device raises."""

    @property
    def failure(self) -> str:
        """Why this process cannot use the device any more, as its driver has said; empty where it can. What is there
        can still be unmapped and released: that is only noted, and the driver gives all back when the process ends.
        Whatever else needs the device raises DeviceError driver_failed."""
        return ""

    def check_usable(self) -> None:
        """Raise DeviceError driver_failed where there is a `failure`."""
        if self.failure:
            raise Lost(f"{self.name} cannot be used: {self.failure}")

    # ---- Hardware

    @property
    def identity(self) -> str:
        """What names this device's hardware alike in all processes of the machine, also where they see other devices
        by its name; empty where there is nothing to tell apart, or where it is not known: the driver tells nothing, or
        could not open it. Asks no driver."""
        return ""

    def check_identity(self, owners: str) -> None:
        """Raise DeviceError other_hardware where this is not the hardware that the owner of its memory calls `owners`,
        as far as both know."""
        own = self.identity
        if own and owners and own != owners:
            text = f"it is {own} in this process, and {owners} to the owner of its memory: let all processes see the "
            text += "same devices (CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES)"
            raise self._broken(text, code="other_hardware")

    unreached: ClassVar[str] = "start with --exchange shm"  # what helps where one of these does not reach another

    def reaches(self, other: str) -> bool:  # noqa: ARG002
        """Whether what computes here may touch the memory of the device called `other`, of the same host and backend.
        Raises DeviceError."""
        return True

    # ---- Ranges and mappings

    def reserve(self, nbytes: int) -> Range:
        """Reserve address space, a multiple of the granularity. No memory. Raises DeviceError not_granular,
        range_too_large."""
        self._check_open()
        self._check_size(nbytes)
        if nbytes > self.range_bytes_max:
            text = f"a range of {nbytes} bytes exceeds the limit of {self.range_bytes_max}"
            raise self._broken(text, code="range_too_large")
        base, backing = self._reserve(nbytes)
        range_ = Range(self.name, base, nbytes, backing)
        self._ranges.add(range_)
        self._rules.add_range(range_)
        return range_

    def unreserve(self, range_: Range) -> None:
        """Give a range back. Tensors over it must be gone. Raises DeviceError still_mapped, released."""
        self._check_range(range_)
        if range_.starts:
            raise self._broken(f"the range still has {len(range_.starts)} mappings", code="still_mapped")
        range_.is_live = False
        self._ranges.discard(range_)
        self._rules.drop_range(range_)
        self._unreserve(range_)

    def map(self, range_: Range, offset: int, handle: Handle, writable: bool) -> None:
        """Map the whole `handle` at `offset` of the range. Raises as `map_many` does."""
        self.map_many(range_, [(offset, handle)], writable)

    def map_many(
        self, range_: Range, parts: Iterable[tuple[int, Handle]], writable: bool, *, populate: bool = False
    ) -> None:
        """Map whole handles, each at its offset of the range: all or none. `populate`: prepare every page now, which
        takes time, rather than at its first touch.

        Raises DeviceError not_granular, out_of_range, mapping_live, mixed_range, other_device, read_only, released.
        """
        self._check_range(range_)
        ordered = sorted(parts, key=lambda part: part[0])
        end = 0
        for offset, handle in ordered:
            self._check_part(range_, offset, handle, writable)
            if offset < end:
                raise self._broken(f"two parts to map overlap at {offset}", code="mapping_live")
            end = offset + handle.nbytes
        if len({handle.origin for _, handle in ordered} | {range_.origin} - {None}) > 1:
            raise self._broken("a range holds handles of one origin", code="mixed_range")
        if not ordered:
            return
        self._map_many(range_, ordered, writable, populate)
        self._rules.add_mappings(range_, ordered, writable)

    def unmap(self, range_: Range, offset: int) -> None:
        """Undo the mapping that begins at `offset`. Raises as `unmap_many` does."""
        self.unmap_many([(range_, offset)])

    def unmap_many(self, parts: Sequence[tuple[Range, int]]) -> None:
        """Undo mappings: those that begin at these offsets of their ranges. Fences first, once, so no operation of this
        process is in flight; that other threads and processes have stopped to use them is the caller's to know.

        Raises DeviceError not_mapped, and none is undone then; the first one where the backend cannot undo some: these
        stay mapped, and all others are not.
        """
        for range_, offset in parts:
            self._check_range(range_)
            if offset not in range_.mappings:
                raise self._broken(f"no mapping begins at {offset}", code="not_mapped")
        if len(set(parts)) < len(parts):
            raise self._broken("a mapping is to be undone twice", code="not_mapped")
        if not parts:
            return
        self.fence()
        refusals = []
        for part in parts:
            try:
                self._undo(*part)
            except ElasticMoEError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    def _undo(self, range_: Range, offset: int) -> None:
        mapping = range_.mappings[offset]
        self._rules.drop_mapping(range_, offset)  # first: no other thread may find it mapped from here on
        try:
            self._unmap(range_, offset, mapping.handle.nbytes)
        except BaseException:  # it is mapped still, and its handle must not be released
            self._rules.add_mappings(range_, [(offset, mapping.handle)], mapping.writable)
            raise

    def collapse(self, range_: Range, offset: int, nbytes: int) -> bool:
        """Put large pages behind a mapped part of the range, both ends at multiples of `large_page_bytes`, for all who
        map it, now or later, at such an offset. What lies there stays, also while others read and write it. Blocks, for
        a few milliseconds each 2 MiB; any thread. Whether all of it has them: the kernel may refuse for any reason, and
        a backend whose pages are never small has nothing to do.

        Raises DeviceError not_granular, not_mapped, out_of_range.
        """
        self._check_range(range_)
        if not self.large_page_bytes:
            return True
        self._check_large(range_, offset, nbytes)
        return self._collapse(range_, offset, nbytes)

    def make_large(self, range_: Range, offset: int, nbytes: int) -> bool:
        """Make a part of claimed handles in large pages, as zeros, both ends at multiples of `large_page_bytes`; it is
        mapped to be written, and nothing of it has been made. `populate` or `write` has still to be called for it, and
        finds most of its work done. Blocks; any thread. Whether all of it is made so: the kernel may refuse for any
        reason, and a backend whose pages are never small has nothing to do.

        Raises DoesNotFit where the machine's memory is short; DeviceError not_claimed, not_granular, not_mapped,
        out_of_range, read_only.
        """
        self._check_range(range_)
        if not self.large_page_bytes:
            return True
        self._check_large(range_, offset, nbytes, writable=True)
        for handle, _, _ in self._rules.parts(range_.address(offset), nbytes):
            self._check_claimed(handle, 0, handle.nbytes)
        return self._make_large(range_, offset, nbytes)

    def _check_large(self, range_: Range, offset: int, nbytes: int, *, writable: bool = False) -> None:
        if offset % self.large_page_bytes or nbytes % self.large_page_bytes:
            text = f"[{offset}, {offset + nbytes}) does not end at multiples of {self.large_page_bytes}"
            raise self._broken(text, code="not_granular")
        self._rules.check_mapped(range_.address(offset), nbytes, writable=writable)

    def wrap(
        self, range_: Range, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str
    ) -> torch.Tensor:
        """A tensor over a part of the range, without a copy. `offset`: bytes; `strides`: elements, None for row-major;
        `dtype`: as TensorSpec has it. Parts of it may be unmapped, if nobody touches them. It owns nothing: it must be
        gone before `unreserve`. Raises DeviceError out_of_range, invalid_dtype."""
        import torch  # here, because the HMM wraps nothing and starts without it

        self._check_range(range_)
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise self._broken(f"{dtype!r} is not a dtype", code="invalid_dtype")
        strides = strides if strides is not None else tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        if len(strides) != len(shape) or min((*shape, *strides, 0)) < 0:
            raise self._broken(f"shape {shape} and strides {strides} do not match", code="out_of_range")
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        nbytes = (last + 1) * kind.itemsize if math.prod(shape) else 0
        if offset < 0 or offset % kind.itemsize or offset + nbytes > range_.nbytes:
            where = f"the range of {range_.nbytes} bytes, or not aligned"
            raise self._broken(f"a tensor of {nbytes} bytes at {offset} is not in {where}", code="out_of_range")
        storage = self._storage(range_, offset, nbytes)
        return torch.empty(0, dtype=kind, device=storage.device).set_(storage, 0, shape, strides)

    def open_torch(self) -> torch.device:
        """Where torch has the tensors of `wrap`, once it can compute there. Raises DeviceError no_torch."""
        return open_torch("cpu")

    def queue_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between tensors of this device, of the same shape and dtype and without gaps, in the order of what torch
        computes here, which is queued: `target` is there when that is. Either may be over memory that another device of
        the host has, and that is mapped here. Raises DeviceError, or what torch raises."""
        target.copy_(source)

    # ---- Bytes

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """Copy between two addresses, also of two devices; they must not overlap. Returns when it is done.

        Raises DeviceError out_of_range, not_mapped, read_only.
        """
        self.copy_async([(dst, src, nbytes)]).wait()

    def copy_async(self, parts: Sequence[tuple[int, int, int]]) -> Completion:
        """Begin to copy parts (destination, source, bytes), of this device or to it. No two may overlap, and nothing of
        them may be unmapped or relied on before the completion says that all is done; a backend may be done at once.

        Raises as `copy` does. Nothing is in flight then; where a driver refuses a part, those before it are done.
        """
        self._check_open()
        for dst, src, nbytes in parts:
            self._rules.check_mapped(dst, nbytes, writable=True)
            self._rules.check_mapped(src, nbytes)
            if dst < src + nbytes and src < dst + nbytes:
                raise self._broken(f"{nbytes} bytes to copy overlap their source", code="out_of_range")
        return self._copy_async(parts)

    def read_into(self, address: int, fd: int, file_offset: int, nbytes: int) -> None:
        """Read exactly `nbytes` of a file to `address`. Blocks. Raises OSError of the file (EIO where it ends early),
        DeviceError out_of_range, not_mapped, read_only."""
        self._check_open()
        self._rules.check_mapped(address, nbytes, writable=True)
        self._read_into(address, fd, file_offset, nbytes)

    def read_bytes(self, address: int, nbytes: int) -> bytes:
        """A copy of what is at `address`. Raises DeviceError out_of_range, not_mapped."""
        self._check_open()
        self._rules.check_mapped(address, nbytes)
        return self._read_bytes(address, nbytes)

    def write_bytes(self, address: int, data: bytes | memoryview) -> None:
        """Put `data`, whose items are bytes, at `address`. Blocks. Raises DeviceError out_of_range, not_mapped,
        read_only; DoesNotFit where that memory was not made yet and there is none."""
        self._check_open()
        self._rules.check_mapped(address, len(data), writable=True)
        self._write_bytes(address, memoryview(data))

    def checksum(self, address: int, nbytes: int) -> int:
        """XXH64 with seed 0 of what is at `address`. Blocks. Raises DeviceError out_of_range, not_mapped."""
        self._check_open()
        self._rules.check_mapped(address, nbytes)
        return self._checksum(address, nbytes)

    @abstractmethod
    def fence(self) -> None:
        """Wait until no operation of this process on the device is in flight."""

    def close(self) -> None:
        """Give everything back, mapped or not; for the process's end and for tests. Idempotent. Where the driver
        refuses to take something back, all else is given back first: then it raises that DeviceError."""
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as ends:  # the last one comes first, and all of them, whatever others raise
            ends.callback(self._close)
            for identity in self._imports.values():
                ends.callback(self._rules.drop_import, identity)
            for range_ in self._ranges:
                ends.callback(self._end_range, range_)
            ends.callback(self.fence)

    def _end_range(self, range_: Range) -> None:
        range_.is_live = False
        self._rules.drop_range(range_)
        self._unreserve(range_)

    # ---- Checks

    def _check_range(self, range_: Range) -> None:
        self._check_open()
        if range_.device != self.name:
            raise self._broken(f"a range of {range_.device} was given", code="other_device")
        if not range_.is_live:
            raise self._broken("the range has been given back", code="released")

    def _check_part(self, range_: Range, offset: int, handle: Handle, writable: bool) -> None:
        self._check_handle(handle)
        if handle.state == "retired":
            raise self._broken("the handle is retired", code="released")
        if offset % self.granularity:
            raise self._broken(f"offset {offset} is not a multiple of {self.granularity}", code="not_granular")
        end = offset + handle.nbytes
        if offset < 0 or end > range_.nbytes:
            text = f"[{offset}, {end}) exceeds the range of {range_.nbytes} bytes"
            raise self._broken(text, code="out_of_range")
        if writable and not handle.writable:
            raise self._broken("the handle was exported read-only", code="read_only")
        if range_.overlaps(offset, end):
            raise self._broken(f"[{offset}, {end}) is already mapped", code="mapping_live")

    # ---- What a backend does

    def _collapse(self, range_: Range, offset: int, nbytes: int) -> bool:  # noqa: ARG002
        return True  # asked only where `large_page_bytes` is set

    def _make_large(self, range_: Range, offset: int, nbytes: int) -> bool:  # noqa: ARG002
        return True  # as above

    @abstractmethod
    def _reserve(self, nbytes: int) -> tuple[int, Any]: ...
    @abstractmethod
    def _unreserve(self, range_: Range) -> None: ...
    @abstractmethod
    def _map_many(self, range_: Range, parts: list[tuple[int, Handle]], writable: bool, populate: bool) -> None: ...
    @abstractmethod
    def _unmap(self, range_: Range, offset: int, nbytes: int) -> None: ...
    @abstractmethod
    def _storage(self, range_: Range, offset: int, nbytes: int) -> Any: ...  # of torch, untyped
    @abstractmethod
    def _copy_async(self, parts: Sequence[tuple[int, int, int]]) -> Completion: ...
    @abstractmethod
    def _read_into(self, address: int, fd: int, file_offset: int, nbytes: int) -> None: ...
    @abstractmethod
    def _read_bytes(self, address: int, nbytes: int) -> bytes: ...
    @abstractmethod
    def _write_bytes(self, address: int, data: memoryview) -> None: ...
    @abstractmethod
    def _checksum(self, address: int, nbytes: int) -> int: ...
    @abstractmethod
    def _close(self) -> None: ...
