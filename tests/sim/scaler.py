"""The scaler: the product's driver, reconciler, decisions and journal in a loop that is driven by the event heap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.layout import Layout, RankId, Seat
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import ElasticMoEError, Fenced, Unavailable
from elasticmoe.common.protocol.hmm import GetHmmStatus
from elasticmoe.common.protocol.pool import GetPool, StartRank
from elasticmoe.common.protocol.rank import GetRankLoad
from elasticmoe.common.protocol.scaler import HmmStatus, PoolRank, PoolStatus, RankExited, RankLoad
from elasticmoe.services.scaler.control.admission import Admission, CancelOperation, Later, Order
from elasticmoe.services.scaler.control.executor import Executor
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.operation.operation import Operation, Request
from elasticmoe.services.scaler.planning.plan import Target
from elasticmoe.services.scaler.store.journal import Journal
from elasticmoe.services.scaler.store.lease import Lease
from tests.sim.heap import Actor, Crashed
from tests.sim.hmm import MAX_MODEL_LEN, MAX_SEQUENCES, MAX_TOKENS, SPEC
from tests.sim.store import DiskFence, StoreReserve

if TYPE_CHECKING:
    from tests.sim.world import World

LEASE_MS = 3_000
CALL_S = 2.0
TURN_S, IDLE_TURN_S = 0.2, 0.6
WRITE_S = 0.02
CONFIG = ScalerConfig(run_dir="/nonexistent")


class Quiet:
    """Meters that count nothing."""

    def phase(self, phase: str, seconds: float) -> None:
        """See elasticmoe.services.scaler.metrics."""

    def operation(self, operation: Operation, outcome: str) -> None:
        """See elasticmoe.services.scaler.metrics."""


class SimPeers:
    """The scaler's connections to ranks."""

    def __init__(self, scaler: Scaler) -> None:
        self._scaler = scaler
        self._loads: dict[RankId, tuple[RankLoad, float]] = {}
        self._asked: dict[RankId, float] = {}

    def keep(self, seats: Iterable[Seat]) -> None:
        """See elasticmoe.services.scaler.control.peers."""
        wanted = {seat.rank for seat in seats}
        for rank in [rank for rank in self._loads if rank not in wanted]:
            del self._loads[rank]

    def ask(self, seats: Iterable[Seat], interval_s: float) -> None:
        """See elasticmoe.services.scaler.control.peers."""
        now = self._scaler.sim.now
        for seat in seats:
            if now - self._asked.get(seat.rank, -9.0) >= min(interval_s, 0.4):
                self._asked[seat.rank] = now
                self.tell(seat.rank, GetRankLoad())

    def tell(self, rank: RankId, command: Message) -> None:
        """See elasticmoe.services.scaler.control.peers."""
        self._scaler.send(f"rank-{rank}", command)

    def receive(self) -> None:
        """See elasticmoe.services.scaler.control.peers: answers are taken as they come."""

    def take(self, load: RankLoad) -> None:
        """An answer."""
        self._loads[load.rank] = load, self._scaler.sim.now

    def loads(self, ranks: Mapping[int, PoolRank], age_s_max: float) -> dict[int, RankLoad]:
        """See elasticmoe.services.scaler.control.peers."""
        found = {}
        for slot, rank in ranks.items():
            load, at = self._loads.get(rank.rank, (None, 0.0))
            if load is not None and at >= self._scaler.sim.now - age_s_max and load.incarnation == rank.incarnation:
                found[slot] = load
        return found


