"""A device whose memory a driver manages, whatever its vendor: the interface of `base.Device` in terms of `Driver`.

A handle is one physical allocation, made and given back whole. Its memory is the last one's until it is zeroed or
written, at the address where the owner has mapped it, or in a range that is there for just that. Nothing here touches a
device's address: bytes go through a buffer of this process.
"""

from __future__ import annotations

import ctypes
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar

from elasticmoe.common.devices.base import Device
from elasticmoe.common.devices.driver import CopyPart, Driver, Lost, MemoryInfo
from elasticmoe.common.devices.names import DeviceId
from elasticmoe.common.devices.rules import PROCESS, SPACES, Completion, Handle, ProcessRules, Range, Space
from elasticmoe.common.devices.torch_devices import check_torch, open_torch, prepare_torch, storage_at
from elasticmoe.common.protocol.errors import DoesNotFit, ElasticMoEError
from elasticmoe.common.wording import size
from elasticmoe.native import host

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")
_STAGED_BYTES = 8 << 20  # of a file that are on their way to a device at once


class Memory:
    """A handle's memory. `number`: the driver's handle; `shared`: what it was exported as, None before; `admitted`:
    who may import that, where its driver asks; `places`: addresses where it is mapped writable, by this owner."""

    __slots__ = ("admitted", "number", "places", "shared")

    def __init__(self, number: int) -> None:
        self.number = number
        self.shared: int | None = None
        self.admitted: Sequence[int] = ()
        self.places: list[int] = []


