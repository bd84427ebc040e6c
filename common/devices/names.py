"""How devices and hosts are named. The only place that writes such a name or reads one. Pure.

| name | means |
|---|---|
| `host:0` | device 0 of the backend `host`, on the deployment's own host |
| `node-a/host:0` | the same of the host `node-a` |
| `host:4`, as a setting | the first four devices of the backend `host`, of each host |
| `npu:0-7`, `cuda:0,cuda:2`, as settings | devices of an accelerator's backend, by their numbers, of each host |
| `cuda:0/4`, as a setting | four devices of the one accelerator: parts of its memory, each with a budget of its own |
| `cuda:0.3` | the last of these |

A backend's name says what the memory is of, a host's whose machine it is in: the backend `host` is a machine's own
memory, on any host. A deployment of one host calls it LOCAL_HOST and leaves it out: one device has one name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Final

import msgspec
from msgspec import Meta

_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
HOST_PATTERN: Final = rf"{_LABEL}(?:\.{_LABEL})*"  # of at most 63 characters
BACKEND_PATTERN: Final = r"[a-z][a-z0-9_-]{0,31}"
NAME_PATTERN: Final = (
    rf"^(?:(?!local/)(?=[a-z0-9.-]{{1,63}}/)({HOST_PATTERN})/)?({BACKEND_PATTERN}):(0|[1-9][0-9]{{0,8}})"
    r"(?:\.(0|[1-9][0-9]?))?\Z"
)
_NUMBER: Final = "(?:0|[1-9][0-9]{0,2})"
_PARTS: Final = "(?:[2-9]|[1-9][0-9])"
_ITEM: Final = rf"(?:npu|cuda):{_NUMBER}(?:-{_NUMBER})?(?:/{_PARTS})?"  # of the factory's backends beside `host`
COUNT_PATTERN: Final = rf"^(?:host:[1-9][0-9]{{0,2}}|{_ITEM}(?:,{_ITEM}){{0,63}})\Z"

HostId = str
"""Of a machine with devices, as its cluster calls it: a DNS name of at most 63 characters."""

DeviceName = Annotated[str, Meta(pattern=NAME_PATTERN)]
"""A DeviceId as text, as messages and records hold it."""

LOCAL_HOST: Final[HostId] = "local"

_NAME = re.compile(NAME_PATTERN)
_COUNT = re.compile(COUNT_PATTERN)


class DeviceId(msgspec.Struct, frozen=True, order=True):
    """One device: the host that it is in, the backend that it is of, and its number there. `part`: which one of the
    devices that an accelerator is divided into; -1 of a whole one."""

    host: HostId
    backend: str
    index: int
    part: int = -1

    def __str__(self) -> str:
        name = f"{self.backend}:{self.index}" + (f".{self.part}" if self.part >= 0 else "")
        return name if self.host == LOCAL_HOST else f"{self.host}/{name}"

    @property
    def whole(self) -> DeviceId:
        """The device that this one is a part of, or this one."""
        return DeviceId(self.host, self.backend, self.index)

    @classmethod
    def parse(cls, name: str) -> DeviceId:
        """What `str` wrote. Raises ValueError for anything else."""
        match = _NAME.match(name)
        if match is None:
            raise ValueError(f"{name!r:.80} names no device: it has to be BACKEND:INDEX or HOST/BACKEND:INDEX")
        return cls(match[1] or LOCAL_HOST, match[2], int(match[3]), int(match[4] or -1))


@lru_cache(maxsize=4096)
def hardware_of(name: DeviceName) -> DeviceName:
    """The name of the device that this one is a part of, or its own: what is lost is lost as a whole."""
    return str(DeviceId.parse(name).whole)


class DeviceCount(msgspec.Struct, frozen=True):
    """So many devices of a backend, as the setting `devices` names them: the first ones, or where there are any, those
    of the `numbers`, which ascend. `parts`: into how many devices each of these is divided; empty where none is. A part
    counts as a device."""

    backend: str
    count: int
    numbers: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.backend == "host":
            return f"{self.backend}:{self.count}"
        return ",".join(f"{self.backend}:{part}" for part in _stretches(self._parts_of))

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers of all, ascending; those of which the devices are parts."""
        return self.numbers or tuple(range(self.count))

    @property
    def _parts_of(self) -> dict[int, int]:
        return dict(zip(self.indices, self.parts or (1,) * len(self.indices), strict=True))

    @classmethod
    def parse(cls, setting: str) -> DeviceCount:
        """What `str` wrote, and its items in any order. Raises ValueError for anything else, for none, and for what
        names devices of two backends, one twice, or a stretch from its end."""
        if not _COUNT.match(setting):
            raise ValueError(
                f"{setting!r:.80} names no devices: it has to be host:N with N at least 1, or BACKEND:I-J/PARTS"
            )
        parts = [part.split(":") for part in setting.split(",")]
        backend = parts[0][0]
        if backend == "host":
            return cls(backend, int(parts[0][1]))
        if any(name != backend for name, _ in parts):
            raise ValueError(f"{setting!r:.80} names devices of two backends: a deployment has devices of one")
        parts_of: dict[int, int] = {}
        for _, item in parts:
            stretch, _, divided = item.partition("/")
            first, _, last = stretch.partition("-")
            if int(last or first) < int(first):
                raise ValueError(f"{setting!r:.80} has {stretch}, whose end comes before its beginning")
            numbers = range(int(first), int(last or first) + 1)
            if not parts_of.keys().isdisjoint(numbers):
                raise ValueError(f"{setting!r:.80} names a device twice")
            parts_of |= dict.fromkeys(numbers, int(divided or 1))
        return cls._divided(backend, parts_of)

    @classmethod
    def _divided(cls, backend: str, parts_of: Mapping[int, int]) -> DeviceCount:
        """Those numbers, each of which is divided into so many, or is not (1)."""
        if all(part == 1 for part in parts_of.values()):
            return cls.of(backend, parts_of)
        numbers = tuple(sorted(parts_of))
        return cls(backend, sum(parts_of.values()), numbers, tuple(parts_of[number] for number in numbers))

    @classmethod
    def of(cls, backend: str, numbers: Iterable[int]) -> DeviceCount:
        """The devices of these numbers, and of the backend `host` all before them."""
        ordered = tuple(sorted(set(numbers)))
        if backend == "host":
            return cls(backend, 1 + ordered[-1])
        return cls(backend, len(ordered), () if ordered == tuple(range(len(ordered))) else ordered)

    @classmethod
    def with_all(cls, devices: Iterable[DeviceId]) -> DeviceCount:
        """The fewest devices among which these are, of one host and backend."""
        parts_of: dict[int, int] = {}
        backend = ""
        for device in devices:
            backend = device.backend
            parts_of[device.index] = max(parts_of.get(device.index, 1), 2 * (device.part >= 0), device.part + 1)
        return cls._divided(backend, parts_of)

    def first(self, num: int) -> DeviceCount:
        """The first ones that are at least `num` devices, of which none is divided in another way; all where there are
        fewer."""
        taken: dict[int, int] = {}
        for index, parts in self._parts_of.items():
            if sum(taken.values()) < num:
                taken[index] = parts
        return self._divided(self.backend, taken)

    def names(self, host: HostId = LOCAL_HOST) -> tuple[str, ...]:
        """Of all devices of a host, by number; of divided ones first the first part of each, so that who takes the
        first few has as much hardware as there is."""
        found = [
            DeviceId(host, self.backend, index, part)
            for index, parts in self._parts_of.items()
            for part in (range(parts) if parts > 1 else (-1,))
        ]
        return tuple(map(str, sorted(found, key=lambda device: (max(0, device.part), device.index))))


def _stretches(parts_of: Mapping[int, int]) -> Iterator[str]:
    """Ascending numbers as `0-3`, `6`, and those that are divided as `0-3/2`."""
    numbers = list(parts_of)
    begin = numbers[0]
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        parts = parts_of[number]
        if following is None or following > number + 1 or parts_of[following] != parts:
            yield (str(begin) if begin == number else f"{begin}-{number}") + (f"/{parts}" if parts > 1 else "")
            begin = number if following is None else following
