"""The interface of all device backends, and the rules of device memory, enforced here for every backend.

Owner and users of memory are different processes: the HMM *creates* page handles and *exports* them, a rank *imports*
and *maps* them. Both *reserve* address ranges and map whole handles into them. A rule that some accelerator has holds
on all of them, so that a test on the host finds what would break on a device. Each breach is a DeviceError with a code:

| code                | rule                                                                              |
|---------------------|-----------------------------------------------------------------------------------|
| not_granular        | sizes and offsets are positive multiples of the granularity                       |
| out_of_range        | a mapping, tensor or copy lies inside its reserved range                          |
| mapping_live        | nothing is mapped over a live mapping                                             |
| mixed_range         | a range holds local handles only or imported ones only                            |
| other_device        | a range holds handles of its own device only                                      |
| already_imported    | a handle is imported once per process                                             |
| export_and_import   | one process exports or imports, never both                                        |
| not_local           | only local handles are exported                                                   |
| not_mapped          | unmap undoes exactly one map; only mapped memory is copied                        |
| still_mapped        | a mapped handle is not released, a range with mappings is not given back          |
| released            | a released handle, range or device is not used again                              |
| read_only           | what was exported read-only is mapped read-only                                   |

A Device and everything made by it belong to one thread at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

from common.devices.rules import SPACES, Handle, ProcessRules, Range, Space, Token
from common.protocol.errors import DeviceError, DoesNotFit
from common.wording import size

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "Handle", "ProcessRules", "Range", "Space", "Token"]


class Device(ABC):
    """One device's memory, as this process uses it. `budget`: bytes that `create` may have out at once; 0 for a process
    that only imports. `granularity`: bytes; a power of two, and a multiple of the page size.

    Public methods check the rules and call the backend's method of the same name with an underscore, which may assume
    them. Nothing here blocks for long except `create` (pages are made now), `copy` and `fence`.
    """

    def __init__(self, name: str, granularity: int, budget: int, rules: ProcessRules) -> None:
        self.name = name
        self.granularity = granularity
        self.budget = budget
        self.used: dict[Space, int] = dict.fromkeys(SPACES, 0)
        self._rules = rules
        self._local: set[Handle] = set()
        self._imports: dict[Handle, Hashable] = {}
        self._ranges: set[Range] = set()
        self._is_closed = False

    # ---- Handles

    @property
    def free(self) -> int:
        """Bytes of the budget that no handle uses."""
        return self.budget - sum(self.used.values())

    def create(self, nbytes: int, space: Space) -> Handle:
        """Allocate a handle of zeroed memory, for records of the class `space`. Blocks while pages are made.

        Raises DoesNotFit with the figures beyond the budget or where the machine's memory is short; nothing changed
        then. DeviceError not_granular.
        """
        self._check_room(nbytes)
        handle = Handle(self.name, nbytes, "local", space, True, self._create(nbytes, space))
        self._own(handle, space)
        return handle

    def _check_room(self, nbytes: int) -> None:
        self._check_open()
        self._check_size(nbytes)
        if nbytes > self.free:
            used = sum(self.used.values())
            raise DoesNotFit(f"{self.name}: {size(nbytes)} do not fit: {size(used)} of {size(self.budget)} are in use")

    def _own(self, handle: Handle, space: Space) -> None:
        self._local.add(handle)
        self.used[space] += handle.nbytes

    def release(self, handle: Handle) -> None:
        """End a handle. A local one's memory is gone and its bytes are free; an imported one stays its owner's.

        Raises DeviceError still_mapped, released, other_device.
        """
        self._check_handle(handle)
        if handle.num_mappings:
            raise self._broken("still_mapped", f"the handle is still mapped {handle.num_mappings} times")
        self._release(handle)
        handle.is_live = False
        if handle.origin == "imported":
            self._rules.drop_import(self._imports.pop(handle))
        elif handle.space is not None:
            self._local.discard(handle)
            self.used[handle.space] -= handle.nbytes

    def export(self, handle: Handle) -> Token:
        """What another process needs to import `handle`; valid while the handle is. Weights are exported read-only
        where the backend can. Raises DeviceError export_and_import, not_local."""
        self._check_handle(handle)
        if handle.origin != "local":
            raise self._broken("not_local", "an imported handle cannot be exported")
        self._rules.take_role("exports")
        return self._export(handle)

    def import_(self, token: Token) -> Handle:
        """Make another process's handle usable here. `token.fd` stays the caller's and may be closed afterwards.

        Raises DeviceError already_imported, export_and_import, not_granular; invalid_token where it names no memory.
        """
        self._check_open()
        self._check_size(token.nbytes)
        if token.offset < 0 or token.offset % self.granularity:
            raise self._broken("not_granular", f"token offset {token.offset} is not a multiple of {self.granularity}")
        self._rules.take_role("imports")
        identity = self._identity(token)
        self._rules.add_import(identity)
        try:
            backing, writable = self._import(token)
        except BaseException:
            self._rules.drop_import(identity)
            raise
        handle = Handle(self.name, token.nbytes, "imported", None, writable, backing)
        self._imports[handle] = identity
        return handle

    # ---- Ranges and mappings

    def reserve(self, nbytes: int) -> Range:
        """Reserve address space, a multiple of the granularity. No memory. Raises DeviceError not_granular."""
        self._check_open()
        self._check_size(nbytes)
        base, backing = self._reserve(nbytes)
        range_ = Range(self.name, base, nbytes, backing)
        self._ranges.add(range_)
        self._rules.add_range(range_)
        return range_

    def unreserve(self, range_: Range) -> None:
        """Give a range back. Tensors over it must be gone. Raises DeviceError still_mapped, released."""
        self._check_range(range_)
        if range_.starts:
            raise self._broken("still_mapped", f"the range still has {len(range_.starts)} mappings")
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
                raise self._broken("mapping_live", f"two parts to map overlap at {offset}")
            end = offset + handle.nbytes
        if len({handle.origin for _, handle in ordered} | {range_.origin} - {None}) > 1:
            raise self._broken("mixed_range", "a range cannot hold local and imported handles")
        if not ordered:
            return
        self._map_many(range_, ordered, writable, populate)
        for offset, handle in ordered:
            insort(range_.starts, offset)
            range_.mappings[offset] = handle
            handle.num_mappings += 1
        range_.origin = ordered[0][1].origin

    def unmap(self, range_: Range, offset: int) -> None:
        """Undo one mapping: the one that begins at `offset`. Fences first, so no operation of this process is in
        flight; that other threads and processes have stopped to use it is the caller's to know. Raises DeviceError
        not_mapped."""
        self._check_range(range_)
        handle = range_.mappings.get(offset)
        if handle is None:
            raise self._broken("not_mapped", f"no mapping begins at {offset}")
        self.fence()
        self._unmap(range_, offset, handle.nbytes)
        del range_.mappings[offset]
        range_.starts.remove(offset)
        handle.num_mappings -= 1
        if not range_.starts:
            range_.origin = None

    def wrap(
        self, range_: Range, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str
    ) -> torch.Tensor:
        """A tensor over a part of the range, without a copy. `offset`: bytes; `strides`: elements, None for row-major;
        `dtype`: as TensorSpec has it. Parts of it may be unmapped, if nobody touches them. It owns nothing: it must be
        gone before `unreserve`. Raises DeviceError out_of_range, invalid_dtype."""
        self._check_range(range_)
        return self._wrap(range_, offset, shape, strides, dtype)

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """Copy between two addresses of mapped memory, also of two devices; they must not overlap. Returns when done.

        Raises DeviceError out_of_range, not_mapped.
        """
        self._check_open()
        self._rules.check_mapped(dst, nbytes)
        self._rules.check_mapped(src, nbytes)
        self._copy(dst, src, nbytes)

    def close(self) -> None:
        """Give everything back, mapped or not; for the process's end and for tests. Idempotent."""
        if self._is_closed:
            return
        for range_ in list(self._ranges):
            range_.is_live = False
            self._rules.drop_range(range_)
            self._unreserve(range_)
        for identity in self._imports.values():
            self._rules.drop_import(identity)
        self._close()
        self._is_closed = True

    # ---- Checks

    def _broken(self, code: str, text: str) -> DeviceError:
        return DeviceError(f"{self.name}: {text}", code=code)

    def _check_open(self) -> None:
        if self._is_closed:
            raise DeviceError(f"{self.name} is closed", code="released")

    def _check_size(self, nbytes: int) -> None:
        if nbytes <= 0 or nbytes % self.granularity:
            raise self._broken("not_granular", f"{nbytes} bytes are not a positive multiple of {self.granularity}")

    def _check_handle(self, handle: Handle) -> None:
        self._check_open()
        if handle.device != self.name:
            raise DeviceError(f"a handle of {handle.device} was given to {self.name}", code="other_device")
        if not handle.is_live:
            raise self._broken("released", "the handle has been released")

    def _check_range(self, range_: Range) -> None:
        self._check_open()
        if range_.device != self.name:
            raise DeviceError(f"a range of {range_.device} was given to {self.name}", code="other_device")
        if not range_.is_live:
            raise self._broken("released", "the range has been given back")

    def _check_part(self, range_: Range, offset: int, handle: Handle, writable: bool) -> None:
        self._check_handle(handle)
        if offset % self.granularity:
            raise self._broken("not_granular", f"offset {offset} is not a multiple of {self.granularity}")
        end = offset + handle.nbytes
        if offset < 0 or end > range_.nbytes:
            raise self._broken("out_of_range", f"[{offset}, {end}) exceeds the range of {range_.nbytes} bytes")
        if writable and not handle.writable:
            raise self._broken("read_only", "the handle was exported read-only")
        if range_.overlaps(offset, end):
            raise self._broken("mapping_live", f"[{offset}, {end}) is already mapped")

    # ---- What a backend does

    @abstractmethod
    def _create(self, nbytes: int, space: Space) -> Any: ...
    @abstractmethod
    def _release(self, handle: Handle) -> None: ...
    @abstractmethod
    def _export(self, handle: Handle) -> Token: ...
    @abstractmethod
    def _identity(self, token: Token) -> Hashable: ...
    @abstractmethod
    def _import(self, token: Token) -> tuple[Any, bool]: ...
    @abstractmethod
    def _reserve(self, nbytes: int) -> tuple[int, Any]: ...
    @abstractmethod
    def _unreserve(self, range_: Range) -> None: ...
    @abstractmethod
    def _map_many(self, range_: Range, parts: list[tuple[int, Handle]], writable: bool, populate: bool) -> None: ...
    @abstractmethod
    def _unmap(self, range_: Range, offset: int, nbytes: int) -> None: ...
    @abstractmethod
    def _wrap(
        self, range_: Range, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str
    ) -> torch.Tensor: ...
    @abstractmethod
    def _copy(self, dst: int, src: int, nbytes: int) -> None: ...
    @abstractmethod
    def _close(self) -> None: ...
    @abstractmethod
    def fence(self) -> None:
        """Wait until no operation of this process on the device is in flight."""
