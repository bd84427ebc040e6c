"""The `cuda` backend on the stand-in of its driver: every rule of the vendor's is broken once, and is one error of
ours; what the backend does of itself beyond the contract of all devices (test_devices_rules.py)."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elasticmoe.common.devices.base import Device, FdToken, Handle, ProcessRules
from elasticmoe.common.devices.cuda import (
    CALLS,
    NEWER_CALLS,
    REFUSALS,
    WORDS,
    CudaDevice,
    _Allocation,
    _CudaDriver,
    _CudaLocation,
)
from elasticmoe.common.devices.factory import backend_of
from elasticmoe.common.protocol.errors import DeviceError
from tests.devices import breaches, standins, vendor
from tests.devices.breaches import (
    PAGE,
    Rule,
    check_answers,
    check_codes,
    check_complete,
    check_declared,
    check_rule,
    check_sizes,
    in_a_new_thread,
    mapped,
    rules,
)

RULES = rules("cuda")


class Pair:
    """The drivers of two processes, with two devices each."""

    def __init__(self, folder: Path) -> None:
        self.owner, self.user = (_CudaDriver(standins.process("cuda", folder).library) for _ in range(2))
        for driver in (self.owner, self.user):
            driver.open(0)
            driver.open(1)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("STANDIN_BYTES", str(64 << 20))
    with standins.memory(monkeypatch) as made:
        yield made


@pytest.fixture
def pair(folder: Path) -> Pair:
    return Pair(folder)


def device(folder: Path, index: int = 0, rules: ProcessRules | None = None) -> Device:
    """Of one more process."""
    return standins.process("cuda", folder)(f"cuda:{index}", PAGE, 8 * PAGE, rules=rules or ProcessRules())


def initialized_first(pair: Pair) -> None:
    """The library as it is before anybody has opened it."""
    folder = Path(pair.owner.library.path).parent
    pair.owner.library.refuse(
        "cuDeviceGetCount", ctypes.CDLL(standins.process("cuda", folder).library).cuDeviceGetCount(ctypes.c_int())
    )


def context_set_first(pair: Pair) -> None:
    address, _ = mapped(pair.owner)
    in_a_new_thread(lambda: pair.owner.library.call("cuMemsetD8_v2", address, 0, PAGE))


def mapped_from_offset_0(pair: Pair) -> None:
    pair.owner.library.call("cuMemMap", pair.owner.reserve(0, PAGE), PAGE, PAGE, pair.owner.create(0, 2 * PAGE), 0)


def mapped_whole(pair: Pair) -> None:
    pair.owner.map(0, [(pair.owner.reserve(0, 4 * PAGE), 2 * PAGE, pair.owner.create(0, PAGE))])


def access_to_whole_mappings(pair: Pair) -> None:
    pair.owner.allow(0, mapped(pair.owner)[0], 2 * PAGE, True)


def accessible_once_it_is_set(pair: Pair) -> None:
    address = pair.owner.reserve(0, PAGE)
    pair.owner.map(0, [(address, PAGE, pair.owner.create(0, PAGE))])
    pair.owner.to_host(0, ctypes.addressof(ctypes.create_string_buffer(8)), address, 8)


def read_only_is_not_written(pair: Pair) -> None:
    address, _ = mapped(pair.owner)
    pair.owner.allow(0, address, PAGE, False)
    source = ctypes.create_string_buffer(8)
    pair.owner.to_device(0, address, ctypes.addressof(source), 8)


def unmapped_whole(pair: Pair) -> None:
    pair.owner.unmap(0, mapped(pair.owner, pages=2)[0], PAGE)


def lost_context_stays_lost(pair: Pair) -> None:
    with pytest.raises(DeviceError):
        breaches.unmap_in_flight(pair)
    pair.owner.drain(0)


def accessible_to_peers_that_can(pair: Pair) -> None:
    """What the second device has is mapped for the first one."""
    address = pair.owner.reserve(0, PAGE)
    pair.owner.map(0, [(address, PAGE, pair.owner.create(1, PAGE))])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STANDIN_NO_PEERS", "2-3,0-1")
        pair.owner.allow(0, address, PAGE, True)


def exported_if_made_for_it(pair: Pair) -> None:
    handle = ctypes.c_ulonglong()
    private = _Allocation(1, 0, _CudaLocation(1, 0))
    pair.owner.library.call("cuMemCreate", ctypes.byref(handle), PAGE, ctypes.byref(private), 0)
    pair.owner.export(handle.value)


def imported_from_its_descriptor(pair: Pair) -> None:
    with open(os.devnull, "rb") as file:
        pair.user.import_(file.fileno())


BREACHES: dict[str, Callable[[Pair], object]] = {
    "memory_of_the_device": breaches.more_memory_than_there_is,
    "mapped_granular": breaches.map_beside_a_granule,
    "mapped_in_a_range": breaches.map_beyond_the_range,
    "not_mapped_over_a_live_one": breaches.map_over_a_mapping,
    "unmapped_idle": breaches.unmap_in_flight,
    "released_once": breaches.release_twice,
    "range_freed_empty": breaches.give_back_a_range_in_use,
    "peers_by_their_contexts": breaches.copy_from_a_stranger,
    "device_exists": lambda pair: pair.owner.create(9, PAGE),
    "range_of_whole_pages": lambda pair: pair.owner.reserve(0, 4095),
    "range_freed_whole": lambda pair: pair.owner.unreserve(0, pair.owner.reserve(0, 2 * PAGE), PAGE),
    "memory_granular": lambda pair: pair.owner.create(0, PAGE // 2),
}
for _breach in (
    *(initialized_first, context_set_first, mapped_whole),
    *(mapped_from_offset_0, access_to_whole_mappings),
    *(accessible_once_it_is_set, read_only_is_not_written, unmapped_whole, lost_context_stays_lost),
    *(accessible_to_peers_that_can, exported_if_made_for_it, imported_from_its_descriptor),
):
    BREACHES[_breach.__name__] = _breach


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["name"])
def test_a_broken_rule_is_one_clear_error(pair: Pair, rule: Rule) -> None:
    check_rule(rule, lambda: BREACHES[rule["name"]](pair), REFUSALS)


def test_every_rule_of_the_file_is_broken() -> None:
    check_complete(RULES, BREACHES)


def test_each_error_of_the_stand_in_is_listed() -> None:
    check_answers("cuda")


def test_calls_and_codes_are_those_of_the_header() -> None:
    (include,) = vendor.headers(vendor.CUDA)
    calls = CALLS | NEWER_CALLS | WORDS
    check_sizes("cuda.h", [include], calls)
    text = (include / "cuda.h").read_text()
    check_declared(text, "CUresult", {name.removesuffix("_v2"): types for name, types in calls.items()})
    check_codes(text, REFUSALS)


# They come before there is a context, or make or set one; their texts list its want beside all else.
_WITHOUT_CONTEXT = {"cuDeviceGetCount", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"}


def test_the_stand_in_asks_for_a_context_where_the_header_does() -> None:
    (include,) = vendor.headers(vendor.CUDA)
    text = (include / "cuda.h").read_text()
    found = re.findall(
        r"CUresult (cu\w+)\([^{]*\) \{\n  ENTER\((true|false)\)", (standins.SOURCE / "cuda.cpp").read_text()
    )
    assert len(found) > 25
    for name, needs in found:
        declared = re.search(rf"/\*\*((?:(?!\*/).)*)\*/\s*CUresult\s+CUDAAPI\s+{name}\s*\(", text, re.DOTALL)
        assert declared is not None, name
        listed = "CUDA_ERROR_INVALID_CONTEXT" in declared[1] and name not in _WITHOUT_CONTEXT
        assert (needs == "true") == listed, name


def test_descriptors_tell_handles_apart_by_their_keys(folder: Path) -> None:
    """A driver's descriptors are all of one file."""
    owner, user = device(folder), device(folder)
    tokens = [owner.export(owner.create(PAGE, "kv")) for _ in range(2)]
    handles = [user.import_(token) for token in tokens]
    for one, handle in enumerate(handles):
        assert [user.is_named(handle, token) for token in tokens] == [one == 0, one == 1]
    owner.close()
    user.close()


