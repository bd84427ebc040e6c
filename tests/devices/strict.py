"""Devices as accelerators are: what services do to them must go through the interface, or it fails here.

- A share token is a key of 64 bits, as Ascend's (aclrtMemExportToShareableHandle). Whoever has it may import the
  handle as long as that is there: it outlives its owner, and a successor takes it over by the key.
- The granularity is 2 MiB, and a handle is made, mapped and unmapped whole (cuMemMap, aclrtMapMem).
- The CPU cannot touch an address: it faults. Only the interface's operations reach the memory, and tensors of `wrap`,
  which stand for what the device itself computes on.
- Copies are not done when they were asked for, but when somebody waits for them or fences; who reads or unmaps what is
  in flight is told so.
- A range is at most 128 GB (aclrtReserveMemAddress), and holds no handles of two origins.

It stands on sparse files in a folder that the processes of a test share. `install` makes it the backend of `strict:N`.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import tempfile
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from elasticmoe.common.devices.base import Completion, Device, Handle, KeyToken, ProcessRules, Range
from elasticmoe.common.devices.factory import register
from elasticmoe.common.devices.rules import PROCESS, SPACES, Space, Token
from elasticmoe.common.protocol.errors import DoesNotFit
from elasticmoe.native import host

GRANULARITY: Final = 2 << 20
FOLDER: Final = "STRICT_DEVICES"  # environment variable: where all processes of a test find the devices' memory
_KEY_MIN: Final = 1 << 63  # so that no signed number holds a key


def folder() -> Path:
    """Where the memory is; made for this process where no test has said."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="strict-", dir="/dev/shm")
    return Path(os.environ[FOLDER])


def install() -> None:
    """Let the factory know the backend."""
    register("strict", StrictDevice)


class InFlight(AssertionError):
    """Memory was used while a copy from or to it was not known to be done."""


class _Place(NamedTuple):
    """Where a handle lies: in the file of a space, from `offset`."""

    device: str
    space: Space
    offset: int
    nbytes: int


class _Copy(Completion):
    """Parts that are copied once somebody waits."""

    def __init__(self, parts: Sequence[tuple[int, int, int]]) -> None:
        self.parts = parts

    def is_done(self) -> bool:
        return self not in _QUEUE

    def wait(self) -> None:
        while self in _QUEUE:
            _run(_QUEUE.pop(0))


_QUEUE: list[_Copy] = []  # of all devices of the process, in order
_BASES: list[int] = []  # of all ranges, ascending
_RANGES: dict[int, tuple[int, int]] = {}  # by base: bytes, and where the CPU reaches the memory


def _run(copy: _Copy) -> None:
    for dst, src, nbytes in copy.parts:
        host.copy(_reach(dst), _reach(src), nbytes)


def _reach(address: int) -> int:
    """Where the CPU reaches what is at a device's address."""
    base = _BASES[bisect_right(_BASES, address) - 1]
    return _RANGES[base][1] + address - base


def _check_idle(address: int, nbytes: int) -> None:
    for copy in _QUEUE:
        for dst, src, size in copy.parts:
            for at in (dst, src):
                if at < address + nbytes and address < at + size:
                    raise InFlight(f"{nbytes} bytes are used while {size} of them or beside them are copied")


