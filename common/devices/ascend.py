"""The backend `npu`: Ascend NPUs, by the memory calls of AscendCL (`libascendcl.so`, CANN 8.0.RC3 and later).
Longer than other files because the vendor's numbers and declarations are beside the calls.

Source of every call: the vendor's `acl/acl_rt.h`, and the pages "aclrtReserveMemAddress" to
"aclrtMemSetPidToShareableHandle" of the CANN application development reference. `tests/devices/rules/ascend.toml` lists
the rules with their sources. What has run on hardware: `docs/ascend.md`.

- A share token is a number of 64 bits, and no capability: the owner `admit`s each process that may import, by the
  number that the process has on the machine. The driver refuses what was admitted before the importer started.
- Only whoever made a handle exports it or admits to it, and a process that exports does not import. So a successor
  takes nothing over: memory outlives its owner where ranks hold it, and nobody else can reach it.
- No kernel touches another device's memory: what is copied from there or to there, the driver copies.
- Access is not narrowed: what an importer may map, it may write.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Hashable, Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, ClassVar, Final

from elasticmoe.common.devices.accelerator import AcceleratorDevice, Memory
from elasticmoe.common.devices.driver import CopyPart, Driver, Library, Meaning, MemoryInfo
from elasticmoe.common.devices.rules import Handle, KeyToken, Space, Token
from elasticmoe.common.devices.torch_devices import fence_torch, queue_of
from elasticmoe.common.protocol.errors import DeviceError, ElasticMoEError
from elasticmoe.common.wording import counted

if TYPE_CHECKING:
    import torch

_REPEATED_INIT: Final = 100002  # another library of this process, such as torch_npu, was first
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3  # aclrtMemcpyKind
_QUEUED_ALIGN: Final = 64  # bytes: where source and target of aclrtMemcpyAsync begin; of aclrtMemcpy anywhere
_DEFAULT_SHARE: Final = 1  # ACL_MEM_SHARE_HANDLE_TYPE_DEFAULT
_HBM: Final = 1  # aclrtMemAttr: ACL_HBM_MEM, pages of every size
_COMPLETE: Final = 1  # ACL_EVENT_RECORDED_STATUS_COMPLETE

# acl_base_rt.h, error_codes/rt_error_codes.h
LOST: Final[dict[int, str]] = {  # answers after which a process cannot use the device any more
    507010: "ACL_ERROR_RT_LOST_HEARTBEAT",
    507013: "ACL_ERROR_RT_SYS_DMA",
    507053: "ACL_ERROR_RT_DEVICE_MEM_ERROR",
    507054: "ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR",
    507901: "ACL_ERROR_RT_SOCKET_CLOSE",
}
REFUSALS: Final[dict[int, Meaning]] = {
    100001: Meaning("ACL_ERROR_UNINITIALIZE", "driver_refused"),
    107000: Meaning("ACL_ERROR_RT_PARAM_INVALID", "driver_refused"),
    107001: Meaning("ACL_ERROR_RT_INVALID_DEVICEID", "no_device"),
    107002: Meaning("ACL_ERROR_RT_CONTEXT_NULL", "driver_refused"),
    107003: Meaning("ACL_ERROR_RT_STREAM_CONTEXT", "driver_refused"),
    107017: Meaning("ACL_ERROR_RT_INVALID_HANDLE", "driver_refused"),
    207000: Meaning("ACL_ERROR_RT_FEATURE_NOT_SUPPORT", "driver_refused"),
    207001: Meaning("ACL_ERROR_RT_MEMORY_ALLOCATION", "does_not_fit"),
    207004: Meaning("ACL_ERROR_RT_NO_DEVICE", "no_device"),
    207006: Meaning("ACL_ERROR_RT_NO_PERMISSION", "not_admitted"),
    207018: Meaning("ACL_ERROR_RT_DEVICE_OOM", "does_not_fit"),
    507899: Meaning("ACL_ERROR_RT_DRV_INTERNAL_ERROR", "driver_refused"),
    **{number: Meaning(name, "driver_failed") for number, name in LOST.items()},
}


class _AclLocation(ctypes.Structure):
    """aclrtMemLocation."""

    _fields_ = [("id", c_uint32), ("type", c_int)]


class _PhysicalMemory(ctypes.Structure):
    """aclrtPhysicalMemProp."""

    _fields_ = [
        ("handle_type", c_int),
        ("allocation_type", c_int),
        ("attributes", c_int),
        ("location", _AclLocation),
        ("reserve", c_uint64),
    ]


def _of(device: int) -> _PhysicalMemory:
    """Pinned memory of a device in huge pages (ACL_HBM_MEM_HUGE, ACL_MEM_LOCATION_TYPE_DEVICE)."""
    return _PhysicalMemory(0, 0, 4, _AclLocation(device, 1), 0)


CALLS: Final[dict[str, tuple[Any, ...]]] = {
    "aclInit": (c_char_p,),
    "aclrtGetDeviceCount": (POINTER(c_uint32),),
    "aclrtSetDevice": (c_int32,),
    "aclrtDeviceGetBareTgid": (POINTER(c_int32),),
    "aclrtMemGetAllocationGranularity": (POINTER(_PhysicalMemory), c_int, POINTER(c_size_t)),
    "aclrtGetMemInfo": (c_int, POINTER(c_size_t), POINTER(c_size_t)),
    "aclrtReserveMemAddress": (POINTER(c_void_p), c_size_t, c_size_t, c_void_p, c_uint64),
    "aclrtReleaseMemAddress": (c_void_p,),
    "aclrtMallocPhysical": (POINTER(c_void_p), c_size_t, POINTER(_PhysicalMemory), c_uint64),
    "aclrtFreePhysical": (c_void_p,),
    "aclrtMapMem": (c_void_p, c_size_t, c_size_t, c_void_p, c_uint64),
    "aclrtUnmapMem": (c_void_p,),
    "aclrtMemExportToShareableHandle": (c_void_p, c_int, c_uint64, POINTER(c_uint64)),
    "aclrtMemSetPidToShareableHandle": (c_uint64, POINTER(c_int32), c_size_t),
    "aclrtMemImportFromShareableHandle": (c_uint64, c_int32, POINTER(c_void_p)),
    "aclrtDeviceCanAccessPeer": (POINTER(c_int32), c_int32, c_int32),
    "aclrtDeviceEnablePeerAccess": (c_int32, c_uint32),
    "aclrtCreateStream": (POINTER(c_void_p),),
    "aclrtMemcpyAsync": (c_void_p, c_size_t, c_void_p, c_size_t, c_int, c_void_p),
    "aclrtMemcpy": (c_void_p, c_size_t, c_void_p, c_size_t, c_int),
    "aclrtMemset": (c_void_p, c_size_t, c_int32, c_size_t),
    "aclrtCreateEvent": (POINTER(c_void_p),),
    "aclrtDestroyEvent": (c_void_p,),
    "aclrtRecordEvent": (c_void_p, c_void_p),
    "aclrtQueryEventStatus": (c_void_p, POINTER(c_int)),
    "aclrtSynchronizeEvent": (c_void_p,),
    "aclrtSynchronizeStream": (c_void_p,),
    "aclrtSynchronizeDevice": (),
}
NEWER_CALLS: Final[dict[str, tuple[Any, ...]]] = {
    "aclrtMemExportToShareableHandleV2": (c_void_p, c_uint64, c_int, POINTER(c_uint64)),
    "aclrtMemSetPidToShareableHandleV2": (POINTER(c_uint64), c_int, POINTER(c_int32), c_size_t),
    "aclrtMemImportFromShareableHandleV2": (POINTER(c_uint64), c_int, c_uint64, POINTER(c_void_p)),
}
# Its argument is a device's number as this process has it, whatever the name says (the call's page, CANN 9.1).
IDENTITY_CALLS: Final[dict[str, tuple[Any, ...]]] = {"aclrtGetPhyDevIdByLogicDevId": (c_int32, POINTER(c_int32))}
WORDS: Final[dict[str, tuple[Any, ...]]] = {"aclGetRecentErrMsg": ()}
_HINT: Final = "install CANN's runtime and its driver, and source CANN's set_env.sh, which puts it on LD_LIBRARY_PATH"
UNREACHED: Final = "name NPUs in --devices that can"  # no other exchange helps: nothing can be copied between them


def _can_be_queued(dst: int, src: int) -> bool:
    return (dst | src) % _QUEUED_ALIGN == 0


class _AclDriver(Driver):
    """AscendCL in this process. A thread's calls concern the device that it has set (aclrtSetDevice), and torch_npu
    sets devices too: so each method says its own first."""

    def __init__(self, path: str) -> None:
        """Raises DeviceError no_driver; no_device where the driver sees none."""
        super().__init__(Library(path, CALLS, NEWER_CALLS | IDENTITY_CALLS, REFUSALS, _HINT, WORDS), LOST)
        self._streams: dict[int, int] = {}  # of each device that is open
        self._thread = threading.local()
        self._peers: set[tuple[int, int]] = set()
        self._letting_in = threading.Lock()
        answer = self.library.ask("aclInit", None)
        if answer == _REPEATED_INIT:
            self.library.told("aclInit", answer)  # takes words that the next refusal would be told with
        elif answer:
            self.library.refuse("aclInit", answer)
        self.is_newer = all(map(self.library.has, NEWER_CALLS))  # version 2 of the calls that share

    def _set(self, device: int) -> None:
        self.library.call("aclrtSetDevice", device)
        self._thread.device = device

    def check(self, device: int) -> None:
        count = c_uint32()
        self.library.call("aclrtGetDeviceCount", byref(count))
        if device >= count.value:
            shown = counted(count.value, "device")
            text = f"there is no npu:{device}: the driver shows {shown} (ASCEND_RT_VISIBLE_DEVICES)"
            raise DeviceError(text, code="no_device")

    def _open(self, device: int) -> None:
        self._set(device)
        stream = c_void_p()
        self.library.call("aclrtCreateStream", byref(stream))
        self._streams[device] = stream.value or 0

    def identity(self, device: int) -> str:
        """The number that the machine gives the NPU, also in a container."""
        if not self.library.has("aclrtGetPhyDevIdByLogicDevId"):
            return ""
        self._set(device)
        number = c_int32()
        self.library.call("aclrtGetPhyDevIdByLogicDevId", device, byref(number))
        return f"NPU {number.value} of the machine"

    def can_access(self, device: int, peer: int) -> bool:
        self._set(device)
        can = c_int32()
        self.library.call("aclrtDeviceCanAccessPeer", byref(can), device, peer)
        return bool(can.value)

    def granularity(self, device: int) -> int:
        self._set(device)
        nbytes = c_size_t()
        self.library.call("aclrtMemGetAllocationGranularity", byref(_of(device)), 0, byref(nbytes))
        return nbytes.value

    def memory(self, device: int) -> MemoryInfo:
        self._set(device)
        free, total = c_size_t(), c_size_t()
        self.library.call("aclrtGetMemInfo", _HBM, byref(free), byref(total))
        return MemoryInfo(free.value, total.value)

    def reserve(self, device: int, nbytes: int) -> int:
        self._set(device)
        address = c_void_p()
        self.library.call("aclrtReserveMemAddress", byref(address), nbytes, 0, None, 0)
        return address.value or 0

    def unreserve(self, device: int, address: int, nbytes: int) -> None:
        self._set(device)
        self.library.call("aclrtReleaseMemAddress", address)

    def create(self, device: int, nbytes: int) -> int:
        self._set(device)
        handle = c_void_p()
        self.library.call("aclrtMallocPhysical", byref(handle), nbytes, byref(_of(device)), 0)
        return handle.value or 0

    def release(self, device: int, handle: int) -> None:
        self._set(device)
        self.library.call("aclrtFreePhysical", handle)

    def map(self, device: int, parts: Sequence[tuple[int, int, int]]) -> None:
        self._set(device)
        for at, (address, nbytes, handle) in enumerate(parts):
            try:
                self.library.call("aclrtMapMem", address, nbytes, 0, handle, 0)
            except ElasticMoEError:
                self.undo(device, parts[:at])
                raise

    def allow(self, device: int, address: int, nbytes: int, writable: bool) -> None:
        """Mapped memory may be read and written at once: AscendCL narrows no access of a device."""

    def unmap(self, device: int, address: int, nbytes: int) -> None:
        self._set(device)
        self.library.call("aclrtUnmapMem", address)

    def export(self, device: int, handle: int) -> int:
        """The number by which admitted processes import the handle. Once per handle."""
        self._set_once(device)
        key = c_uint64()
        if self.is_newer:
            self.library.call("aclrtMemExportToShareableHandleV2", handle, 0, _DEFAULT_SHARE, byref(key))
        else:
            self.library.call("aclrtMemExportToShareableHandle", handle, 0, 0, byref(key))
        return key.value

    def admit(self, device: int, keys: Iterable[int], importers: Sequence[int]) -> None:
        """Let processes that have started import what was exported as `keys`: by their numbers on the machine, as
        their `own_number` says."""
        self._set_once(device)
        numbers, num = (c_int32 * len(importers))(*importers), len(importers)
        for key in keys:
            if self.is_newer:
                key_ref = byref(c_uint64(key))
                self.library.call("aclrtMemSetPidToShareableHandleV2", key_ref, _DEFAULT_SHARE, numbers, num)
            else:
                self.library.call("aclrtMemSetPidToShareableHandle", key, numbers, num)

    def own_number(self, device: int) -> int:
        """This process's number on the machine, which in a container is not its own pid."""
        self._set(device)
        number = c_int32()
        self.library.call("aclrtDeviceGetBareTgid", byref(number))
        return number.value

    def _set_once(self, device: int) -> None:
        """For what is asked for thousands of times, in threads where torch_npu sets no other device: a rank's own, and
        an owner's, which has no torch."""
        if getattr(self._thread, "device", None) != device:
            self._set(device)

    def import_(self, device: int, key: int) -> int:
        """A handle of what another process has exported. Raises DeviceError not_admitted."""
        self._set_once(device)
        handle = c_void_p()
        if self.is_newer:
            self.library.call(
                "aclrtMemImportFromShareableHandleV2", byref(c_uint64(key)), _DEFAULT_SHARE, 0, byref(handle)
            )
        else:
            self.library.call("aclrtMemImportFromShareableHandle", key, device, byref(handle))
        return handle.value or 0

    def zero(self, device: int, address: int, nbytes: int) -> None:
        self._set(device)
        self.library.call("aclrtMemset", address, nbytes, 0, nbytes)

    def _copy(self, device: int, parts: Sequence[CopyPart]) -> None:
        self._set(device)
        stream = self._streams[device]
        for part in parts:
            for peer in {part.dst_device, part.src_device} - {device}:
                self._let_in(device, peer)
            dst, src, nbytes = part[:3]
            if _can_be_queued(dst, src):
                self.library.call("aclrtMemcpyAsync", dst, nbytes, src, nbytes, _DEVICE_TO_DEVICE, stream)
            else:
                self.library.call("aclrtMemcpy", dst, nbytes, src, nbytes, _DEVICE_TO_DEVICE)

    def _create_event(self, device: int) -> int:
        self._set(device)
        event = c_void_p()
        self.library.call("aclrtCreateEvent", byref(event))
        return event.value or 0

    def _record(self, device: int, event: int) -> None:
        self._set(device)
        self.library.call("aclrtRecordEvent", event, self._streams[device])

    def queue_copy(self, device: int, target: int, source: int, nbytes: int, queue: int | None) -> None:
        """Begin to copy on the stream `queue`; without one, or where the ends cannot be queued, copy. Devices of
        imported memory are let in already: the driver does that with the import."""
        self._set_once(device)
        stream = self._streams[device] if queue is None else queue
        if not _can_be_queued(target, source):
            self.library.call("aclrtSynchronizeStream", stream)
            self.library.call("aclrtMemcpy", target, nbytes, source, nbytes, _DEVICE_TO_DEVICE)
            return
        self.library.call("aclrtMemcpyAsync", target, nbytes, source, nbytes, _DEVICE_TO_DEVICE, stream)
        if queue is None:
            self.library.call("aclrtSynchronizeStream", stream)

    def _let_in(self, device: int, peer: int) -> None:
        with self._letting_in:  # once: no page says what a driver answers the second time
            if (device, peer) in self._peers:
                return
            if not self.can_access(device, peer):
                text = f"npu:{device} cannot access the memory of npu:{peer}, and nothing can be copied between them"
                raise DeviceError(f"{text}: {UNREACHED}", code="no_peer_access")
            self.library.call("aclrtDeviceEnablePeerAccess", peer, 0)
            self._peers.add((device, peer))

    def to_device(self, device: int, address: int, source: int, nbytes: int) -> None:
        self._set(device)
        self.library.call("aclrtMemcpy", address, nbytes, source, nbytes, _HOST_TO_DEVICE)

    def to_host(self, device: int, target: int, address: int, nbytes: int) -> None:
        self._set(device)
        self.library.call("aclrtMemcpy", target, nbytes, address, nbytes, _DEVICE_TO_HOST)

    def is_done(self, device: int, event: int) -> bool:
        self._set(device)
        status = c_int()
        self.library.call("aclrtQueryEventStatus", event, byref(status))
        return status.value == _COMPLETE

    def wait(self, device: int, event: int) -> None:
        self._set(device)
        self.library.call("aclrtSynchronizeEvent", event)

    def forget(self, device: int, event: int) -> None:
        self._set(device)
        self.library.call("aclrtDestroyEvent", event)

    def drain(self, device: int) -> None:
        self._set(device)
        self.library.call("aclrtSynchronizeDevice")


