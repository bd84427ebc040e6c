"""What the device interface is about: tokens, handles, ranges, and the rules that concern the process as a whole."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable
from typing import Any, Final, Literal, NamedTuple

from elasticmoe.common.protocol.errors import DeviceError

Space = Literal["weights", "kv", "mailbox"]
SPACES: Final[tuple[Space, ...]] = ("weights", "kv", "mailbox")
HandleOrigin = Literal["local", "restored", "imported"]
HandleState = Literal["claimed", "settled", "retired"]


class FdToken(NamedTuple):
    """A share token that is a descriptor and a part of what it names. The descriptor belongs to the exporting device
    and is open while the handle is live; it travels as a duplicate (SCM_RIGHTS). `key`: names the memory among all that
    its device shares, where descriptors do not tell it apart; 0 where they do."""

    fd: int
    offset: int
    nbytes: int
    key: int = 0


class KeyToken(NamedTuple):
    """A share token that is a number of 64 bits, by which the driver knows the handle."""

    key: int
    nbytes: int


Token = FdToken | KeyToken  # what one process hands another so that it can import a handle


class Handle:
    """One physical allocation of `nbytes` on `device`, mapped whole. Made by `create`, `claim`, `restore` or `import_`;
    ends with `release`. Compared by identity.

    `place`: of a local one: its offset in its space, unlike that of any other handle there, for its life and for its
    owner's successors; -1 of an imported one. `key`: the driver's name for a local one, where it has any, else 0; a
    successor needs it. `num_filled`: bytes of a local one that were made: all, once it is settled.
    """

    __slots__ = (
        "backing",
        "device",
        "is_live",
        "key",
        "nbytes",
        "num_filled",
        "num_mappings",
        "origin",
        "place",
        "space",
        "state",
        "writable",
    )

    def __init__(
        self,
        device: str,
        nbytes: int,
        origin: HandleOrigin,
        space: Space | None,
        writable: bool,
        backing: Any,
        *,
        place: int = -1,
        key: int = 0,
        is_settled: bool = True,
    ) -> None:
        self.device = device
        self.nbytes = nbytes
        self.origin: HandleOrigin = origin
        self.space: Space | None = space  # None for imported handles: the importer does not know
        self.writable = writable
        self.backing = backing
        self.place = place
        self.key = key
        self.state: HandleState = "settled" if is_settled else "claimed"
        self.num_filled = nbytes if is_settled and space is not None else 0
        self.num_mappings = 0
        self.is_live = True


class Mapping(NamedTuple):
    """A handle in its place of a range."""

    handle: Handle
    writable: bool


class Range:
    """A reserved part of the address space: `nbytes` from address `base`, with memory only where handles are mapped.
    Made by `Device.reserve`, ends with `Device.unreserve`."""

    __slots__ = ("backing", "base", "device", "is_live", "mappings", "nbytes", "origin", "starts")

    def __init__(self, device: str, base: int, nbytes: int, backing: Any) -> None:
        self.device = device
        self.base = base
        self.nbytes = nbytes
        self.backing = backing
        self.origin: HandleOrigin | None = None  # of the handles that are mapped in it; None while there are none
        self.starts: list[int] = []  # offsets of live mappings, ascending
        self.mappings: dict[int, Mapping] = {}
        self.is_live = True

    def address(self, offset: int) -> int:
        """The address of `offset`. Stable for the range's life, whatever is mapped."""
        return self.base + offset

    def end_of(self, at: int) -> int:
        """Where the mapping ends whose start is the one numbered `at`."""
        return self.starts[at] + self.mappings[self.starts[at]].handle.nbytes

    def overlaps(self, offset: int, end: int) -> bool:
        """Whether any part of [offset, end) is mapped."""
        at = bisect_left(self.starts, end) - 1
        return at >= 0 and self.end_of(at) > offset

    def is_mapped(self, offset: int, nbytes: int, *, writable: bool = False) -> bool:
        """Whether mappings cover all of [offset, offset + nbytes): `writable` ones, if that is asked."""
        at = bisect_right(self.starts, offset) - 1
        end = offset
        while 0 <= at < len(self.starts) and self.starts[at] <= end < offset + nbytes:
            if writable and not self.mappings[self.starts[at]].writable:
                return False
            end = max(end, self.end_of(at))
            at += 1
        return end >= offset + nbytes


