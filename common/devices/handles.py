"""The life of a device's handles: its first half of the interface, with the rules of it (base.py has the table).

The owner of memory (the HMM) takes a handle through these states, each by one call:

| call                | state afterwards | what holds                                                                |
|---------------------|------------------|---------------------------------------------------------------------------|
| `claim`             | claimed          | budget and place are taken; it may be mapped; its memory is not all there |
| `populate`, `write` | claimed          | a part is there: as zeros, or filled                                      |
| `settle`            | settled          | all of it is there; it may be exported                                    |
| `retire`            | retired          | nobody else uses it; it is mapped and exported no more                    |
| `reclaim`           | retired          | a part's memory may be gone already                                       |
| `release`           | -                | budget and place are free again                                           |

`create` is claim, populate and settle in one. `restore` takes over what a predecessor settled. A user (a rank) knows
`import_` and `release` only.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

from elasticmoe.common.devices.extents import FreeList
from elasticmoe.common.devices.rules import PROCESS, SPACES, FdToken, Handle, ProcessRules, Range, Space, Token
from elasticmoe.common.devices.torch_devices import check_torch, prepare_torch
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit
from elasticmoe.common.wording import size

_Make = Callable[[int, Space, int], tuple[Any, int]]
REACH: Final = 8  # places of a space end at this multiple of the budget, so that gaps refuse nothing


class Handles(ABC):
    """One device's handles, as this process has them. `budget`: bytes that may be out at once; 0 for a process that
    only imports. `granularity`: bytes; a power of two. `used`: bytes out, by space.

    Public methods check the rules and call the backend's method of the same name with an underscore, which may assume
    them. Belongs to one thread at a time, but for `populate`, `write`, `reclaim` and `pages`, which any thread may call
    while the handle lives.
    """

    token_kind: type[Token]
    granularity_min: int  # bytes
    kv_handle_bytes_min: int  # small ones are given back in small steps, and each costs what a handle costs
    range_bytes_max: int = sys.maxsize  # of one reserved range
    large_page_bytes: int = 0  # what `collapse` makes of small pages; 0 where pages are never small

    def __init__(
        self,
        name: str,
        granularity: int,
        budget: int = 0,
        *,
        descriptors: Mapping[str, int] | None = None,  # noqa: ARG002 - for backends that have any
        rules: ProcessRules = PROCESS,
    ) -> None:
        """`descriptors`: of a predecessor, taken over. Raises DeviceError bad_granularity for a granularity that is no
        power of two, or less than the backend's least."""
        if granularity < self.granularity_min or granularity & (granularity - 1):
            text = f"granularity {granularity} is not a power of two of at least {self.granularity_min}"
            raise DeviceError(f"{name}: {text}", code="bad_granularity")
        self.name = name
        self.granularity = granularity
        self.budget = budget
        self.reach = max(granularity, budget // granularity * granularity * REACH)
        self.used: dict[Space, int] = dict.fromkeys(SPACES, 0)
        self._rules = rules
        self._local: set[Handle] = set()
        self._imports: dict[Handle, Hashable] = {}
        self._places: dict[Space, FreeList] = {space: FreeList(self.reach) for space in SPACES}
        self._ranges: set[Range] = set()  # of base.py
        self.has_leftovers = False  # of released handles: the kernel could not let it go then; `trim` tries again
        self._is_closed = False

    @classmethod
    @abstractmethod
    def check(cls, index: int) -> None:
        """Whether there is a device of that number, and what it needs. Raises DeviceError no_driver, no_device."""

    @classmethod
    def check_torch(cls) -> None:
        """Whether torch knows such devices. Touches none. Raises DeviceError no_torch."""
        check_torch("cpu")

    @classmethod
    def prepare_torch(cls) -> None:
        """Import what torch needs to know them, in a process that is to compute there and forks no more. Raises
        DeviceError no_torch."""
        prepare_torch("cpu")

    @property
    def window_bytes(self) -> int:
        """Handles of one space lie in windows of this size, none across two: each can be a range of its own."""
        return min(self.reach, self.range_bytes_max)

    @property
    def free(self) -> int:
        """Bytes of the budget that no handle uses."""
        return self.budget - sum(self.used.values())

    @property
    def pages(self) -> int:
        """Real bytes that this device's memory takes now, whoever made it. Any thread may ask."""
        return sum(self._present(space) for space in SPACES)

    # ---- The owner's side

    def create(self, nbytes: int, space: Space, at: int = 0) -> Handle:
        """Make a settled handle of zeroed memory, for records of the class `space`. Blocks while memory is made. `at`:
        the offset in a range at which its users map it; its place is chosen so that large pages can be there.

        Raises DoesNotFit with the figures beyond the budget or where the machine's memory is short; nothing changed
        then. DeviceError not_granular.
        """
        return self._make(nbytes, space, at, self._create, is_settled=True)

    def claim(self, nbytes: int, space: Space, at: int = 0) -> Handle:
        """`create` without its memory, which `populate` or `write` makes in pieces of the caller's choice; `settle`
        says that all is there. Raises DoesNotFit beyond the budget, DeviceError not_granular."""
        return self._make(nbytes, space, at, self._claim, is_settled=False)

    def _make(self, nbytes: int, space: Space, at: int, make: _Make, *, is_settled: bool) -> Handle:
        self._check_open()
        self._check_size(nbytes)
        if nbytes > self.free:
            used = sum(self.used.values())
            raise DoesNotFit(f"{self.name}: {size(nbytes)} do not fit: {size(used)} of {size(self.budget)} are in use")
        place = self._place(nbytes, space, at)
        if place is None:
            raise DoesNotFit(f"{self.name}: no gap of {size(nbytes)} is left in places for {size(self.reach)}")
        try:
            backing, key = make(nbytes, space, place)
        except BaseException:
            self._places[space].release(place, nbytes)
            raise
        handle = Handle(self.name, nbytes, "local", space, True, backing, place=place, key=key, is_settled=is_settled)
        return self._own(handle, space)

    def _place(self, nbytes: int, space: Space, at: int) -> int | None:
        """A large page lies in as many places as addresses: both leave the same when they are divided by its size."""
        places, large, window = self._places[space], self.large_page_bytes, self.window_bytes
        found = places.allocate(nbytes, window, (large, at % large)) if 0 < large <= nbytes else None
        return places.allocate(nbytes, window) if found is None else found

    def _own(self, handle: Handle, space: Space) -> Handle:
        self._local.add(handle)
        self.used[space] += handle.nbytes
        return handle

    def restore(self, space: Space, place: int, nbytes: int, key: int = 0) -> Handle:
        """The settled handle that a predecessor had there, by that key. Raises DeviceError invalid_extent."""
        self._check_open()
        self._check_size(nbytes)
        try:
            if place % self.granularity:
                raise ValueError(f"place {place} is not a multiple of {self.granularity}")
            self._places[space].take(place, nbytes)
        except ValueError as error:
            raise self._broken(f"{space}: {error}", code="invalid_extent") from None
        try:
            backing = self._restore(nbytes, space, place, key)
        except BaseException:
            self._places[space].release(place, nbytes)
            raise
        return self._own(Handle(self.name, nbytes, "restored", space, True, backing, place=place, key=key), space)

    def populate(self, handle: Handle, offset: int, nbytes: int) -> None:
        """Make a part of a claimed handle, as zeros. Blocks meanwhile.

        Raises DoesNotFit where the machine's memory is short; DeviceError not_claimed, out_of_range.
        """
        self._check_claimed(handle, offset, nbytes)
        self._populate(handle, offset, nbytes)
        handle.num_filled += nbytes

    def write(self, handle: Handle, offset: int, address: int, nbytes: int) -> None:
        """Make a part of a claimed handle with what is at `address`, perhaps of another device: cheaper than `populate`
        and a copy. Blocks, and raises, as `populate`; DeviceError not_mapped for the address, too."""
        self._check_claimed(handle, offset, nbytes)
        self._rules.check_mapped(address, nbytes)
        self._write(handle, offset, address, nbytes)
        handle.num_filled += nbytes

    def settle(self, handle: Handle) -> None:
        """All of a claimed handle is there. Raises DeviceError not_claimed, or not_populated where some is not."""
        self._check_claimed(handle, 0, handle.nbytes)
        if handle.num_filled < handle.nbytes:
            text = f"{handle.num_filled} of the handle's {handle.nbytes} bytes are there"
            raise self._broken(text, code="not_populated")
        handle.state = "settled"

    def retire(self, handle: Handle) -> None:
        """Nobody else uses a local handle any more: `reclaim` may give its memory back, until it is released. Raises
        DeviceError not_local."""
        self._check_local(handle)
        handle.state = "retired"

    def reclaim(self, handle: Handle, offset: int, nbytes: int) -> None:
        """Give back a part of a retired handle ahead of its release, where the backend can: then releasing it is quick.
        Blocks. Raises DeviceError not_retired, out_of_range."""
        self._check_handle(handle)
        if handle.state != "retired":
            raise self._broken(f"the handle is {handle.state}, not retired", code="not_retired")
        self._check_inside(handle, offset, nbytes)
        self._reclaim(handle, offset, nbytes)

    def release(self, handle: Handle) -> None:
        """End a handle. A local one's memory is gone and its bytes are free; an imported one stays its owner's.

        Raises DeviceError still_mapped, released, other_device.
        """
        self._check_handle(handle)
        if handle.num_mappings:
            raise self._broken(f"the handle is still mapped {handle.num_mappings} times", code="still_mapped")
        self._release(handle)
        handle.is_live = False
        if handle.origin == "imported":
            self._rules.drop_import(self._imports.pop(handle))
        elif handle.space is not None:
            self._local.discard(handle)
            self._places[handle.space].release(handle.place, handle.nbytes)
            self.used[handle.space] -= handle.nbytes

    def export(self, handle: Handle) -> Token:
        """What another process needs to import a settled `handle`; valid while the handle is; of weights read-only
        where the backend can. Raises DeviceError export_and_import, not_local, not_settled, released, its driver's."""
        self._check_local(handle)
        if handle.state != "settled":
            text = f"the handle is {handle.state}"
            raise self._broken(text, code="released" if handle.state == "retired" else "not_settled")
        self._rules.take_role("exports")
        return self._export(handle)

    def admit(self, importers: Sequence[int]) -> None:  # noqa: B027 - most drivers ask nobody
        """The processes that may import what is exported from now on, also again, by their `importer_number`: to be
        said after each start of one. Who has imported keeps that. Asks no driver: `export` does. Raises DeviceError."""

    def admit_to(self, handle: Handle, importers: Sequence[int]) -> None:
        """Let processes of other devices import one exported handle, too. Raises as `admit`; DeviceError not_local."""
        self._check_local(handle)
        self._admit_to(handle, importers)

    def id_of(self, handle: Handle) -> int:
        """A number that no other local handle of this device has while it lives; its owner's successors give it the
        same one. Only to be compared. Raises DeviceError not_local."""
        self._check_local(handle)
        assert handle.space is not None, "a local handle has a space"
        return handle.place * len(SPACES) + SPACES.index(handle.space)

    # ---- From owner to owner

    @abstractmethod
    def descriptors(self) -> Mapping[str, int]:
        """The descriptors that a successor needs beside the places, by their names within this device; they stay the
        device's. Empty where handles outlive a process without any."""

    @abstractmethod
    def prepare(self) -> None:
        """Take what the first handles of a space need of this process besides memory, so that it can be parked ahead.
        Raises OSError."""

    def trim(self) -> None:
        """Give back memory that no handle owns: what a predecessor made and did not record, and leftovers."""
        self.has_leftovers = False
        for space, places in self._places.items():
            self._trim(space, places.extents)

    def check_integrity(self) -> list[str]:
        """Findings: free + owned = total in every space, and memory of settled handles is there. None: all is well."""
        findings = []
        for space, places in self._places.items():
            handles = [handle for handle in self._local if handle.space == space]
            owned = sorted((handle.place, handle.nbytes) for handle in handles)
            end = 0
            for offset, nbytes in sorted(owned + places.extents):
                if offset != end:
                    findings.append(f"{self.name}.{space}: [{min(end, offset)}, {max(end, offset)}) is lost or doubled")
                end = offset + nbytes
            if end != self.reach:
                findings.append(f"{self.name}.{space}: free and owned extents end at {end}, not at {self.reach}")
            owned_bytes = sum(nbytes for _, nbytes in owned)
            if owned_bytes != self.used[space]:
                findings.append(f"{self.name}.{space}: {self.used[space]} bytes are counted, {owned_bytes} are owned")
            present, settled = self._present(space), sum(one.nbytes for one in handles if one.state == "settled")
            if present < settled:
                findings.append(f"{self.name}.{space}: {present} bytes are present, {settled} are owned")
        return findings

    # ---- The user's side

    @classmethod
    def importer_number(cls, index: int) -> int:  # noqa: ARG003
        """By what the owner of device `index` admits this process, where its driver asks who imports; else 0. Raises
        DeviceError."""
        return 0

    def import_(self, token: Token) -> Handle:
        """Make another process's handle usable here: of this device, or of another one of its host whose memory this
        one reaches; here it is this one's. A token's descriptor stays the caller's and may be closed afterwards.

        Raises DeviceError already_imported, export_and_import, not_granular; invalid_token where it names no memory of
        this backend.
        """
        self._check_open()
        self._check_size(token.nbytes)
        self._check_kind(token)
        if isinstance(token, FdToken) and (token.offset < 0 or token.offset % self.granularity):
            text = f"token offset {token.offset} is not a multiple of {self.granularity}"
            raise self._broken(text, code="not_granular")
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

    def is_named(self, handle: Handle, token: Token) -> bool:
        """Whether `token` names the memory that this imported handle is. Raises DeviceError invalid_token."""
        self._check_handle(handle)
        self._check_kind(token)
        return self._imports.get(handle) == self._identity(token) and handle.nbytes == token.nbytes

    # ---- Checks

    def _broken(self, text: str, *, code: str) -> DeviceError:
        return DeviceError(f"{self.name}: {text}", code=code)

    def _check_open(self) -> None:
        if self._is_closed:
            raise self._broken("the device is closed", code="released")

    def _check_size(self, nbytes: int) -> None:
        if nbytes <= 0 or nbytes % self.granularity:
            text = f"{nbytes} bytes are not a positive multiple of {self.granularity}"
            raise self._broken(text, code="not_granular")

    def _check_kind(self, token: Token) -> None:
        if not isinstance(token, self.token_kind):
            text = f"{type(token).__name__} is not what this backend shares by: {self.token_kind.__name__}"
            raise self._broken(text, code="invalid_token")

    def _check_handle(self, handle: Handle) -> None:
        self._check_open()
        if handle.device != self.name:
            raise self._broken(f"a handle of {handle.device} was given", code="other_device")
        if not handle.is_live:
            raise self._broken("the handle has been released", code="released")

    def _check_local(self, handle: Handle) -> None:
        self._check_handle(handle)
        if handle.origin == "imported":
            raise self._broken("an imported handle is its owner's to export and to retire", code="not_local")

    def _check_claimed(self, handle: Handle, offset: int, nbytes: int) -> None:
        self._check_handle(handle)
        if handle.state != "claimed" or handle.origin != "local":
            raise self._broken(f"the handle is {handle.origin} and {handle.state}, not claimed", code="not_claimed")
        self._check_inside(handle, offset, nbytes)

    def _check_inside(self, handle: Handle, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes <= 0 or offset + nbytes > handle.nbytes:
            text = f"[{offset}, {offset + nbytes}) exceeds the handle of {handle.nbytes} bytes"
            raise self._broken(text, code="out_of_range")

    # ---- What a backend does

    @abstractmethod
    def _create(self, nbytes: int, space: Space, place: int) -> tuple[Any, int]: ...  # backing and key
    @abstractmethod
    def _claim(self, nbytes: int, space: Space, place: int) -> tuple[Any, int]: ...
    @abstractmethod
    def _restore(self, nbytes: int, space: Space, place: int, key: int) -> Any: ...
    @abstractmethod
    def _populate(self, handle: Handle, offset: int, nbytes: int) -> None: ...
    @abstractmethod
    def _write(self, handle: Handle, offset: int, address: int, nbytes: int) -> None: ...
    @abstractmethod
    def _reclaim(self, handle: Handle, offset: int, nbytes: int) -> None: ...
    @abstractmethod
    def _release(self, handle: Handle) -> None: ...
    @abstractmethod
    def _export(self, handle: Handle) -> Token: ...
    def _admit_to(self, handle: Handle, importers: Sequence[int]) -> None:  # noqa: B027 - most drivers ask nobody
        """Of `admit_to`."""

    @abstractmethod
    def _identity(self, token: Token) -> Hashable: ...
    @abstractmethod
    def _import(self, token: Token) -> tuple[Any, bool]: ...
    @abstractmethod
    def _present(self, space: Space) -> int: ...
    @abstractmethod
    def _trim(self, space: Space, free: list[tuple[int, int]]) -> None: ...