class _Copied(Completion):
    """Copies of a device, up to an event of its driver."""

    def __init__(self, driver: Driver, device: int, event: int) -> None:
        self._driver, self._device = driver, device
        self._event: int | None = event
        self._error: ElasticMoEError | None = None

    def is_done(self) -> bool:
        if self._event is not None and self._ask(self._driver.is_done, self._event):
            self._end()
        if self._error is not None:
            raise self._error.with_traceback(None)  # else it keeps the frames of all who have asked
        return self._event is None

    def wait(self) -> None:
        if self._event is not None:
            try:
                self._ask(self._driver.wait, self._event)
            except ElasticMoEError as error:  # nobody waits again; who asks hears it again
                self._error = error
            finally:
                self._end()
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _end(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            with suppress(ElasticMoEError):  # what was copied is there all the same
                self._ask(self._driver.forget, event)

    def _ask(self, call: Callable[[int, int], T], event: int) -> T:
        with self._driver.noting(self._device):
            return call(self._device, event)


class AcceleratorDevice(Device):
    """See the module's text. `library`: the vendor's, as the loader finds it; `torch_device`: what torch calls
    the one of a number. A process opens a driver once."""

    granularity_min = 2 << 20
    kv_handle_bytes_min = 4 << 20
    library: ClassVar[str]
    torch_device: ClassVar[str]

    _drivers: ClassVar[dict[str, Driver]] = {}  # of this process, by their libraries
    _opening: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        name: str,
        granularity: int,
        budget: int = 0,
        *,
        descriptors: Mapping[str, int] | None = None,
        rules: ProcessRules = PROCESS,
    ) -> None:
        """One that was given up, or has failed, is opened without its driver: it holds what a predecessor has recorded
        of it by name. Raises DeviceError no_driver, no_device; bad_granularity where it is no multiple of the driver's.
        """
        super().__init__(name, granularity, budget, rules=rules)
        self._kept = dict(descriptors or {})
        self._index = DeviceId.parse(name).index
        self._driver = self._of_this_process()
        self._hardware = ""  # as long as the driver has not said what it is
        if not self.failure:
            least = self._open()
            if granularity % least:
                text = f"granularity {granularity} is no multiple of the driver's, {least}"
                raise self._broken(text, code="bad_granularity")
        self._made: dict[Space, int] = dict.fromkeys(SPACES, 0)
        self._mapped: dict[int, Memory] = {}  # by address

    @classmethod
    def check(cls, index: int) -> None:
        """Whether there is such a device. Raises DeviceError no_driver, no_device."""
        cls._of_this_process().check(index)

    @classmethod
    def memory(cls, index: int) -> MemoryInfo:
        """What the driver says, of a device that this process opens for it. Raises DeviceError."""
        driver = cls._of_this_process()
        with driver.noting(index):
            driver.open(index)
            return driver.memory(index)

    @classmethod
    def give_up(cls, index: int, reason: str) -> None:
        """See Device."""
        cls._of_this_process().fail(index, reason)

    @property
    def failure(self) -> str:
        """See Device."""
        return self._driver.failures.get(self._index, "")

    @contextmanager
    def _using(self) -> Iterator[None]:
        """While the driver is asked about this device. Raises Lost at once where it has failed."""
        self.check_usable()
        with self._driver.noting(self._index):
            yield

    def _ask(self, call: Callable[Concatenate[int, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._using():
            return call(self._index, *args, **kwargs)

    def _attempt(self, call: Callable[Concatenate[int, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """`_ask` for what a device that has failed may go without: what gives something back, above all, as the driver
        does by itself when the process ends."""
        with suppress(Lost):
            self._ask(call, *args, **kwargs)

    def _open(self) -> int:
        with self._using():
            self._driver.open(self._index)
            self._hardware = self._driver.identity(self._index)
            return self._driver.granularity(self._index)

    @property
    def identity(self) -> str:
        """See Device. As the driver said it when this was opened: also of a device that has failed since."""
        return self._hardware

    def reaches(self, other: str) -> bool:
        """See Device."""
        peer = DeviceId.parse(other).index
        return peer == self._index or self._ask(self._driver.can_access, peer)

    @classmethod
    def _of_this_process(cls) -> Driver:
        with cls._opening:
            if cls.library not in cls._drivers:
                cls._drivers[cls.library] = cls._load()
            return cls._drivers[cls.library]

    @classmethod
    @abstractmethod
    def _load(cls) -> Driver: ...

    def descriptors(self) -> Mapping[str, int]:
        """None: see the backend's text for what outlives its owner."""
        return {}

    def prepare(self) -> None:
        """Nothing is needed ahead of the first handle."""

    # ---- Handles

    def _create(self, nbytes: int, space: Space, place: int) -> tuple[Memory, int]:
        memory, key = self._claim(nbytes, space, place)
        try:
            with self._at(memory, nbytes) as address:
                self._ask(self._driver.zero, address, nbytes)
        except BaseException:
            self._attempt(self._driver.release, memory.number)
            self._made[space] -= nbytes
            raise
        return memory, key

    def _claim(self, nbytes: int, space: Space, place: int) -> tuple[Memory, int]:
        del place  # a name only: handles have no neighbours
        try:
            memory = Memory(self._ask(self._driver.create, nbytes))
        except DoesNotFit as error:
            raise DoesNotFit(f"{self.name}: {size(nbytes)}: {error.message}") from None
        self._made[space] += nbytes
        return memory, 0

    @contextmanager
    def _at(self, memory: Memory, nbytes: int) -> Iterator[int]:
        """An address where the owner may write the handle's memory."""
        if memory.places:
            yield memory.places[0]
            return
        address = self._ask(self._driver.reserve, nbytes)
        try:
            self._ask(self._driver.map, [(address, nbytes, memory.number)])
            try:
                self._ask(self._driver.allow, address, nbytes, True)
                yield address
            finally:
                self._driver.synchronize()
                self._attempt(self._driver.unmap, address, nbytes)
        finally:
            self._attempt(self._driver.unreserve, address, nbytes)

    def _populate(self, handle: Handle, offset: int, nbytes: int) -> None:
        with self._at(handle.backing, handle.nbytes) as address:
            self._ask(self._driver.zero, address + offset, nbytes)

    def _write(self, handle: Handle, offset: int, address: int, nbytes: int) -> None:
        with self._at(handle.backing, handle.nbytes) as there:
            self._copy_async([(there + offset, address, nbytes)]).wait()

    def _reclaim(self, handle: Handle, offset: int, nbytes: int) -> None:
        """Handles go whole, with their release."""

    def _release(self, handle: Handle) -> None:
        self._attempt(self._driver.release, handle.backing.number)
        if handle.space is not None:
            self._made[handle.space] -= handle.nbytes

    def _present(self, space: Space) -> int:
        """All of what was claimed: the driver makes a handle's memory with the handle."""
        return self._made[space]

    def _trim(self, space: Space, free: list[tuple[int, int]]) -> None:
        """What a predecessor had and nobody holds any more, the driver has given back."""

    # ---- Ranges

    def _reserve(self, nbytes: int) -> tuple[int, None]:
        try:
            return self._ask(self._driver.reserve, nbytes), None
        except DoesNotFit as error:
            raise DoesNotFit(f"{self.name}: no address space for {size(nbytes)}: {error.message}") from None

    def _unreserve(self, range_: Range) -> None:
        with ExitStack() as ends:  # with what is still mapped there when all is closed
            ends.callback(self._attempt, self._driver.unreserve, range_.base, range_.nbytes)
            for offset in [one - range_.base for one in self._mapped if 0 <= one - range_.base < range_.nbytes]:
                ends.callback(self._unmap, range_, offset, range_.mappings[offset].handle.nbytes)

    def _map_many(self, range_: Range, parts: list[tuple[int, Handle]], writable: bool, populate: bool) -> None:
        del populate  # a device's page tables are made when it is mapped
        places = [(range_.address(at), part.nbytes, part.backing.number) for at, part in parts]
        self._ask(self._driver.map, places)
        try:
            for begin, end in _runs(parts):
                self._ask(self._driver.allow, range_.address(begin), end - begin, writable)
        except BaseException:
            self._attempt(self._driver.undo, places)
            raise
        for offset, handle in parts:
            memory: Memory = handle.backing
            self._mapped[range_.address(offset)] = memory
            if writable and handle.origin != "imported":
                memory.places.append(range_.address(offset))

    def _unmap(self, range_: Range, offset: int, nbytes: int) -> None:
        address = range_.address(offset)
        self._attempt(self._driver.unmap, address, nbytes)
        memory = self._mapped.pop(address)
        if address in memory.places:
            memory.places.remove(address)

    @classmethod
    def check_torch(cls) -> None:
        """See Handles."""
        check_torch(cls.torch_device)

    @classmethod
    def prepare_torch(cls) -> None:
        """See Handles."""
        prepare_torch(cls.torch_device)

    def open_torch(self) -> torch.device:
        """See Device."""
        return open_torch(self.torch_device.format(index=self._index))

    def _storage(self, range_: Range, offset: int, nbytes: int) -> Any:
        return storage_at(range_.address(offset), self.open_torch(), nbytes)

    # ---- Bytes

    def _copy_async(self, parts: Sequence[tuple[int, int, int]]) -> Completion:
        where = self._device_at
        asked = [CopyPart(dst, src, nbytes, where(dst), where(src)) for dst, src, nbytes in parts]
        for index in {index for part in asked for index in (part.dst_device, part.src_device)}:
            if index in self._driver.failures:  # a copy from there could cost the process this device as well
                raise Lost(f"{self.name} copies nothing with a device that has failed: {self._driver.failures[index]}")
        return _Copied(self._driver, self._index, self._ask(self._driver.copy, asked))

    def _device_at(self, address: int) -> int:
        name = self._rules.device_of(address)
        return self._index if name is None else DeviceId.parse(name).index  # None: a range of this class's own

    def fence(self) -> None:
        """Also of the process's other devices: their copies may read or write this one's memory. Of those that have
        failed, nothing is in flight."""
        self._driver.synchronize()

    def _read_into(self, address: int, fd: int, file_offset: int, nbytes: int) -> None:
        buffer = (ctypes.c_char * min(nbytes, _STAGED_BYTES))()
        for at in range(0, nbytes, _STAGED_BYTES):
            num = min(_STAGED_BYTES, nbytes - at)
            host.read_into(fd, file_offset + at, ctypes.addressof(buffer), num)
            self._ask(self._driver.to_device, address + at, ctypes.addressof(buffer), num)

    def _fetch(self, address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        buffer = (ctypes.c_char * nbytes)()
        self._ask(self._driver.to_host, ctypes.addressof(buffer), address, nbytes)
        return buffer

    def _read_bytes(self, address: int, nbytes: int) -> bytes:
        return bytes(self._fetch(address, nbytes))

    def _write_bytes(self, address: int, data: memoryview) -> None:
        kind = ctypes.c_char * len(data)
        buffer = kind.from_buffer_copy(data) if data.readonly else kind.from_buffer(data)
        self._ask(self._driver.to_device, address, ctypes.addressof(buffer), len(data))

    def _checksum(self, address: int, nbytes: int) -> int:
        buffer = self._fetch(address, nbytes)
        return host.checksum(ctypes.addressof(buffer), nbytes)

    def _close(self) -> None:
        """Ranges have been given back, and with them all mappings."""
        for handle in (*self._local, *self._imports):
            try:
                self._attempt(self._driver.release, handle.backing.number)
            except ElasticMoEError:
                continue  # the driver gives all back when the process ends


def _runs(parts: Sequence[tuple[int, Handle]]) -> Iterator[tuple[int, int]]:
    """Parts that follow one another without a gap, as (begin, end); `parts` ascend."""
    begin = end = parts[0][0]
    for offset, handle in parts:
        if offset != end:
            yield begin, end
            begin = offset
        end = offset + handle.nbytes
    yield begin, end
