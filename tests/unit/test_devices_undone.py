"""Many mappings are undone at once, after one wait for the device; and what a driver refuses half-way leaves nothing
behind: no mapping, no event. On the stand-ins, which count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.devices.accelerator import AcceleratorDevice
from elasticmoe.common.devices.base import Device, Handle, ProcessRules, Range
from elasticmoe.common.devices.driver import CopyPart
from elasticmoe.common.protocol.errors import DeviceError
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.worker.hmm import memory as memory_module
from elasticmoe.services.worker.hmm.memory import RankMemory
from tests.devices import standins
from tests.devices.backends import ALL_KINDS, machine
from tests.devices.breaches import mapped
from tests.unit.test_rank_memory import SLOT, Owner

PAGE = standins.GRANULARITY


class Standin:
    """A device of one process on the stand-in of its driver. `library`: what it counts."""

    def __init__(self, kind: str, folder: Path, index: int = 0) -> None:
        self.kind = standins.process(kind, folder)
        self.device: AcceleratorDevice = self.kind(f"{kind}:{index}", PAGE, 256 << 20, rules=ProcessRules())
        self.driver: Any = self.device._driver
        self.library = standins.loaded(self.kind)

    def fences(self, act: Callable[[], object]) -> int:
        """How often the device was waited for meanwhile."""
        before = self.library.standin_num_fences()
        act()
        return int(self.library.standin_num_fences() - before)


@pytest.fixture
def standin(kind: str, folder: Path) -> Iterator[Standin]:
    made = Standin(kind, folder)
    yield made
    made.device.close()


def refuse(driver: Any, monkeypatch: pytest.MonkeyPatch, *refused: str) -> list[str]:
    """Let these calls of the library be refused from now on; the names of all that are made."""
    library, made = driver.library, list[str]()
    call = library.call

    def call_or_refuse(name: str, *args: Any) -> None:
        made.append(name)
        if name in refused:
            raise DeviceError(f"{name} answers 1", code="driver_refused")
        call(name, *args)

    monkeypatch.setattr(library, "call", call_or_refuse)
    return made


def filled(device: Device, count: int) -> tuple[Range, list[Handle]]:
    """A range of that many pages, each mapped with one of a handle's."""
    range_, handles = device.reserve(count * PAGE), [device.create(PAGE, "kv") for _ in range(count)]
    device.map_many(range_, [(at * PAGE, handle) for at, handle in enumerate(handles)], True)
    return range_, handles


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_many_mappings_are_undone_or_none(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(kind, tmp_path, monkeypatch) as made:
        device = made.process().open(0, PAGE, 64 * PAGE)
        (one, handles), (other, _) = filled(device, 4), filled(device, 2)
        for parts in ([(one, 0), (one, PAGE // 2)], [(one, 0), (other, 5 * PAGE)], [(one, 0), (one, 0)]):
            with pytest.raises(DeviceError) as caught:
                device.unmap_many(parts)
            assert caught.value.code == "not_mapped"
            assert one.starts == [0, PAGE, 2 * PAGE, 3 * PAGE]
        device.unmap_many([])
        device.unmap_many([(one, 2 * PAGE), (other, 0), (one, 0)])
        assert (one.starts, other.starts) == ([PAGE, 3 * PAGE], [PAGE])
        assert [handle.num_mappings for handle in handles] == [0, 1, 0, 1]
        device.close()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_of_many_all_are_undone_that_can_be(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that cannot is told."""
    with machine(kind, tmp_path, monkeypatch) as made:
        device = made.process().open(0, PAGE, 64 * PAGE)
        range_, handles = filled(device, 4)
        unmap = device._unmap

        def fail(range_: Range, offset: int, nbytes: int) -> None:
            if offset in (PAGE, 2 * PAGE):
                raise DeviceError(f"no more mappings at {offset}")
            unmap(range_, offset, nbytes)

        with monkeypatch.context() as patched:
            patched.setattr(device, "_unmap", fail)
            with pytest.raises(DeviceError, match=f"no more mappings at {PAGE}$"):
                device.unmap_many([(range_, at * PAGE) for at in range(4)])
        assert range_.starts == [PAGE, 2 * PAGE]
        assert [handle.num_mappings for handle in handles] == [0, 1, 1, 0]
        device.write_bytes(range_.address(PAGE), b"abc")
        device.close()


def test_an_owner_waits_once_for_all_that_it_gives_back(standin: Standin) -> None:
    memory = DeviceMemory(standin.device)
    handles = [memory.claim(PAGE, "kv", at * PAGE) for at in range(20)]
    assert standin.fences(lambda: memory.let_go(*handles)) == 1
    assert standin.library.standin_used(0) == 0
    assert standin.device.check_integrity() == []


def test_an_owner_gives_back_the_rest_where_its_driver_refuses_a_part(
    standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DeviceMemory(standin.device)
    handles = [memory.claim(PAGE, "kv", at * PAGE) for at in range(5)]
    kept, unmap = memory.address(handles[2]), standin.driver.unmap

    def refuse_one(index: int, address: int, nbytes: int) -> None:
        if address == kept:
            raise DeviceError("no more mappings", code="driver_refused")
        unmap(index, address, nbytes)

    with monkeypatch.context() as patched:
        patched.setattr(standin.driver, "unmap", refuse_one)
        memory.let_go(*handles)
    assert [handle.is_live for handle in handles] == [False, False, True, False, False]
    assert standin.device.used["kv"] == standin.library.standin_used(0) == PAGE


def test_a_rank_waits_once_for_all_that_a_slice_unmaps(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hmm, user = Owner(Standin(kind, folder).device), standins.process(kind, folder)
    monkeypatch.setattr(memory_module, "open_device", partial(user, rules=ProcessRules()))
    hmm.device.admit([user.importer_number(0)])
    seat, (reply, fds) = hmm.seat([(0, 0), (0, 1), (1, 2)], 4), hmm.reply()
    rank = RankMemory(reply, fds, f"{kind}:0", SLOT, [(hmm.shared, hmm.shared_fds), (seat, hmm.fds)])
    hmm.hand(rank, hmm.seat([(0, 1)], 1))
    library = standins.loaded(user)
    before = library.standin_num_fences()
    while not rank.advance(lambda _: True):
        pass
    assert (rank.held[0], rank.held[1]) == ([1], [])
    assert library.standin_num_fences() - before == 2, "one for KV, one for records"
    rank.close()
    hmm.device.close()


def map_three(standin: Standin) -> tuple[int, Sequence[tuple[int, int, int]]]:
    """A range, and what is to be mapped there, of which the last cannot be."""
    driver = standin.driver
    address = driver.reserve(0, 4 * PAGE)
    parts = [(address + at * PAGE, PAGE, driver.create(0, PAGE)) for at in range(3)]
    return address, [*parts, (address + 2 * PAGE, PAGE, driver.create(0, PAGE))]


@pytest.mark.parametrize("is_refused", [False, True])
def test_what_was_mapped_is_unmapped_where_a_later_part_is_refused(
    standin: Standin, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    """Also where that is refused for the first of them: the others go, and what is told is why nothing is mapped."""
    address, parts = map_three(standin)
    driver, unmap, tried = standin.driver, standin.driver.unmap, list[int]()

    def refuse_first(index: int, at: int, nbytes: int) -> None:
        tried.append(at)
        if is_refused and at == address:
            raise DeviceError("no more mappings", code="driver_refused")
        unmap(index, at, nbytes)

    with monkeypatch.context() as patched:
        patched.setattr(driver, "unmap", refuse_first)
        with pytest.raises(DeviceError, match=r"(aclrtMapMem|cuMemMap) answers"):
            driver.map(0, parts)
    assert tried == [address + at * PAGE for at in range(3)]
    driver.map(0, [parts[1], parts[2]])  # their places are free


def test_what_is_out_of_reach_is_unmapped_whole(
    kind: str, folder: Path, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where access is refused, and then to unmap the first part."""
    device, driver, unmap = standin.device, standin.driver, standin.driver.unmap
    range_, handles = device.reserve(4 * PAGE), [device.create(PAGE, "kv") for _ in range(3)]

    def refuse_first(index: int, at: int, nbytes: int) -> None:
        if at == range_.base:
            raise DeviceError("no more mappings", code="driver_refused")
        unmap(index, at, nbytes)

    def refuse_access(*_: object) -> None:
        raise DeviceError("no access", code="driver_refused")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "unmap", refuse_first)
        patched.setattr(driver, "allow", refuse_access)
        with pytest.raises(DeviceError, match="no access"):
            device.map_many(range_, [(at * PAGE, handle) for at, handle in enumerate(handles)], True)
    assert range_.starts == []
    device.map_many(range_, [(at * PAGE, handle) for at, handle in enumerate(handles)][1:], True)
    unmap(0, range_.base, PAGE)  # what was refused


RECORD = {"npu": "aclrtRecordEvent", "cuda": "cuEventRecord"}
WAIT = {"npu": "aclrtSynchronizeEvent", "cuda": "cuEventSynchronize"}


def test_an_event_that_cannot_be_recorded_is_ended(
    kind: str, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    (src, _), (dst, _) = mapped(standin.driver), mapped(standin.driver)
    part = CopyPart(dst, src, PAGE, 0, 0)
    with monkeypatch.context() as patched:
        made = refuse(standin.driver, patched, RECORD[kind])
        with pytest.raises(DeviceError, match=RECORD[kind]):
            standin.driver.copy(0, [part])
    assert RECORD[kind] in made
    assert standin.library.standin_num_events() == 0
    standin.driver.forget(0, standin.driver.copy(0, [part]))


def test_copies_that_cannot_be_waited_for_end_with_that_error_whoever_asks(
    kind: str, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    range_, _ = filled(standin.device, 2)
    copied = standin.device.copy_async([(range_.base, range_.address(PAGE), PAGE)])
    assert standin.library.standin_num_events() == 1
    with monkeypatch.context() as patched:
        refuse(standin.driver, patched, WAIT[kind])
        with pytest.raises(DeviceError, match=WAIT[kind]):
            copied.wait()
    assert standin.library.standin_num_events() == 0
    for ask in (copied.wait, copied.is_done):
        with pytest.raises(DeviceError, match=WAIT[kind]):
            ask()


def test_an_event_belongs_to_no_thread(standin: Standin) -> None:
    """Who waits for copies, and ends them, may be another thread than the one that began them."""
    range_, _ = filled(standin.device, 2)
    errors = list[BaseException]()

    def wait() -> None:
        try:
            copied.wait()
        except DeviceError as error:
            errors.append(error)

    copied = standin.device.copy_async([(range_.base, range_.address(PAGE), PAGE)])
    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join()
    assert errors == []
    assert standin.library.standin_num_events() == 0


def test_a_peer_is_let_in_once_by_threads_that_copy_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page says what an NPU's driver answers to another time."""
    standin = Standin("npu", folder)
    standin.driver.open(1)
    can_access, both_ask = standin.driver.can_access, threading.Barrier(2)

    def asked(device: int, peer: int) -> bool:
        with suppress(threading.BrokenBarrierError):
            both_ask.wait(0.3)  # where threads may ask at once, they do
        return bool(can_access(device, peer))

    monkeypatch.setattr(standin.driver, "can_access", asked)
    (here, _), (there, _) = mapped(standin.driver, 0), mapped(standin.driver, 1)
    copy = partial(standin.driver.copy, 0, [CopyPart(here, there, PAGE, 0, 1)])
    threads = [threading.Thread(target=copy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert standin.library.standin_num_let_in() == 1
    standin.driver.drain(0)
