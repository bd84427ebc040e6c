"""A device whose driver says that it is lost: the process uses it no more, and goes on with its others. On the
stand-ins, where a test takes a device away (`standins.lose`)."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from elasticmoe.common.devices import ascend, cuda
from elasticmoe.common.devices.accelerator import AcceleratorDevice
from elasticmoe.common.devices.base import Device, Handle, ProcessRules, Range
from elasticmoe.common.devices.driver import CopyPart, Meaning
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit, ElasticMoEError
from elasticmoe.services.worker.hmm import memory as memory_module
from elasticmoe.services.worker.hmm.memory import RankMemory
from tests.devices import standins, vendor
from tests.devices.breaches import check_codes, mapped
from tests.unit.test_rank_memory import SLOT, Owner

PAGE = standins.GRANULARITY
LOST = {"npu": "507010, ACL_ERROR_RT_LOST_HEARTBEAT", "cuda": "709, "}


class Mapped:
    """A device of a process, with a page that is mapped."""

    def __init__(self, device: AcceleratorDevice) -> None:
        self.device = device
        self.handle: Handle = device.create(PAGE, "kv")
        self.range: Range = device.reserve(2 * PAGE)
        device.map(self.range, 0, self.handle, True)

    def give_back(self) -> None:
        """As the HMM does."""
        self.device.unmap(self.range, 0)
        self.device.retire(self.handle)
        self.device.reclaim(self.handle, 0, PAGE)
        self.device.release(self.handle)
        self.device.unreserve(self.range)


@pytest.fixture
def pair(kind: str, folder: Path) -> Iterator[tuple[Mapped, Mapped]]:
    """Two devices of one process."""
    process, rules = standins.process(kind, folder), ProcessRules()
    one, other = (Mapped(process(f"{kind}:{index}", PAGE, 8 * PAGE, rules=rules)) for index in range(2))
    yield one, other
    one.device.close()
    other.device.close()


def refuses(act: Callable[[], object], kind: str) -> None:
    with pytest.raises(DeviceError) as caught:
        act()
    assert caught.value.code == "driver_failed"
    assert LOST[kind] in caught.value.message


def test_what_a_lost_device_has_is_given_back_by_name_and_the_others_go_on(
    kind: str, folder: Path, pair: tuple[Mapped, Mapped]
) -> None:
    fine, gone = pair
    fine.device.write_bytes(fine.range.base, b"abc")
    standins.lose(folder, 1)
    assert (fine.device.failure, gone.device.failure) == ("", "")  # nobody has asked about it
    fine.give_back()  # which waits for all devices
    assert fine.device.failure == ""
    assert LOST[kind] in gone.device.failure
    assert standins.used(kind, folder)[0] == 0
    gone.give_back()
    for device in (fine.device, gone.device):
        assert (device.free, device.pages, device.check_integrity()) == (8 * PAGE, 0, [])
    again = Mapped(fine.device)
    fine.device.write_bytes(again.range.base, b"abc")
    assert fine.device.read_bytes(again.range.base, 3) == b"abc"
    refuses(lambda: gone.device.create(PAGE, "kv"), kind)
    assert gone.device.free == 8 * PAGE
    (folder / "lost.1").unlink()
    refuses(lambda: gone.device.reserve(PAGE), kind)  # it would have other memory than this process knows


@pytest.mark.parametrize(
    "error",
    [
        DeviceError("answers 507899", code="driver_refused"),
        DeviceError("answers 207004", code="no_device"),
        DoesNotFit("answers 207001"),
    ],
)
def test_a_device_that_cannot_be_waited_for_has_failed_whatever_its_driver_answers(
    kind: str, folder: Path, pair: tuple[Mapped, Mapped], monkeypatch: pytest.MonkeyPatch, error: ElasticMoEError
) -> None:
    fine, gone = pair
    drain = fine.device._driver.drain

    def refuse(index: int) -> None:
        if index == 1:
            raise error
        drain(index)

    monkeypatch.setattr(fine.device._driver, "drain", refuse)
    fine.give_back()
    assert (fine.device.failure, gone.device.failure) == ("", error.message)
    assert standins.used(kind, folder)[0] == 0
    gone.give_back()
    assert (fine.device.free, gone.device.free) == (8 * PAGE, 8 * PAGE)


def test_a_rank_ends_as_it_loses_its_device_and_does_not_say_that_it_has_unmapped_anything(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has all of it until it ends: the HMM would give the room to others before."""
    owner, user = (standins.process(kind, folder) for _ in range(2))
    hmm = Owner(owner(f"{kind}:0", PAGE, 256 << 20, rules=ProcessRules()))
    monkeypatch.setattr(memory_module, "open_device", partial(user, rules=ProcessRules()))
    hmm.device.admit([user.importer_number(0)])
    seat, (reply, fds) = hmm.seat([], 2), hmm.reply()
    handed = [(hmm.shared, hmm.shared_fds), (seat, hmm.fds)]
    memory = RankMemory(reply, fds, f"{kind}:0", SLOT, handed)
    hmm.hand(memory, hmm.seat([], 1))
    standins.lose(folder, 0)
    refuses(lambda: memory.advance(lambda _: True), kind)
    assert memory.revision == seat.revision
    (folder / "lost.0").unlink()
    memory.close()
    hmm.device.close()


def test_a_device_that_has_failed_is_the_hardware_that_it_was(folder: Path, pair: tuple[Mapped, Mapped]) -> None:
    """A rank that goes on there hears it when it resumes."""
    _, gone = pair
    before = gone.device.identity
    standins.lose(folder, 1)
    gone.give_back()
    assert gone.device.failure
    assert gone.device.identity == before != ""


