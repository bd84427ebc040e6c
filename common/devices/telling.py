"""What drivers of accelerators say about themselves: their version, and how much memory a device has. For reports; no
backend depends on it, so a call that a library lacks, or refuses, is an answer that is not known.

Source: the vendors' `cuda.h` (cuDriverGetVersion, cuMemGetInfo) and `acl/acl_rt.h` (aclrtGetVersion, aclrtGetMemInfo).
"""

from __future__ import annotations

from ctypes import POINTER, byref, c_int, c_int32, c_size_t
from typing import Any, Final, NamedTuple

from elasticmoe.common.devices.accelerator import AcceleratorDevice
from elasticmoe.common.devices.driver import Library
from elasticmoe.common.devices.factory import backend_of
from elasticmoe.common.protocol.errors import DeviceError

CALLS: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "cuda": {"cuDriverGetVersion": (POINTER(c_int),), "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t))},
    "npu": {
        "aclrtGetVersion": (POINTER(c_int32), POINTER(c_int32), POINTER(c_int32)),
        "aclrtGetMemInfo": (c_int, POINTER(c_size_t), POINTER(c_size_t)),
    },
}
_HBM: Final = 1  # aclrtMemAttr: ACL_HBM_MEM


class Told(NamedTuple):
    """`version`: of the driver's interface, as it says it; empty where it does not. `free_bytes` and `total_bytes`: of
    the device that this thread has used last; -1 where they are not known."""

    library: str
    version: str
    free_bytes: int
    total_bytes: int


def ask_driver(kind: str) -> Told:
    """What the driver of the backend `kind` says, in a process that has opened one of its devices. Raises DeviceError
    unknown_backend, no_driver."""
    backend = backend_of(kind)
    if not (isinstance(backend, type) and issubclass(backend, AcceleratorDevice)):
        raise DeviceError(f"devices of {kind} have no driver", code="no_driver")
    library = Library(backend.library, {}, CALLS[kind], {}, "")
    version = _cuda_version(library) if kind == "cuda" else _acl_version(library)
    return Told(backend.library, version, *_memory(library, kind))


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


def _memory(library: Library, kind: str) -> tuple[int, int]:
    name, args = ("cuMemGetInfo_v2", ()) if kind == "cuda" else ("aclrtGetMemInfo", (_HBM,))
    free, total = c_size_t(), c_size_t()
    if not library.has(name) or library.ask(name, *args, byref(free), byref(total)):
        return -1, -1
    return free.value, total.value