def test_weights_are_read_only_to_the_device_where_the_driver_can(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for narrows in (True, False):
        owner, user = device(folder), device(folder)
        if not narrows:
            monkeypatch.setenv("STANDIN_NO_READ_ONLY", "1")
        range_ = user.reserve(PAGE)
        user.map(range_, 0, user.import_(owner.export(owner.create(PAGE, "weights"))), False)
        assert user.read_bytes(range_.base, 8) == bytes(8)
        permissions = next(
            line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if f"{range_.base:x}-" in line
        )
        assert permissions == ("r--s" if narrows else "rw-s")
        owner.close()
        user.close()


def test_a_copy_across_devices_is_done_later_and_unmapping_waits_for_it(folder: Path) -> None:
    rules, kind = ProcessRules(), standins.process("cuda", folder)
    here, there = (kind(f"cuda:{index}", PAGE, 8 * PAGE, rules=rules) for index in range(2))
    ranges = [made.reserve(PAGE) for made in (here, there)]
    for made, range_ in zip((here, there), ranges, strict=True):
        made.map(range_, 0, made.create(PAGE, "kv"), True)
    here.write_bytes(ranges[0].base, b"abc")
    completion = there.copy_async([(ranges[1].base, ranges[0].base, 3)])
    assert not completion.is_done()
    here.unmap(ranges[0], 0)
    assert completion.is_done()
    assert there.read_bytes(ranges[1].base, 4) == b"abc\0"
    here.close()
    there.close()


def test_memory_outlives_its_owner_by_its_descriptor(folder: Path) -> None:
    owner = device(folder)
    kept = owner.create(PAGE, "weights")
    descriptors = {name: os.dup(fd) for name, fd in owner.descriptors().items()}
    token = owner.export(kept)
    assert isinstance(token, FdToken)
    place, key = kept.place, kept.key
    owner.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(token.fd)
    successor = standins.process("cuda", folder)("cuda:0", PAGE, 8 * PAGE, descriptors=descriptors)
    again = successor.restore("weights", place, PAGE, key)
    assert successor.read_bytes(_mapped(successor, again), PAGE) == bytes(PAGE)
    successor.close()
    assert standins.loaded(standins.process("cuda", folder)).standin_used(0) == 0


def _mapped(made: Device, handle: Handle) -> int:
    range_ = made.reserve(PAGE)
    made.map(range_, 0, handle, True)
    return range_.base


def test_the_driver_says_what_is_free_and_what_there_is(folder: Path) -> None:
    here, there = standins.process("cuda", folder), device(folder, 1)
    there.create(PAGE, "kv")
    assert [here.memory(index) for index in (0, 1)] == [(64 << 20, 64 << 20), ((64 << 20) - PAGE, 64 << 20)]
    there.close()
    with pytest.raises(DeviceError, match="no cuda:7: the driver shows 4 devices"):
        here.memory(7)


def test_what_is_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_of("cuda") is CudaDevice
    missing = standins.device_class("cuda", folder / "libcuda.so.1")
    with pytest.raises(DeviceError, match=r"libcuda\.so\.1 cannot be loaded: install NVIDIA's driver") as caught:
        missing("cuda:0", PAGE, PAGE)
    assert caught.value.code == "no_driver"
    with pytest.raises(DeviceError, match="no cuda:7: the driver shows 4 devices") as caught:
        device(folder, 7)
    assert caught.value.code == "no_device"
    monkeypatch.setenv("STANDIN_NO_SHARING", "1")
    with pytest.raises(DeviceError, match="cuda:0 has no virtual memory management") as caught:
        device(folder)
    assert caught.value.code == "no_device"
