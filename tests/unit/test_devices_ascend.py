"""The `npu` backend on the stand-in of its driver: every rule of the vendor's is broken once, and is one error of ours;
what the backend does of itself beyond the contract of all devices (test_devices_rules.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticmoe.common.devices import torch_devices
from elasticmoe.common.devices.ascend import (
    CALLS,
    IDENTITY_CALLS,
    NEWER_CALLS,
    REFUSALS,
    WORDS,
    AscendDevice,
    _AclDriver,
)
from elasticmoe.common.devices.base import ProcessRules
from elasticmoe.common.devices.driver import CopyPart
from elasticmoe.common.devices.factory import backend_of
from elasticmoe.common.devices.rules import KeyToken
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

MIB = 1 << 20
RULES = rules("ascend")


class Pair:
    """The drivers of two processes, of which the first exports and the second imports."""

    def __init__(self, folder: Path, *defines: str) -> None:
        self._folder, self._defines = folder, defines
        self.owner, self.user = self.process(), self.process()

    def process(self) -> _AclDriver:
        """One more process, with two devices."""
        driver = _AclDriver(standins.process("npu", self._folder, *self._defines).library)
        driver.open(0)
        driver.open(1)
        return driver

    def shared(self) -> int:
        """The number of a handle that the user may import."""
        key = self.owner.export(0, self.owner.create(0, PAGE))
        self.owner.admit(0, [key], [self.user.own_number(0)])
        return key


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setenv("STANDIN_BYTES", str(64 * MIB))
    with standins.memory(monkeypatch) as folder:
        yield Pair(folder)


def device_set_first(pair: Pair) -> None:
    in_a_new_thread(lambda: pair.owner.library.call("aclrtReserveMemAddress", None, PAGE, 0, None, 0))


def freed_unmapped(pair: Pair) -> None:
    pair.owner.release(0, mapped(pair.owner)[1])


def mapped_whole(pair: Pair) -> None:
    pair.owner.map(0, [(pair.owner.reserve(0, 4 * PAGE), PAGE, pair.owner.create(0, 2 * PAGE))])


def mapped_from_offset_0(pair: Pair) -> None:
    address, handle = pair.owner.reserve(0, PAGE), pair.owner.create(0, 2 * PAGE)
    pair.owner.library.call("aclrtMapMem", address, PAGE, PAGE, handle, 0)


def range_of_one_device(pair: Pair) -> None:
    address, _ = mapped(pair.owner)
    pair.owner.map(0, [(address + PAGE, PAGE, pair.owner.create(1, PAGE))])


def range_of_one_origin(pair: Pair) -> None:
    address, _ = mapped(pair.user)
    pair.user.map(0, [(address + PAGE, PAGE, pair.user.import_(0, pair.shared()))])


def unmapped_from_its_start(pair: Pair) -> None:
    pair.owner.unmap(0, mapped(pair.owner, pages=2)[0] + PAGE, PAGE)


def lost_device_stays_lost(pair: Pair) -> None:
    with pytest.raises(DeviceError):
        breaches.unmap_in_flight(pair)
    (src, _), (dst, _) = mapped(pair.owner), mapped(pair.owner)
    pair.owner.copy(0, [CopyPart(dst, src, PAGE, 0, 0)])


def exported_once(pair: Pair) -> None:
    handle = pair.owner.create(0, PAGE)
    pair.owner.export(0, handle)
    pair.owner.export(0, handle)


def exported_by_its_maker(pair: Pair) -> None:
    pair.user.export(0, pair.user.import_(0, pair.shared()))


def imported_once(pair: Pair) -> None:
    key = pair.shared()
    pair.user.import_(0, key)
    pair.user.import_(0, key)


def imported_elsewhere(pair: Pair) -> None:
    pair.owner.import_(0, pair.shared())


def imported_when_admitted(pair: Pair) -> None:
    pair.user.import_(0, pair.owner.export(0, pair.owner.create(0, PAGE)))


def admitted_after_its_start(pair: Pair) -> None:
    """The next process has the number of the one that was admitted."""
    key = pair.owner.export(0, pair.owner.create(0, PAGE))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STANDIN_TGID", "77")
        first = pair.process()
        pair.owner.admit(0, [key], [first.own_number(0)])
        second = pair.process()
    assert first.own_number(0) == second.own_number(0) == 77
    first.release(0, first.import_(0, key))
    second.import_(0, key)


def admitted_by_its_exporter(pair: Pair) -> None:
    pair.user.admit(0, [pair.shared()], [pair.user.own_number(0)])


def imported_while_it_is_there(pair: Pair) -> None:
    handle = pair.owner.create(0, PAGE)
    key = pair.owner.export(0, handle)
    pair.owner.admit(0, [key], [pair.user.own_number(0)])
    pair.owner.release(0, handle)
    pair.user.import_(0, key)


def peers_that_can_are_let_in(pair: Pair) -> None:
    """The driver's own calls: ours asks first."""
    pair.owner.own_number(0)  # sets the device
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STANDIN_NO_PEERS", "1-0")
        pair.owner.library.call("aclrtDeviceEnablePeerAccess", 1, 0)


