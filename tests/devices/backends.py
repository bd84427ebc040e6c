"""Tests of what uses devices, on each backend: `host:N` names a device of the one that the fixture has chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from elasticmoe.common.devices import factory
from elasticmoe.common.devices.base import Device, ProcessRules
from elasticmoe.common.devices.cuda import CudaDevice
from elasticmoe.common.devices.host import HostDevice
from tests.devices import standins, strict

KINDS = ("host", "strict")
ALL_KINDS = (*KINDS, *standins.KINDS)
"""Those that the contract of devices is tested on: the product's and the tests' own, and accelerators on stand-ins; on
a machine with a GPU, `hardware` (tests/hardware)."""


@pytest.fixture(params=(*KINDS, "cuda"))
def granularity(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of the backend that the test runs on: one whose owner and user may be one process."""
    if request.param == "host":
        yield 4096
    elif request.param == "strict":
        (tmp_path / "devices").mkdir()
        monkeypatch.setenv(strict.FOLDER, str(tmp_path / "devices"))
        monkeypatch.setitem(factory._BACKENDS, "host", strict.StrictDevice)
        yield strict.GRANULARITY
    else:
        with standins.memory(monkeypatch) as folder:
            monkeypatch.setitem(factory._BACKENDS, "host", standins.process(request.param, folder))
            yield standins.GRANULARITY


class Process:
    """A process of the machine, as far as devices know: it has rules of its own, and a driver where there is one."""

    def __init__(self, kind: str, backend: type[Device]) -> None:
        self._kind, self._backend, self._rules = kind, backend, ProcessRules()

    def open(
        self, index: int, granularity: int, budget: int = 0, descriptors: Mapping[str, int] | None = None
    ) -> Device:
        """A device of the machine, in this process."""
        name = f"cuda:0.{index}" if self._kind == "hardware" else f"{self._kind}:{index}"
        return self._backend(name, granularity, budget, descriptors=descriptors, rules=self._rules)


class Machine:
    """A machine with devices of one `kind`. `is_whole`: a handle's memory comes and goes with it, not in parts;
    `takes_over`: a successor has what its predecessor had; `narrows`: weights are shared read-only."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind: Final = kind
        self._folder = folder
        self.is_whole = kind in (*standins.KINDS, "hardware")
        self.takes_over = kind != "npu"
        self.narrows = not self.is_whole

    def process(self) -> Process:
        """One more process."""
        backends: dict[str, Callable[[], Any]] = {"host": lambda: HostDevice, "strict": lambda: strict.StrictDevice}
        backends["hardware"] = lambda: CudaDevice  # whose owner and user may be one process
        make = backends.get(self.kind) or (lambda: standins.process(self.kind, self._folder))
        return Process(self.kind, make())


@contextmanager
def machine(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine of its own for a test, in `folder`."""
    monkeypatch.setenv(strict.FOLDER, str(folder))
    if kind not in standins.KINDS:
        yield Machine(kind, folder)
        return
    with standins.memory(monkeypatch) as memory:
        yield Machine(kind, folder)
        library = standins.loaded(standins.process(kind, memory))
        left = [library.standin_used(device) for device in range(4)]
        assert left == [0] * 4, "memory that nobody has given back"
