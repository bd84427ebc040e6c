"""What drivers of accelerators say about themselves: their version. For reports; no backend depends on it, so a call
that a library lacks, or refuses, is an answer that is not known.

Source: the vendors' `cuda.h` (cuDriverGetVersion) and `acl/acl_rt.h` (aclrtGetVersion).
"""

from __future__ import annotations

from ctypes import POINTER, byref, c_int, c_int32
from typing import Any, Final, NamedTuple

from elasticmoe.common.devices.accelerator import AcceleratorDevice
from elasticmoe.common.devices.driver import Library
from elasticmoe.common.devices.factory import backend_of
from elasticmoe.common.protocol.errors import DeviceError

CALLS: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "cuda": {"cuDriverGetVersion": (POINTER(c_int),)},
    "npu": {"aclrtGetVersion": (POINTER(c_int32), POINTER(c_int32), POINTER(c_int32))},
}


class Told(NamedTuple):
    """`version`: of the driver's interface, as it says it; empty where it does not."""

    library: str
    version: str


def ask_driver(kind: str) -> Told:
    """What the driver of the backend `kind` says, in a process that has opened one of its devices. Raises DeviceError
    unknown_backend, no_driver."""
    backend = backend_of(kind)
    if not (isinstance(backend, type) and issubclass(backend, AcceleratorDevice)):
        raise DeviceError(f"devices of {kind} have no driver", code="no_driver")
    library = Library(backend.library, {}, CALLS[kind], {}, "", {})
    return Told(backend.library, _cuda_version(library) if kind == "cuda" else _acl_version(library))


def _cuda_version(library: Library) -> str:
    number = c_int()
    if not library.has("cuDriverGetVersion") or library.ask("cuDriverGetVersion", byref(number)):
        return ""
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _acl_version(library: Library) -> str:
    parts = [c_int32() for _ in range(3)]
    if not library.has("aclrtGetVersion") or library.ask("aclrtGetVersion", *map(byref, parts)):
        return ""
    return ".".join(str(part.value) for part in parts)