def imported_by_peers_that_can(pair: Pair) -> None:
    key = pair.shared()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("STANDIN_NO_PEERS", "0-1")
        pair.user.import_(1, key)


def queued_aligned(pair: Pair) -> None:
    """The driver's own call: ours makes another one for such ends."""
    (src, _), (dst, _) = mapped(pair.owner), mapped(pair.owner)
    pair.owner.own_number(0)  # sets the device
    pair.owner.library.call("aclrtMemcpyAsync", dst + 32, 64, src, 64, 3, pair.owner._streams[0])


BREACHES: dict[str, Callable[[Pair], object]] = {
    "memory_of_the_device": breaches.more_memory_than_there_is,
    "mapped_granular": breaches.map_beside_a_granule,
    "mapped_in_a_range": breaches.map_beyond_the_range,
    "not_mapped_over_a_live_one": breaches.map_over_a_mapping,
    "unmapped_idle": breaches.unmap_in_flight,
    "freed_once": breaches.release_twice,
    "range_released_empty": breaches.give_back_a_range_in_use,
    "peers_are_let_in": breaches.copy_from_a_stranger,
    "device_exists": lambda pair: pair.owner.create(9, PAGE),
    "range_granular": lambda pair: pair.owner.reserve(0, PAGE + 4096),
    "range_at_most_128_gb": lambda pair: pair.owner.reserve(0, 128 * 10**9 // PAGE * PAGE + PAGE),
    "memory_granular": lambda pair: pair.owner.create(0, MIB),
}
for _breach in (
    *(device_set_first, freed_unmapped, mapped_whole),
    *(mapped_from_offset_0, range_of_one_device),
    *(range_of_one_origin, unmapped_from_its_start, lost_device_stays_lost, exported_once),
    *(exported_by_its_maker, imported_once, imported_elsewhere, imported_when_admitted, admitted_after_its_start),
    *(admitted_by_its_exporter, imported_while_it_is_there, peers_that_can_are_let_in, imported_by_peers_that_can),
    queued_aligned,
):
    BREACHES[_breach.__name__] = _breach


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["name"])
def test_a_rule_that_is_broken_is_one_clear_error(pair: Pair, rule: Rule) -> None:
    check_rule(rule, lambda: BREACHES[rule["name"]](pair), REFUSALS)


def test_every_rule_is_broken_and_has_its_source() -> None:
    check_complete(RULES, BREACHES)


def test_each_error_of_the_stand_in_is_listed() -> None:
    check_answers("ascend")


def test_calls_and_codes_are_what_the_vendor_declares() -> None:
    includes = vendor.headers(vendor.ASCEND)
    include = includes[1]
    calls = CALLS | NEWER_CALLS | IDENTITY_CALLS
    check_sizes("acl/acl_rt.h", includes, calls | WORDS)
    text = (include / "acl_rt.h").read_text()
    check_declared(text, "aclError", calls)
    assert "const char *aclGetRecentErrMsg();" in text
    codes = (include / "acl_base_rt.h").read_text() + (include / "error_codes/rt_error_codes.h").read_text()
    check_codes(codes, REFUSALS)


