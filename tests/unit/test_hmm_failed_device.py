"""The HMM's memory where a device fails: what the others have goes on, in this process and in its successor. And where
the machine has no descriptor left to share memory by. On the stand-ins of both drivers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from elasticmoe.common.devices import factory
from elasticmoe.common.devices.accelerator import AcceleratorDevice
from elasticmoe.common.devices.driver import Lost
from elasticmoe.common.devices.rules import Handle, ProcessRules
from elasticmoe.common.layout import Layout, initial_layout, keys_on
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit, ElasticMoEError, Unavailable
from elasticmoe.common.protocol.hmm import LoadModel, StageLayout
from elasticmoe.services.hmm.loading.loader import ModelLoad
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.sessions.handles import attach_reply
from tests.devices import standins
from tests.procs.descriptors import left_with
from tests.unit.test_hmm_memory_shortage import LOG, World, try_transition

pytestmark = pytest.mark.slow

DEVICE_BYTES = 256 << 20


@pytest.fixture
def process(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[AcceleratorDevice]:
    """The driver of the first HMM's process; its `host:N` are devices of the kind."""
    made = standins.process(kind, folder)
    monkeypatch.setitem(factory._BACKENDS, "host", made)
    return made


@pytest.fixture
def world(process: type[AcceleratorDevice], tiny_mixtral: Path, tmp_path: Path) -> Iterator[World]:
    made = World(tiny_mixtral, tmp_path, device_bytes=DEVICE_BYTES)
    yield made
    made.close()


only_cuda = pytest.mark.parametrize("kind", ["cuda"], indirect=True)  # NPUs share by numbers
only_npu = pytest.mark.parametrize("kind", ["npu"], indirect=True)


def without(device: str, request: StageLayout, before: Layout) -> StageLayout:
    """The transition, with nothing read from `device`, which is lost: records that others have come from there, the
    rest from the checkpoint."""
    seats = [seat for seat in before.seats if seat.device != device]
    other = {key: one.device for one in seats for key in keys_on(before, one.slot)}
    copies = tuple(msgspec.structs.replace(copy, source=other.get(copy.key, "")) for copy in request.copies)
    return msgspec.structs.replace(request, copies=copies)


def failure(world: World) -> tuple[str, str]:
    """Code and text of what failed in the latest transition."""
    status = world.transitions.status()
    assert status is not None
    assert status.error is not None
    return status.error.code, status.error.message


def test_a_device_that_is_lost_is_left_out_and_its_memory_is_given_back_by_name(world: World, folder: Path) -> None:
    memories = world.holdings.memories
    assert try_transition(world, (0, 1, 2)) == "released"
    standins.lose(folder, 1)
    request = without("host:1", world.request(0, 2), world.layout)
    world.transitions.stage(request)
    world.turn_to("staged")
    world.transitions.commit(request.id)
    world.flip()
    world.turn_to("flipped")
    del world.by_slot[1]
    world.transitions.release(request.id)
    world.turn_to("released")
    world.check()
    assert [bool(memories[f"host:{slot}"].device.failure) for slot in range(3)] == [False, True, False]
    assert not memories["host:1"].records
    again = world.request(0, 1, 2)
    world.transitions.stage(again)
    world.turn_to("failed")
    code, text = failure(world)
    assert (code, text.partition(": ")[0]) == ("driver_failed", "host:1 cannot be used")
    world.transitions.abort(again.id)
    world.turn_to("aborted")
    world.check()


@pytest.mark.parametrize("error", [DoesNotFit("answers 207001"), DeviceError("answers 107000", code="driver_refused")])
def test_memory_that_cannot_be_given_back_holds_up_nothing(
    world: World, process: type[AcceleratorDevice], monkeypatch: pytest.MonkeyPatch, error: ElasticMoEError
) -> None:
    memory, driver = world.holdings.memories["host:0"], process._of_this_process()
    taken = memory.take_all()
    unmap, (kept, *others) = driver.unmap, taken

    def refuse(index: int, address: int, nbytes: int) -> None:
        if address == kept_at:
            raise error
        unmap(index, address, nbytes)

    assert isinstance(kept, Handle)
    kept_at = memory.address(kept)
    monkeypatch.setattr(driver, "unmap", refuse)
    for one in taken:
        memory.let_go(one)
    assert memory.device.budget - memory.device.free == kept.nbytes, "the rest is given back"
    assert all(not one.is_live for one in others if isinstance(one, Handle))
    memory.close()


