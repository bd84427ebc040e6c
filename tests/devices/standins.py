"""Stand-in drivers: the vendors' libraries over memory of this machine, compiled for the test run, with the vendors'
rules and error codes (`rules/`). The devices' code is the product's; only the library's path and torch's device differ.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.devices.accelerator import AcceleratorDevice
from elasticmoe.common.devices.ascend import AscendDevice
from elasticmoe.common.devices.cuda import CudaDevice
from tests.devices import vendor

SOURCE = Path(__file__).parent / "standin"
SITE = Path(__file__).parent / "site_standin"
GRANULARITY = 2 << 20
KINDS: dict[str, type[AcceleratorDevice]] = {"npu": AscendDevice, "cuda": CudaDevice}
_HEADERS = {"npu": vendor.ASCEND, "cuda": vendor.CUDA}
_SOURCES = {"npu": "ascend.cpp", "cuda": "cuda.cpp"}
FLAGS: tuple[str, ...] = (
    "-std=c++20",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-deprecated-declarations",
    "-fPIC",
    "-shared",
)
FLAGS += ("-fvisibility=hidden", "-fno-gnu-unique", "-DFUNC_VISIBILITY", "-Wl,--no-undefined")


def library(kind: str, *defines: str) -> Path:
    """The stand-in of the driver, compiled where it or its flags are new. Skips the test without declarations or a
    compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"stand-in drivers need a C++ compiler, and there is no {compiler}")
    includes = vendor.headers(_HEADERS[kind])
    sources = [SOURCE / _SOURCES[kind], SOURCE / "memory.cpp"]
    command = [compiler, *FLAGS, *defines, *(f"-isystem{folder}" for folder in includes), *map(str, sources)]
    state = [*command, *(path.read_text() for path in (*sources, SOURCE / "memory.h"))]
    name = f"standin/{kind}-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.so"
    with vendor.made_once(name) as (built, is_new):
        if is_new:
            part = built.with_suffix(".part")
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            part.rename(built)
    return built


@contextmanager
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on tmpfs that is the memory of all stand-in devices of a test, of all its processes. What test runs that
    were killed have left there is removed."""
    for left in Path("/dev/shm").glob("standin-*-*"):
        if not Path("/proc", left.name.split("-")[1]).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"standin-{os.getpid()}-", dir="/dev/shm"))
    monkeypatch.setenv("STANDIN_FOLDER", str(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def environment(kind: str, *, operators: bool = False) -> dict[str, str]:
    """What lets Python processes have devices of the `kind` on stand-ins, in the present memory. `operators`: and torch
    those of NPUs (npu_operators.py)."""
    library(kind)  # once: a whole deployment's processes would wait for the compiler, and cannot skip a test
    made = {"STANDIN_KIND": kind, "PYTHONPATH": os.pathsep.join((str(SITE), str(vendor.ROOT)))}
    if operators:
        vendor.headers(vendor.OPERATORS[0])
        made["STANDIN_OPERATORS"] = "1"
    return made


def install(kind: str, monkeypatch: pytest.MonkeyPatch, *, operators: bool = False) -> None:
    """Give the Python processes that the test starts the environment of the `kind`."""
    for name, value in environment(kind, operators=operators).items():
        monkeypatch.setenv(name, value)


def lose(folder: Path, device: int) -> None:
    """Take a device away: from now on its driver says in every process that it is lost."""
    (folder / f"lost.{device}").touch()


def fault(folder: Path, pid: int) -> None:
    """What that process computes on GPUs touches what is not mapped: its contexts there are lost, and no other's."""
    (folder / f"fault.{pid}").touch()


def used(kind: str, folder: Path) -> list[int]:
    """Bytes of each device that somebody has, by the stand-in's own accounting."""
    library_ = loaded(process(kind, folder))
    return [library_.standin_used(device) for device in range(int(os.environ.get("STANDIN_DEVICES", "4")))]


_numbers = itertools.count()


def process(kind: str, folder: Path, *defines: str) -> type[AcceleratorDevice]:
    """The devices' class of one more process on the machine: a copy of the library has a state of its own."""
    copy = folder / f"lib{kind}-{os.getpid()}-{next(_numbers)}.so"
    shutil.copyfile(library(kind, *defines), copy)
    return device_class(kind, copy)


def device_class(kind: str, path: Path) -> type[AcceleratorDevice]:
    """The product's class of the kind, on the library at `path` and torch's CPU."""
    return type(f"StandIn{KINDS[kind].__name__}", (KINDS[kind],), {"library": str(path), "torch_device": "cpu"})


def loaded(kind: type[AcceleratorDevice]) -> Any:
    """The library itself, for what only a stand-in tells: `standin_calls()`, `standin_used(device)`,
    `standin_num_fences()`, `standin_num_events()`, those that there are; of an NPU's `standin_num_copied()` and
    `standin_bytes_copied()`, of copies from device memory to device memory, and `standin_num_let_in()`, of peers."""
    made = ctypes.CDLL(kind.library)
    for name in ("calls", "used", "num_fences", "num_events", "num_copied", "bytes_copied", "num_let_in"):
        if hasattr(made, f"standin_{name}"):
            getattr(made, f"standin_{name}").restype = ctypes.c_uint64
    return made
