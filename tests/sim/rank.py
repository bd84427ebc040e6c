"""Ranks and their pool: the product's engine, scheduler, ledger, migration and adoption around a model that is a hash.

What is simulated: the loop's order of things, the mapping of memory (sets), the meeting at each step (all members at
once), processes. The next token is a function of all tokens so far as they are read back from the KV blocks.

One file of more than 400 lines: ranks and the pool that starts and ends them know one another.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from common.layout import RankId
from common.protocol.codec import Message, Received
from common.protocol.errors import Conflict, ElasticMoEError, Overloaded, Unavailable
from common.protocol.handles import SeatMemory
from common.protocol.pool import GetPool, StartRank
from common.protocol.rank import (
    Cancel,
    GetRankLoad,
    HandOver,
    Move,
    Reserve,
    Submit,
    Unreserve,
    Unwatch,
    Watch,
)
from common.protocol.replies import Ack, refusal
from common.protocol.router import Delta, Failed, RankStatus, Tokens
from common.protocol.scaler import PoolRank, PoolStatus, RankExited, RankLoad, RankReady, RankStarted
from native import host
from services.worker.engine.adoption import adopt_rows
from services.worker.engine.engine import Engine
from services.worker.engine.outcome import Choice, Outcome
from services.worker.engine.plan import Chunk, Plan
from services.worker.engine.trials import guilty_error
from services.worker.migration import Migration
from services.worker.reports import Reports
from tests.sim.heap import Actor, Sim
from tests.sim.hmm import (
    BLOCK_SIZE,
    BLOCKS_PER_HANDLE,
    CHANNEL_S,
    GEOMETRY,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    MAX_TOKENS,
    SPEC,
    Hmm,
    Memory,
    held_by,
)
from tests.sim.store import DiskFence

if TYPE_CHECKING:
    from tests.sim.world import World

STATUS_S = 0.5


def next_token(tokens: Iterable[int]) -> int:
    """The reference: a function of all tokens so far."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return 1 + value % 250


def _write_bytes(address: int, data: memoryview) -> None:
    ctypes.memmove(address, bytes(data), len(data))


