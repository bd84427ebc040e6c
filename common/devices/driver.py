"""What the drivers of accelerators have in common: a vendor's library as ctypes reaches it, and its calls by one set of
names (`Driver`), which `accelerator.py` is written in. Numbers are the driver's: addresses, handles, events.

What a driver refuses is one DeviceError, whose text has the call and the driver's own name and number for it.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit


class Meaning(NamedTuple):
    """What one of a driver's error codes means: its name there, and our code for it."""

    name: str
    code: str


class CopyPart(NamedTuple):
    """Bytes to be copied, and the devices that both ends are of."""

    dst: int
    src: int
    nbytes: int
    dst_device: int
    src_device: int


class MemoryInfo(NamedTuple):
    """Bytes of a device that nobody has, and all that it has, as its driver says."""

    free: int
    total: int


class Library:
    """A vendor's library. `calls`: the types of each call's arguments; `optional`: those that only newer ones have.

    Raises DeviceError no_driver where it cannot be loaded, or lacks a call.
    """

    def __init__(
        self,
        path: str,
        calls: Mapping[str, Sequence[Any]],
        optional: Mapping[str, Sequence[Any]],
        refusals: Mapping[int, Meaning],
        hint: str,
    ) -> None:
        self.path = path
        self._refusals = refusals
        self._calls: dict[str, Any] = {}
        try:
            library = ctypes.CDLL(path)
        except OSError:
            raise DeviceError(f"the driver's library {path} cannot be loaded: {hint}", code="no_driver") from None
        for name, types in (*calls.items(), *optional.items()):
            call = getattr(library, name, None)
            if call is None and name in calls:
                raise DeviceError(f"the driver's library {path} is too old: it has no {name}", code="no_driver")
            if call is not None:
                call.argtypes, call.restype = list(types), ctypes.c_int
                self._calls[name] = call

    def has(self, name: str) -> bool:
        """Whether this library has the optional call `name`."""
        return name in self._calls

    def ask(self, name: str, *args: Any) -> int:
        """The driver's answer to a call: 0 where all is well."""
        return int(self._calls[name](*args))

    def call(self, name: str, *args: Any) -> None:
        """Make a call. Raises DeviceError with the code of its refusal, or DoesNotFit where memory is short."""
        answer = self._calls[name](*args)
        if answer:
            self.refuse(name, answer)

    def refuse(self, name: str, answer: int) -> NoReturn:
        """Raise what the driver's `answer` to the call `name` means."""
        refusal = self._refusals.get(answer, Meaning("an error that is not known here", "driver_failed"))
        text = f"{name} answers {answer}, {refusal.name}"
        if refusal.code == DoesNotFit.code:
            raise DoesNotFit(f"the device's memory is short: {text}")
        raise DeviceError(text, code=refusal.code)


class Driver(ABC):
    """One vendor's driver in this process, of all its devices there, which are known by their numbers. Any thread may
    ask for anything. Every method raises DeviceError, as `Library.call` does."""

    def __init__(self, library: Library) -> None:
        self.library = library

    @abstractmethod
    def check(self, device: int) -> None:
        """Whether there is such a device, without a touch of it. Raises DeviceError no_device."""

    @abstractmethod
    def open(self, device: int) -> None:
        """Make a device usable in this process. Idempotent. Raises DeviceError no_device where there is none."""

    @abstractmethod
    def identity(self, device: int) -> str:
        """What names the hardware of a device alike in all processes of the machine, whatever number it has there;
        empty where the driver does not say."""

    @abstractmethod
    def can_access(self, device: int, peer: int) -> bool:
        """Whether what runs on a device may touch memory of another one, the `peer`."""

    @abstractmethod
    def granularity(self, device: int) -> int:
        """Bytes of which sizes and addresses are multiples."""

    @abstractmethod
    def memory(self, device: int) -> MemoryInfo:
        """What is free now, and what there is. Of a device that is open."""

    @abstractmethod
    def reserve(self, device: int, nbytes: int) -> int:
        """The address of a new range."""

    @abstractmethod
    def unreserve(self, device: int, address: int, nbytes: int) -> None:
        """Give a range back, whole and without mappings."""

    @abstractmethod
    def create(self, device: int, nbytes: int) -> int:
        """A handle of new physical memory, with whatever the last one left there. Raises DoesNotFit."""

    @abstractmethod
    def release(self, device: int, handle: int) -> None:
        """End a handle, made or imported here."""

    @abstractmethod
    def map(self, device: int, parts: Sequence[tuple[int, int, int]]) -> None:
        """Map handles, each whole, as (address, bytes, handle): all or none. They may be touched after `allow`."""

    @abstractmethod
    def allow(self, device: int, address: int, nbytes: int, writable: bool) -> None:
        """Let the device touch mappings that follow one another without a gap."""

    @abstractmethod
    def unmap(self, device: int, address: int, nbytes: int) -> None:
        """Undo one `map`. It waits for nothing: whoever calls has fenced."""

    @abstractmethod
    def zero(self, device: int, address: int, nbytes: int) -> None:
        """Fill with zeros; done when it returns."""

    @abstractmethod
    def copy(self, device: int, parts: Sequence[CopyPart]) -> int:
        """Begin to copy, to the device or from it; an event."""

    @abstractmethod
    def to_device(self, device: int, address: int, source: int, nbytes: int) -> None:
        """Copy from the host's address `source`; done when it returns."""

    @abstractmethod
    def to_host(self, device: int, target: int, address: int, nbytes: int) -> None:
        """Copy to the host's address `target`; done when it returns."""

    @abstractmethod
    def is_done(self, device: int, event: int) -> bool:
        """Whether all is over that was asked for before the event. Does not wait."""

    @abstractmethod
    def wait(self, device: int, event: int) -> None:
        """Return when that is over."""

    @abstractmethod
    def forget(self, device: int, event: int) -> None:
        """End an event."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when no operation of this process is in flight on any of its devices."""
