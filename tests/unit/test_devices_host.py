"""The host backend: budgets, real pages, hand-over between an owner and a user, restoration, tensors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from elasticmoe.common.devices.base import FdToken, Handle, ProcessRules, Range, Space
from elasticmoe.common.devices.host import HostDevice
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit
from elasticmoe.common.wording import size
from elasticmoe.native import host

PAGE = 4096


def pages_of(device: HostDevice) -> int:
    """Bytes that the device's files really take."""
    return sum(os.fstat(fd).st_blocks * 512 for fd in device.descriptors().values())


@pytest.fixture
def owner() -> Iterator[HostDevice]:
    device = HostDevice("host:0", PAGE, 16 * PAGE, rules=ProcessRules())
    yield device
    device.close()


@pytest.fixture
def user() -> Iterator[HostDevice]:
    device = HostDevice("host:0", PAGE, rules=ProcessRules())
    yield device
    device.close()


def mapped(device: HostDevice, handle: Handle, writable: bool = True) -> Range:
    range_ = device.reserve(handle.nbytes)
    device.map(range_, 0, handle, writable)
    return range_


def test_pages_are_real_at_creation_and_gone_after_release(owner: HostDevice) -> None:
    spaces: list[Space] = ["weights", "kv"]
    handles = [owner.create(2 * PAGE, space) for space in spaces]
    assert pages_of(owner) == 4 * PAGE
    assert owner.used == {"weights": 2 * PAGE, "kv": 2 * PAGE, "mailbox": 0}
    assert owner.free == 12 * PAGE
    for handle in handles:
        owner.release(handle)
    assert pages_of(owner) == 0
    assert owner.free == 16 * PAGE
    assert owner.check_integrity() == []


def test_creating_beyond_the_budget_gives_the_figures_and_changes_nothing(owner: HostDevice) -> None:
    owner.create(10 * PAGE, "weights")
    with pytest.raises(
        DoesNotFit, match=f"host:0: {size(7 * PAGE)} do not fit: {size(10 * PAGE)} of {size(16 * PAGE)} are in use"
    ):
        owner.create(7 * PAGE, "kv")
    assert owner.free == 6 * PAGE
    owner.create(6 * PAGE, "kv")
    assert owner.free == 0


