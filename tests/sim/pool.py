"""The worker pool: starts and ends the processes of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, Overloaded
from elasticmoe.common.protocol.pool import GetPool, StartRank
from elasticmoe.common.protocol.replies import Ack, refusal
from elasticmoe.common.protocol.scaler import PoolRank, PoolStatus, RankExited, RankStarted
from tests.sim.heap import Actor
from tests.sim.rank import RankProcess
from tests.sim.store import DiskFence

if TYPE_CHECKING:
    from tests.sim.world import World


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

    def _survivors(self) -> dict[int, RankProcess]:
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
        self.ranks[seat.slot] = RankProcess(self.world, seat)
        return RankStarted(seat.rank, seat.incarnation)

    def _refill(self) -> None:
        self.standby = min(self._standbys, self.standby + 1)

    def _status(self) -> PoolStatus:
        ranks = tuple(
            PoolRank(
                rank.seat.rank, slot, rank.seat.device, rank.seat.incarnation, 1, rank.is_ready, 0.0, rank.is_paused
            )
            for slot, rank in self.ranks.items()
        )
        return PoolStatus(self.standby, ranks)

    def notify(self, event: Message) -> None:
        """Tell the scaler that asked last."""
        if self._subscriber and self.is_alive:
            self.sim.send("pool", self._subscriber, Received(0, "pool:1", 0, event))

    def on_exit(self, rank: RankProcess, reason: str) -> None:
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
