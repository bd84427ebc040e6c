"""Which hardware a device's name means: the HMM says it when a rank attaches, and a rank that means another one by the
name maps nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from elasticmoe.common.devices import factory
from elasticmoe.common.devices.base import Device, ProcessRules
from elasticmoe.common.devices.host import HostDevice
from elasticmoe.common.protocol.errors import DeviceError
from elasticmoe.services.hmm.sessions.handles import attach_reply
from elasticmoe.services.worker.hmm import memory as memory_module
from elasticmoe.services.worker.hmm.link import Handed
from elasticmoe.services.worker.hmm.memory import RankMemory
from tests.devices import standins
from tests.unit.test_hmm_memory_shortage import World
from tests.unit.test_rank_memory import SLOT, Owner

PAGE = standins.GRANULARITY
NAMES = {
    "cuda": [f"d0d0d0d0-d0d0-d0d0-d0d0-d0d0d0d0d0{number:02x}" for number in range(8)],
    "npu": [f"NPU {number} of the machine" for number in range(8)],
}


def opened(kind: str, folder: Path, index: int, *defines: str, budget: int = 0) -> Device:
    """A device of one more process."""
    process = standins.process(kind, folder, *defines)
    return process(f"{kind}:{index}", PAGE, budget, rules=ProcessRules())


def test_processes_that_see_the_same_devices_call_them_alike(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hardware, numbers in (("0,1", (0, 1)), ("5,6", (5, 6))):
        monkeypatch.setenv("STANDIN_HARDWARE", hardware)
        devices = [opened(kind, folder, index) for index in (0, 1, 1)]
        first, second, again = (device.identity for device in devices)
        assert (first, second) == (NAMES[kind][numbers[0]], NAMES[kind][numbers[1]])
        assert again == second
        for device in devices:
            device.close()


def test_what_one_side_does_not_know_is_not_compared(kind: str, folder: Path) -> None:
    """As of an older driver, which has no such call; and of the host's memory, which is one."""
    older, newer = opened(kind, folder, 0, "-DSTANDIN_V1"), opened(kind, folder, 0)
    assert older.identity == ""
    older.check_identity(newer.identity)
    newer.check_identity(older.identity)
    newer.check_identity(newer.identity)
    host = HostDevice("host:0", 4096, rules=ProcessRules())
    assert host.identity == ""
    host.check_identity(newer.identity)
    for device in (older, newer, host):
        device.close()


def test_a_rank_that_sees_other_hardware_by_the_name_maps_nothing(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was started with other visible devices than the HMM's."""
    owner = Owner(opened(kind, folder, 1, budget=256 << 20))
    reply, fds = owner.reply()
    reply = msgspec.structs.replace(reply, identity=owner.device.identity)
    user = standins.process(kind, folder)
    monkeypatch.setattr(memory_module, "open_device", partial(user, rules=ProcessRules()))
    monkeypatch.setenv("STANDIN_HARDWARE", "0,3")

    def handed() -> Iterator[Handed]:
        pytest.fail("it has asked for handles")
        yield from ()

    with pytest.raises(DeviceError) as caught:
        RankMemory(reply, fds, f"{kind}:1", SLOT, handed())
    assert caught.value.code == "other_hardware"
    assert caught.value.message == (
        f"{kind}:1: it is {NAMES[kind][3]} in this process, and {NAMES[kind][1]} to the owner of its memory: "
        "let all processes see the same devices (CUDA_VISIBLE_DEVICES, ASCEND_RT_VISIBLE_DEVICES)"
    )
    assert fds == []
    monkeypatch.delenv("STANDIN_HARDWARE")
    owner.device.admit([user.importer_number(1)])
    seat, (reply_again, fds_again) = owner.seat([], 1), owner.reply()
    reply_again = msgspec.structs.replace(reply_again, identity=owner.device.identity)
    memory = RankMemory(
        reply_again, fds_again, f"{kind}:1", SLOT, [(owner.shared, owner.shared_fds), (seat, owner.fds)]
    )
    memory.close()
    owner.device.close()


def test_the_hmm_says_it_with_its_answer(
    kind: str, tiny_mixtral: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are host's, the devices accelerators, of which the first two are exchanged here."""
    monkeypatch.setitem(factory._BACKENDS, "host", standins.process(kind, folder))
    monkeypatch.setenv("STANDIN_HARDWARE", "1,0")
    world = World(tiny_mixtral, tmp_path, device_bytes=256 << 20)
    memories = world.holdings.memories
    for slot in (0, 1):
        reply, _ = attach_reply(memories[f"host:{slot}"], world.holdings)
        assert reply.identity == NAMES[kind][1 - slot]
    world.close()


def test_the_host_says_nothing(tiny_mixtral: Path, tmp_path: Path) -> None:
    world = World(tiny_mixtral, tmp_path)
    reply, _ = attach_reply(world.holdings.memories["host:0"], world.holdings)
    assert reply.identity == ""
    world.close()