@pytest.mark.parametrize("define", ["STANDIN_V1", "STANDIN_V2"])
def test_calls_that_share_are_those_that_the_library_has(monkeypatch: pytest.MonkeyPatch, define: str) -> None:
    with standins.memory(monkeypatch) as folder:
        pair = Pair(folder, f"-D{define}")
        assert pair.owner.is_newer == (define != "STANDIN_V1")
        key = pair.shared()
        address = pair.user.reserve(0, PAGE)
        pair.user.map(0, [(address, PAGE, pair.user.import_(0, key))])
        pair.user.zero(0, address, PAGE)


@pytest.mark.parametrize("is_refused", [False, True])
def test_what_torch_holds_back_is_waited_for_before_anything_is_unmapped(
    monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    """The driver waits for nothing that it was not given. Where torch cannot wait, as of a device that has failed, the
    device has failed."""
    with standins.memory(monkeypatch) as folder:
        device = standins.process("npu", folder)("npu:0", PAGE, 8 * PAGE, rules=ProcessRules())
        range_, asked, driver = device.reserve(2 * PAGE), list[str](), device._driver
        device.map_many(range_, [(at, device.create(PAGE, "kv")) for at in (0, PAGE)], True)
        drain = driver.drain

        def wait(on: torch.device) -> None:
            asked.append(f"torch waits for {on}")
            if is_refused:
                raise RuntimeError("ACL stream synchronize failed\nmore")

        def drained(index: int) -> None:
            asked.append(f"the driver waits for {index}")
            drain(index)

        monkeypatch.setattr(torch.cpu, "synchronize", wait)
        monkeypatch.setattr(driver, "drain", drained)
        device.open_torch()
        device.fence()
        assert asked == ["the driver waits for 0"], "there is no queue of torch's before a CPU"
        monkeypatch.setitem(torch_devices._QUEUES, "cpu", "none")
        device.unmap(range_, 0)
        if is_refused:
            assert asked[1:] == ["torch waits for cpu"]
            assert device.failure == "torch cannot wait for cpu: ACL stream synchronize failed"
            device.unmap(range_, PAGE)  # by name alone
        else:
            assert asked[1:] == ["torch waits for cpu", "the driver waits for 0"]
        device.close()


def test_who_comes_later_is_admitted_to_what_is_exported_anew_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with standins.memory(monkeypatch) as folder:
        owner, user = (standins.process("npu", folder)("npu:0", PAGE, 8 * PAGE, rules=ProcessRules()) for _ in range(2))
        first, library = owner.create(PAGE, "kv"), standins.loaded(type(owner))
        before = owner.export(first)
        with pytest.raises(DeviceError) as caught:
            user.import_(before)
        assert caught.value.code == "not_admitted"
        calls = library.standin_calls()
        owner.admit([user.importer_number(0)])
        assert library.standin_calls() == calls, "whoever has thousands of handles asks for each when it hands it over"
        again, after = owner.export(first), owner.export(owner.create(PAGE, "kv"))
        assert again == before
        assert len({user.import_(again), user.import_(after)}) == 2
        calls = library.standin_calls()
        owner.export(first)
        assert library.standin_calls() == calls
        owner.close()
        user.close()


def test_a_handle_of_another_size_is_refused_when_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver tells no size of what was imported."""
    with standins.memory(monkeypatch) as folder:
        owner, user = (standins.process("npu", folder)("npu:0", PAGE, 8 * PAGE, rules=ProcessRules()) for _ in range(2))
        owner.admit([user.importer_number(0)])
        first, second = (owner.export(owner.create(PAGE, "kv")) for _ in range(2))
        assert isinstance(second, KeyToken)
        parts = [(0, user.import_(first)), (PAGE, user.import_(second._replace(nbytes=2 * PAGE)))]
        range_ = user.reserve(4 * PAGE)
        with pytest.raises(DeviceError, match="aclrtMapMem answers 107000") as caught:
            user.map_many(range_, parts, True)
        assert (caught.value.code, range_.starts) == ("driver_refused", [])
        user.map_many(range_, parts[:1], True)  # the first part was undone
        owner.close()
        user.close()


def test_memory_is_zeroed_copied_across_devices_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with standins.memory(monkeypatch) as folder:
        kind, rules = standins.process("npu", folder), ProcessRules()
        here, there = (kind(f"npu:{index}", PAGE, 8 * PAGE, rules=rules) for index in range(2))
        ranges = [device.reserve(PAGE) for device in (here, there)]
        for device, range_ in zip((here, there), ranges, strict=True):
            device.map(range_, 0, device.create(PAGE, "kv"), True)
            assert device.read_bytes(range_.base, PAGE) == bytes(PAGE)
        here.write_bytes(ranges[0].base, b"abc")
        completion = there.copy_async([(ranges[1].base, ranges[0].base, 3)])
        assert not completion.is_done()
        here.unmap(ranges[0], 0)  # waits for the other device, too
        assert completion.is_done()
        assert there.read_bytes(ranges[1].base, 4) == b"abc\0"
        library = standins.loaded(kind)
        assert [library.standin_used(index) for index in range(2)] == [PAGE, PAGE]
        here.close()
        there.close()
        assert [library.standin_used(index) for index in range(2)] == [0, 0]


@pytest.mark.parametrize(("to", "of"), [(0, 32), (32, 0), (33, 31), (64, 128)])
def test_ends_that_no_copy_may_be_queued_for_are_copied_all_the_same(
    monkeypatch: pytest.MonkeyPatch, to: int, of: int
) -> None:
    """Within a device, and from another one."""
    with standins.memory(monkeypatch) as folder:
        kind, rules = standins.process("npu", folder), ProcessRules()
        devices = [kind(f"npu:{index}", PAGE, 8 * PAGE, rules=rules) for index in range(2)]
        ranges = [device.reserve(2 * PAGE) for device in devices]
        for device, range_ in zip(devices, ranges, strict=True):
            device.map(range_, 0, device.create(PAGE, "kv"), True)
        source, target = ranges[1].base + of, ranges[0].base + to
        devices[1].write_bytes(source, b"there")
        copied = devices[0].copy_async([(target, source, 5), (ranges[0].base + PAGE // 2, source, 5)])
        copied.wait()
        devices[0].copy(ranges[0].base + 4096 + to, target, 5)
        found = [devices[0].read_bytes(ranges[0].base + at, 6) for at in (to, PAGE // 2, 4096 + to)]
        assert found == [b"there\0"] * 3
        for device in devices:
            device.close()


def test_the_driver_says_what_is_free_and_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_BYTES", str(64 * MIB))
    with standins.memory(monkeypatch) as folder:
        here, there = standins.process("npu", folder), standins.process("npu", folder)("npu:1", PAGE, 8 * PAGE)
        there.create(PAGE, "kv")
        assert [here.memory(index) for index in (0, 1)] == [(64 * MIB, 64 * MIB), (64 * MIB - PAGE, 64 * MIB)]
        there.close()


def test_a_driver_that_is_missing_and_a_device_that_is_not_there_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_of("npu") is AscendDevice
    missing = standins.device_class("npu", Path("/nowhere/libascendcl.so"))
    with pytest.raises(DeviceError, match=r"libascendcl\.so cannot be loaded: install CANN") as caught:
        missing("npu:0", PAGE, PAGE)
    assert caught.value.code == "no_driver"
    monkeypatch.setenv("STANDIN_DEVICES", "2")
    with standins.memory(monkeypatch) as folder:
        kind = standins.process("npu", folder)
        with pytest.raises(DeviceError, match="no npu:2: the driver shows 2 devices") as caught:
            kind("npu:2", PAGE, PAGE, rules=ProcessRules())
        assert caught.value.code == "no_device"


def test_a_library_that_lacks_a_call_is_too_old() -> None:
    old: Any = standins.device_class("npu", Path("libc.so.6"))
    with pytest.raises(DeviceError, match=r"libc\.so\.6 is too old: it has no aclInit"):
        old("npu:0", PAGE, PAGE)
