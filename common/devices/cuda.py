"""The backend `cuda`: NVIDIA GPUs, by the virtual memory calls of the driver (`libcuda.so.1`, CUDA 11.2 and later).

Source of every call: the vendor's `cuda.h`, and the pages "Virtual Memory Management" of the CUDA driver API.
`tests/devices/rules/cuda.toml` lists the rules with their sources. What has run on hardware: `docs/cuda.md`.
Longer than other files because the vendor's numbers, declarations and calls are in one.

- A share token is a descriptor (CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) of one handle, and a key: descriptors of
  several handles look the same to whoever gets them.
- Memory is there until every handle, mapping and open descriptor of it is gone, whoever made it. So a successor takes
  over what it gets descriptors of.
- What is mapped to be read only is read only to the device too, where the driver can: a write there is a fault, and
  costs the process its context.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import uuid
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_ushort, c_void_p
from typing import Any, ClassVar, Final

from elasticmoe.common.devices.accelerator import AcceleratorDevice, Memory
from elasticmoe.common.devices.driver import CopyPart, Driver, Library, Lost, Meaning, MemoryInfo
from elasticmoe.common.devices.rules import FdToken, Handle, Space, Token
from elasticmoe.common.protocol.errors import DeviceError, ElasticMoEError, Unavailable
from elasticmoe.common.wording import counted

_DESCRIPTOR: Final = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_READ, _READ_AND_WRITE = 1, 3  # CUmemAccess_flags
_NON_BLOCKING: Final = 1  # CU_STREAM_NON_BLOCKING: its copies wait for no default stream
_NO_TIMING: Final = 2  # CU_EVENT_DISABLE_TIMING
_NOT_READY, _NOT_SUPPORTED = 600, 801
_NEEDED: Final = {102: "virtual memory management", 103: "sharing by descriptors"}  # CUdevice_attribute

# cuda.h, CUresult
LOST: Final[dict[int, str]] = {  # answers after which a process cannot use the device any more
    214: "CUDA_ERROR_ECC_UNCORRECTABLE",
    220: "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    226: "CUDA_ERROR_CONTAINED",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS",
    702: "CUDA_ERROR_LAUNCH_TIMEOUT",
    709: "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    710: "CUDA_ERROR_ASSERT",
    714: "CUDA_ERROR_HARDWARE_STACK_ERROR",
    715: "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    716: "CUDA_ERROR_MISALIGNED_ADDRESS",
    717: "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    718: "CUDA_ERROR_INVALID_PC",
    719: "CUDA_ERROR_LAUNCH_FAILED",
    721: "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    810: "CUDA_ERROR_MPS_CLIENT_TERMINATED",
    911: "CUDA_ERROR_EXTERNAL_DEVICE",
}
REFUSALS: Final[dict[int, Meaning]] = {
    1: Meaning("CUDA_ERROR_INVALID_VALUE", "driver_refused"),
    2: Meaning("CUDA_ERROR_OUT_OF_MEMORY", "does_not_fit"),
    3: Meaning("CUDA_ERROR_NOT_INITIALIZED", "driver_refused"),
    34: Meaning("CUDA_ERROR_STUB_LIBRARY", "no_driver"),
    100: Meaning("CUDA_ERROR_NO_DEVICE", "no_device"),
    101: Meaning("CUDA_ERROR_INVALID_DEVICE", "no_device"),
    201: Meaning("CUDA_ERROR_INVALID_CONTEXT", "driver_refused"),
    304: Meaning("CUDA_ERROR_OPERATING_SYSTEM", "driver_failed"),
    400: Meaning("CUDA_ERROR_INVALID_HANDLE", "driver_refused"),
    800: Meaning("CUDA_ERROR_NOT_PERMITTED", "driver_refused"),
    801: Meaning("CUDA_ERROR_NOT_SUPPORTED", "driver_refused"),
    803: Meaning("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "no_driver"),
    999: Meaning("CUDA_ERROR_UNKNOWN", "driver_failed"),
    **{number: Meaning(name, "driver_failed") for number, name in LOST.items()},
}
_OPERATING_SYSTEM, _UNKNOWN = 304, 999


class _CudaLocation(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", c_int), ("id", c_int)]


class _Flags(ctypes.Structure):
    """CUmemAllocationProp.allocFlags."""

    _fields_ = [("compression", c_ubyte), ("rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4)]


class _Allocation(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _CudaLocation),
        ("metadata", c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _CudaLocation), ("flags", c_int)]


def _of(device: int) -> _Allocation:
    """Pinned memory of a device, to be shared by descriptors (CU_MEM_LOCATION_TYPE_DEVICE)."""
    return _Allocation(1, _DESCRIPTOR, _CudaLocation(1, device), None, _Flags())


CALLS: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceCanAccessPeer": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(_Allocation), c_int),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_ulonglong),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (POINTER(c_ulonglong), c_size_t, POINTER(_Allocation), c_ulonglong),
    "cuMemRelease": (c_ulonglong,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(_Access), c_size_t),
    "cuMemExportToShareableHandle": (POINTER(c_int), c_ulonglong, c_int, c_ulonglong),
    "cuMemImportFromShareableHandle": (POINTER(c_ulonglong), c_void_p, c_int),
    "cuMemsetD8_v2": (c_uint64, c_ubyte, c_size_t),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemcpyPeerAsync": (c_uint64, c_void_p, c_uint64, c_void_p, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventSynchronize": (c_void_p,),
}
_Uuid = c_ubyte * 16  # CUuuid
NEWER_CALLS: Final[dict[str, tuple[Any, ...]]] = {  # of CUDA 11.4
    "cuDeviceGetUuid_v2": (POINTER(_Uuid), c_int),
}
WORDS: Final[dict[str, tuple[Any, ...]]] = {  # of CUDA 6.0
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
_HINT: Final = "install NVIDIA's driver; in a container, start it with the NVIDIA container toolkit"


class _CudaDriver(Driver):
    """CUDA's driver in this process. It computes in the devices' primary contexts, which torch has too. A thread's
    calls concern the context that it has set: each method that needs one says its own first. Calls about addresses and
    handles need none, nor whether an event is over (cuda.h: they answer no INVALID_CONTEXT)."""

    def __init__(self, path: str) -> None:
        """Raises DeviceError no_driver; no_device where the driver sees none."""
        super().__init__(Library(path, CALLS, NEWER_CALLS, REFUSALS, _HINT, WORDS), LOST)
        self._contexts: dict[int, int] = {}  # of each device that is open
        self._streams: dict[int, int] = {}
        self._narrows = True  # until the driver says that it cannot
        if answer := self.library.ask("cuInit", 0):
            if answer == _UNKNOWN:  # as where the kernel's module, or its node in a container, is missing
                raise DeviceError(f"{self.library.told('cuInit', answer)}: {_HINT}", code="no_driver")
            self.library.refuse("cuInit", answer)

    def _set(self, device: int) -> None:
        self.library.call("cuCtxSetCurrent", self._contexts[device])

    def check(self, device: int) -> None:
        count = c_int()
        self.library.call("cuDeviceGetCount", byref(count))
        if device >= count.value:
            shown = counted(count.value, "device")
            text = f"there is no cuda:{device}: the driver shows {shown} (CUDA_VISIBLE_DEVICES)"
            raise DeviceError(text, code="no_device")
        for attribute, what in _NEEDED.items():
            has = c_int()
            self.library.call("cuDeviceGetAttribute", byref(has), attribute, device)
            if not has.value:
                raise DeviceError(f"cuda:{device} has no {what}, which its driver would need", code="no_device")

    def _open(self, device: int) -> None:
        context, stream = c_void_p(), c_void_p()
        self.library.call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._contexts[device] = context.value or 0
        self._set(device)
        self.library.call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        self._streams[device] = stream.value or 0

    def identity(self, device: int) -> str:
        """The UUID of the GPU, or of the part that MIG has made of one."""
        if not self.library.has("cuDeviceGetUuid_v2"):
            return ""
        told = _Uuid()
        self.library.call("cuDeviceGetUuid_v2", byref(told), device)
        return str(uuid.UUID(bytes=bytes(told)))

    def can_access(self, device: int, peer: int) -> bool:
        can = c_int()
        self.library.call("cuDeviceCanAccessPeer", byref(can), device, peer)
        return bool(can.value)

    def granularity(self, device: int) -> int:
        nbytes = c_size_t()
        self.library.call("cuMemGetAllocationGranularity", byref(nbytes), byref(_of(device)), 0)
        return nbytes.value

    def memory(self, device: int) -> MemoryInfo:
        self._set(device)
        free, total = c_size_t(), c_size_t()
        self.library.call("cuMemGetInfo_v2", byref(free), byref(total))
        return MemoryInfo(free.value, total.value)

    def reserve(self, device: int, nbytes: int) -> int:
        address = c_uint64()
        self.library.call("cuMemAddressReserve", byref(address), nbytes, 0, 0, 0)
        return address.value

    def unreserve(self, device: int, address: int, nbytes: int) -> None:
        self.library.call("cuMemAddressFree", address, nbytes)

    def create(self, device: int, nbytes: int) -> int:
        handle = c_ulonglong()
        self.library.call("cuMemCreate", byref(handle), nbytes, byref(_of(device)), 0)
        return handle.value

    def release(self, device: int, handle: int) -> None:
        self.library.call("cuMemRelease", handle)

    def map(self, device: int, parts: Sequence[tuple[int, int, int]]) -> None:
        for at, (address, nbytes, handle) in enumerate(parts):
            try:
                self.library.call("cuMemMap", address, nbytes, 0, handle, 0)
            except ElasticMoEError:
                self.undo(device, parts[:at])
                raise

    def allow(self, device: int, address: int, nbytes: int, writable: bool) -> None:
        flags = _READ if self._narrows and not writable else _READ_AND_WRITE
        answer = self.library.ask("cuMemSetAccess", address, nbytes, byref(_Access(_CudaLocation(1, device), flags)), 1)
        if answer == _NOT_SUPPORTED and flags == _READ:
            self._narrows = False
            self.allow(device, address, nbytes, writable)
        elif answer:
            self.library.refuse("cuMemSetAccess", answer)

    def unmap(self, device: int, address: int, nbytes: int) -> None:
        self.library.call("cuMemUnmap", address, nbytes)

    def export(self, handle: int) -> int:
        """A descriptor of the handle's memory, the caller's to close. Raises Unavailable no_descriptors at the limit of
        open files."""
        fd, call = c_int(), "cuMemExportToShareableHandle"
        if answer := self.library.ask(call, byref(fd), handle, _DESCRIPTOR, 0):
            if answer == _OPERATING_SYSTEM:  # the one thing that this call asks of it is a descriptor
                text = f"no descriptor is left to share memory by: {self.library.told(call, answer)}"
                raise Unavailable(text, code="no_descriptors")
            self.library.refuse(call, answer)
        return fd.value

    def import_(self, fd: int) -> int:
        """A handle of the memory that a descriptor is of, which stays the caller's."""
        handle, call = c_ulonglong(), "cuMemImportFromShareableHandle"
        if answer := self.library.ask(call, byref(handle), c_void_p(fd), _DESCRIPTOR):
            if answer == _UNKNOWN:  # seen of all other descriptors: nothing is wrong with the device
                text = f"the descriptor cannot be imported as memory: {self.library.told(call, answer)}"
                raise DeviceError(text, code="driver_refused")
            self.library.refuse(call, answer)
        return handle.value

    def zero(self, device: int, address: int, nbytes: int) -> None:
        self._set(device)
        self.library.call("cuMemsetD8_v2", address, 0, nbytes)
        self.library.call("cuCtxSynchronize")

    def _copy(self, device: int, parts: Sequence[CopyPart]) -> None:
        self._set(device)
        stream = self._streams[device]
        for dst, src, nbytes, dst_device, src_device in parts:
            if dst_device == src_device == device:
                self.library.call("cuMemcpyDtoDAsync_v2", dst, src, nbytes, stream)
            else:
                there, here = self._contexts[dst_device], self._contexts[src_device]
                self.library.call("cuMemcpyPeerAsync", dst, there, src, here, nbytes, stream)

    def _create_event(self, device: int) -> int:
        self._set(device)
        event = c_void_p()
        self.library.call("cuEventCreate", byref(event), _NO_TIMING)
        return event.value or 0

    def _record(self, device: int, event: int) -> None:
        self._set(device)
        self.library.call("cuEventRecord", event, self._streams[device])

    def to_device(self, device: int, address: int, source: int, nbytes: int) -> None:
        self._set(device)
        self.library.call("cuMemcpyHtoD_v2", address, source, nbytes)
        self.library.call("cuCtxSynchronize")  # from memory that is not pinned it may return before it is there

    def to_host(self, device: int, target: int, address: int, nbytes: int) -> None:
        self._set(device)
        self.library.call("cuMemcpyDtoH_v2", target, address, nbytes)

    def is_done(self, device: int, event: int) -> bool:
        answer = self.library.ask("cuEventQuery", event)
        if answer not in (0, _NOT_READY):
            self.library.refuse("cuEventQuery", answer)
        return answer == 0

    def wait(self, device: int, event: int) -> None:
        self._set(device)
        self.library.call("cuEventSynchronize", event)

    def forget(self, device: int, event: int) -> None:
        self._set(device)
        self.library.call("cuEventDestroy_v2", event)

    def drain(self, device: int) -> None:
        self._set(device)
        self.library.call("cuCtxSynchronize")