class AscendDevice(AcceleratorDevice):
    """One NPU. See the module's text."""

    token_kind = KeyToken
    range_bytes_max = 128 * 10**9 // (2 << 20) * (2 << 20)
    library: ClassVar[str] = "libascendcl.so"
    torch_device: ClassVar[str] = "npu:{index}"
    unreached: ClassVar[str] = UNREACHED
    _driver: _AclDriver
    _importers: tuple[int, ...] = ()

    @classmethod
    def _load(cls) -> _AclDriver:
        return _AclDriver(cls.library)

    @classmethod
    def _of_this_process(cls) -> _AclDriver:
        driver = super()._of_this_process()
        assert isinstance(driver, _AclDriver), "as _load has made it"
        return driver

    def queue_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """By the driver: of torch's own copy torch_npu makes a kernel (aclnnInplaceCopy)."""
        is_like = (target.shape, target.dtype) == (source.shape, source.dtype)
        if not (is_like and target.is_contiguous() and source.is_contiguous()):
            raise self._broken("a copy is of tensors of one form, without gaps", code="out_of_range")
        if nbytes := target.nbytes:
            queue = queue_of(target.device)
            self._driver.queue_copy(self._index, target.data_ptr(), source.data_ptr(), nbytes, queue)

    def fence(self) -> None:
        """Also of what torch_npu holds back: a kernel that the driver was not given yet may read what is to be
        unmapped. It hands over what it has for all devices."""
        if not self.failure:
            try:
                fence_torch(self.torch_device.format(index=self._index))
            except DeviceError as error:  # as where the driver cannot wait
                self._driver.fail(self._index, error.message)
        super().fence()

    @classmethod
    def importer_number(cls, index: int) -> int:
        """What the driver calls this process (aclrtDeviceGetBareTgid)."""
        return cls._of_this_process().own_number(index)

    def admit(self, importers: Sequence[int]) -> None:
        """The driver keeps a list for each handle: it is asked as each is exported, anew where that was before."""
        self._check_open()
        self._importers = (*importers,)  # another value, whatever the numbers: they may be of other processes

    def _admit_to(self, handle: Handle, importers: Sequence[int]) -> None:
        shared = handle.backing.shared
        assert shared is not None, "it has been exported"
        self._ask(self._driver.admit, [shared], importers)

    def _restore(self, nbytes: int, space: Space, place: int, key: int) -> Memory:
        text = f"{space}: ({place}, {nbytes}) cannot be taken over: only who made an NPU's memory can share it"
        raise self._broken(text, code="invalid_extent")

    def _export(self, handle: Handle) -> KeyToken:
        memory: Memory = handle.backing
        if memory.shared is None:
            memory.shared = self._ask(self._driver.export, memory.number)
        if self._importers and memory.admitted is not self._importers:
            self._ask(self._driver.admit, [memory.shared], self._importers)
            memory.admitted = self._importers
        return KeyToken(memory.shared, handle.nbytes)

    def _identity(self, token: Token) -> Hashable:
        assert isinstance(token, KeyToken), "import_ has looked"
        return token.key

    def _import(self, token: Token) -> tuple[Memory, bool]:
        assert isinstance(token, KeyToken), "import_ has looked"
        try:
            return Memory(self._ask(self._driver.import_, token.key)), True
        except DeviceError as error:
            if error.code != "driver_refused":
                raise
            text = f"what the token names cannot be imported: {error.message}"
            raise self._broken(text, code="invalid_token") from None
