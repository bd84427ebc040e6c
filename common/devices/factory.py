"""The only place that knows device backends: which there are, and which one a device's name asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from elasticmoe.common.devices.ascend import AscendDevice
from elasticmoe.common.devices.base import Device
from elasticmoe.common.devices.cuda import CudaDevice
from elasticmoe.common.devices.driver import MemoryInfo
from elasticmoe.common.devices.host import HostDevice
from elasticmoe.common.devices.names import DeviceCount, DeviceId
from elasticmoe.common.devices.rules import PROCESS, ProcessRules
from elasticmoe.common.protocol.errors import DeviceError


class DeviceBackend(Protocol):
    """What makes the devices of one kind, and what it asks of sizes, in bytes."""

    @property
    def granularity_min(self) -> int:
        """Of handles; a power of two."""
        ...

    @property
    def kv_handle_bytes_min(self) -> int:
        """What a KV handle should have."""
        ...

    def check(self, index: int) -> None:
        """Whether there is a device of that number, and what it needs. Raises DeviceError no_driver, no_device."""
        ...

    def importer_number(self, index: int) -> int:
        """As Device has it."""
        ...

    def memory(self, index: int) -> MemoryInfo | None:
        """As Device has it."""
        ...

    def give_up(self, index: int, reason: str) -> None:
        """As Device has it."""
        ...

    def check_torch(self) -> None:
        """As Device has it."""
        ...

    def prepare_torch(self) -> None:
        """As Device has it."""
        ...

    def __call__(
        self,
        name: str,
        granularity: int,
        budget: int,
        *,
        descriptors: Mapping[str, int] | None,
        rules: ProcessRules,
    ) -> Device:
        """As `open_device`, whose arguments these are."""
        ...


_BACKENDS: dict[str, DeviceBackend] = {"host": HostDevice, "npu": AscendDevice, "cuda": CudaDevice}


def register(name: str, backend: DeviceBackend) -> None:
    """Let `backend` make the devices whose names have `name` for their backend."""
    _BACKENDS[name] = backend


def backend_of(name: str) -> DeviceBackend:
    """The backend called `name`. Raises DeviceError unknown_backend."""
    backend = _BACKENDS.get(name)
    if backend is None:
        known = ", ".join(sorted(_BACKENDS))
        raise DeviceError(f"no backend is called {name}; there are: {known}", code="unknown_backend")
    return backend


def backend_of_device(name: str) -> DeviceBackend:
    """The backend of the device called `name`, as DeviceId writes it. Raises DeviceError unknown_backend."""
    return backend_of(DeviceId.parse(name).backend)


def check_devices(devices: DeviceCount) -> None:
    """Whether all of them are there, and what they need. Raises DeviceError unknown_backend, no_driver, no_device,
    no_torch."""
    backend = backend_of(devices.backend)
    for index in devices.indices:
        backend.check(index)
    backend.check_torch()


def prepare_torch(devices: DeviceCount) -> None:
    """Import what torch needs to compute on them. Raises DeviceError unknown_backend, no_torch."""
    backend_of(devices.backend).prepare_torch()


def importer_number(name: str) -> int:
    """By what the owner of the device called `name` admits this process. Raises DeviceError."""
    device = DeviceId.parse(name)
    return backend_of(device.backend).importer_number(device.index)


def memory_of(names: Iterable[str]) -> dict[str, MemoryInfo]:
    """What drivers say of the memory of these devices, without those whose memory is the machine's. This process opens
    each, so it is for one that uses devices. Raises DeviceError."""
    devices = {name: DeviceId.parse(name) for name in names}
    told = {name: backend_of(device.backend).memory(device.index) for name, device in devices.items()}
    return {name: memory for name, memory in told.items() if memory is not None}


def give_up(name: str, reason: str) -> None:
    """Use the device called `name` no more in this process, which could not open it: see Device."""
    device = DeviceId.parse(name)
    backend_of(device.backend).give_up(device.index, reason)


def granularity_of(devices: DeviceCount, asked: int) -> int:
    """The granularity of these devices: what is `asked` for, or the backend's least where that is more."""
    return max(asked, backend_of(devices.backend).granularity_min)


def open_device(
    name: str,
    granularity: int,
    budget: int = 0,
    *,
    descriptors: Mapping[str, int] | None = None,
    rules: ProcessRules = PROCESS,
) -> Device:
    """The device called `name`, as DeviceId writes it. The owner of its memory gives a `budget` in bytes, and after
    its restart the `descriptors` that its predecessor named, then calls `restore` for each handle and `trim`. A process
    that only imports gives neither. The caller closes it.

    Raises DeviceError unknown_backend; bad_granularity where the backend does not have that one.
    """
    return backend_of_device(name)(name, granularity, budget, descriptors=descriptors, rules=rules)