@pytest.mark.parametrize("failing", range(4))
def test_any_failing_allocation_is_a_refusal_that_leaks_nothing(
    owner: HostDevice, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = host.allocate, iter(range(100))

    def allocate(fd: int, offset: int, nbytes: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        real(fd, offset, nbytes)

    monkeypatch.setattr(host, "allocate", allocate)
    for _ in range(failing):
        owner.create(2 * PAGE, "weights")
    with pytest.raises(DoesNotFit, match=r"the machine has no memory for 8\.00 KiB"):
        owner.create(2 * PAGE, "weights")
    assert pages_of(owner) == owner.used["weights"] == failing * 2 * PAGE
    assert owner.check_integrity() == []


def test_want_of_memory_for_many_bytes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = HostDevice("host:0", PAGE, 256 * PAGE, rules=ProcessRules())
    range_ = owner.reserve(256 * PAGE)
    owner.map(range_, 0, owner.create(256 * PAGE, "weights"), True)
    real, calls = os.pwrite, iter(range(100))

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if next(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[:PAGE], offset)  # the kernel may write less than it was asked for

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DoesNotFit, match=r"the machine has no memory for 1\.00 MiB"):
        owner.write_bytes(range_.base, b"x" * 256 * PAGE)
    assert owner.read_bytes(range_.base, PAGE + 1) == b"x" * PAGE + b"\0"
    owner.close()


def test_fragmented_offsets_do_not_refuse_what_the_budget_allows(owner: HostDevice) -> None:
    singles = [owner.create(PAGE, "weights") for _ in range(16)]
    for handle in singles[::2]:
        owner.release(handle)
    assert owner.create(8 * PAGE, "weights").nbytes == 8 * PAGE
    assert owner.check_integrity() == []


def test_released_memory_is_zero_when_it_is_created_again(owner: HostDevice) -> None:
    handle = owner.create(PAGE, "kv")
    range_ = mapped(owner, handle)
    owner.write_bytes(range_.base, b"\xff" * PAGE)
    owner.unmap(range_, 0)
    owner.release(handle)
    again = owner.create(PAGE, "kv")
    assert again.place == 0
    assert owner.read_bytes(mapped(owner, again).base, PAGE) == bytes(PAGE)


def test_a_user_sees_what_the_owner_writes_and_keeps_it_after_the_owner(owner: HostDevice, user: HostDevice) -> None:
    owner.create(PAGE, "weights")  # so that the offset is not 0
    handle = owner.create(2 * PAGE, "weights")
    token = owner.export(handle)
    assert token.offset == PAGE
    fd = os.dup(token.fd)
    imported = user.import_(FdToken(fd, token.offset, token.nbytes))
    os.close(fd)  # the device keeps a duplicate of its own
    seen = mapped(user, imported, writable=False)
    owner.write_bytes(mapped(owner, handle).base, b"\x5a" * 2 * PAGE)
    assert user.read_bytes(seen.base, 2 * PAGE) == b"\x5a" * 2 * PAGE
    owner.close()
    assert user.read_bytes(seen.base, 2 * PAGE) == b"\x5a" * 2 * PAGE


@pytest.mark.parametrize(("space", "writable"), [("weights", False), ("kv", True)])
def test_weights_are_exported_read_only(owner: HostDevice, user: HostDevice, space: Space, writable: bool) -> None:
    handle = user.import_(owner.export(owner.create(PAGE, space)))
    assert handle.writable is writable


def test_the_kernel_refuses_writable_mappings_of_weights(owner: HostDevice) -> None:
    token = owner.export(owner.create(PAGE, "weights"))
    reservation = host.Reservation(PAGE)
    with pytest.raises(OSError, match="denied"):
        reservation.map(0, token.fd, token.offset, token.nbytes, True)
    reservation.close()


def test_a_successor_restores_handles_and_trims_what_was_not_recorded(owner: HostDevice) -> None:
    kept = owner.create(2 * PAGE, "weights")
    owner.create(3 * PAGE, "weights")  # never recorded
    owner.create(PAGE, "kv")
    owner.write_bytes(mapped(owner, kept).base, b"abc")
    descriptors = {name: os.dup(fd) for name, fd in owner.descriptors().items()}
    successor = HostDevice("host:0", PAGE, 16 * PAGE, descriptors=descriptors, rules=ProcessRules())
    handle = successor.restore("weights", 0, 2 * PAGE)
    successor.trim()
    assert successor.read_bytes(mapped(successor, handle).base, 3) == b"abc"
    assert successor.used == {"weights": 2 * PAGE, "kv": 0, "mailbox": 0}
    assert pages_of(successor) == 2 * PAGE
    assert successor.check_integrity() == []
    for offset, nbytes in [(0, PAGE), (PAGE, 2 * PAGE), (100 * PAGE, PAGE), (PAGE // 2, PAGE)]:
        with pytest.raises(DeviceError) as caught:
            successor.restore("weights", offset, nbytes)
        assert caught.value.code == "invalid_extent"
    successor.close()


def test_integrity_finds_lost_pages_and_wrong_counts(owner: HostDevice) -> None:
    owner.create(2 * PAGE, "weights")
    owner.used["weights"] += PAGE
    host.punch_hole(owner.descriptors()["weights"], 0, PAGE)
    findings = owner.check_integrity()
    assert findings == [
        f"host:0.weights: {3 * PAGE} bytes are counted, {2 * PAGE} are owned",
        f"host:0.weights: {PAGE} bytes are present, {2 * PAGE} are owned",
    ]


def test_copy_moves_bytes_between_devices() -> None:
    rules = ProcessRules()
    devices = [HostDevice(f"host:{i}", PAGE, PAGE, rules=rules) for i in range(2)]
    ranges = [mapped(device, device.create(PAGE, "weights")) for device in devices]
    devices[0].write_bytes(ranges[0].base, b"page")
    devices[1].copy(ranges[1].base, ranges[0].base, PAGE)
    assert devices[1].read_bytes(ranges[1].base, 4) == b"page"
    for device in devices:
        device.close()


def test_a_tensor_is_the_memory_itself(owner: HostDevice) -> None:
    range_ = mapped(owner, owner.create(PAGE, "weights"))
    tensor = owner.wrap(range_, 256, (3, 5), None, "float32")
    tensor.copy_(torch.arange(15, dtype=torch.float32).reshape(3, 5))
    again = owner.wrap(range_, 256, (5, 3), (1, 5), "float32")
    assert torch.equal(again, tensor.T)
    assert tensor.data_ptr() == range_.address(256)
    half = owner.wrap(range_, 0, (4,), None, "bfloat16")
    assert half.dtype == torch.bfloat16
    assert owner.wrap(range_, PAGE, (0, 4), None, "float32").numel() == 0


def test_slots_may_be_empty_under_a_tensor(owner: HostDevice) -> None:
    range_ = owner.reserve(4 * PAGE)
    for slot in (0, 2):
        owner.map(range_, slot * PAGE, owner.create(PAGE, "weights"), True)
    slots = owner.wrap(range_, 0, (4, 8), (PAGE // 4, 1), "float32")
    slots[2].fill_(3.0)
    assert slots[0].sum() == 0.0
    assert slots[2].sum() == 24.0


def test_what_the_system_does_not_unmap_is_an_error_of_the_device(owner: HostDevice) -> None:
    range_ = mapped(owner, owner.create(PAGE, "kv"))
    backing = range_.backing

    def fail(offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    range_.backing = SimpleNamespace(unmap=fail)
    with pytest.raises(DeviceError, match="host:0: 4096 bytes cannot be unmapped: Cannot allocate memory"):
        owner.unmap(range_, 0)
    range_.backing = backing
    owner.unmap(range_, 0)


@pytest.mark.parametrize("granularity", [0, 1, 2048, 4096 * 3])
def test_granularity_is_a_power_of_two_of_pages(granularity: int) -> None:
    with pytest.raises(DeviceError) as caught:
        HostDevice("host:0", granularity, PAGE, rules=ProcessRules())
    assert caught.value.code == "bad_granularity"


def test_nothing_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    owner = HostDevice("host:0", PAGE, 4 * PAGE, rules=ProcessRules())
    owner.prepare()
    user = HostDevice("host:0", PAGE, rules=ProcessRules())
    handles = [user.import_(owner.export(owner.create(PAGE, "weights"))) for _ in range(3)]
    user.release(handles[0])
    owner.close()
    user.release(handles[1])
    user.release(handles[2])
    assert set(os.listdir("/proc/self/fd")) == before
    user.close()
    user.close()
