"""The HMM: the product's service with its catalog, transitions and supply of memory.

What is simulated: pages (memory.py), the threads that make, release and copy them (time passes), the keeper's snapshot,
the channel to each rank (ordered, nothing is lost while both live), the bus (values).

Its process's ends: hmm_ends.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from elasticmoe.common.capacity import Sizes, sizes_of
from elasticmoe.common.devices.base import Handle
from elasticmoe.common.devices.driver import MemoryInfo
from elasticmoe.common.layout import Layout, keys_on
from elasticmoe.common.protocol.codec import Received
from elasticmoe.common.protocol.handles import Attach
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.common.seat_sizes import LedgerSizes, size_ledger
from elasticmoe.common.sharding import sharded
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.hmm.background import Background as HmmBackground
from elasticmoe.services.hmm.memory.catalog import Catalog, Loaded, Transition
from elasticmoe.services.hmm.memory.claims import ClaimedPart
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.large_pages import LargePages
from elasticmoe.services.hmm.memory.transfer import Peaks, Supply
from elasticmoe.services.hmm.parts import Parts
from elasticmoe.services.hmm.service import Hmm as HmmService
from elasticmoe.services.hmm.transition.transition import Transitions
from tests.claims import make_kv, make_record
from tests.sim.barrier import Bus
from tests.sim.heap import Actor
from tests.sim.hmm_ends import Attachments, Background, Copies, Parking, Server
from tests.sim.memory import GEOMETRY, PAGE, Memory, RealBytes, SimLedger, SimTransfer
from tests.sim.store import NotingFence
from tests.unit.specs import tiny_mixtral_spec

if TYPE_CHECKING:
    from tests.sim.rank import Channel
    from tests.sim.world import World

SPEC = tiny_mixtral_spec(num_local_experts=4, num_hidden_layers=2)
SPECS = {1: SPEC, 2: sharded(SPEC, 2)}
"""By the ranks of a replica."""
CHANNEL_S = 0.003
SEGMENT = SimpleNamespace(fd=0, nbytes=PAGE)  # stands for the bus in messages


class Hmm(Actor):
    """The service. `memories`, `loaded`, `transition`: its holdings; `disk`: fences; `bus`: memory that outlives it.

    `by_slot`: the ranks that are attached.
    """

    def __init__(self, world: World, devices: Sequence[str], budget: int, load: LoadModel) -> None:
        super().__init__(world.sim, "hmm")
        self.world = world
        self._real = {name: RealBytes(budget) for name in devices}
        self._budget = budget
        self.memories: dict[str, Memory] = {}
        self.told: dict[str, MemoryInfo] = {}  # no driver is there
        self.granularity = PAGE
        self.num_readers = 0
        self.failure_rate = 0.0
        self.gone: set[str] = set()  # devices whose memory is lost
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
        self._begin()
        self.write()
        self.service.adopt()
        self.sim.actors["hmm"] = self

    def _open_memories(self) -> None:
        """As a process of its own has them."""
        for name, real in self._real.items():
            memory = self.memories[name] = Memory(name, self._budget, real)
            memory.sim_device.is_lost = self._is_lost
            memory.sim_device.check_unused = partial(self._check_unused, memory)

    def _fill(self, load: LoadModel) -> None:
        self._open_memories()
        kv_handles = load.kv_bytes_max // PAGE
        for seat in load.layout.seats:
            memory = self.memories[seat.device]
            for key in keys_on(load.layout, seat.slot):
                make_record(memory, key, self._sizes.of(key))
            for _ in range(kv_handles):
                make_kv(memory, PAGE)
            memory.ledger = memory.claim_ledger(size_ledger(load, PAGE).nbytes)
        footprint = max(sum(memory.device.used.values()) for memory in self.memories.values())
        self.loaded = Loaded(load, self.spec, GEOMETRY, PAGE, load.layout, "memory", footprint, kv_handles, "")
        self.doorbells = dict.fromkeys(load.layout.slots, 0)

    def _begin(self) -> None:
        """What a process of its own has."""
        self.is_alive = True
        self.server = Server(self.sim)
        self.attachments = Attachments(self)
        background = Background(self)
        holdings, threads = cast(Holdings, self), cast(HmmBackground, background)
        self.supply = Supply(holdings, threads, ledger=self._claim_ledger, transfer=self._transfer)
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
            supply=self.supply,
            large_pages=LargePages(self, self.supply, background, get_logger("sim"), is_wanted=False),  # type: ignore[arg-type]
            fence=self.fence,
        )
        self.service = HmmService(parts)

    def _claim_ledger(self, device: str, sizes: LedgerSizes) -> SimLedger:
        return self.memories[device].claim_ledger(sizes.nbytes)

    def _transfer(self, parts: Sequence[ClaimedPart], rate: int, peaks: Peaks, *_: object) -> SimTransfer:
        return SimTransfer(parts, rate, peaks, self.sim.rng, self.failure_rate, self.gone.__contains__)

    def start(self) -> None:
        """See elasticmoe.services.hmm.memory.holdings. A new process goes on with what the keeper has."""
        self.loaded, self.transition, entries, doorbells = self._snapshot
        self.doorbells = dict(doorbells)
        self._open_memories()
        for entry in entries:
            self.memories[entry.device].fill(entry)

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
        self._snapshot = (self.loaded, self.transition, self.catalog().devices, dict(self.doorbells))
        self.on_change()

    def _is_lost(self, address: int) -> bool:
        lost = (self._real[name].buffer for name in self.gone)
        return any(0 <= address - ctypes.addressof(buffer) < len(buffer) for buffer in lost)

    def catalog(self) -> Catalog:
        """See elasticmoe.services.hmm.memory.holdings."""
        entries = tuple(memory.entry() for memory in self.memories.values())
        return Catalog(granularity=PAGE, devices=entries, loaded=self.loaded, transition=self.transition)

    def open_layout(self, layout: Layout) -> None:
        """See elasticmoe.services.hmm.memory.holdings."""
        for slot in set(layout.slots) - set(self.doorbells):
            self.doorbells[slot] = 0
            self.bus.blocks[slot] = 0

    def close_slots(self, slots: set[int]) -> None:
        """See elasticmoe.services.hmm.memory.holdings."""
        for slot in slots:
            self.doorbells.pop(slot, None)

    def ring(self) -> None:
        """Wake all ranks."""
        for process in self.world.ranks.values():
            if process.is_ready:
                process.ring()

    def _check_unused(self, memory: Memory, handle: Handle) -> None:
        """What is given back is mapped by no living rank."""
        name = memory.device.id_of(handle)
        for rank in self.world.ranks.values():
            if rank.seat.device == memory.device.name:
                text = f"{handle.space} handle {name} of {memory.device.name} is mapped and given back"
                self.expect(name not in rank.handles, text)

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
