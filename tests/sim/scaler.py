"""The scaler: the product's. What is simulated: its process, its ends of transports, and the clients of its orders."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import ElasticMoEError, Fenced
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow
from elasticmoe.services.scaler.control.admission import Accepted, CancelOperation, Order
from elasticmoe.services.scaler.operation.operation import Operation, Request
from elasticmoe.services.scaler.parts import ScalerParts
from elasticmoe.services.scaler.planning.plan import Target
from elasticmoe.services.scaler.service import Scaler as ScalerService
from tests.sim.heap import Actor, Crashed
from tests.sim.memory import MAX_MODEL_LEN, MAX_SEQUENCES, MAX_TOKENS
from tests.sim.store import DiskFence, StoreReserve

if TYPE_CHECKING:
    from tests.sim.world import World

TURN_S = 0.2  # the machine is busy: nobody sleeps for less
WRITE_S, LOOK_S = 0.02, 0.1  # of the journal's thread
CONFIG = ScalerConfig(
    run_dir="/nonexistent",
    model="/m",
    devices="host:4",
    lease_ms=3_000,
    max_tokens_per_step=MAX_TOKENS,
    max_sequences=MAX_SEQUENCES,
    max_model_len=MAX_MODEL_LEN,
)


class Client:
    """A connection to the HMM, the pool or a rank."""

    def __init__(self, process: Scaler, name: str) -> None:
        self._process, self._name = process, name
        self.epoch = 0
        self.came: deque[Received[Any]] = deque()

    def send(self, body: Message) -> int:
        """See elasticmoe.common.endpoints."""
        sim, me = self._process.sim, self._process.name
        seq = sim.next_seq()
        sim.send(me, self._name, Received(self.epoch, me, seq, body))
        return seq

    def receive(self) -> Received[Any] | None:
        """See elasticmoe.common.endpoints."""
        return self.came.popleft() if self.came else None

    def call(self, body: Message, *, deadline_ms: int) -> tuple[Any, list[Received[Any]]]:
        """See elasticmoe.common.endpoints. What else comes meanwhile is received afterwards."""
        process = self._process
        if isinstance(body, StartRank) and self.epoch == process.world.disk["scaler"]:  # else it is refused
            process.world.losses.check_start(body.device)
        return process.sim.call(process, process.name, self._name, self.epoch, body, deadline_ms / 1e3), []

    def close(self) -> None:
        """See elasticmoe.common.endpoints."""
        self._process.clients.pop(self._name)


class Windows:
    """Where routers and ranks push their load to."""

    def __init__(self, world: World, scaler: Scaler) -> None:
        self._world = world
        self._scaler = scaler
        self.came: deque[tuple[bytes, Received[Any]]] = deque()

    def has_path(self) -> bool:
        """See elasticmoe.common.endpoints."""
        return self._world.sim.actors.get("signals") is self._scaler

    def is_connected(self, peer: bytes) -> bool:
        """See elasticmoe.common.endpoints."""
        return peer.decode() in self._world.sim.actors

    def receive(self) -> tuple[bytes, Received[Any]] | None:
        """See elasticmoe.common.endpoints."""
        return self.came.popleft() if self.came else None

    def close(self) -> None:
        """See elasticmoe.common.endpoints."""


class Asked(NamedTuple):
    """An order that was handed in, until when its client waits, and what becomes of it."""

    op_id: str
    until: float
    future: Future[Accepted]


class Scaler(Actor):
    """One process. It waits for the lease, acts under its fencing epoch, and ends when it is fenced."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world.sim, f"scaler:{number}")
        self.world = world
        self.clients: dict[str, Client] = {}
        self.windows = Windows(world, self)
        self.asked: list[Asked] = []
        self._last_event = ""
        simulated: Any = self  # what stands for a transport and a poller
        store: Any = world.store
        parts = ScalerParts(
            identity=self.name,
            new_identity=self._new_identity,
            clock=world.sim.clock,
            transport=simulated,
            poller=simulated,
            store=store,
            fence=DiskFence(world.disk, "scaler"),
            epochs=DiskFence(world.disk, "layout"),
            reserve=StoreReserve(world.store, self.name),
        )
        self.service = ScalerService(world.policies.settings, world.hmm.spec, parts)
        world.policies.watch(self)
        world.sim.actors[self.name] = self
        self.after(0.01, self._turn)
        self.aside(0.01, self._renew)
        self.aside(0.02, self._write)

    # ---- what stands for the system

    def connect(self, name: str, identity: str, codec: object) -> Client:
        """See elasticmoe.common.endpoints."""
        self.clients[name] = Client(self, name)
        return self.clients[name]

    def take_over(self, name: str, identity: str, codec: object) -> Windows:
        """See elasticmoe.common.endpoints."""
        self.sim.actors[name] = self
        return self.windows

    def wake(self) -> None:
        """See elasticmoe.services.scaler.control.poller. It looks again soon."""

    def _new_identity(self, name: str) -> str:
        self.world.num_named += 1
        return f"{name}:{self.world.num_named:016x}"

    def receive(self, sender: str, message: Received[Any]) -> None:
        """A message that nothing waits for; `sender` is an address."""
        if isinstance(message.body, RankWindow | RouterWindow):
            self.windows.came.append((b"", message))
            self.world.policies.hear(self, message.body)
        elif sender in self.clients:
            self.clients[sender].came.append(message)

    # ---- turns

    def _turn(self) -> None:
        try:
            self._take_orders()
            self.service.wait(0.0)
            wait_s = self.service.turn()
        except Crashed:
            return
        except ElasticMoEError as error:
            if error.code != Fenced.code:
                raise
            self.sim.note(f"{self.name}: fenced: {error.message}")
            self.crash(self.sim.rng.uniform(0.3, 3.0))
            return
        self._note_events()
        self.world.policies.look(self)
        self._take_answers()
        self.after(max(wait_s, TURN_S), self._turn)

    def _renew(self) -> None:
        """A turn of the lease's thread."""
        if (wait_s := self.service.lease.turn()) is not None:
            self.aside(wait_s, self._renew)

    def _write(self) -> None:
        """A turn of the journal's thread; where there is nothing to write it looks again soon."""
        journal = self.service.journal
        is_busy = journal._has_work()
        if (wait_s := journal.turn(self.sim.now)) is not None:
            self.aside(wait_s if is_busy and journal._failing else WRITE_S if is_busy else LOOK_S, self._write)

    def _note_events(self) -> None:
        for event_id, event in self.service.events._after(self._last_event):
            self._last_event = event_id
            facts = " ".join(event.facts.values())
            self.sim.note(f"{self.name}: {event.kind} {facts}: {event.reason}")
            self.world.num_ejected += event.kind == "rank_ejected"
        error = self.service.status_cache.snapshot.error
        self.world.has_crash_loop |= error is not None and error.code == "rank_crash_loop"

    # ---- what is seen from outside

    @property
    def is_acting(self) -> bool:
        """Whether it has a lease, and does not know that another one has it."""
        try:
            self.service.lease.check()
        except Fenced:
            return False
        return self.service._fence > 0

    @property
    def has_served(self) -> bool:
        """Whether the deployment has served since this scaler began."""
        return self.service._executor.state.ever_served

    @property
    def phase(self) -> str:
        """Of the deployment, as it sees it."""
        return self.service.status_cache.snapshot.phase

    @property
    def operation(self) -> Operation | None:
        """The one in progress."""
        return self.service._executor.operation

    # ---- orders

    def _take_orders(self) -> None:
        """What operators ask for. Who is not served yet waits, unless it is for the loss of a device."""
        orders, others = self.world.orders, []
        while orders:
            op_id, target = orders.popleft()
            is_lost = isinstance(target, Target) and target.is_lost
            if self.is_acting and (self.has_served or is_lost):
                self.hand_in(op_id, target)
            else:
                others.append((op_id, target))
        orders.extend(others)

    def hand_in(self, op_id: str, target: Target | str | None) -> None:
        """Ask this very scaler."""
        until = self.sim.now + self.world.losses.patience_s
        self.asked.append(Asked(op_id, until, self.service.commands.put(self._order(op_id, target))))

    def _take_answers(self) -> None:
        for asked in self.asked:
            if not asked.future.done() and self.sim.now >= asked.until:
                self.sim.note(f"{self.name}: the client of {asked.op_id} gives up")
                asked.future.cancel()
            elif asked.future.done() and (error := asked.future.exception()) is not None:
                self.sim.note(f"{self.name}: order {asked.op_id} refused: {error}")
        self.asked = [asked for asked in self.asked if not asked.future.done()]

    def _order(self, op_id: str, target: Target | str | None) -> Order | CancelOperation:
        if isinstance(target, str):
            return CancelOperation(target)
        request = Request(reason=op_id, deadline_s=self.world.deadline_s)
        if target is not None:
            request = msgspec.structs.replace(
                request,
                replicas=target.replicas,
                devices=target.devices,
                remove=target.remove,
                is_lost=target.is_lost,
            )
        return Order(op_id, request, target)

    def crash(self, down_s: float) -> None:
        """It ends; a supervisor starts another one."""
        if not self.is_alive:
            return
        self.sim.note(f"{self.name}: ended for {down_s:.2f} s")
        self.end()
        self.sim.actors.pop(self.name, None)
        self.world.scalers.remove(self)
        self.sim.push(self.sim.now + down_s, None, 0, self.world.start_scaler, ())
