"""What an HMM's process is connected to: who asks it, the channels of ranks, the keeper, threads that copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from elasticmoe.common.clock import Clock
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError
from elasticmoe.common.protocol.handles import Attach, SeatMemory
from elasticmoe.common.protocol.replies import Refused, refusal
from elasticmoe.services.hmm.memory.blocks import BlockCopies
from elasticmoe.services.hmm.memory.transfer import Transfer
from elasticmoe.services.hmm.sessions.handles import Importer, Offer, shares
from tests.sim.heap import Sim

if TYPE_CHECKING:
    from tests.sim.hmm import Hmm
    from tests.sim.rank import Channel


class Server:
    """Where others reach the HMM."""

    def __init__(self, sim: Sim) -> None:
        self._sim = sim
        self.inbox: deque[tuple[bytes, Received[Any]]] = deque()

    def receive(self) -> tuple[bytes, Received[Any]] | None:
        """See elasticmoe.common.endpoints."""
        return self.inbox.popleft() if self.inbox else None

    def send(self, peer: bytes, body: Message, *, seq: int = 0, epoch: int = 0) -> bool:
        """See elasticmoe.common.endpoints."""
        if isinstance(body, Refused):
            self._sim.note(f"hmm: refused: {body.message}")
        self._sim.send("hmm", peer.decode(), Received(epoch, "hmm:1", seq, body))
        return True


class Parking:
    """The keeper is not simulated: what it has is the snapshot."""

    is_connected = True

    def fileno(self) -> int:
        """See elasticmoe.services.hmm.sessions.parking."""
        return -1

    def retry(self) -> bool:
        """See elasticmoe.services.hmm.sessions.parking."""
        return False


class _Job(NamedTuple):
    name: str
    work: Callable[[], Any]
    then: Callable[[Any], None]


LONGEST_S = {"blocks": 0.2, "release": 0.05}  # a transfer says it itself


class Background:
    """Threads: each takes a while and then does it all at once."""

    def __init__(self, hmm: Hmm) -> None:
        self._hmm = hmm
        self._jobs: list[_Job] = []
        self._done: deque[Callable[[], None]] = deque()

    def start(self, name: str, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """See elasticmoe.services.hmm.background."""
        job = _Job(name, work, then)
        self._jobs.append(job)
        owner: Any = getattr(work, "__self__", None)
        longest_s = owner.longest_s if isinstance(owner, Transfer) else LONGEST_S[name]
        self._hmm.after(0.01 + longest_s * self._hmm.sim.rng.random(), self._end, job)

    def _end(self, job: _Job) -> None:
        if job in self._jobs:
            self._run(job)
            self._hmm.turn()

    def _run(self, job: _Job) -> None:
        self._jobs.remove(job)
        try:
            result = job.work()
        except ElasticMoEError as error:
            result = error
        self._done.append(lambda: job.then(result))

    def hurry(self) -> None:
        """Let all threads that copy blocks end now."""
        for job in [job for job in self._jobs if job.name == "blocks"]:
            self._run(job)

    def finish(self) -> None:
        """See elasticmoe.services.hmm.background."""
        while self._done:
            self._done.popleft()()


class Copies(BlockCopies):
    """The product's copies: while the loop waits for threads, they end."""

    def __init__(self, background: Any, clock: Clock) -> None:
        super().__init__(background, clock)
        self._threads: Background = background

    def wait_stopped(self, slot: int, timeout_s: float) -> bool:
        """See BlockCopies."""
        self._threads.hurry()
        return super().wait_stopped(slot, 0.0)


class Attached:
    """As the product's."""

    def __init__(self, channel: Channel, request: Attach) -> None:
        self.channel = channel
        self.rank, self.slot, self.device = request.rank, request.slot, request.device
        self.incarnation, self.importer = request.incarnation, Importer(request.importer)
        self.sent = SeatMemory(0, (), (), (), (), ())
        self.shared: set[int] = set()
        self.applied = 0
        self.version = -1


class Attachments:
    """The HMM's ends of the channels to ranks. `asking`: who wants to be attached; `ended`: channels that have."""

    def __init__(self, hmm: Hmm) -> None:
        self._hmm = hmm
        self._revision = 0
        self.by_slot: dict[int, Attached] = {}
        self.asking: list[tuple[Channel, Attach]] = []
        self.ended: list[Channel] = []

    def open(self) -> None:
        """See elasticmoe.services.hmm.sessions.attachments."""

    def accept(self, ready: set[int]) -> None:
        """See elasticmoe.services.hmm.sessions.attachments."""

    def requests(self, ready: set[int]) -> list[tuple[Channel, Attach]]:
        """See elasticmoe.services.hmm.sessions.attachments."""
        asking, self.asking = self.asking, []
        return asking

    def note_applied(self, channel: Channel, revision: int) -> None:
        """A rank says what it has mapped."""
        attached = self.by_slot.get(channel.process.seat.slot)
        if attached is not None and attached.channel is channel:
            attached.applied = max(attached.applied, revision)

    def take(self, ready: set[int]) -> list[Attached]:
        """See elasticmoe.services.hmm.sessions.attachments."""
        ended, self.ended = self.ended, []
        gone = [one for one in self.by_slot.values() if one.channel in ended]
        for attached in gone:
            del self.by_slot[attached.slot]
        return gone

    def ended_now(self, slot: int) -> Attached | None:
        """See elasticmoe.services.hmm.sessions.attachments."""
        attached = self.by_slot.get(slot)
        return self.by_slot.pop(slot) if attached is not None and attached.channel.is_closed else None

    def check_vacant(self, slot: int) -> None:
        """See elasticmoe.services.hmm.sessions.attachments."""
        if slot in self.by_slot:
            raise Conflict(f"slot {slot} is taken", code="occupied")

    def admit(self, channel: Channel, request: Attach, reply: Message, fds: tuple[int, ...]) -> Attached:
        """See elasticmoe.services.hmm.sessions.attachments."""
        channel.tell(reply)
        self._hmm.sim.note(f"hmm: attached {request.incarnation}{' again' if request.resume else ''}")
        attached = self.by_slot[request.slot] = Attached(channel, request)
        return attached

    def refuse(self, channel: Channel, error: ElasticMoEError) -> None:
        """See elasticmoe.services.hmm.sessions.attachments."""
        channel.tell(refusal(error))

    def share(self, attached: Attached, tell: Callable[[Importer], tuple[SeatMemory, Offer]]) -> None:
        """See elasticmoe.services.hmm.sessions.attachments."""
        self.update(attached, *tell(attached.importer))

    def update(self, attached: Attached, seat: SeatMemory, offer: Offer) -> None:
        """See elasticmoe.services.hmm.sessions.attachments."""
        if seat == msgspec.structs.replace(attached.sent, revision=0):
            return
        self._revision = max(self._revision + 1, int(self._hmm.sim.now * 1000))
        attached.sent = msgspec.structs.replace(seat, revision=self._revision)
        for make in shares(offer, attached.shared):
            message, _ = make()
            attached.channel.tell(message)
        attached.shared = set(offer.handles)
        attached.channel.tell(attached.sent)
