"""The HMM: the product's service over memory that is only counted.

What is simulated: pages (sets and counts), the threads that make, release and copy them (time passes), the keeper's
snapshot, the channel to each rank (ordered, nothing is lost while both live), the bus (values).

Its process's ends: hmm_ends.py.

One file of more than 400 lines: it stands for one process, whose parts share its holdings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from elasticmoe.common.capacity import Sizes, sizes_of
from elasticmoe.common.devices.base import KeyToken
from elasticmoe.common.devices.driver import MemoryInfo
from elasticmoe.common.families import records
from elasticmoe.common.layout import Layout, keys_on
from elasticmoe.common.model_spec import KvGeometry, RecordKey
from elasticmoe.common.protocol.codec import Received
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit, ElasticMoEError, Unavailable
from elasticmoe.common.protocol.handles import Attach, SeatMemory
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.common.seat_sizes import size_ledger
from elasticmoe.common.sharding import sharded
from elasticmoe.common.telemetry import get_logger
from elasticmoe.native.ledger import Ledger, format_ledger
from elasticmoe.native.ledger import ledger_bytes as native_ledger_bytes
from elasticmoe.services.hmm.memory.catalog import Catalog, DeviceEntry, Loaded, Placed, Span, Transition
from elasticmoe.services.hmm.memory.large_pages import LargePages
from elasticmoe.services.hmm.parts import Parts
from elasticmoe.services.hmm.service import Hmm as HmmService
from elasticmoe.services.hmm.transition.transition import Transitions
from tests.sim.barrier import Bus
from tests.sim.heap import Actor
from tests.sim.hmm_ends import Attachments, Background, Copies, Parking, Server
from tests.sim.store import NotingFence
from tests.unit.specs import tiny_mixtral_spec

if TYPE_CHECKING:
    from tests.sim.rank import Channel
    from tests.sim.world import World

PAGE = 4096
SPEC = tiny_mixtral_spec(num_local_experts=4, num_hidden_layers=2)
SPECS = {1: SPEC, 2: sharded(SPEC, 2)}
"""By the ranks of a replica."""
BLOCK_SIZE, BLOCKS_PER_HANDLE = 4, 4
GEOMETRY = KvGeometry(BLOCK_SIZE, 4 * BLOCK_SIZE, 4 * BLOCK_SIZE, BLOCKS_PER_HANDLE, PAGE)
MAX_TOKENS, MAX_SEQUENCES, MAX_MODEL_LEN = 16, 4, 48
BLOCKS_MAX = 4096
CHANNEL_S = 0.003
RECORD_IDS = {
    key: 1_000_000 + number
    for number, key in enumerate(dict.fromkeys(record.key for spec in SPECS.values() for record in records(spec)))
}

SEGMENT = SimpleNamespace(fd=0, nbytes=PAGE)  # stands for the bus in messages


class Device:
    """A device's name and budget in bytes. A KV handle is its own id; those of records are above. `is_lost`: whether
    the memory at an address is."""

    range_bytes_max = 1 << 40
    pages = 0  # not simulated

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.is_lost: Callable[[int], bool] = lambda _address: False
        self.used = {"weights": 0, "kv": 0, "mailbox": 0}  # as of the latest snapshot

    def admit(self, importers: Sequence[int]) -> None:
        """See elasticmoe.common.devices. Nobody is refused."""

    def copy_async(self, parts: Sequence[tuple[int, int, int]]) -> SimpleNamespace:
        """See elasticmoe.common.devices. Done at once."""
        for target, source, nbytes in parts:
            if self.is_lost(target) or self.is_lost(source):
                raise DeviceError("a device is gone")
            ctypes.memmove(target, source, nbytes)
        return SimpleNamespace(wait=lambda: None)

    def id_of(self, handle: RecordKey | int) -> int:
        """See elasticmoe.common.devices."""
        return RECORD_IDS[handle] if isinstance(handle, RecordKey) else handle

    def export(self, handle: RecordKey | int) -> KeyToken:
        """See elasticmoe.common.devices."""
        return KeyToken(self.id_of(handle), PAGE)


class Memory:
    """One device: real KV bytes and a real ledger, which outlive every process; counted pages. `budget` in bytes."""

    mailbox = None  # ranks exchange no rows here

    def __init__(self, name: str, budget: int) -> None:
        self.device = Device(name, budget)
        self.records: dict[RecordKey, RecordKey] = {}
        self.kv: list[int] = []
        self.ledger: object | None = None
        self.num_releasing = 0  # bytes
        self.num_claimed = 0
        self.buffer = ctypes.create_string_buffer(budget // PAGE * BLOCKS_PER_HANDLE * GEOMETRY.block_bytes)
        self.values = memoryview(self.buffer).cast("B").cast("i")
        self.poison = memoryview(b"\xff" * self.values.nbytes).cast("i")  # what is read where it is lost
        sizes = (MAX_SEQUENCES, MAX_MODEL_LEN, MAX_MODEL_LEN // BLOCK_SIZE + 4, 4096)
        self._row_bytes = native_ledger_bytes(*sizes)
        self._row_sizes = sizes
        self._rows = ctypes.create_string_buffer(self._row_bytes + 64)
        self._next_kv = 0
        self.format()

    def format(self) -> None:
        """A new ledger."""
        address = (ctypes.addressof(self._rows) + 63) // 64 * 64
        ctypes.memset(address, 0, self._row_bytes)
        format_ledger(address, self._row_bytes, *self._row_sizes)
        self.rows = Ledger(address, self._row_bytes)

    def take_all(self) -> list[Any]:
        """Empty the device."""
        taken = [*self.records, *self.kv, *(("ledger",) if self.ledger else ())]
        self.records, self.kv, self.ledger = {}, [], None
        return taken

    def address(self, handle: int) -> int:
        """See elasticmoe.services.hmm.memory.memory. The bytes of a KV handle are where its place among them is."""
        return ctypes.addressof(self.buffer) + self.kv.index(handle) * BLOCKS_PER_HANDLE * GEOMETRY.block_bytes

    def new_kv(self) -> int:
        """A KV handle."""
        self._next_kv += 1
        return self._next_kv


def held_by(seat: SeatMemory) -> set[Any]:
    """The handles that a seat's memory names."""
    return {*(record.key for record in seat.records), *seat.kv}


