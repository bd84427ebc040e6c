"""What the device interface is about: tokens, handles, ranges, and the rules that concern the process as a whole."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable
from typing import Any, Final, Literal, NamedTuple

from common.protocol.errors import DeviceError

Space = Literal["weights", "kv", "shared"]
SPACES: Final[tuple[Space, ...]] = ("weights", "kv", "shared")
Origin = Literal["local", "imported"]


class Token(NamedTuple):
    """What one process hands another so that it can import a handle: a descriptor and a part of what it names.

    The descriptor belongs to the exporting device; it travels as a duplicate (SCM_RIGHTS).
    """

    fd: int
    offset: int
    nbytes: int


class Handle:
    """One physical allocation of `nbytes` on `device`, mapped whole. Made by `create`, `import_` or a backend's
    restoration; ends with `release`. Compared by identity."""

    __slots__ = ("backing", "device", "is_live", "nbytes", "num_mappings", "origin", "space", "writable")

    def __init__(
        self, device: str, nbytes: int, origin: Origin, space: Space | None, writable: bool, backing: Any
    ) -> None:
        self.device = device
        self.nbytes = nbytes
        self.origin: Origin = origin
        self.space: Space | None = space  # None for imported handles: the importer does not know
        self.writable = writable
        self.backing = backing
        self.num_mappings = 0
        self.is_live = True


class Range:
    """A reserved part of the address space: `nbytes` from address `base`, with memory only where handles are mapped.
    Made by `Device.reserve`, ends with `Device.unreserve`."""

    __slots__ = ("backing", "base", "device", "is_live", "mappings", "nbytes", "origin", "starts")

    def __init__(self, device: str, base: int, nbytes: int, backing: Any) -> None:
        self.device = device
        self.base = base
        self.nbytes = nbytes
        self.backing = backing
        self.origin: Origin | None = None  # of the handles that are mapped in it; None while there are none
        self.starts: list[int] = []  # offsets of live mappings, ascending
        self.mappings: dict[int, Handle] = {}
        self.is_live = True

    def address(self, offset: int) -> int:
        """The address of `offset`. Stable for the range's life, whatever is mapped."""
        return self.base + offset

    def overlaps(self, offset: int, end: int) -> bool:
        """Whether any part of [offset, end) is mapped."""
        at = bisect_left(self.starts, end) - 1
        return at >= 0 and self.starts[at] + self.mappings[self.starts[at]].nbytes > offset

    def is_mapped(self, offset: int, nbytes: int) -> bool:
        """Whether mappings cover all of [offset, offset + nbytes)."""
        at = bisect_right(self.starts, offset) - 1
        end = offset
        while 0 <= at < len(self.starts) and self.starts[at] <= end < offset + nbytes:
            end = max(end, self.starts[at] + self.mappings[self.starts[at]].nbytes)
            at += 1
        return end >= offset + nbytes


class ProcessRules:
    """What the rules say about the process as a whole: its role, and what it has imported. One per process."""

    def __init__(self) -> None:
        self._role: Literal["exports", "imports"] | None = None
        self._imported: set[Hashable] = set()
        self._ranges: dict[int, Range] = {}  # live ones, by base

    def take_role(self, role: Literal["exports", "imports"]) -> None:
        """Fix whether this process exports or imports. Raises DeviceError export_and_import."""
        if self._role not in (None, role):
            raise DeviceError(
                f"a process that {self._role} handles cannot also be one that {role} them", code="export_and_import"
            )
        self._role = role

    def add_import(self, identity: Hashable) -> None:
        """Note that a handle was imported. Raises DeviceError already_imported."""
        if identity in self._imported:
            raise DeviceError("this process has already imported the handle", code="already_imported")
        self._imported.add(identity)

    def drop_import(self, identity: Hashable) -> None:
        """Undo `add_import`."""
        self._imported.discard(identity)

    def add_range(self, range_: Range) -> None:
        """Note a live range."""
        self._ranges[range_.base] = range_

    def drop_range(self, range_: Range) -> None:
        """Undo `add_range`."""
        self._ranges.pop(range_.base, None)

    def check_mapped(self, address: int, nbytes: int) -> None:
        """Raise DeviceError out_of_range or not_mapped unless all of it is mapped memory of one range."""
        for base, range_ in self._ranges.items():
            if base <= address and address + nbytes <= base + range_.nbytes:
                if not range_.is_mapped(address - base, nbytes):
                    raise DeviceError(f"{nbytes} bytes to copy are not all mapped", code="not_mapped")
                return
        raise DeviceError(f"{nbytes} bytes to copy do not lie inside one reserved range", code="out_of_range")


PROCESS = ProcessRules()
