"""A rank's memory follows what it is told, slice by slice: real memfds, real mappings, no other process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest

from elasticmoe.common.devices.base import Device, KeyToken
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.rules import Handle, ProcessRules
from elasticmoe.common.families import record
from elasticmoe.common.families.fingerprint import fingerprint
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.model_spec import KvGeometry, RecordKey, kv_geometry, round_up
from elasticmoe.common.protocol.errors import DeviceError, ElasticMoEError, ProtocolError
from elasticmoe.common.protocol.handles import (
    AttachReply,
    RecordHandle,
    Routing,
    SeatMemory,
    Segment,
    SharedFd,
    SharedHandle,
    SharedKey,
    ShareHandles,
)
from elasticmoe.native.bus import bus_bytes, format_bus
from elasticmoe.native.ledger import format_ledger, ledger_bytes
from elasticmoe.services.worker.hmm import memory as memory_module
from elasticmoe.services.worker.hmm.memory import RankMemory
from tests.devices.backends import granularity
from tests.unit.specs import tiny_mixtral_spec

__all__ = ["granularity"]

SPEC = tiny_mixtral_spec()
SLOT = 1


def geometry(granularity: int) -> KvGeometry:
    return kv_geometry(SPEC, 4, granularity, handle_bytes_min=granularity)


@dataclass
class Owner:
    """What the HMM would hold: handles of all records, filled with a number of their own."""

    device: Device
    handles: dict[RecordKey, Handle] = field(default_factory=dict)
    kv: list[Handle] = field(default_factory=list)
    revision: int = 0
    fds: list[int] = field(default_factory=list)
    shared: ShareHandles = field(default_factory=lambda: ShareHandles(()))
    shared_fds: list[int] = field(default_factory=list)

    @property
    def geometry(self) -> KvGeometry:
        """Of the KV handles."""
        return geometry(self.device.granularity)

    def share(self, handle: Handle) -> SharedHandle:
        token = self.device.export(handle)
        name = self.device.id_of(handle)
        if isinstance(token, KeyToken):
            return SharedHandle(name, token.nbytes, SharedKey(token.key))
        self.shared_fds.append(os.dup(token.fd))
        return SharedHandle(name, token.nbytes, SharedFd(len(self.shared_fds) - 1, token.offset, token.key))

    def seat(self, experts: list[tuple[int, int]], num_kv: int, epochs: tuple[int, ...] = (1,)) -> SeatMemory:
        """The goal with these experts, and in `shared` the handles that it names; the descriptors that they index are
        in `fds` and `shared_fds`."""
        self.revision += 1
        self.fds, self.shared_fds = [], []
        fixed = [RecordKey("base"), *(RecordKey("layer", layer) for layer in range(SPEC.num_layers))]
        keys = [*fixed, *(RecordKey("expert", layer, expert) for layer, expert in experts)]
        while len(self.kv) < num_kv:
            self.kv.append(self.device.create(self.geometry.handle_bytes, "kv"))
        handles = {key: self.handle(key) for key in keys}
        self.shared = ShareHandles(tuple(self.share(one) for one in (*handles.values(), *self.kv[:num_kv])))
        records = tuple(RecordHandle(key, self.device.id_of(handle)) for key, handle in handles.items())
        doorbells = []
        for _ in range(2):
            doorbells.append(len(self.fds))
            self.fds.append(os.eventfd(0))
        routings = tuple(Routing(epoch, ((0,),)) for epoch in epochs)
        kv = tuple(self.device.id_of(handle) for handle in self.kv[:num_kv])
        return SeatMemory(self.revision, records, kv, routings, (0, SLOT), tuple(doorbells))

    def hand(self, memory: RankMemory, seat: SeatMemory) -> None:
        """All that the HMM would send."""
        memory.take(self.shared, self.shared_fds)
        memory.take(seat, self.fds)

    def handle(self, key: RecordKey) -> Handle:
        if key not in self.handles:
            nbytes = round_up(record(SPEC, key).nbytes, self.device.granularity)
            handle = self.handles[key] = self.device.create(nbytes, "weights")
            range_ = self.device.reserve(nbytes)
            self.device.map(range_, 0, handle, True)
            self.device.write_bytes(range_.base, bytes([number_of(key)]) * nbytes)
            self.device.unmap(range_, 0)
        return self.handles[key]

    def reply(self) -> tuple[AttachReply, list[int]]:
        bus, ledger = bus_bytes(2, 8, 8, 2), ledger_bytes(4, 32, 8, 256)
        segments, fds = [], list[int]()
        for name, nbytes, make in (
            ("bus", round_up(bus, 4096), lambda at, n: format_bus(at, n, 2, 8, 8, 2)),
            ("ledger", round_up(ledger, 4096), lambda at, n: format_ledger(at, n, 4, 32, 8, 256)),
        ):
            shared = HostShared.create(name)
            shared.resize(nbytes)
            make(shared.address, nbytes)
            fds.append(os.dup(shared.fd))
            segments.append(Segment(len(fds) - 1, nbytes))
            shared.close()
        reserved = 64 * self.geometry.handle_bytes
        granularity, bus_segment, ledger_segment = self.device.granularity, *segments
        reply = AttachReply(
            "id", SPEC, fingerprint(SPEC), granularity, self.geometry, reserved, bus_segment, ledger_segment
        )
        return reply, fds


def number_of(key: RecordKey) -> int:
    return 1 + key.layer * 16 + key.expert if key.kind == "expert" else 200


@pytest.fixture
def owner(granularity: int) -> Iterator[Owner]:
    device = open_device("host:1", granularity, 256 << 20, rules=ProcessRules())
    yield Owner(device)
    device.close()


def attach(owner: Owner, experts: list[tuple[int, int]], num_kv: int = 2) -> RankMemory:
    seat = owner.seat(experts, num_kv)
    handed = [(owner.shared, owner.shared_fds), (seat, owner.fds)]
    return RankMemory(*owner.reply(), "host:1", SLOT, handed)


def byte_of(memory: RankMemory, layer: int, expert: int) -> int:
    return int(memory.weights.experts[layer]["w13"][expert].view(-1).view(memory_module.torch.uint8)[0])


def reach(memory: RankMemory, *, refusals: int = 0) -> tuple[int, list[int]]:
    """Advance to the goal; the revision, and what KV sizes were asked for."""
    asked: list[int] = []

    def resize(num_blocks: int) -> bool:
        asked.append(num_blocks)
        if len(asked) <= refusals:
            return False
        memory.kv.num_blocks = num_blocks
        return True

    for _ in range(1_000):
        if revision := memory.advance(resize):
            return revision, asked
    raise AssertionError("the goal was not reached")


def test_attach_maps_what_is_named_and_closes_every_descriptor(owner: Owner) -> None:
    memory = attach(owner, [(0, 0), (0, 3), (1, 2)])
    assert owner.fds == owner.shared_fds == []
    assert memory.held == [[0, 3], [2]]
    assert byte_of(memory, 0, 3) == number_of(RecordKey("expert", 0, 3))
    assert memory.kv.num_blocks == 2 * owner.geometry.blocks_per_handle
    assert not memory.is_changing
    memory.close()


def test_experts_come_and_go_and_what_stays_keeps_its_place(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "SLICE_BYTES", 1)  # one record between two steps
    memory = attach(owner, [(0, 0), (0, 3), (1, 2)])
    address = memory.weights.experts[0]["w13"].data_ptr()
    owner.hand(memory, owner.seat([(0, 0), (0, 1), (1, 2), (1, 3)], 2, (1, 2)))
    assert memory.is_changing
    assert set(memory.routings) == {1, 2}
    revision, _ = reach(memory)
    assert revision == owner.revision
    assert owner.fds == owner.shared_fds == []
    assert memory.held == [[0, 1], [2, 3]]
    assert memory.weights.experts[0]["w13"].data_ptr() == address
    assert [byte_of(memory, layer, expert) for layer, expert in ((0, 0), (0, 1), (1, 3))] == [
        number_of(RecordKey("expert", *key)) for key in ((0, 0), (0, 1), (1, 3))
    ]
    memory.close()


def test_kv_shrinks_only_when_its_blocks_are_vacated_and_grows_again(owner: Owner) -> None:
    memory = attach(owner, [(0, 0)], num_kv=4)
    per_handle = owner.geometry.blocks_per_handle
    owner.hand(memory, owner.seat([(0, 0)], 1))
    revision, asked = reach(memory, refusals=3)
    assert revision == owner.revision
    assert asked[:4] == [per_handle] * 4
    assert memory.kv.num_blocks == per_handle
    owner.hand(memory, owner.seat([(0, 0)], 3))
    assert reach(memory)[0] == owner.revision
    assert memory.kv.num_blocks == 3 * per_handle
    memory.close()


def test_a_newer_goal_replaces_one_in_progress(owner: Owner) -> None:
    memory = attach(owner, [(0, 0)], num_kv=2)
    owner.hand(memory, owner.seat([(0, 0)], 1))
    assert memory.advance(lambda _: False) == 0
    owner.hand(memory, owner.seat([(0, 0), (0, 1)], 2))
    revision, asked = reach(memory)
    assert revision == owner.revision
    assert asked[-1] == 2 * owner.geometry.blocks_per_handle  # the shrinking is taken back
    assert memory.held[0] == [0, 1]
    memory.close()


def test_what_is_mapped_cannot_be_said_to_lie_elsewhere(owner: Owner) -> None:
    memory = attach(owner, [(0, 0), (0, 1)])
    seat = owner.seat([(0, 0), (0, 1)], 2)
    first, *others = [item for item in seat.records if item.key.kind == "expert"]
    moved = RecordHandle(first.key, others[0].handle)
    records = (*(item for item in seat.records if item.key != first.key), moved)
    bad = SeatMemory(9, records, seat.kv, seat.routings, seat.slots, seat.doorbells)
    with pytest.raises(DeviceError, match=r"expert\.0\.0 cannot move"):
        owner.hand(memory, bad)
    bad = SeatMemory(9, seat.records, seat.kv[::-1], seat.routings, seat.slots, seat.doorbells)
    with pytest.raises(DeviceError, match="KV handle 0 cannot move"):
        memory.take(bad, owner.fds)
    grown = msgspec.structs.replace(owner.shared.handles[0], nbytes=1 << 30)
    with pytest.raises(DeviceError, match="is said to have 1073741824"):
        memory.take(ShareHandles((grown,)), [])
    memory.close()


def test_a_handle_that_has_another_ones_place_and_id_is_refused(owner: Owner, granularity: int) -> None:
    """The rank was away while its handle was given back. On the host, the place is the memory, and nothing is wrong."""
    memory, key = attach(owner, [(0, 0), (0, 1)]), RecordKey("expert", 0, 1)
    old = owner.handles.pop(key)
    owner.device.release(old)
    seat = owner.seat([(0, 0), (0, 1)], 2)
    assert owner.handles[key].place == old.place
    if granularity == 4096:
        owner.hand(memory, seat)
        assert byte_of(memory, 0, 1) == number_of(key)
    else:
        with pytest.raises(DeviceError, match="is said to be another one") as caught:
            owner.hand(memory, seat)
        assert caught.value.code == "record_moved"
    memory.close()


@pytest.mark.parametrize("key", [RecordKey("expert", 0, 99), RecordKey("expert", 7, 0)])
def test_records_of_another_model_are_refused(owner: Owner, key: RecordKey) -> None:
    memory = attach(owner, [(0, 0)])
    seat = owner.seat([(0, 0), (0, 1)], 2)
    records = (*seat.records, RecordHandle(key, seat.records[-1].handle))
    owner.hand(memory, SeatMemory(9, records, seat.kv, seat.routings, seat.slots, seat.doorbells))
    with pytest.raises(ProtocolError, match="is not a record of this model"):
        reach(memory)
    memory.close()


def test_a_record_that_is_not_handed_over_fails_the_attach(owner: Owner) -> None:
    seat = owner.seat([(0, 0)], 1)
    cut = SeatMemory(1, seat.records[1:], seat.kv, seat.routings, seat.slots, seat.doorbells)
    handed = [(owner.shared, owner.shared_fds), (cut, owner.fds)]
    with pytest.raises(ElasticMoEError, match="of record base, 0 bytes were handed over; it has at least"):
        RankMemory(*owner.reply(), "host:1", SLOT, handed)
    assert owner.fds == owner.shared_fds == []


def test_a_device_that_cannot_be_opened_leaves_nothing_open(owner: Owner) -> None:
    before = set(os.listdir("/proc/self/fd"))
    reply, fds = owner.reply()
    with pytest.raises(DeviceError) as caught:
        RankMemory(msgspec.structs.replace(reply, granularity=3), fds, "host:1", SLOT, [])
    assert caught.value.code == "bad_granularity"
    assert fds == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_memory_that_another_version_laid_out_is_not_mapped(owner: Owner) -> None:
    """Nothing else would tell: a field that it has put into the spec and this version does not know is dropped."""
    before = set(os.listdir("/proc/self/fd"))
    reply, fds = owner.reply()
    spec = msgspec.json.decode(msgspec.json.encode(reply.spec))
    assert msgspec.convert(spec | {"norm_plus_one": True}, type(reply.spec)) == reply.spec
    with pytest.raises(ProtocolError, match="laid out by a version") as caught:
        RankMemory(msgspec.structs.replace(reply, fingerprint="another"), fds, "host:1", SLOT, [])
    assert caught.value.code == "version_mismatch"
    assert fds == []
    assert set(os.listdir("/proc/self/fd")) == before


def test_handles_are_kept_and_dropped_as_goals_name_them(owner: Owner) -> None:
    memory = attach(owner, [(0, 0)], num_kv=2)
    held = len(memory.device._imports)
    owner.hand(memory, owner.seat([(0, 0), (0, 1)], 2))  # shares what is there already, too
    assert len(memory.device._imports) == held + 1
    owner.hand(memory, owner.seat([(0, 0)], 2))  # replaces a goal of which nothing was mapped
    assert len(memory.device._imports) == held
    reach(memory)
    owner.hand(memory, owner.seat([(0, 0)], 1))
    again = owner.seat([(0, 0)], 2)
    memory.take(owner.shared, owner.shared_fds)  # while the other goal is worked at, whose KV goes
    reach(memory)
    memory.take(again, owner.fds)
    assert reach(memory)[0] == again.revision
    assert len(memory.device._imports) == held
    memory.close()


def test_a_goal_that_names_what_was_not_shared_is_refused(owner: Owner) -> None:
    memory = attach(owner, [(0, 0)])
    seat = owner.seat([(0, 0), (0, 1)], 2)
    with pytest.raises(ProtocolError, match="is named, but was not shared"):
        memory.take(seat, owner.fds)
    assert owner.fds == []
    memory.take(ShareHandles(()), owner.shared_fds)
    if isinstance(owner.shared.handles[0].token, SharedFd):
        with pytest.raises(ProtocolError, match="names descriptor 0 of 0"):
            memory.take(owner.shared, [])
    memory.close()
