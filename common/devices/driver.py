"""What the drivers of accelerators have in common: a vendor's library as ctypes reaches it, and its calls by one set of
names (`Driver`), which `accelerator.py` is written in. Numbers are the driver's: addresses, handles, events.

What a driver refuses is one DeviceError, whose text has the call, the driver's own number and name for it, and what
else the driver says of it.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, NamedTuple, NoReturn

from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit, ElasticMoEError

_TOLD_CHARS_MAX: Final = 300  # of a loader's or a driver's own words


class Meaning(NamedTuple):
    """What one of a driver's error codes means: its name there, and our code for it."""

    name: str
    code: str


class Lost(DeviceError):
    """A device's driver has said that this process cannot use it any more."""

    code = "driver_failed"


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
    """A vendor's library. `calls`: the types of each call's arguments; `optional`: those that only newer ones have;
    `words`: calls by which it says what an error is, if it has them. One with arguments takes the error's number and a
    place for the text, and answers as all do; one without returns the text of the last error.

    Raises DeviceError no_driver where it cannot be loaded, or lacks a call.
    """

    def __init__(
        self,
        path: str,
        calls: Mapping[str, Sequence[Any]],
        optional: Mapping[str, Sequence[Any]],
        refusals: Mapping[int, Meaning],
        hint: str,
        words: Mapping[str, Sequence[Any]],
    ) -> None:
        self.path = path
        self._refusals = refusals
        self._calls: dict[str, Any] = {}
        self._words: list[Any] = []
        self.lost: frozenset[int] = frozenset()  # answers that are a Lost
        try:
            library = ctypes.CDLL(path)
        except OSError as error:  # the loader names the library that it misses: it may be one that this one needs
            text = f"the driver's library {path} cannot be loaded: {hint} ({_line(str(error))})"
            raise DeviceError(text, code="no_driver") from None
        for name, types in (*calls.items(), *optional.items()):
            call = getattr(library, name, None)
            if call is None and name in calls:
                raise DeviceError(f"the driver's library {path} is too old: it has no {name}", code="no_driver")
            if call is not None:
                call.argtypes, call.restype = list(types), ctypes.c_int
                self._calls[name] = call
        for name, types in words.items():
            if (call := getattr(library, name, None)) is not None:
                call.argtypes, call.restype = list(types), ctypes.c_int if types else ctypes.c_char_p
                self._words.append(call)

    def has(self, name: str) -> bool:
        """Whether this library has the optional call `name`."""
        return name in self._calls

    def ask(self, name: str, *args: Any) -> int:
        """The driver's answer to a call: 0 where all is well."""
        return int(self._calls[name](*args))

    def call(self, name: str, *args: Any) -> None:
        """Make a call. Raises DeviceError with the code of its refusal, Lost among them, or DoesNotFit where memory is
        short."""
        answer = self._calls[name](*args)
        if answer:
            self.refuse(name, answer)

    def refuse(self, name: str, answer: int) -> NoReturn:
        """Raise what the driver's `answer` to the call `name` means."""
        text, refusal = self.told(name, answer), self._refusals.get(answer)
        code = "driver_failed" if refusal is None else refusal.code
        if code == DoesNotFit.code:
            raise DoesNotFit(f"the device's memory is short: {text}")
        raise Lost(text) if answer in self.lost else DeviceError(text, code=code)

    def told(self, name: str, answer: int) -> str:
        """What is said of an answer to the call `name`: once, for AscendCL keeps its words until somebody has taken
        them."""
        refusal = self._refusals.get(answer)
        words = dict.fromkeys([*([refusal.name] if refusal else []), *self._in_words(answer)])  # a name is said once
        return f"{name} answers {answer}, {': '.join(words) or 'an error that is not known here'}"

    def _in_words(self, answer: int) -> list[str]:
        """What the library says of an error."""
        told = []
        for call in self._words:
            if call.argtypes:
                text = ctypes.c_char_p()
                said = None if call(answer, ctypes.byref(text)) else text.value
            else:
                said = call()
            told.append(_line((said or b"").decode(errors="replace")))
        return list(filter(None, told))


def _line(text: str) -> str:
    """On one line, of bounded length."""
    return " ".join(text.split())[:_TOLD_CHARS_MAX]


class Driver(ABC):
    """One vendor's driver in this process, of all its devices there, which are known by their numbers. Any thread may
    ask for anything. Every method raises DeviceError, as `Library.call` does.

    `lost`: by number, the vendor's errors after which a process cannot use a device any more. `failures`: of devices
    that have failed in this process, what was said then; nothing is asked about them any more.
    """

    def __init__(self, library: Library, lost: Mapping[int, str]) -> None:
        self.library = library
        library.lost = frozenset(lost)
        self.failures: dict[int, str] = {}
        self._opened: list[int] = []

    @contextmanager
    def noting(self, device: int) -> Iterator[None]:
        """Remember that a device has failed, where what is asked about it says so."""
        try:
            yield
        except Lost as error:
            self.fail(device, error.message)
            raise

    def fail(self, device: int, reason: str) -> None:
        """A device cannot be used any more, for that reason or an earlier one."""
        self.failures.setdefault(device, reason)

    @abstractmethod
    def check(self, device: int) -> None:
        """Whether there is such a device, without a touch of it. Raises DeviceError no_device."""

    def open(self, device: int) -> None:
        """Make a device usable in this process. Idempotent. Raises DeviceError no_device where there is none."""
        if device not in self._opened:
            self.check(device)
            self._open(device)
            self._opened.append(device)

    @abstractmethod
    def _open(self, device: int) -> None: ...

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

    def undo(self, device: int, parts: Sequence[tuple[int, int, int]]) -> None:
        """Unmap all of these parts that can be, as where what comes after them was refused. Raises nothing."""
        for address, nbytes, _ in parts:
            self._attempt(self.unmap, device, address, nbytes)

    @abstractmethod
    def zero(self, device: int, address: int, nbytes: int) -> None:
        """Fill with zeros; done when it returns."""

    def copy(self, device: int, parts: Sequence[CopyPart]) -> int:
        """Begin to copy, to the device or from it; an event. Where that is refused, nothing of it is in flight any
        more: waits for what was asked for before it was."""
        with ExitStack() as refused:
            refused.callback(self._attempt, self.drain, device)  # of a device that has failed, nothing is
            self._copy(device, parts)
            event = self._create_event(device)
            refused.callback(self._attempt, self.forget, device, event)
            self._record(device, event)
            refused.pop_all()
        return event

    def _attempt(self, call: Callable[..., None], *args: int) -> None:
        with suppress(ElasticMoEError):
            call(*args)

    @abstractmethod
    def _copy(self, device: int, parts: Sequence[CopyPart]) -> None: ...

    @abstractmethod
    def _create_event(self, device: int) -> int: ...

    @abstractmethod
    def _record(self, device: int, event: int) -> None: ...

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
    def drain(self, device: int) -> None:
        """Return when no operation of this process is in flight on the device."""

    def synchronize(self) -> None:
        """Return when no operation of this process is in flight on any of its devices. Of one that has failed, nothing
        is: one whose driver refuses to say so has failed now, and keeps nobody from using the others. Raises nothing.
        """
        for device in self._opened:
            if device in self.failures:
                continue
            try:
                self.drain(device)
            except ElasticMoEError as error:  # whatever its number: a call without arguments is about the device
                self.fail(device, error.message)