class Scaler(Actor):
    """One process. It waits for the lease, acts under its fencing epoch, and ends when it is fenced."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world.sim, f"scaler:{number}")
        self.world = world
        self.epoch = 0
        self.reserve = StoreReserve(world.store, self.name)
        self.lease = Lease(world.store, self.name, LEASE_MS, DiskFence(world.disk, "scaler"))  # type: ignore[arg-type]
        self.starting: dict[int, float] = {}
        self.peers = SimPeers(self)
        self.driver: Executor | None = None
        self.intake: Admission
        self.waiting: list[tuple[str, Target | str | None, float]] = []
        self.journal: Journal
        self.last_turn_s = -1.0
        self._hmm: HmmStatus | None = None
        self._num_started = 0
        self._mark: Any = None
        world.sim.actors[self.name] = self
        self.after(0.01, self._acquire)

    # ---- the lease

    def _acquire(self) -> None:
        got = self.lease.attempt()
        if isinstance(got, str):
            if self.lease.why_not.code == "storage_full":
                self.reserve.give_up()
            self.after(LEASE_MS / 10e3, self._acquire)
            return
        self.epoch = got
        self.sim.note(f"{self.name}: acts under epoch {got}")
        wiring: Any = (
            self.world.store,
            self.name,
            lambda _: None,
            self.lease.lose,
            lambda: None,
            self.reserve,
            self.sim.clock,
        )
        self.journal = Journal(*wiring)
        state = State(layout=Layout(0, 1, (), ()), stall_s=math.inf)
        self.driver = Executor(CONFIG, self, self.journal, Quiet(), self._tell, state, lambda: self.sim.now)  # type: ignore[arg-type]
        self.intake = Admission(
            CONFIG,
            SPEC,
            self.driver,
            (self.journal.check_room,),
            self._tell,
            clock=self.sim.clock,
            new_id=lambda: f"op-{self.sim.next_seq():012x}",
        )
        self.driver.leave_out = lambda action: self.intake.leave_out(action, self._hmm)
        try:
            self.driver.resume(self.world.store.get_operation(), self.world.store.ended_operations())
        except Unavailable:
            pass
        self.journal.act_under(got)
        self.aside(LEASE_MS / 2e3, self._renew)
        self.aside(0.02, self._pump)
        self._loop()

    def _renew(self) -> None:
        if self.lease.renew():
            self.aside(LEASE_MS / 2e3, self._renew)

    @property
    def is_fenced(self) -> bool:
        """Whether it knows that another one has the lease."""
        try:
            self.lease.check()
        except Fenced:
            return True
        return False

    def _pump(self) -> None:
        """A turn of the journal's thread; where there is nothing to write it looks again soon."""
        is_busy = self.journal._has_work()
        if (wait_s := self.journal.turn(self.sim.now)) is not None:
            is_failing = is_busy and self.journal._failing
            self.aside(wait_s if is_failing else WRITE_S if is_busy else 0.1, self._pump)

    def _tell(self, kind: str, reason: str, /, **facts: str) -> None:
        if kind != "operation_phase":
            self.sim.note(f"{self.name}: {kind} {facts.get('op_id', '')} {reason}")

    # ---- links

    def send(self, address: str, body: Message) -> None:
        """A message to a rank; its answer comes by `receive`."""
        self.sim.send(self.name, address, Received(self.epoch, self.name, self.sim.next_seq(), body))

    def receive(self, sender: str, message: Received[Any]) -> None:
        """What comes unasked, or too late."""
        if isinstance(message.body, RankLoad):
            self.peers.take(message.body)
        elif isinstance(message.body, RankExited):
            self.starting.pop(message.body.slot, None)
            if self.driver is not None:
                self.driver.on_exit(message.body)

    def _call(self, address: str, body: Message) -> Any:
        return self.sim.call(self, self.name, address, self.epoch, body, CALL_S)

    def tell_hmm(self, command: Message) -> None:
        """See elasticmoe.services.scaler.control.links."""
        self._call("hmm", command)

    def tell_pool(self, command: Message) -> None:
        """See elasticmoe.services.scaler.control.links."""
        self._call("pool", command)

    def start(self, seat: Seat, epoch: int) -> None:
        """See elasticmoe.services.scaler.control.links."""
        if self.epoch == self.world.disk["scaler"]:  # what a superseded one asks for is refused
            self.world.losses.check_start(seat.device)
        self.world.num_started += 1
        incarnation = f"rank-{seat.rank}:{self.world.num_started:016x}"
        self.tell_pool(
            StartRank(seat.rank, seat.slot, seat.device, incarnation, epoch, MAX_TOKENS, MAX_SEQUENCES, MAX_MODEL_LEN)
        )
        self.starting[seat.slot] = self.sim.now

    def _ask(self, address: str, question: Message) -> Any:
        try:
            return self._call(address, question)
        except ElasticMoEError:
            return None

    # ---- the loop

    def _loop(self) -> None:
        try:
            is_busy = self._turn()
        except Crashed:
            return
        except ElasticMoEError as error:
            if error.code != Fenced.code:
                raise
            self.sim.note(f"{self.name}: fenced: {error.message}")
            self.crash(0.3)
            return
        self.after(TURN_S if is_busy else IDLE_TURN_S, self._loop)

    def _turn(self) -> bool:
        assert self.driver is not None
        self.lease.check()
        hmm: HmmStatus | None = self._ask("hmm", GetHmmStatus())
        pool: PoolStatus | None = self._ask("pool", GetPool())
        now = self.sim.now
        coming = {rank.slot for rank in pool.ranks if not rank.ready} if pool else set(self.starting)
        self.starting = {slot: at for slot, at in self.starting.items() if slot in coming and now - at < 60.0}
        self._hmm = hmm
        if hmm is not None and hmm.layout is not None:
            self.driver.state = msgspec.structs.replace(self.driver.state, layout=hmm.layout)
            self._serve_orders()
        elif not self.has_served and self.driver.operation is None:
            return True
        seen = msgspec.structs.replace(self.driver.observe(hmm, pool), restarts_left=5)
        actions = self.driver.decide(seen)
        self.driver.execute(actions)
        self._note_operation()
        return self.driver.operation is not None or self.phase != "serving" or bool(actions)

    @property
    def has_served(self) -> bool:
        """Whether the deployment has served since this scaler began."""
        return self.driver is not None and self.driver.state.ever_served

    @property
    def phase(self) -> str:
        """Of the deployment, as it sees it."""
        return self.driver.state.status.phase if self.driver is not None else "waiting"

    def _note_operation(self) -> None:
        assert self.driver is not None
        operation = self.driver.operation
        mark = (operation.phase, operation.leg, operation.progress.attempt, operation.why) if operation else None
        if operation is not None and mark != self._mark:
            self.sim.note(f"{self.name}: {operation.transition_id} {operation.phase}: {operation.why}")
        self._mark = mark

    # ---- orders

    def _serve_orders(self) -> None:
        """Those that wait here, then new ones, as the desk does it."""
        came, self.waiting = self.waiting, []
        orders_of, others = self.world.orders, []
        while orders_of:
            op_id, target = orders_of.popleft()
            if self.has_served or (isinstance(target, Target) and target.is_lost):
                came.append((op_id, target, self.sim.now + self.world.losses.patience_s))
            else:
                others.append((op_id, target))
        orders_of.extend(others)
        for op_id, target, until in came:
            try:
                accepted = self.intake.take(self._order(op_id, target), self._hmm, ever_served=self.has_served)
                self.sim.note(f"{self.name}: takes {op_id}: {accepted.operation.op_id}, {target}")
            except Later as later:
                if self.sim.now < until:
                    self.waiting.append((op_id, target, until))
                else:
                    self._refuse(op_id, later.error)
            except ElasticMoEError as error:
                self._refuse(op_id, error)

    def _refuse(self, op_id: str, error: ElasticMoEError) -> None:
        self.sim.note(f"{self.name}: order {op_id} refused: {error.message}")
        self.world.refused[op_id] = error.code

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
