"""The HMM's memory on each device backend: loads, transitions there and back, and a successor that takes all over."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe.common.families import FAMILIES
from elasticmoe.common.families import fingerprint as fingerprint_module
from elasticmoe.common.families.fingerprint import fingerprint
from elasticmoe.common.model_spec import ModelSpec, RecordBuilder, RecordKey, RecordSpec
from elasticmoe.common.telemetry import get_logger
from elasticmoe.native import host
from elasticmoe.services.hmm.loading.loader import ModelLoad
from elasticmoe.services.hmm.memory.holdings import Holdings
from tests.devices import strict
from tests.devices.backends import granularity
from tests.unit.test_hmm_memory_shortage import World, try_transition

__all__ = ["granularity"]

LOG = get_logger("test")
LAYER = FAMILIES["mixtral"].layer


@pytest.fixture
def world(tiny_mixtral: Path, tmp_path: Path, granularity: int) -> Iterator[World]:
    made = World(tiny_mixtral, tmp_path, device_bytes=256 << 20)
    yield made
    made.close()


def test_sizes_follow_the_backend(world: World, granularity: int) -> None:
    """Though the configuration says 4096."""
    loaded = world.holdings.loaded
    assert loaded is not None
    assert world.holdings.granularity == granularity
    assert loaded.kv.handle_bytes == (2 << 20 if granularity == 4096 else 4 << 20)
    for memory in world.holdings.memories.values():
        assert memory.device.granularity == granularity
        assert all(handle.nbytes % granularity == 0 for handle in memory.records.values())


def ledgers() -> list[str]:
    """Devices whose ledgers this process has open."""
    found = (re.fullmatch(r"\d+ /memfd:(.+)\.ledger \(deleted\)", file) for file in open_files())
    return sorted(match[1] for match in found if match is not None)


def test_layouts_come_and_go_and_every_record_is_whole(world: World) -> None:
    for slots in ((0, 1, 2), (0, 2), (0,), (0, 1)):
        assert try_transition(world, slots) == "released"
        world.check()
        assert ledgers() == [f"host:{slot}" for slot in slots]
        assert sorted(name for name in world.kept if name.startswith("ledger.")) == [
            f"ledger.{one}" for one in ledgers()
        ]


def test_a_ledger_that_has_lost_memory_is_found(world: World) -> None:
    ledger = world.holdings.memories["host:1"].ledger
    assert ledger is not None
    host.punch_hole(ledger.fd, ledger.nbytes - 4096, 4096)
    (finding,) = world.holdings.check_integrity()
    assert finding == f"host:1: of the ledger, {ledger.nbytes - 4096} bytes are present, it has {ledger.nbytes}"


def started(world: World, kept: dict[str, int], held: dict[str, int]) -> Holdings:
    """A successor that finds `kept` at the keeper, and lets it hold `held`."""
    parking: Any = SimpleNamespace(fetch=lambda **_: kept, keep=held.update, forget=lambda _: None, names=set())
    successor = Holdings(world.config, parking, LOG)
    successor.start()
    return successor


def reversed_layer(spec: ModelSpec, layer: int, index: int) -> RecordSpec:
    """A layer's record as another version might lay it out: as large, in the other order."""
    builder = RecordBuilder(RecordKey("layer", layer, shard=index))
    for tensor in reversed(LAYER(spec, layer, index).tensors):
        builder.add(tensor.name, tensor.dtype, *tensor.sources, alternatives=tensor.alternatives)
    return builder.build()


@pytest.mark.parametrize("change", ["a record", "a transform"])
def test_a_successor_that_lays_records_out_in_another_way_loads_them_anew(
    world: World, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, kept = world.holdings.loaded, {name: os.dup(fd) for name, fd in world.kept.items()}
    assert before is not None
    if change == "a record":
        other, mine = reversed_layer(before.spec, 0, 0), LAYER(before.spec, 0, 0)
        assert other.nbytes == mine.nbytes  # so that nothing but the fingerprint tells
        family = FAMILIES["mixtral"]._replace(layer=reversed_layer)
        monkeypatch.setitem(FAMILIES, "mixtral", family)
    else:
        monkeypatch.setattr(fingerprint_module, "_TRANSFORMS", 2)
    successor = started(world, kept, {})
    assert successor.loaded is None
    assert [memory.device.pages for memory in successor.memories.values()] == [0, 0, 0]
    segment = successor.prepare(before.layout)
    load = ModelLoad(before.load, successor.memories, segment, successor.granularity)
    successor.commit(load.run())
    assert successor.loaded is not None
    assert successor.loaded.records == fingerprint(before.spec) != before.records
    assert successor.check_integrity() == []
    successor.close()


@pytest.mark.parametrize("lost", ["catalog", "ledger.host:1", "bus", "doorbell.1"])
def test_a_successor_that_finds_not_everything_drops_all_memory(world: World, lost: str, granularity: int) -> None:
    before = open_files()
    kept = {name: os.dup(fd) for name, fd in world.kept.items() if name != lost}
    successor = started(world, kept, {})
    assert successor.loaded is None
    assert [memory.device.pages for memory in successor.memories.values()] == [0, 0, 0]
    assert successor.check_integrity() == []
    if strict.FOLDER in os.environ:  # there memory outlives every process
        folder = Path(os.environ[strict.FOLDER])
        assert list(folder.glob("*.key")) == []
        assert sum(file.stat().st_blocks for file in folder.iterdir()) == 0
    successor.close()
    assert open_files() == before


def open_files() -> list[str]:
    """Of this process, by number and name."""
    folder = Path("/proc/self/fd")
    numbers = sorted(int(name) for name in os.listdir(folder))
    return [f"{number} {os.readlink(folder / str(number))}" for number in numbers if (folder / str(number)).exists()]


def test_a_successor_has_the_same_memory(world: World) -> None:
    assert try_transition(world, (0, 1, 2)) == "released"
    before, kept = world.checksums(), {name: os.dup(fd) for name, fd in world.kept.items()}
    names = {name: [memory.device.id_of(one) for one in memory.kv] for name, memory in world.holdings.memories.items()}
    held: dict[str, int] = {}
    successor = started(world, kept, held)
    assert set(held) == set(world.kept)
    assert successor.check_integrity() == []
    jobs = successor.checksum_jobs()
    assert {name: device.checksum(address, nbytes) for name, device, address, nbytes in jobs} == before
    for name, memory in successor.memories.items():
        assert [memory.device.id_of(one) for one in memory.kv] == names[name]
        made = memory.claim(memory.device.granularity, "kv", 0)  # beside what the predecessor made
        memory.device.populate(made, 0, made.nbytes)
        memory.device.settle(made)
        memory.device.write_bytes(memory.address(made), b"new")
        memory.release(made)
    successor.close()
