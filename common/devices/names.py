"""How devices and hosts are named. The only place that writes such a name or reads one. Pure.

| name | means |
|---|---|
| `host:0` | device 0 of the backend `host`, on the deployment's own host |
| `node-a/host:0` | the same of the host `node-a` |
| `host:4`, as a setting | the first four devices of the backend `host`, of each host |

A backend's name says what the memory is of, a host's whose machine it is in: the backend `host` is a machine's own
memory, on any host. A deployment of one host calls it LOCAL_HOST and leaves it out: one device has one name.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta

_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
HOST_PATTERN: Final = rf"{_LABEL}(?:\.{_LABEL})*"  # of at most 63 characters
BACKEND_PATTERN: Final = r"[a-z][a-z0-9_-]{0,31}"
NAME_PATTERN: Final = (
    rf"^(?:(?!local/)(?=[a-z0-9.-]{{1,63}}/)({HOST_PATTERN})/)?({BACKEND_PATTERN}):(0|[1-9][0-9]{{0,8}})\Z"
)
COUNT_PATTERN: Final = r"^host:[1-9][0-9]{0,2}\Z"

HostId = str
"""Of a machine with devices, as its cluster calls it: a DNS name of at most 63 characters."""

DeviceName = Annotated[str, Meta(pattern=NAME_PATTERN)]
"""A DeviceId as text, as messages and records hold it."""

LOCAL_HOST: Final[HostId] = "local"

_NAME = re.compile(NAME_PATTERN)
_COUNT = re.compile(rf"^({BACKEND_PATTERN}):([1-9][0-9]{{0,8}})\Z")


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
    """So many devices of a backend, as the setting `devices` names them."""

    backend: str
    count: int

    def __str__(self) -> str:
        return f"{self.backend}:{self.count}"

    @classmethod
    def parse(cls, setting: str) -> DeviceCount:
        """What `str` wrote. Raises ValueError for anything else, and for none."""
        match = _COUNT.match(setting)
        if match is None:
            raise ValueError(f"{setting!r:.80} names no devices: it has to be BACKEND:N with N at least 1")
        return cls(match[1], int(match[2]))

    def names(self, host: HostId = LOCAL_HOST) -> tuple[str, ...]:
        """Of all devices of a host, by number."""
        return tuple(str(DeviceId(host, self.backend, index)) for index in range(self.count))
