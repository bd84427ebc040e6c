"""How devices and hosts are named. The only place that writes such a name or reads one. Pure.

| name | means |
|---|---|
| `host:0` | device 0 of the backend `host`, on the deployment's own host |
| `node-a/host:0` | the same of the host `node-a` |
| `host:4`, as a setting | the first four devices of the backend `host`, of each host |
| `npu:0-7`, `cuda:0,cuda:2`, as settings | devices of an accelerator's backend, by their numbers, of each host |

A backend's name says what the memory is of, a host's whose machine it is in: the backend `host` is a machine's own
memory, on any host. A deployment of one host calls it LOCAL_HOST and leaves it out: one device has one name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Final

import msgspec
from msgspec import Meta

_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
HOST_PATTERN: Final = rf"{_LABEL}(?:\.{_LABEL})*"  # of at most 63 characters
BACKEND_PATTERN: Final = r"[a-z][a-z0-9_-]{0,31}"
NAME_PATTERN: Final = (
    rf"^(?:(?!local/)(?=[a-z0-9.-]{{1,63}}/)({HOST_PATTERN})/)?({BACKEND_PATTERN}):(0|[1-9][0-9]{{0,8}})\Z"
)
_NUMBER: Final = "(?:0|[1-9][0-9]{0,2})"
_ITEM: Final = rf"(?:npu|cuda):{_NUMBER}(?:-{_NUMBER})?"  # of the backends that the factory knows beside `host`
COUNT_PATTERN: Final = rf"^(?:host:[1-9][0-9]{{0,2}}|{_ITEM}(?:,{_ITEM}){{0,63}})\Z"

HostId = str
"""Of a machine with devices, as its cluster calls it: a DNS name of at most 63 characters."""

DeviceName = Annotated[str, Meta(pattern=NAME_PATTERN)]
"""A DeviceId as text, as messages and records hold it."""

LOCAL_HOST: Final[HostId] = "local"

_NAME = re.compile(NAME_PATTERN)
_COUNT = re.compile(COUNT_PATTERN)


class DeviceId(msgspec.Struct, frozen=True, order=True):
    """One device: the host that it is in, the backend that it is of, and its number there."""

    host: HostId
    backend: str
    index: int

    def __str__(self) -> str:
        name = f"{self.backend}:{self.index}"
        return name if self.host == LOCAL_HOST else f"{self.host}/{name}"

    @classmethod
    def parse(cls, name: str) -> DeviceId:
        """What `str` wrote. Raises ValueError for anything else."""
        match = _NAME.match(name)
        if match is None:
            raise ValueError(f"{name!r:.80} names no device: it has to be BACKEND:INDEX or HOST/BACKEND:INDEX")
        return cls(match[1] or LOCAL_HOST, match[2], int(match[3]))


class DeviceCount(msgspec.Struct, frozen=True):
    """So many devices of a backend, as the setting `devices` names them: the first ones, or where there are any, those
    of the `numbers`, which ascend."""

    backend: str
    count: int
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.backend == "host":
            return f"{self.backend}:{self.count}"
        return ",".join(f"{self.backend}:{part}" for part in _stretches(self.indices))

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers of all, ascending."""
        return self.numbers or tuple(range(self.count))

    @classmethod
    def parse(cls, setting: str) -> DeviceCount:
        """What `str` wrote, and its items in any order. Raises ValueError for anything else, for none, and for what
        names devices of two backends, one twice, or a stretch from its end."""
        if not _COUNT.match(setting):
            raise ValueError(f"{setting!r:.80} names no devices: it has to be host:N with N at least 1, or BACKEND:I-J")
        parts = [part.split(":") for part in setting.split(",")]
        backend = parts[0][0]
        if backend == "host":
            return cls(backend, int(parts[0][1]))
        if any(name != backend for name, _ in parts):
            raise ValueError(f"{setting!r:.80} names devices of two backends: a deployment has devices of one")
        numbers: list[int] = []
        for _, part in parts:
            first, _, last = part.partition("-")
            if int(last or first) < int(first):
                raise ValueError(f"{setting!r:.80} has {part}, whose end comes before its beginning")
            numbers += range(int(first), int(last or first) + 1)
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{setting!r:.80} names a device twice")
        return cls.of(backend, numbers)

    @classmethod
    def of(cls, backend: str, numbers: Iterable[int]) -> DeviceCount:
        """The devices of these numbers, and of the backend `host` all before them."""
        ordered = tuple(sorted(set(numbers)))
        if backend == "host":
            return cls(backend, 1 + ordered[-1])
        return cls(backend, len(ordered), () if ordered == tuple(range(len(ordered))) else ordered)

    def names(self, host: HostId = LOCAL_HOST) -> tuple[str, ...]:
        """Of all devices of a host, by number."""
        return tuple(str(DeviceId(host, self.backend, index)) for index in self.indices)


def _stretches(numbers: tuple[int, ...]) -> Iterator[str]:
    """Ascending numbers as `0-3`, `6`."""
    begin = numbers[0]
    for at, number in enumerate(numbers):
        if at + 1 == len(numbers) or numbers[at + 1] > number + 1:
            yield str(begin) if begin == number else f"{begin}-{number}"
            begin = numbers[at + 1] if at + 1 < len(numbers) else begin
