"""Ranks: the product's rank with its engine, scheduler, ledger, lockstep, steps, migration and adoption.

What is simulated: its ends of transports, the mapping of memory (sets), the barrier (all members leave it at the same
instant), what fails in a step, processes, and how long things take. The model: engine.py. Longer than other files
because leaders and followers share all of these ends, and differ in a few lines.

One file of more than 400 lines: a process and all of its ends know one another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from elasticmoe.common.endpoints import PushEnd
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import DeviceError, ElasticMoEError, ProtocolError, Unavailable
from elasticmoe.common.protocol.handles import Applied, Attach, Routing, SeatMemory, ShareHandles
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.services.worker.exchange.base import StepTimedOut
from elasticmoe.services.worker.exchange.expert_rows import ExpertRows
from elasticmoe.services.worker.hmm.link import HmmLink
from elasticmoe.services.worker.rank.follower import Follower
from elasticmoe.services.worker.rank.parts import SeatParts
from elasticmoe.services.worker.rank.rank import Rank
from tests.sim.barrier import SimBarrier, SimBoard
from tests.sim.engine import SimEngine, SimModel, kv_of
from tests.sim.heap import Actor, Push
from tests.sim.hmm import CHANNEL_S
from tests.sim.memory import BLOCKS_PER_HANDLE, RealBytes
from tests.sim.store import NotingFence

if TYPE_CHECKING:
    from tests.sim.world import World

BEAT_S = 0.1  # the machine is busy: nobody sleeps for less, but where something comes
STEP_S = 0.25  # a step is slow, so that requests live long enough to move
MEET_S = 0.5
CHANNEL_FD, DOORBELL_FD, CLIENT_FD = 1_000, 2_000, 3_000


class Killed(BaseException):
    """The process ends in the middle of something."""


class Poisoned(Exception):
    """A step fails in a rank that lives on."""


class Client:
    """A connection to another rank or to the HMM."""

    def __init__(self, process: RankProcess, name: str) -> None:
        self._process, self._target = process, name
        self._came: deque[Received[Any]] = deque()
        self._seqs: set[int] = set()
        process.clients.append(self)

    def fileno(self) -> int:
        """See elasticmoe.common.endpoints. The rank is woken by whatever comes."""
        return CLIENT_FD

    def send(self, body: Message) -> int:
        """See elasticmoe.common.endpoints."""
        sim, me = self._process.sim, self._process.seat.incarnation
        seq = sim.next_seq()
        sim.send(me, self._target, Received(0, me, seq, body))
        self._seqs.add(seq)
        return seq

    def take(self, message: Received[Any]) -> bool:
        """An answer; whether it is one to this client."""
        is_mine = message.seq in self._seqs
        if is_mine:
            self._came.append(message)
        return is_mine

    def receive(self) -> Received[Any] | None:
        """See elasticmoe.common.endpoints."""
        return self._came.popleft() if self._came else None

    def close(self) -> None:
        """See elasticmoe.common.endpoints."""
        if self in self._process.clients:
            self._process.clients.remove(self)
            self._process.unheard |= self._seqs


class Lost:
    """An end whose service is always away."""

    def push(self, body: Message) -> bool:
        """See elasticmoe.common.endpoints."""
        del body
        return False

    def close(self) -> None:
        """See elasticmoe.common.endpoints."""


class Server:
    """Where others reach the rank, and where it sleeps: `poll` says at once what there is to look at."""

    def __init__(self, process: RankProcess) -> None:
        self._process = process
        self._watched: set[int] = set()
        self.inbox: deque[tuple[bytes, Received[Any]]] = deque()

    def watch(self, fd: int) -> None:
        """See elasticmoe.common.endpoints."""
        self._watched.add(fd)

    def unwatch(self, fd: int) -> None:
        """See elasticmoe.common.endpoints."""
        self._watched.discard(fd)

    def poll(self, timeout_ms: int) -> set[int]:
        """See elasticmoe.common.endpoints."""
        return {fd for fd in self._watched if self._process.is_readable(fd)}

    def receive(self) -> tuple[bytes, Received[Any]] | None:
        """See elasticmoe.common.endpoints."""
        return self.inbox.popleft() if self.inbox else None

    def send(self, peer: bytes, body: Message, *, seq: int = 0, epoch: int = 0) -> bool:
        """See elasticmoe.common.endpoints."""
        process, target = self._process, peer.decode()
        sim, seat, plane = process.sim, process.seat, "control"
        if target.startswith("router:"):
            plane, actor = "data", sim.actors.get(target)
            if actor is None or not actor.is_alive or not process.world.router.is_linked(peer, seat.rank):
                return False
        sim.send(process.address, target, Received(epoch, seat.incarnation, seq, body), plane)
        return True

    def close(self) -> None:
        """See elasticmoe.common.endpoints."""


class Channel:
    """A rank's connection to one life of the HMM. Ordered; nothing is lost while both live."""

    def __init__(self, process: RankProcess, fd: int) -> None:
        self.process = process
        self._hmm = process.world.hmm
        self._fd = fd
        self._came: deque[Message] = deque()
        self._is_cut = self._is_introducing = False
        self.is_closed = False

    @property
    def is_readable(self) -> bool:
        """Something has come, be it the end."""
        return bool(self._came) or self._is_cut

    def fileno(self) -> int:
        """See elasticmoe.services.worker.hmm.link."""
        return self._fd

    def send(self, body: Message, *, deadline_ms: int = 0) -> None:
        """See elasticmoe.services.worker.hmm.link."""
        if self._is_cut:
            raise Unavailable("the peer is gone")
        if isinstance(body, Attach):  # who attaches waits for the answer and does nothing else
            self._is_introducing = True
            self._hmm.introduce(self, body)
            self._is_introducing = False
        else:
            assert isinstance(body, Applied)
            self._hmm.after(CHANNEL_S, self._hmm.applied, self, body.revision)

    def receive(self, *, deadline_ms: int) -> tuple[Received[Any], list[int]]:
        """See elasticmoe.services.worker.hmm.link."""
        if not self._came:
            raise Unavailable("the peer is gone")
        return Received(0, "hmm:1", 0, self._came.popleft()), []

    def tell(self, message: Message) -> None:
        """The HMM sends something."""
        if self._is_introducing:
            self._came.append(message)
        else:
            self.process.after(CHANNEL_S, self._deliver, message)

    def _deliver(self, message: Message) -> None:
        self._came.append(message)
        self.process.wake()

    def cut(self) -> None:
        """The HMM's process has ended."""
        self._is_cut = True
        self.process.wake()

    def close(self) -> None:
        """See elasticmoe.services.worker.hmm.link. To the HMM it is the rank's death."""
        if not self.is_closed:
            self.is_closed = True
            self._hmm.after(CHANNEL_S, self._hmm.detached, self)