def named_by(seat: SeatMemory) -> set[int]:
    """Their ids."""
    return {*(record.handle for record in seat.records), *seat.kv}


class Supply:
    """Threads that make and give back memory: it takes time, and making may fail."""

    def __init__(self, hmm: Hmm) -> None:
        self._hmm = hmm
        self._claims: list[tuple[Memory, str, Any, int]] = []
        self._sources: set[str] = set()
        self.is_transferring = False
        self._num_releasing = 0
        self.bytes_copied = self.bytes_done = 0
        self.peaks = SimpleNamespace(by_device={})

    @property
    def is_releasing(self) -> bool:
        """See elasticmoe.services.hmm.memory.transfer."""
        return self._num_releasing > 0

    def begin(self, peaks: Any = None) -> None:
        """See elasticmoe.services.hmm.memory.transfer."""

    def give_back_leftovers(self) -> None:
        """See elasticmoe.services.hmm.memory.transfer. A kernel that can split its pages leaves none."""

    def _claim(self, memory: Memory, space: str, key: Any, nbytes: int) -> None:
        if self._hmm.bytes_of(memory) + nbytes > memory.device.budget:
            raise DoesNotFit(f"{memory.device.name}: no room for {nbytes} bytes")
        memory.num_claimed += nbytes
        self._claims.append((memory, space, key, nbytes))

    def claim_stage(self, transition: Transition, loaded: Loaded) -> None:
        """See elasticmoe.services.hmm.memory.transfer."""
        memories, sizes = self._hmm.memories, sizes_of(loaded.spec, PAGE)
        for seat in transition.after.seats:
            if transition.before.seat_on(seat.device) is None:
                memory = memories[seat.device]
                self._claim(memory, "ledger", None, self._hmm.ledger_bytes)
                self.claim_kv(memory, transition.request.kv_handles[seat.device], loaded)
        self._sources = {copy.source for copy in transition.request.copies}
        for copy in transition.request.copies:
            self._hmm.expect(
                not copy.source or copy.key in memories[copy.source].records, f"{copy.key} is copied from nothing"
            )
            self._claim(memories[copy.target], "records", copy.key, sizes.of(copy.key))

    def claim_kv(self, memory: Memory, count: int, loaded: Loaded) -> None:
        """See elasticmoe.services.hmm.memory.transfer."""
        for _ in range(count):
            self._claim(memory, "kv", memory.new_kv(), loaded.kv.handle_bytes)

    def start(self, rate: int, loaded: Loaded, then: Callable[[ElasticMoEError | None], None]) -> None:
        """See elasticmoe.services.hmm.memory.transfer."""
        self.is_transferring = True
        hmm = self._hmm
        fails = hmm.sim.rng.random() < hmm.failure_rate

        def over() -> None:
            self.is_transferring = False
            is_cut = bool(hmm.gone & {*self._sources, *(memory.device.name for memory, *_ in self._claims)})
            self._sources = set()
            error = Unavailable("the disk is full", code="storage_full") if fails else None
            then(Unavailable("a device is gone", code="device_error") if is_cut else error)
            hmm.turn()

        hmm.after(0.02 + hmm.sim.rng.random() * (1.5 if rate else 0.3), over)

    def settle(self) -> None:
        """See elasticmoe.services.hmm.memory.transfer."""
        for memory, space, key, nbytes in self._claims:
            memory.num_claimed -= nbytes
            if space == "records":
                memory.records[key] = key
            elif space == "kv":
                memory.kv.append(key)
            else:
                memory.ledger = self._hmm.ledger
                memory.format()
        self._claims.clear()

    def drop_claims(self) -> None:
        """See elasticmoe.services.hmm.memory.transfer."""
        for memory, _, _, nbytes in self._claims:
            memory.num_claimed -= nbytes
        self._claims.clear()

    def stop(self) -> None:
        """See elasticmoe.services.hmm.memory.transfer."""

    def give_back(self, gone: Sequence[tuple[Memory, Any]]) -> None:
        """See elasticmoe.services.hmm.memory.transfer. Nobody may have it mapped."""
        for memory, handle in gone:
            self._hmm.check_unused(memory, handle)
        nbytes = [(memory, self._hmm.handle_bytes(handle)) for memory, handle in gone]
        for memory, size in nbytes:
            memory.num_releasing += size
        self._num_releasing += 1

        def over() -> None:
            for memory, size in nbytes:
                memory.num_releasing -= size
            self._num_releasing -= 1
            self._hmm.turn()

        self._hmm.after(0.02, over)