class Completion(ABC):
    """Work that a device was asked for. Its memory may be used, and what it reads changed, once it is done."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether all of it is over. Does not wait."""

    @abstractmethod
    def wait(self) -> None:
        """Return when all of it is over. Raises DeviceError where it failed."""


class _Done(Completion):
    """Of work that was over when it had been asked for."""

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


DONE: Final[Completion] = _Done()


class ProcessRules:
    """What the rules say about the process as a whole: its role, what it has imported and what it has mapped. One per
    process; `check_mapped` may be asked by any thread."""

    def __init__(self) -> None:
        self._role: Literal["exports", "imports"] | None = None
        self._imported: set[Hashable] = set()
        self._ranges: dict[int, Range] = {}  # live ones, by base
        self._bases: list[int] = []  # ascending
        self._lock = threading.Lock()  # of ranges and what is mapped in them

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
        with self._lock:
            self._ranges[range_.base] = range_
            insort(self._bases, range_.base)

    def drop_range(self, range_: Range) -> None:
        """Undo `add_range`."""
        with self._lock:
            if self._ranges.pop(range_.base, None) is not None:
                self._bases.remove(range_.base)

    def add_mappings(self, range_: Range, parts: list[tuple[int, Handle]], writable: bool) -> None:
        """Note that handles are mapped now, each at its offset."""
        with self._lock:
            for offset, handle in parts:
                insort(range_.starts, offset)
                range_.mappings[offset] = Mapping(handle, writable)
                handle.num_mappings += 1
            range_.origin = parts[0][1].origin

    def drop_mapping(self, range_: Range, offset: int) -> None:
        """Note that what is mapped at `offset` is about to be unmapped."""
        with self._lock:
            range_.mappings.pop(offset).handle.num_mappings -= 1
            range_.starts.remove(offset)
            if not range_.starts:
                range_.origin = None

    def device_of(self, address: int) -> str | None:
        """The device in whose range an address lies; None where it lies in none."""
        with self._lock:
            at = bisect_right(self._bases, address) - 1
            range_ = self._ranges[self._bases[at]] if at >= 0 else None
            return range_.device if range_ is not None and address < range_.base + range_.nbytes else None

    def parts(self, address: int, nbytes: int) -> list[tuple[Handle, int, int]]:
        """What is mapped there, all of it: each handle's part, as its offset in the handle and its bytes. Raises
        DeviceError as `check_mapped`."""
        self.check_mapped(address, nbytes)
        with self._lock:
            range_ = self._ranges[self._bases[bisect_right(self._bases, address) - 1]]
            offset, found = address - range_.base, []
            at = bisect_right(range_.starts, offset) - 1
            for start in range_.starts[at:]:
                if start >= address - range_.base + nbytes:
                    break
                handle = range_.mappings[start].handle
                end = min(start + handle.nbytes, address - range_.base + nbytes)
                found.append((handle, offset - start, end - offset))
                offset = end
            return found

    def check_mapped(self, address: int, nbytes: int, *, writable: bool = False) -> None:
        """Raise DeviceError out_of_range, not_mapped or read_only unless all of it is mapped memory of one range."""
        with self._lock:
            at = bisect_right(self._bases, address) - 1
            range_ = self._ranges[self._bases[at]] if at >= 0 else None
            if range_ is None or nbytes <= 0 or address + nbytes > range_.base + range_.nbytes:
                raise DeviceError(f"{nbytes} bytes do not lie inside one reserved range", code="out_of_range")
            offset = address - range_.base
            if not range_.is_mapped(offset, nbytes):
                raise DeviceError(f"{nbytes} bytes are not all mapped", code="not_mapped")
            if writable and not range_.is_mapped(offset, nbytes, writable=True):
                raise DeviceError(f"{nbytes} bytes to be written are mapped read-only", code="read_only")


PROCESS = ProcessRules()