class SimEngine(Engine):
    """The product's engine with arithmetic in the model's place."""

    def __init__(self, memory: Memory, num_kv: int) -> None:
        kv: Any = SimpleNamespace(
            geometry=GEOMETRY,
            base_addr=ctypes.addressof(memory.buffer),
            address=ctypes.addressof(memory.buffer),
            num_blocks=num_kv * BLOCKS_PER_HANDLE,
            device=SimpleNamespace(copy=host.copy, read_bytes=ctypes.string_at, write_bytes=_write_bytes),
        )
        super().__init__(
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            kv,
            memory.rows,
            max_tokens=MAX_TOKENS,
            max_sequences=MAX_SEQUENCES,
            max_model_len=MAX_MODEL_LEN,
        )
        self._values = memory.values

    def compute(self, plan: Plan, total_tokens: int, deadline_ms: float) -> list[Choice]:
        """See Engine."""
        del total_tokens, deadline_ms
        choices = []
        for chunk in plan.chunks:
            self._write(chunk)
            choices.append(Choice(next_token(self._read(chunk)) if chunk.sample else None))
        return choices

    def _write(self, chunk: Chunk) -> None:
        sequence, start, count, _ = chunk
        for position in range(start, start + count):
            place = sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            self._values[place] = sequence.tokens[position]

    def _read(self, chunk: Chunk) -> list[int]:
        sequence, start, count, _ = chunk
        values, blocks = self._values, sequence.blocks
        found: list[int] = []
        for index in range((start + count + BLOCK_SIZE - 1) // BLOCK_SIZE):
            found += values[blocks[index] * BLOCK_SIZE : (blocks[index] + 1) * BLOCK_SIZE]
        return found[: start + count]


class PeerClient:
    """In the place of a client's socket, for the migration's links."""

    def __init__(self, rank: Rank, target: str, identity: str) -> None:
        self._rank, self._target = rank, target
        self._came: list[Received[Any]] = []
        self._address = f"{identity}>{self._target}"
        self._seqs: set[int] = set()
        self._rank.clients[self._address] = self

    def fileno(self) -> int:
        """None."""
        return -1

    def send(self, body: Message) -> int:
        """See common.transport."""
        sim, seq = self._rank.sim, self._rank.sim.next_seq()
        sim.send(self._rank.seat.incarnation, self._target, Received(0, self._rank.seat.incarnation, seq, body))
        self._seqs.add(seq)
        return seq

    def take(self, message: Received[Any]) -> bool:
        """An answer; whether it is one to this client."""
        is_mine = message.seq in self._seqs
        if is_mine:
            self._came.append(message)
        return is_mine

    def receive(self) -> Received[Any] | None:
        """See common.transport."""
        return self._came.pop(0) if self._came else None

    def close(self) -> None:
        """See common.transport."""
        self._rank.clients.pop(self._address, None)


class Rank(Actor):
    """One seat's process."""

    def __init__(self, world: World, seat: StartRank) -> None:
        super().__init__(world.sim, seat.incarnation)
        self.world = world
        self.seat = seat
        self.address = f"rank-{seat.rank}"
        self.clients: dict[str, PeerClient] = {}
        self.fence = DiskFence(world.disk, f"rank-{seat.slot}")
        self.num_clean = 0  # see Lockstep
        self.is_attached = self.is_ready = self.is_member = self.is_leaving_now = False
        self.held: set[Any] = set()
        self.routings: dict[int, Any] = {}
        self.goal: SeatMemory | None = None
        self.generation = self.members = 0
        self.epoch = 0
        self.num_kv = 0
        self.memory: Memory | None = None
        self.engine: SimEngine
        self._hmm_life = -1
        self._watchers: set[bytes] = set()
        self._status_at = -1.0
        self._last_status: RankStatus | None = None
        self._progress = 0
        self.reports = Reports(self._send_to)
        world.seat(self)
        self.after(0.02 + 0.1 * world.sim.rng.random(), self._attach)

    def connect(self, name: str, identity: str, codec: object) -> PeerClient:
        """See common.endpoints."""
        return PeerClient(self, name, identity)

    # ---- memory

    def _attach(self) -> None:
        hmm = self.world.hmm
        if self.seat.device in hmm.gone:
            self.exit("its device is lost")
            return
        if not hmm.is_alive or hmm.is_paused:
            self.after(0.2, self._attach)
            return
        hmm.attach(self, False)

    def refused(self, error: ElasticMoEError) -> None:
        """The HMM does not give a seat."""
        self.exit(error.message)

    def attached(self, hmm_life: int, seat: SeatMemory, memory: Memory, is_resumed: bool) -> None:
        """The memory is handed over."""
        self._hmm_life = hmm_life
        if is_resumed:
            self.goal = seat
            return
        if self.seat.device in self.world.hmm.gone:
            self.exit("its device is lost")
            return
        self.memory, self.num_kv = memory, len(seat.kv)
        self.held = held_by(seat)
        self.routings = {routing.epoch: routing for routing in seat.routings}
        self.engine = SimEngine(memory, self.num_kv)
        self.migration = Migration(
            self.seat,
            self.engine,
            self,  # type: ignore[arg-type]
            watch=lambda _: None,
            unwatch=lambda _: None,
        )
        self._revision = seat.revision
        self.after(0.05 + 0.2 * self.sim.rng.random(), self._ready)

    def _ready(self) -> None:
        self.is_ready = True
        self.sim.actors[self.address] = self
        self.sim.actors[self.seat.incarnation] = self
        outcome = adopt_rows(self.engine, SPEC.vocab)
        self.reports.expect({*outcome.deltas, *(router for router, _ in outcome.failures)}, self.sim.now)
        self._send(outcome)
        num = len(self.engine.scheduler.sequences())
        self.sim.note(f"{self.name}: ready in slot {self.seat.slot}, {num} sequences adopted")
        self.world.pool.notify(RankReady(self.seat.rank, self.seat.slot, self.seat.incarnation, 1.0, 1.0))
        self._tell_applied(self._revision)

    def _tell_applied(self, revision: int) -> None:
        hmm = self.world.hmm
        if self._hmm_life == hmm.life:
            hmm.after(CHANNEL_S, hmm.applied, self.seat.slot, self.seat.incarnation, revision)

    def begin_memory(self, hmm_life: int, seat: SeatMemory) -> None:
        """The HMM says what shall be mapped from now on."""
        if hmm_life == self._hmm_life:
            self.goal = seat

    def lose_hmm(self) -> None:
        """Its connection ended."""
        self._hmm_life = -1
        if not self.is_ready:
            self.after(0.0, self.exit, "the HMM ended")

    def resume(self) -> None:
        """Introduce itself to the next one."""
        hmm = self.world.hmm
        if self._hmm_life == hmm.life and hmm.is_alive:
            return
        if not hmm.is_alive or hmm.is_paused:
            self.after(0.2, self.resume)
        else:
            hmm.attach(self, True)

    def _change_memory(self) -> None:
        goal = self.goal
        if goal is None:
            return
        blocks = len(goal.kv) * BLOCKS_PER_HANDLE
        keep = held_by(goal)
        if len(goal.kv) < self.num_kv and not self.engine.resize_kv(blocks):
            return
        self.held, self.num_kv = keep, len(goal.kv)
        if not self.engine.resize_kv(blocks):
            return
        # Routings of epochs that are over are forgotten, but for the one in use.
        self.routings = {routing.epoch: routing for routing in goal.routings} | (
            {self.epoch: self.routings[self.epoch]} if self.epoch in self.routings else {}
        )
        self.goal = None
        self._tell_applied(goal.revision)

    # ---- turns

    def turn(self) -> None:
        """One turn of the loop, up to the plan."""
        now = self.sim.now
        self._progress += 1
        self._send_failures(self.engine.expire(now))
        self._change_memory()
        if self._sync():
            self.migration.ask_again()
        for router in self.reports.turn(now):
            self._drop_peer(router)
        for router, message in self.migration.turn(now, self.members):
            self._tell(router, message)
        self._send(self.engine.end_overlong())
        self._send_status(now)
        has_work = self.engine.scheduler.sequences() or self.migration.num_moving or self._watchers
        if self.migration.is_leaving and not self.is_member and not has_work:
            self.exit("left")

    def _sync(self) -> bool:
        generation, members, running, epoch = self.world.hmm.bus.membership()
        if generation == self.generation:
            return False
        is_member = running and bool(members >> self.seat.slot & 1)
        if is_member and epoch not in self.routings:
            return False
        self.generation, self.members, self.is_member = generation, members, is_member
        self.num_clean = 0
        if is_member:
            self.epoch = epoch
        return running

    def step(self, plan: Plan) -> None:
        """A step that nobody fails in."""
        self._send(self.engine.commit(plan, self.engine.compute(plan, 0, 0.0)))
        self.engine.trials.end(plan)
        self.num_clean += not plan.is_alone

    def fail_step(self, plan: Plan) -> None:
        """A step that somebody fails in."""
        self.num_clean = 0
        self._send_failures([self.engine.fail(guilty, guilty_error()) for guilty in self.engine.trials.fail(plan)])

    @property
    def is_connected(self) -> bool:
        """An HMM would see its end."""
        return self._hmm_life == self.world.hmm.life

    def reconnect(self) -> None:
        """End the generation, because it cannot go on with the step that others wait for."""
        hmm = self.world.hmm
        if self.is_connected:
            self._hmm_life = -1
            hmm.after(CHANNEL_S, hmm.detached, self.seat.slot, self.seat.incarnation)
        self.after(0.05, self.resume)

    @property
    def is_busy(self) -> bool:
        """Whether it wants a turn soon."""
        scheduler = self.engine.scheduler
        return bool(
            self.goal or scheduler.running or scheduler.waiting or self.migration.num_moving or self.reports.is_waiting
        )

    # ---- messages

    def receive(self, sender: str, message: Received[Any]) -> None:
        """One message."""
        body, peer = message.body, sender.encode()
        if any(client.take(message) for client in self.clients.values()):
            return
        if isinstance(body, Submit):
            self._submit(body, peer)
        elif isinstance(body, Cancel):
            self.migration.cancel(peer, body.request_id)
            self.engine.cancel(peer, body.request_id)
        elif isinstance(body, Watch):
            self._watchers.add(peer)
            self._last_status = None
        elif isinstance(body, Unwatch):
            self._watchers.discard(peer)
        elif isinstance(body, GetRankLoad | Reserve | HandOver | Unreserve | Move):
            answer = self._answer(message)
            self.sim.send(self.address, sender, Received(0, self.seat.incarnation, message.seq, answer))

    def _answer(self, message: Received[Any]) -> Message:
        body, sender, now = message.body, message.sender, self.sim.now
        try:
            if isinstance(body, GetRankLoad):
                return self._load()
            if isinstance(body, Reserve):
                return self.migration.reserve(sender, body)
            if isinstance(body, HandOver):
                taken = self.migration.take(sender, body, now)
                if body.router not in self._watchers:
                    self.reports.expect((body.router,), now)
                return taken
            if isinstance(body, Unreserve):
                self.migration.unreserve(sender, body)
                return Ack()
            self.fence.check(message.epoch, message.sender)
            self.world.note_fence(f"rank-{self.seat.slot}", message.epoch)
            self.migration.command(body)
            self._last_status = None
            return Ack()
        except ElasticMoEError as error:
            return refusal(error)

    def _load(self) -> RankLoad:
        scheduler, migration = self.engine.scheduler, self.migration
        return RankLoad(
            self.seat.rank,
            self.seat.incarnation,
            len(scheduler.running),
            len(scheduler.waiting),
            migration.num_moving,
            migration.handed_over,
            migration.taken_over,
            scheduler.blocks.num_free,
            scheduler.blocks.num_blocks,
            migration.is_leaving,
            migration.op_id,
            len(self._watchers),
            self.epoch,
        )

    def _submit(self, request: Submit, peer: bytes) -> None:
        try:
            if request.output and not self.engine.scheduler.has_room(request):
                self._tell(peer, Tokens((Delta(request.request_id, len(request.output), (), "length"),)))
                return
            self.engine.add(request, peer, self.sim.now)
        except ElasticMoEError as error:
            self._send_to(peer, Failed(request.request_id, error.code, error.message, error.retryable))

    def _send_to(self, router: bytes, message: Message) -> bool:
        actor = self.sim.actors.get(router.decode())
        if actor is None or not actor.is_alive or not self.world.router.is_linked(router, self.seat.rank):
            return False
        self.sim.send(self.address, router.decode(), Received(0, self.seat.incarnation, 0, message), "data")
        return True

    def _tell(self, router: bytes, message: Message) -> None:
        if not self.reports.tell(router, message):
            self._drop_peer(router)

    def _send(self, outcome: Outcome) -> None:
        for router, suspected in outcome.suspected:
            self._tell(router, suspected)
        for router, deltas in outcome.deltas.items():
            self._tell(router, Tokens(tuple(deltas)))
        self._send_failures(outcome.failures)

    def _send_failures(self, failures: Sequence[tuple[bytes, Failed]]) -> None:
        for router, failed in failures:
            self._tell(router, failed)

    def _drop_peer(self, peer: bytes) -> None:
        self.sim.note(f"{self.name}: {peer.decode()} is gone")
        self._watchers.discard(peer)
        self.engine.cancel_peer(peer)

    def _send_status(self, now: float) -> None:
        if not self._watchers or (self._last_status is not None and now - self._status_at < STATUS_S):
            return
        scheduler = self.engine.scheduler
        self._last_status = RankStatus(
            self.seat.rank,
            self.seat.incarnation,
            self._progress,
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.tokens_queued,
            scheduler.blocks.num_free,
            scheduler.blocks.num_blocks,
            scheduler.capacity_tokens,
            is_leaving=self.migration.is_leaving,
        )
        self._status_at = now
        for router in list(self._watchers):
            self._tell(router, self._last_status)

    # ---- end

    def exit(self, reason: str) -> None:
        """It ends, or is killed: its memory stays as it is."""
        if not self.is_alive:
            return
        self.sim.note(f"{self.name}: ended: {reason}")
        self.end()
        for address in (self.address, self.seat.incarnation):
            if self.sim.actors.get(address) is self:
                del self.sim.actors[address]
        if self.is_ready:
            self.migration.close()
        hmm = self.world.hmm
        hmm.after(CHANNEL_S, hmm.detached, self.seat.slot, self.seat.incarnation)
        self.world.ranks.pop(self.name, None)
        self.world.pool.on_exit(self, reason)

    def stop(self) -> None:
        """SIGTERM: requests that nobody else may have fail."""
        if self.is_ready:
            self._send_failures(self.engine.fail_all(Unavailable("shutting down", code="shutting_down")))
        self.exit("stopped")


class Pool(Actor):
    """The worker pool: starts and ends ranks. They outlive it, and the next one finds those that live."""

    def __init__(self, world: World, standbys: int) -> None:
        super().__init__(world.sim, "pool")
        self.world = world
        self._standbys = standbys
        self.num_adopted = 0
        self._begin()
        self.standby = standbys
        world.sim.actors["pool"] = self

    def _begin(self) -> None:
        self.is_alive = True
        self.standby = 0
        self.ranks = self._survivors()
        self.num_adopted += len(self.ranks)
        self.fence = DiskFence(self.world.disk, "pool")
        self._subscriber = ""

    def _survivors(self) -> dict[int, Rank]:
        """What the records of its seats say."""
        return {rank.seat.slot: rank for rank in self.world.ranks.values()}

    def _fill(self) -> None:
        self.standby = self._standbys

    def receive(self, sender: str, message: Received[Any]) -> None:
        """One message."""
        try:
            answer = self._answer(sender, message)
        except ElasticMoEError as error:
            self.sim.note(f"pool: refused {type(message.body).__name__}: {error.message}")
            answer = refusal(error)
        self.sim.send("pool", sender, Received(0, "pool:1", message.seq, answer))

    def _answer(self, sender: str, message: Received[Any]) -> Message:
        body = message.body
        if isinstance(body, GetPool):
            self._subscriber = sender
            return self._status()
        self.fence.check(message.epoch, message.sender)
        self.world.note_fence("pool", message.epoch)
        if isinstance(body, StartRank):
            return self._start(body)
        for rank in list(self.ranks.values()):
            if rank.seat.incarnation == body.incarnation:
                rank.after(0.01, rank.stop)
                self.after(body.grace_ms / 1e3 + 0.02, rank.exit, "killed")
        return Ack()

    def _start(self, seat: StartRank) -> Message:
        rank = self.ranks.get(seat.slot)
        if rank is not None:
            if rank.seat.incarnation == seat.incarnation:
                return RankStarted(seat.rank, seat.incarnation)
            raise Conflict(f"slot {seat.slot} has a living rank", code="seat_taken")
        if self.standby <= 0:
            raise Overloaded("no standby", code="no_standby")
        self.standby -= 1
        self.after(1.0, self._refill)
        self.sim.note(f"pool: starts {seat.incarnation} on {seat.device}")
        self.ranks[seat.slot] = Rank(self.world, seat)
        return RankStarted(seat.rank, seat.incarnation)

    def _refill(self) -> None:
        self.standby = min(self._standbys, self.standby + 1)

    def _status(self) -> PoolStatus:
        ranks = tuple(
            PoolRank(rank.seat.rank, slot, rank.seat.device, rank.seat.incarnation, 1, rank.is_ready)
            for slot, rank in self.ranks.items()
        )
        return PoolStatus(self.standby, ranks)

    def notify(self, event: Message) -> None:
        """Tell the scaler that asked last."""
        if self._subscriber and self.is_alive:
            self.sim.send("pool", self._subscriber, Received(0, "pool:1", 0, event))

    def on_exit(self, rank: Rank, reason: str) -> None:
        """A rank has ended."""
        if self.ranks.get(rank.seat.slot) is rank:
            del self.ranks[rank.seat.slot]
        if self.is_alive:
            seat = rank.seat
            self.after(0.01, self.notify, RankExited(seat.rank, seat.slot, seat.incarnation, -9, reason))

    def crash(self, down_s: float) -> None:
        """Killed, and back later; its standbys take longer. Ranks do not notice."""
        self.sim.note(f"pool: killed for {down_s:.2f} s")
        self.end()
        self.sim.push(self.sim.now + down_s, None, 0, self._come_back, (down_s,))

    def _come_back(self, more_s: float) -> None:
        self._begin()
        self.after(more_s, self._fill)


def leader_of(rank: RankId) -> str:
    """The address of a rank."""
    return f"rank-{rank}"


__all__ = ["Hmm", "Pool", "Rank", "Sim", "next_token"]
