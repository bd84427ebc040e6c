"""Devices that cannot access one another's memory: it is said before anything is mapped, and what needs no access goes
on."""

from __future__ import annotations

from pathlib import Path

import pytest

from elasticmoe.common.devices import factory
from elasticmoe.common.devices.base import Device, ProcessRules
from elasticmoe.common.protocol.errors import DeviceError
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.hmm.memory.memory import check_exchange
from tests.devices import standins
from tests.unit.test_hmm_memory_shortage import World, try_transition

PAGE = standins.GRANULARITY
TEXT = "{} cannot access the memory of {}, which ranks need to exchange tokens from device to device: {}"
WAYS_OUT = {"cuda": "start with --exchange shm", "npu": "name NPUs in --devices that can"}


def told(error: DeviceError | Refused) -> tuple[str, str]:
    return error.code, error.message


def refused(one: str, other: str, kind: str = "cuda") -> tuple[str, str]:
    """Code and text where `one` has no access to `other`."""
    return "no_peer_access", TEXT.format(one, other, WAYS_OUT[kind])


def opened(kind: str, folder: Path, *names: str) -> list[Device]:
    """Devices of one process."""
    process, rules = standins.process(kind, folder), ProcessRules()
    return [process(name, PAGE, 8 * PAGE, rules=rules) for name in names]


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_pair_without_access_is_named_with_the_way_out(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = opened(kind, folder, *(f"{kind}:{index}" for index in range(3)))
    check_exchange(devices)
    monkeypatch.setenv("STANDIN_NO_PEERS", "1-2")
    check_exchange(devices[:2])
    with pytest.raises(DeviceError) as caught:
        check_exchange(devices)
    assert told(caught.value) == refused(f"{kind}:1", f"{kind}:2", kind)
    check_exchange(devices[:1], devices[1:])  # the two that stay were asked when they came
    with pytest.raises(DeviceError, match=f"{kind}:2 cannot access the memory of {kind}:1"):
        check_exchange(devices[2:], devices[:2])
    for device in devices:
        device.close()


@pytest.mark.parametrize("kind", standins.KINDS)
def test_parts_of_one_accelerator_need_no_access_to_another(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drivers say of a device and itself that it is no peer."""
    monkeypatch.setenv("STANDIN_DEVICES", "1")
    devices = opened(kind, folder, f"{kind}:0.0", f"{kind}:0.1")
    check_exchange(devices)
    for device in devices:
        device.close()


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_driver_copies_between_gpus_all_the_same_and_between_npus_it_is_refused(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As experts that change their device: CUDA's driver takes the host's memory then, the NPUs' has no such way."""
    monkeypatch.setenv("STANDIN_NO_PEERS", "0-1")
    here, there = opened(kind, folder, f"{kind}:0", f"{kind}:1")
    addresses = []
    for device in (here, there):
        range_ = device.reserve(PAGE)
        device.map(range_, 0, device.create(PAGE, "weights"), True)
        addresses.append(range_.base)
    here.write_bytes(addresses[0], b"abc")
    if kind == "cuda":
        there.copy(addresses[1], addresses[0], 3)
        assert there.read_bytes(addresses[1], 3) == b"abc"
    else:
        with pytest.raises(DeviceError, match="npu:1 cannot access the memory of npu:0") as caught:
            there.copy(addresses[1], addresses[0], 3)
        assert caught.value.code == "no_peer_access"
    for device in (here, there):
        device.close()


def test_a_load_and_a_transition_are_refused_before_a_rank_is_told(
    tiny_mixtral: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are host's, the devices GPUs."""
    monkeypatch.setitem(factory._BACKENDS, "host", standins.process("cuda", folder))
    monkeypatch.setenv("STANDIN_NO_PEERS", "0-1")
    with pytest.raises(DeviceError) as caught:
        World(tiny_mixtral, tmp_path, device_bytes=256 << 20, exchange="mailbox")
    assert told(caught.value) == refused("host:0", "host:1")
    World(tiny_mixtral, tmp_path, device_bytes=256 << 20, exchange="shm").close()
    monkeypatch.setenv("STANDIN_NO_PEERS", "1-2")
    world = World(tiny_mixtral, tmp_path, device_bytes=256 << 20, exchange="mailbox")
    kv = {name: len(memory.kv) for name, memory in world.holdings.memories.items()}
    request = world.request(0, 1, 2)
    world.transitions.stage(request)
    assert world.turn_to("staged", "failed") == "failed"
    status = world.transitions.status()
    assert status is not None
    assert status.error is not None
    assert told(status.error) == refused("host:2", "host:1")
    world.transitions.abort(request.id)
    world.turn_to("aborted")
    sent = [getattr(attached.sent, "mailboxes", ()) for attached in world.by_slot.values()]
    assert all(mailbox.slot != 2 for mailboxes in sent for mailbox in mailboxes)
    assert {name: len(memory.kv) for name, memory in world.holdings.memories.items()} == kv
    assert world.holdings.check_integrity() == []
    monkeypatch.delenv("STANDIN_NO_PEERS")
    assert try_transition(world, (0, 1, 2)) == "released"
    monkeypatch.setenv("STANDIN_NO_PEERS", "1-2")
    assert try_transition(world, (0, 1)) == "released", "who leaves, as when it is lost, is not asked"
    world.close()