def _named_by(seat: SeatMemory) -> set[int]:
    return {*(record.handle for record in seat.records), *seat.kv}


class Mapping:
    """What a rank has mapped of its device: `handles`, by their ids; `held`, the records, and the ids of KV."""

    def __init__(
        self, spec: ModelSpec, device: RealBytes, handed: Iterable[tuple[ShareHandles | SeatMemory, list[int]]]
    ) -> None:
        self.spec = spec
        self.replica: tuple[int, ...] = ()
        self.ledger = device.rows
        self.routings: dict[int, Routing] = {}
        self.doorbells: dict[int, int] = {}
        self.handles: set[int] = set()
        self.held: set[Any] = set()
        self._kv: tuple[int, ...] = ()
        self._goal: SeatMemory | None = None
        self._shared: set[int] = set()
        for message in handed:
            self.take(*message)
        self.revision = self.advance(lambda _: True)

    @property
    def num_kv(self) -> int:
        """KV handles that are mapped."""
        return len(self._kv)

    @property
    def is_changing(self) -> bool:
        """See elasticmoe.services.worker.rank.parts."""
        return self._goal is not None

    def take(self, message: ShareHandles | SeatMemory, fds: list[int]) -> None:
        """See elasticmoe.services.worker.rank.parts."""
        if isinstance(message, ShareHandles):
            self._shared.update(handle.id for handle in message.handles)
            return
        seat = message
        if missing := _named_by(seat) - self._shared:
            raise ProtocolError(f"handle {min(missing)} is named, but was not shared")
        if any(mapped != named for mapped, named in zip(self._kv, seat.kv, strict=False)):
            raise DeviceError("a KV handle cannot move while it is mapped", code="record_moved")
        self._goal, self._shared = seat, _named_by(seat)
        self.doorbells = {slot: DOORBELL_FD + slot for slot in seat.slots}
        self.replica = seat.replica
        self.routings.clear()
        self.routings.update((routing.epoch, routing) for routing in seat.routings)

    def advance(self, resize_kv: Callable[[int], bool]) -> int:
        """See elasticmoe.services.worker.rank.parts."""
        goal = self._goal
        if goal is None:
            return 0
        num_blocks = len(goal.kv) * BLOCKS_PER_HANDLE
        if len(goal.kv) < self.num_kv and not resize_kv(num_blocks):
            return 0
        self.handles, self._kv = _named_by(goal), goal.kv
        self.held = {*(record.key for record in goal.records), *goal.kv}
        if not resize_kv(num_blocks):
            return 0
        self._goal = None
        return goal.revision

    def close(self) -> None:
        """See elasticmoe.services.worker.rank.parts."""