class CudaDevice(AcceleratorDevice):
    """One GPU. See the module's text. `descriptors` that a predecessor named are taken over."""

    token_kind = FdToken
    library: ClassVar[str] = "libcuda.so.1"
    torch_device: ClassVar[str] = "cuda:{index}"
    _driver: _CudaDriver

    @classmethod
    def _load(cls) -> _CudaDriver:
        return _CudaDriver(cls.library)

    def descriptors(self) -> Mapping[str, int]:
        """One of each settled handle: its memory is there as long as somebody has it. Of a device that has failed,
        those that had been made."""
        settled = [handle for handle in self._local if handle.state == "settled" and handle.space is not None]
        if self.failure:
            settled = [handle for handle in settled if handle.backing.shared is not None]
        return {_name(one.space or "kv", one.place, one.nbytes, one.key): self._descriptor(one) for one in settled}

    def _descriptor(self, handle: Handle) -> int:
        memory: Memory = handle.backing
        if memory.shared is None:
            with self._using():
                memory.shared = self._driver.export(memory.number)
            os.set_inheritable(memory.shared, False)
        return memory.shared

    def _claim(self, nbytes: int, space: Space, place: int) -> tuple[Memory, int]:
        memory, _ = super()._claim(nbytes, space, place)
        return memory, 1 + secrets.randbits(62)

    def _restore(self, nbytes: int, space: Space, place: int, key: int) -> Memory:
        name = _name(space, place, nbytes, key)
        if name not in self._kept:
            raise self._broken(f"there is no descriptor of {name}", code="invalid_extent")
        memory = Memory(0)
        with suppress(Lost), self._using():  # of a device that has failed, what is kept is the descriptor
            memory.number = self._driver.import_(self._kept[name])
        memory.shared = self._kept.pop(name)
        self._made[space] += nbytes
        return memory

    def _trim(self, space: Space, free: list[tuple[int, int]]) -> None:
        for name in [one for one in self._kept if one.startswith(f"{space}.")]:
            os.close(self._kept.pop(name))

    def _release(self, handle: Handle) -> None:
        super()._release(handle)
        if handle.backing.shared is not None:
            os.close(handle.backing.shared)

    def _export(self, handle: Handle) -> FdToken:
        return FdToken(self._descriptor(handle), 0, handle.nbytes, handle.key)

    def _identity(self, token: Token) -> Hashable:
        assert isinstance(token, FdToken), "import_ has looked"
        return token.key

    def _import(self, token: Token) -> tuple[Memory, bool]:
        assert isinstance(token, FdToken), "import_ has looked"
        if token.offset:
            raise self._broken(f"a handle is shared whole, not from {token.offset}", code="invalid_token")
        try:
            with self._using():
                return Memory(self._driver.import_(token.fd)), True
        except DeviceError as error:
            if error.code != "driver_refused":
                raise
            text = f"what the token names cannot be imported: {error.message}"
            raise self._broken(text, code="invalid_token") from None

    def _close(self) -> None:
        super()._close()
        kept = [*self._kept.values(), *(one.backing.shared for one in self._local if one.backing.shared is not None)]
        for fd in kept:
            os.close(fd)
        self._kept.clear()


def _name(space: str, place: int, nbytes: int, key: int) -> str:
    """Of a handle's descriptor."""
    return f"{space}.{place}.{nbytes}.{key}"