class Hmm(Actor):
    """The service. `memories`, `loaded`, `transition`: its holdings; `disk`: fences; `bus`: memory that outlives it.

    `by_slot`: the ranks that are attached.
    """

    def __init__(self, world: World, devices: Sequence[str], budget: int, load: LoadModel) -> None:
        super().__init__(world.sim, "hmm")
        self.world = world
        self.memories = {name: Memory(name, budget) for name in devices}
        self.told: dict[str, MemoryInfo] = {}  # no driver is there
        self.granularity = PAGE
        self.num_readers = 0
        self.failure_rate = 0.0
        self.gone: set[str] = set()  # devices whose memory is lost
        for memory in self.memories.values():
            memory.device.is_lost = self._is_lost
        self.ledger_bytes = size_ledger(load, PAGE).nbytes
        self.ledger = SimpleNamespace(fd=0, nbytes=self.ledger_bytes)  # stands for one in messages
        self.bus = Bus()
        self.segment = SimpleNamespace(bus=self.bus, shared=SEGMENT)
        self.spec = SPECS[load.layout.tp]
        self._sizes: Sizes = sizes_of(self.spec, PAGE)
        self.on_change: Callable[[], None] = lambda: None
        self.expect: Callable[[bool, str], None] = lambda _is_true, _text: None
        self.loaded: Loaded | None = None
        self.transition: Transition | None = None
        self.doorbells: dict[int, int] = {}
        self._fill(load)
        self._spans: dict[tuple[RecordKey, int], Placed] = {}
        self._begin()
        self.write()
        self.service.adopt()
        self.sim.actors["hmm"] = self

    def _fill(self, load: LoadModel) -> None:
        footprint = 0
        for seat in load.layout.seats:
            memory = self.memories[seat.device]
            memory.records = {key: key for key in keys_on(load.layout, seat.slot)}
            memory.ledger = self.ledger
            memory.kv = [memory.new_kv() for _ in range(load.kv_bytes_max // PAGE)]
        self.loaded = Loaded(load, self.spec, GEOMETRY, PAGE, load.layout, "memory", 0, load.kv_bytes_max // PAGE, "")
        for memory in self.memories.values():
            footprint = max(footprint, sum(self._sizes.of(key) for key in memory.records) + len(memory.kv) * PAGE)
        self.loaded = Loaded(
            load, self.spec, GEOMETRY, PAGE, load.layout, "memory", footprint, load.kv_bytes_max // PAGE, ""
        )
        self.doorbells = dict.fromkeys(load.layout.slots, 0)

    def _begin(self) -> None:
        """What a process of its own has."""
        self.is_alive = True
        self.server = Server(self.sim)
        self.attachments = Attachments(self)
        background = Background(self)
        self.supply = Supply(self)
        self.fence = NotingFence(self.world, "hmm")
        parts: Any = Parts(
            devices="",
            clock=self.sim.clock,
            log=get_logger("sim"),
            server=self.server,
            attachments=self.attachments,  # type: ignore[arg-type]
            parking=Parking(),  # type: ignore[arg-type]
            holdings=self,  # type: ignore[arg-type]
            background=background,  # type: ignore[arg-type]
            copies=Copies(background, self.sim.clock),
            supply=self.supply,  # type: ignore[arg-type]
            large_pages=LargePages(self, self.supply, background, get_logger("sim"), is_wanted=False),  # type: ignore[arg-type]
            fence=self.fence,
        )
        self.service = HmmService(parts)

    def start(self) -> None:
        """See elasticmoe.services.hmm.memory.holdings. A new process goes on with what the keeper has."""
        self.loaded, self.transition, held, self.doorbells = self._snapshot
        for name, (weights, kv, ledger) in held.items():
            memory = self.memories[name]
            memory.records, memory.kv, memory.ledger = dict(weights), list(kv), ledger
            memory.num_claimed = memory.num_releasing = 0

    @property
    def by_slot(self) -> dict[int, Any]:
        """The ranks that are attached."""
        return self.attachments.by_slot

    @property
    def transitions(self) -> Transitions:
        """The product's, of this life."""
        return self.service._transitions

    # ---- holdings, attachments and copies, as the transitions see them

    def write(self) -> None:
        """The snapshot."""
        held = {name: (dict(m.records), list(m.kv), m.ledger) for name, m in self.memories.items()}
        for memory in self.memories.values():
            weights = sum(self._sizes.of(key) for key in memory.records)
            memory.device.used = {"weights": weights, "kv": len(memory.kv) * PAGE, "mailbox": 0}
        self._snapshot = (self.loaded, self.transition, held, dict(self.doorbells))
        self.on_change()

    def _is_lost(self, address: int) -> bool:
        lost = (self.memories[name].buffer for name in self.gone)
        return any(0 <= address - ctypes.addressof(buffer) < len(buffer) for buffer in lost)

    def catalog(self) -> Catalog:
        """As the product's, with made-up places."""
        entries = []
        for name, memory in self.memories.items():
            placed = tuple(self._placed(key, index) for index, key in enumerate(memory.records))
            kv = tuple(Span(i * PAGE, PAGE) for i in range(len(memory.kv)))
            ledger = self.ledger_bytes if memory.ledger else 0
            entries.append(DeviceEntry(name, memory.device.budget, placed, kv, ledger))
        return Catalog(granularity=PAGE, devices=tuple(entries), loaded=self.loaded, transition=self.transition)

    def _placed(self, key: RecordKey, index: int) -> Placed:
        if (key, index) not in self._spans:
            self._spans[key, index] = Placed(key, Span(index << 24, self._sizes.of(key)))
        return self._spans[key, index]

    def bytes_of(self, memory: Memory) -> int:
        """All that is in use, or about to be."""
        held = sum(self._sizes.of(key) for key in memory.records) + len(memory.kv) * PAGE
        return held + (self.ledger_bytes if memory.ledger else 0) + memory.num_claimed + memory.num_releasing

    def handle_bytes(self, handle: Any) -> int:
        """Of a record, a KV handle or a ledger."""
        if isinstance(handle, RecordKey):
            return self._sizes.of(handle)
        return PAGE if isinstance(handle, int) else self.ledger_bytes

    def open_layout(self, layout: Layout) -> None:
        """See elasticmoe.services.hmm.memory.holdings."""
        for slot in layout.slots:
            self.doorbells.setdefault(slot, 0)

    def close_slots(self, slots: set[int]) -> None:
        """See elasticmoe.services.hmm.memory.holdings."""
        for slot in slots:
            self.doorbells.pop(slot, None)

    def ring(self) -> None:
        """Wake all ranks."""
        for process in self.world.ranks.values():
            if process.is_ready:
                process.ring()

    def check_unused(self, memory: Memory, handle: Any) -> None:
        """What is given back is mapped by no living rank."""
        for rank in self.world.ranks.values():
            if rank.seat.device == memory.device.name:
                self.expect(handle not in rank.held, f"{handle} of {memory.device.name} is mapped and given back")

    # ---- turns

    def turn(self) -> None:
        """The loop has something to look at."""
        self.service.turn(set())
        self.on_change()

    def receive(self, sender: str, message: Received[Any]) -> None:
        """One message."""
        self.server.inbox.append((sender.encode(), message))
        self.turn()

    def introduce(self, channel: Channel, request: Attach) -> None:
        """A rank asks to be attached; it is answered before this returns."""
        self.attachments.asking.append((channel, request))
        self.turn()

    def applied(self, channel: Channel, revision: int) -> None:
        """A rank has mapped what was sent."""
        self.attachments.note_applied(channel, revision)
        self.turn()

    def detached(self, channel: Channel) -> None:
        """A rank's connection has ended."""
        self.attachments.ended.append(channel)
        self.turn()

    # ---- life

    def crash(self, down_s: float) -> None:
        """Killed, and back later with what the keeper has."""
        self.sim.note(f"hmm: killed for {down_s:.2f} s")
        self.end()
        for attached in self.by_slot.values():
            attached.channel.process.after(CHANNEL_S, attached.channel.cut)
        self.sim.push(self.sim.now + down_s, None, 0, self._restart, ())

    def _restart(self) -> None:
        self.sim.note("hmm: back")
        self._begin()
        self.service.adopt()
        self.beat(self.life)

    def beat(self, life: int) -> None:
        """Turns without an event, as the loop has them."""
        if life == self.life and self.is_alive:
            self.turn()
            self.after(1.0, self.beat, life)