def test_a_rank_is_answered_though_this_process_has_lost_its_device(world: World, folder: Path) -> None:
    """Its own driver may have it still: it goes on there, and has to be known."""
    memory = world.holdings.memories["host:1"]
    before, _ = attach_reply(memory, world.holdings)
    standins.lose(folder, 1)
    memory.device.fence()
    assert memory.device.failure
    after, _ = attach_reply(memory, world.holdings)
    assert after == before
    assert after.identity


def successor_of(
    world: World, process: type[AcceleratorDevice], monkeypatch: pytest.MonkeyPatch
) -> tuple[Holdings, set[str]]:
    """The next HMM, in that process, and what it lets the keeper hold."""
    held = dict[str, int]()
    monkeypatch.setitem(factory._BACKENDS, "host", process)

    def fetch(**_: object) -> dict[str, int]:
        return {name: os.dup(fd) for name, fd in world.kept.items()}

    parking: Any = SimpleNamespace(fetch=fetch, keep=held.update, forget=lambda _: None, names=set())
    made = Holdings(world.config, parking, LOG)
    made.start()
    return made, set(held)


@only_cuda
def test_a_successor_takes_over_what_the_healthy_devices_have(
    world: World, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, kept = world.checksums(), set(world.kept)
    standins.lose(folder, 1)
    successor, held = successor_of(world, standins.process(kind, folder), monkeypatch)
    try:
        assert successor.loaded is not None
        assert successor.loaded.layout == world.layout
        assert (successor.check_integrity(), held) == ([], kept)  # its own are by name, for whoever can open it again
        found = {name: device.checksum(at, nbytes) for name, device, at, nbytes in successor.checksum_jobs()}
        assert found == {name: value for name, value in before.items() if not name.startswith("host:1/")}
        gone = successor.memories["host:1"]
        record = next(iter(gone.records.values()))
        gone.device.export(record)  # it has the descriptor
        with pytest.raises(DeviceError, match="host:1 cannot be used"):
            gone.address(record)
        gone.clear()
        assert (gone.device.pages, gone.device.check_integrity()) == (0, [])
        with pytest.raises(DeviceError, match="host:1 cannot be used"):
            gone.claim(gone.device.granularity, "kv")
        assert gone.device.free == gone.device.budget
    finally:
        successor.close()


@only_npu
def test_a_successor_that_begins_anew_loads_on_the_healthy_devices(
    world: World, kind: str, folder: Path, tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.lose(folder, 1)
    successor, _ = successor_of(world, standins.process(kind, folder), monkeypatch)

    def load(*slots: int) -> None:
        layout = initial_layout((5, 5), [f"host:{slot}" for slot in slots])
        request = LoadModel("load", str(tiny_mixtral), "float32", layout, 16, 3 << 21, 64, 4, 64, "mailbox")
        segment = successor.prepare(layout)
        try:
            successor.commit(ModelLoad(request, successor.memories, segment, successor.granularity).run())
        except ElasticMoEError:
            successor.discard()
            raise

    try:
        assert successor.loaded is None
        with pytest.raises(DeviceError, match="host:1 cannot be used") as caught:
            load(0, 1)
        assert caught.value.code == "driver_failed"
        assert [memory.device.pages for memory in successor.memories.values()] == [0, 0, 0]
        load(0, 2)
        assert successor.check_integrity() == []
    finally:
        successor.close()


def test_without_any_device_the_start_fails(
    world: World, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in range(3):
        standins.lose(folder, device)
    with pytest.raises(DeviceError) as caught:
        successor_of(world, standins.process(kind, folder), monkeypatch)
    assert caught.value.code == "driver_failed"


def test_a_device_that_has_no_memory_for_its_driver_costs_only_itself(
    world: World, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU that others have filled."""
    process = standins.process(kind, folder)
    driver = process._of_this_process()
    open_ = driver._open

    def short(index: int) -> None:
        if index == 1:
            raise DoesNotFit("the device's memory is short")
        open_(index)

    monkeypatch.setattr(driver, "_open", short)
    successor, _ = successor_of(world, process, monkeypatch)
    try:
        failures = [memory.device.failure for memory in successor.memories.values()]
        assert failures == ["", "the device's memory is short", ""]
        assert (successor.loaded is not None) == (kind == "cuda")  # what an NPU has nobody takes over
    finally:
        successor.close()


# ---- Mailboxes


def lost(device: int, export: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """A driver's export that a device does no more."""

    def refuse(index: int, handle: int) -> int:
        if index == device:
            raise Lost("answers 507010")
        return export(index, handle)

    return refuse


@only_npu
def test_a_load_fails_whose_mailboxes_cannot_be_shared(
    process: type[AcceleratorDevice], tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later on every rank would be told of them."""
    driver: Any = process._of_this_process()
    monkeypatch.setattr(driver, "export", lost(1, driver.export))
    with pytest.raises(Lost):
        World(tiny_mixtral, tmp_path, device_bytes=DEVICE_BYTES, exchange="mailbox")
    assert standins.loaded(process).standin_used(0) == 0


@only_npu
def test_a_mailbox_that_cannot_be_shared_is_not_staged(
    process: type[AcceleratorDevice], tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tiny_mixtral, tmp_path, device_bytes=DEVICE_BYTES, exchange="mailbox")
    driver: Any = process._of_this_process()
    try:
        monkeypatch.setattr(driver, "export", lost(2, driver.export))
        request = world.request(0, 1, 2)
        world.transitions.stage(request)
        world.turn_to("failed")
        assert failure(world)[0] == "driver_failed"
        world.transitions.abort(request.id)
        world.turn_to("aborted")
        assert (world.holdings.check_integrity(), world.layout.slots) == ([], (0, 1))
    finally:
        world.close()


# ---- Without descriptors


def refuse(*_: object) -> int:
    raise Unavailable("no descriptor is left", code="no_descriptors")


@only_cuda
def test_that_no_descriptor_is_left_is_said_as_such(process: type[AcceleratorDevice]) -> None:
    device = process("host:0", standins.GRANULARITY, DEVICE_BYTES, rules=ProcessRules())
    handle = device.create(standins.GRANULARITY, "kv")
    with left_with(os.getpid(), 0), pytest.raises(Unavailable) as caught:
        device.export(handle)
    assert (caught.value.code, device.failure) == ("no_descriptors", "")
    device.export(handle)
    device.close()


@only_cuda
def test_what_cannot_be_shared_for_want_of_descriptors_is_not_staged(
    world: World, process: type[AcceleratorDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = world.request(0, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(process._of_this_process(), "export", refuse)
        world.transitions.stage(request)
        world.turn_to("failed")
    assert failure(world)[0] == "no_descriptors"
    world.transitions.abort(request.id)
    world.turn_to("aborted")
    world.check()
    assert try_transition(world, (0, 1, 2)) == "released"


@only_cuda
def test_kv_that_cannot_be_shared_for_want_of_descriptors_does_not_grow(
    world: World, process: type[AcceleratorDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = msgspec.structs.replace(world.request(0), kv_handles_after={"host:0": 2})
    world.transitions.stage(request)
    world.turn_to("staged")
    world.transitions.commit(request.id)
    world.flip()
    world.turn_to("flipped")
    del world.by_slot[1]
    with monkeypatch.context() as patched:
        patched.setattr(process._of_this_process(), "export", refuse)
        world.transitions.release(request.id)
        world.turn_to("released")
    assert failure(world)[0] == "no_descriptors"
    world.check()


@only_cuda
def test_a_load_without_descriptors_fails_and_gives_all_back(
    process: type[AcceleratorDevice], tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process._of_this_process(), "export", refuse)
    with pytest.raises(Unavailable) as caught:
        World(tiny_mixtral, tmp_path, device_bytes=DEVICE_BYTES)
    assert caught.value.code == "no_descriptors"
    assert standins.loaded(process).standin_used(0) == 0