class Exchange:
    """What of a rank's exchange others see. `owners`: whose experts are where, by the routing in force."""

    def __init__(self) -> None:
        self.generation = 0
        self.owners: Sequence[Sequence[int]] = ()
        self.is_awaited = False  # by others, in a step that fails here

    def begin_step(self, total_tokens: int, deadline_ms: float) -> None:
        """See Exchange. Nothing is exchanged here."""

    def prepare(self, generation: int) -> bool:
        """See Exchange. There is nothing to prepare."""
        del generation
        return True

    def take_expert_rows(self) -> ExpertRows:
        """See Exchange. Nothing is exchanged here."""
        return ExpertRows(0, ())

    def close(self) -> None:
        """See Exchange."""

    def set_routing(self, generation: int, owners: Sequence[Sequence[int]]) -> None:
        """See elasticmoe.services.worker.exchange."""
        self.generation, self.owners = generation, owners

    def listen(self, hear: Callable[[], None]) -> None:
        """See elasticmoe.services.worker.exchange: here nobody waits in the midst of a step."""


class RankProcess(Actor):
    """One seat's process. `rank`: the product's, once it is attached and built: a Rank with `engine`, or a Follower
    with `model`, where `board` leads to its replica's other ranks."""

    def __init__(self, world: World, seat: StartRank) -> None:
        super().__init__(world.sim, seat.incarnation)
        self.world = world
        self.seat = seat
        self.address = f"rank-{seat.rank}"
        self.clients: list[Client] = []
        self.unheard: set[int] = set()  # numbers of what closed connections had sent
        self.server = Server(self)
        self.channel: Channel | None = None
        self.barrier = SimBarrier(world.hmm.bus, self)
        self.exchange = Exchange()
        self.mapping: Mapping | None = None
        self.engine: SimEngine
        self.model: SimModel
        self.board: SimBoard
        self.rank: Rank | Follower
        self.is_ready = self.has_rung = False
        self._num_channels = 0
        self._turn_number = 0
        self._sleeps = ""  # where: at the barrier, in poll
        world.seat(self)
        self.after(0.02 + 0.1 * world.sim.rng.random(), self._boot)

    @property
    def leads(self) -> bool:
        """It has its replica's requests."""
        return self.seat.rank.tp == 0

    @property
    def held(self) -> set[Any]:
        """Records and ids of KV that are mapped."""
        return self.mapping.held if self.mapping is not None else set()

    @property
    def handles(self) -> set[int]:
        """Ids of all handles that are mapped."""
        return self.mapping.handles if self.mapping is not None else set()

    # ---- beginning

    def _boot(self) -> None:
        hmm, seat = self.world.hmm, self.seat
        if seat.device in hmm.gone:
            self.exit("its device is lost")
            return
        if not hmm.is_alive or hmm.is_paused:
            self.after(0.2, self._boot)
            return
        link = HmmLink(self._open_channel, seat, watch=self.server.watch, unwatch=self.server.unwatch)
        try:
            link.attach()
        except ElasticMoEError as error:
            self.exit(error.message)
            return
        self._build(link)
        self.after(0.05 + 0.2 * self.sim.rng.random(), self._start)

    def _open_channel(self, deadline_ms: int) -> Channel:
        """See HmmLink."""
        hmm = self.world.hmm
        if not hmm.is_alive or hmm.is_paused:
            raise Unavailable("no HMM")
        self._num_channels += 1
        self.channel = Channel(self, CHANNEL_FD + self._num_channels)
        return self.channel

    def connect(self, name: str, identity: str, codec: object) -> Client:
        """See elasticmoe.common.endpoints."""
        return Client(self, name)

    def connect_push(self, name: str, identity: str) -> PushEnd:
        """See elasticmoe.common.endpoints. What a follower tells its leader of its time is lost."""
        return Push(self.sim, self.address) if name == "signals" else Lost()

    def _build(self, link: HmmLink) -> None:
        device = self.world.hmm.memories[self.seat.device].real
        self.mapping = Mapping(self.world.hmm.spec, device, link.handed())
        if self.mapping.spec.tp > 1:
            self.board = SimBoard(self.world.hmm.bus, self, self.mapping.replica)
        simulated: Any = self  # what stands for a transport, a server, an exchange
        parts = SeatParts(
            seat=self.seat,
            clock=self.sim.clock,
            transport=simulated,
            server=self.server,
            hmm=link,
            fence=NotingFence(self.world, f"rank-{self.seat.slot}"),
            memory=self.mapping,
            revision=self.mapping.revision,
            barrier=self.barrier,
            exchange=simulated.exchange,
            attach_ms=1.0,
            build_ms=1.0,
            computes_by="",
            use_cores=lambda _: None,
        )
        if self.leads:
            board = self.board if self.mapping.spec.tp > 1 else None
            self.engine = SimEngine(device, self.mapping.num_kv, self._take_part, board)
            self.rank = Rank(parts, self.engine, self.world.pool.notify)
        else:
            kv = kv_of(device, self.mapping.num_kv)
            model: Any = SimModel(kv, device.values, self._follow)
            self.model = model
            self.rank = Follower(parts, self.board, model, kv, self.world.pool.notify)

    def _start(self) -> None:
        if self.seat.device in self.world.hmm.gone:
            self.exit("its device is lost")
            return
        self.is_ready = True
        self.sim.actors[self.address] = self
        self.sim.actors[self.seat.incarnation] = self
        self.rank.start(self.sim.now)
        num = len(self.engine.scheduler.sequences()) if self.leads else 0
        self.sim.note(f"{self.name}: ready in slot {self.seat.slot}, {num} sequences adopted")
        self._again(0.0)

    # ---- turns

    def _again(self, seconds: float, sleeps: str = "") -> None:
        """The next turn, unless something brings it forward."""
        self._turn_number += 1
        self._sleeps = sleeps
        self.after(seconds, self._turn, self._turn_number)

    def _turn(self, number: int) -> None:
        if number != self._turn_number:
            return
        rank, computes = self.rank, self.engine if self.leads else self.model
        num_steps = computes.num_steps
        if rank.is_stopping:
            self._finish()
            return
        try:
            if self._sleeps == "in poll":
                rank.wait(0)
            wait_ms = rank.turn(self.sim.now)
        except Killed:
            self.exit("killed in a step")
            return
        except (ElasticMoEError, StepTimedOut, Poisoned) as error:
            self.exit(f"{type(error).__name__}: {error}")
            return
        if rank.is_stopping:
            self._finish()
        elif computes.num_steps > num_steps:
            self._again(STEP_S)
        elif rank._has_arrived if isinstance(rank, Follower) else rank._plan is not None:
            self._again(MEET_S, "at the barrier")
        elif wait_ms:
            self._again(max(wait_ms / 1e3, BEAT_S), "in poll")
        else:
            self._again(0.001)

    def _finish(self) -> None:
        self.rank.finish()
        self.exit("it was told to stop, or has left")

    def wake(self) -> None:
        """There is something to look at."""
        if self._sleeps == "in poll":
            self._again(0.0, "in poll")

    def go_on(self) -> None:
        """The barrier has an answer."""
        if self._sleeps == "at the barrier":
            self._again(0.0, "at the barrier")

    def ring(self) -> None:
        """Somebody rings its doorbell."""
        self.has_rung = True
        self.wake()

    def is_readable(self, fd: int) -> bool:
        """Whether there is something at a descriptor."""
        if fd == DOORBELL_FD + self.seat.slot:
            return self.has_rung
        return self.channel is not None and fd == self.channel.fileno() and self.channel.is_readable

    def _take_part(self) -> None:
        """In the step that was met for; raises what becomes of it here."""
        self.exchange.is_awaited = False
        self.world.num_urgent += self.engine.last_plan.is_decode_only
        fate = self.world.fate_of(self)
        if fate is not None:
            self.exchange.is_awaited = len(self.barrier.last.members) > 1
            raise fate

    def _follow(self, write: Callable[[], None]) -> None:
        """The same of a follower. What its leader has completed, it has taken part in up to the last collective: its KV
        is written then, whatever becomes of it afterwards. Of a step that was given up it may be in the midst for a
        while, and take no turn."""
        self.exchange.is_awaited = False
        fate = self.world.fate_of(self)
        self.world.num_followed += 1
        if self.world.is_completed(self.barrier.last, self.board.leader):
            write()
        elif self.sim.rng.random() < 0.5:
            self.after(self.sim.rng.random() * STEP_S, write)
        if fate is not None:
            self.exchange.is_awaited = True
            raise fate

    def receive(self, sender: str, message: Received[Any]) -> None:
        """One message. An answer to a connection that was closed meanwhile is nobody's."""
        if message.seq in self.unheard:
            return
        if not any(client.take(message) for client in self.clients):
            self.server.inbox.append((sender.encode(), message))
        self.wake()

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
        if self.channel is not None:
            self.channel.close()
        self.world.ranks.pop(self.name, None)
        self.world.pool.on_exit(self, reason)

    def stop(self) -> None:
        """SIGTERM."""
        if not self.is_ready:
            self.exit("stopped")
            return
        self.rank.stop()
        self.wake()