class StrictDevice(Device):
    """See the module's text."""

    token_kind = KeyToken
    granularity_min = GRANULARITY
    kv_handle_bytes_min = 2 * GRANULARITY
    range_bytes_max = 128 * 10**9 // GRANULARITY * GRANULARITY

    def __init__(
        self,
        name: str,
        granularity: int,
        budget: int = 0,
        *,
        descriptors: Mapping[str, int] | None = None,
        rules: ProcessRules = PROCESS,
    ) -> None:
        assert not descriptors, "no descriptors were named"
        super().__init__(name, granularity, budget, rules=rules)
        self._folder = folder()
        self._made: dict[Space, int] = defaultdict(int)
        self._fds: dict[tuple[str, Space, int], int] = {}

    @classmethod
    def check(cls, index: int) -> None:
        pass

    def descriptors(self) -> Mapping[str, int]:
        return {}

    def prepare(self) -> None:
        pass

    # ---- Handles

    def _file(self, device: str, space: Space, flags: int = os.O_RDWR) -> int:
        name = (device, space, flags)
        if name not in self._fds:
            path = self._folder / f"{device}.{space}"
            self._fds[name] = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._fds[name]

    def _key_file(self, key: int) -> Path:
        return self._folder / f"{key:016x}.key"

    def _claim(self, nbytes: int, space: Space, place: int) -> tuple[_Place, int]:
        fd = self._file(self.name, space)
        if os.fstat(fd).st_size < place + nbytes:
            os.ftruncate(fd, place + nbytes)
        key = _KEY_MIN + secrets.randbits(63)
        self._key_file(key).write_text(f"{self.name} {space} {place} {nbytes}")
        return _Place(self.name, space, place, nbytes), key

    def _create(self, nbytes: int, space: Space, place: int) -> tuple[_Place, int]:
        made = self._claim(nbytes, space, place)
        self._made[space] += nbytes
        return made

    def _find(self, key: int) -> _Place:
        try:
            device, space, offset, nbytes = self._key_file(key).read_text().split()
        except OSError:
            raise self._broken(f"there is no handle of the key {key:x}", code="invalid_token") from None
        return _Place(device, next(one for one in SPACES if one == space), int(offset), int(nbytes))

    def _restore(self, nbytes: int, space: Space, place: int, key: int) -> _Place:
        if not self._key_file(key).exists() or self._find(key) != (self.name, space, place, nbytes):
            raise self._broken(f"{space}: ({place}, {nbytes}) is not what {key:x} names", code="invalid_extent")
        self._made[space] += nbytes
        return _Place(self.name, space, place, nbytes)

    def _populate(self, handle: Handle, offset: int, nbytes: int) -> None:
        self._made[handle.backing.space] += nbytes

    def _write(self, handle: Handle, offset: int, address: int, nbytes: int) -> None:
        _check_idle(address, nbytes)
        place: _Place = handle.backing
        host.write_from(self._file(place.device, place.space), place.offset + offset, _reach(address), nbytes)
        self._made[place.space] += nbytes

    def _reclaim(self, handle: Handle, offset: int, nbytes: int) -> None:
        """Handles go whole, with their release."""

    def _release(self, handle: Handle) -> None:
        place: _Place = handle.backing
        if handle.origin == "imported":
            return
        host.punch_hole(self._file(place.device, place.space), place.offset, place.nbytes)
        self._key_file(handle.key).unlink()
        self._made[place.space] -= handle.num_filled

    def _export(self, handle: Handle) -> KeyToken:
        return KeyToken(handle.key, handle.nbytes)

    def _identity(self, token: Token) -> Hashable:
        assert isinstance(token, KeyToken), "import_ has looked"
        return token.key

    def _import(self, token: Token) -> tuple[_Place, bool]:
        assert isinstance(token, KeyToken), "import_ has looked"
        place = self._find(token.key)
        if place.nbytes != token.nbytes:
            raise self._broken(f"{token.key:x} is of {place.nbytes} bytes of {place.device}", code="invalid_token")
        return place, place.space != "weights"

    def _present(self, space: Space) -> int:
        return self._made[space]

    def _trim(self, space: Space, free: list[tuple[int, int]]) -> None:
        owned = {handle.key for handle in self._local}
        for path in self._folder.glob("*.key"):
            key = int(path.stem, 16)
            place = self._find(key)
            if (place.device, place.space) == (self.name, space) and key not in owned:
                path.unlink()
                host.punch_hole(self._file(self.name, space), place.offset, place.nbytes)

    # ---- Ranges

    def _reserve(self, nbytes: int) -> tuple[int, tuple[host.Reservation, host.Reservation]]:
        try:
            guard, memory = host.Reservation(nbytes, self.granularity), host.Reservation(nbytes, self.granularity)
        except OSError as error:
            raise DoesNotFit(f"{self.name}: no address space for {nbytes} bytes: {error.strerror}") from None
        insort(_BASES, guard.base)
        _RANGES[guard.base] = (nbytes, memory.base)
        return guard.base, (guard, memory)

    def _unreserve(self, range_: Range) -> None:
        del _RANGES[range_.base]
        _BASES.remove(range_.base)
        for reservation in range_.backing:
            reservation.close()

    def _map_many(self, range_: Range, parts: list[tuple[int, Handle]], writable: bool, populate: bool) -> None:
        native = []
        for at, handle in parts:
            place: _Place = handle.backing
            flags = os.O_RDWR if writable else os.O_RDONLY
            native.append((at, self._file(place.device, place.space, flags), place.offset, place.nbytes))
        range_.backing[1].map_many(native, writable, populate)

    def _unmap(self, range_: Range, offset: int, nbytes: int) -> None:
        _check_idle(range_.address(offset), nbytes)
        range_.backing[1].unmap(offset, nbytes)

    def _storage(self, range_: Range, offset: int, nbytes: int) -> Any:
        import torch

        at = range_.backing[1].base + offset
        return torch._C._construct_storage_from_data_pointer(at, torch.device("cpu"), nbytes)

    # ---- Bytes

    def _copy_async(self, parts: Sequence[tuple[int, int, int]]) -> Completion:
        copy = _Copy(tuple(parts))
        _QUEUE.append(copy)
        return copy

    def fence(self) -> None:
        while _QUEUE:
            _run(_QUEUE.pop(0))

    def _read_into(self, address: int, fd: int, file_offset: int, nbytes: int) -> None:
        _check_idle(address, nbytes)
        host.read_into(fd, file_offset, _reach(address), nbytes)

    def _read_bytes(self, address: int, nbytes: int) -> bytes:
        _check_idle(address, nbytes)
        return ctypes.string_at(_reach(address), nbytes)

    def _write_bytes(self, address: int, data: memoryview) -> None:
        _check_idle(address, len(data))
        ctypes.memmove(_reach(address), bytes(data), len(data))

    def _checksum(self, address: int, nbytes: int) -> int:
        _check_idle(address, nbytes)
        return host.checksum(_reach(address), nbytes)

    def _close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


assert set(SPACES) == {"weights", "kv", "mailbox"}, "what _find reads"