def test_nothing_is_copied_from_a_device_that_has_failed(kind: str, folder: Path, pair: tuple[Mapped, Mapped]) -> None:
    """It could cost the process the device that copies."""
    fine, gone = pair
    standins.lose(folder, 1)
    refuses(lambda: gone.device.read_bytes(gone.range.base, 8), kind)
    for target, source in ((fine, gone), (gone, fine)):
        copy = (target.range.base, source.range.base, 8)
        refuses(lambda target=target, copy=copy: target.device.copy(*copy), kind)  # type: ignore[misc]
    assert fine.device.failure == ""


def test_a_copy_that_a_lost_device_owes_ends_with_its_error(
    kind: str, folder: Path, pair: tuple[Mapped, Mapped]
) -> None:
    fine, gone = pair
    owed = gone.device.copy_async([(gone.range.base + PAGE // 2, gone.range.base, 8)])
    standins.lose(folder, 1)
    refuses(owed.is_done, kind)
    refuses(owed.wait, kind)
    fine.device.fence()


def test_a_close_gives_back_what_other_devices_have(kind: str, folder: Path, pair: tuple[Mapped, Mapped]) -> None:
    standins.lose(folder, 1)
    for one in pair:
        one.device.close()
    assert standins.used(kind, folder)[0] == 0


def test_a_close_gives_back_the_rest_where_the_driver_refuses_a_part(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = standins.process(kind, folder)(f"{kind}:0", PAGE, 8 * PAGE, rules=ProcessRules())
    kept, *others = (Mapped(device) for _ in range(3))
    unmap = device._driver.unmap

    def refuse(index: int, address: int, nbytes: int) -> None:
        if address == kept.range.base:
            raise DeviceError("no more mappings", code="driver_refused")
        unmap(index, address, nbytes)

    with monkeypatch.context() as patched:
        patched.setattr(device._driver, "unmap", refuse)
        with pytest.raises(DeviceError):
            device.close()
    assert standins.used(kind, folder)[0] == PAGE
    device.close()  # is over
    assert not any(one.range.is_live for one in (kept, *others))


def test_a_device_that_cannot_be_opened_is_one_in_name_for_who_gives_it_up(kind: str, folder: Path) -> None:
    process, rules = standins.process(kind, folder), ProcessRules()
    absent = f"{kind}:7"
    for act in (lambda: process.memory(7), lambda: process(absent, PAGE, rules=rules)):  # the second as a rank
        with pytest.raises(DeviceError, match=f"there is no {absent}") as caught:
            act()
        assert caught.value.code == "no_device"
    process.give_up(7, caught.value.message)
    made: Device = process(absent, PAGE, 8 * PAGE, rules=rules)
    made.trim()
    assert (made.failure, made.free, made.check_integrity()) == (caught.value.message, 8 * PAGE, [])
    assert made.identity == "", "which is not compared"
    with pytest.raises(DeviceError, match=f"^{absent} cannot be used: there is no {absent}"):
        made.create(PAGE, "kv")
    other = Mapped(process(f"{kind}:0", PAGE, 8 * PAGE, rules=rules))
    other.give_back()
    for device in (made, other.device):
        device.close()


def test_of_copies_that_are_refused_nothing_is_in_flight(kind: str, folder: Path) -> None:
    """The place may be another's a moment later."""
    device = standins.process(kind, folder)(f"{kind}:0", PAGE, 8 * PAGE, rules=ProcessRules())
    driver = device._driver
    (dst, _), (src, _) = mapped(driver), mapped(driver)
    text, found = ctypes.create_string_buffer(b"abc"), ctypes.create_string_buffer(4)
    driver.to_device(0, src, ctypes.addressof(text), 4)
    driver.zero(0, dst, PAGE)
    with pytest.raises(DeviceError) as caught:
        driver.copy(0, [CopyPart(dst, src, 4, 0, 0), CopyPart(4096, 8192, 4, 0, 0)])
    assert caught.value.code == "driver_refused"
    driver.to_host(0, ctypes.addressof(found), dst, 4)
    assert found.value == b"abc"
    device.close()


def test_all_answers_of_cuda_that_cost_a_process_its_device_are_known() -> None:
    """Those of which the header says so, or that there was an error which nobody corrects."""
    (include,) = vendor.headers(vendor.CUDA)
    text = (include / "cuda.h").read_text()
    codes = text[text.index("typedef enum cudaError_enum") : text.index("} CUresult;")]
    found = {}
    for told, name, number in re.findall(r"/\*\*((?:(?!\*/).)*)\*/\s*(CUDA_\w+)\s*=\s*(\d+)", codes, re.DOTALL):
        words = " ".join(told.replace("*", " ").split())
        if re.search("must be terminated|cannot be used anymore|uncorrectable|has been destroyed using", words):
            found[int(number)] = name
    assert found == cuda.LOST
    assert {702, 710, 721} < set(found)


def test_answers_that_cost_a_process_its_device_are_the_vendors() -> None:
    (cuda_include,), (_, npu_include) = vendor.headers(vendor.CUDA), vendor.headers(vendor.ASCEND)
    codes = (npu_include / "error_codes/rt_error_codes.h").read_text()
    for text, lost in (((cuda_include / "cuda.h").read_text(), cuda.LOST), (codes, ascend.LOST)):
        check_codes(text, {number: Meaning(name, "driver_failed") for number, name in lost.items()})
