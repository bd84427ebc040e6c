"""The scaler's view of the ranks themselves: their loads, and commands to hand sequences over. Nothing here waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from elasticmoe.common.clock import Clock
from elasticmoe.common.endpoints import ClientEnd, Transport, arrived
from elasticmoe.common.layout import RankId, Seat
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.protocol.rank import GetRankLoad
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import CODEC, PoolRank, RankLoad, ToScaler
from elasticmoe.common.telemetry import get_logger

log = get_logger("scaler")

ANSWER_S = 0.5  # a question that was not answered by then is asked again


class _Peer:
    def __init__(self, client: ClientEnd[ToScaler]) -> None:
        self.client = client
        self.asked_at = -ANSWER_S
        self.is_waiting = False
        self.load: RankLoad | None = None
        self.loaded_at = 0.0


class Peers:
    """One connection per rank, made when it is first needed, closed when its seat is gone. The loop's thread only."""

    def __init__(self, transport: Transport, identity: str, clock: Clock) -> None:
        self._transport = transport
        self._identity = identity
        self._clock = clock
        self._peers: dict[RankId, _Peer] = {}
        self.epoch = 0

    def filenos(self) -> list[int]:
        """Descriptors that become readable when a rank answers; call `receive` before waiting for them."""
        return [peer.client.fileno() for peer in self._peers.values()]

    def keep(self, seats: Iterable[Seat]) -> None:
        """Close the connections to ranks of other seats."""
        wanted = {seat.rank for seat in seats}
        for rank in [rank for rank in self._peers if rank not in wanted]:
            self._peers.pop(rank).client.close()

    def ask(self, seats: Iterable[Seat], interval_s: float) -> None:
        """Ask each rank for its load, at most every `interval_s`."""
        now = self._clock.monotonic()
        for seat in seats:
            peer = self._peer(seat.rank)
            wait_s = max(interval_s, ANSWER_S) if peer.is_waiting else interval_s
            if now - peer.asked_at >= wait_s and self._send(peer, GetRankLoad()):
                peer.asked_at, peer.is_waiting = now, True

    def tell(self, rank: RankId, command: Message) -> None:
        """Send a command; whether it took effect is seen in the rank's load."""
        peer = self._peer(rank)
        self._send(peer, command)
        peer.asked_at = -ANSWER_S  # ask at once what came of it

    def receive(self) -> None:
        """Take all answers that have come."""
        for rank, peer in self._peers.items():
            for received in arrived(peer.client, log, rank=rank):
                if isinstance(received.body, RankLoad):
                    peer.load, peer.loaded_at, peer.is_waiting = received.body, self._clock.monotonic(), False
                elif isinstance(received.body, Refused):
                    log.warning("rank refused", rank=rank, code=received.body.code, because=received.body.message)

    def loads(self, ranks: Mapping[int, PoolRank], age_s_max: float) -> dict[int, RankLoad]:
        """Loads by slot, of these ranks' living incarnations, no older than `age_s_max`."""
        oldest = self._clock.monotonic() - age_s_max
        found = {}
        for slot, rank in ranks.items():
            peer = self._peers.get(rank.rank)
            if peer and peer.load and peer.loaded_at >= oldest and peer.load.incarnation == rank.incarnation:
                found[slot] = peer.load
        return found

    def close(self) -> None:
        """Close all connections."""
        self.keep(())

    def _peer(self, rank: RankId) -> _Peer:
        peer = self._peers.get(rank)
        if peer is None:
            peer = _Peer(self._transport.connect(f"rank-{rank}", self._identity, CODEC))
            self._peers[rank] = peer
        peer.client.epoch = self.epoch
        return peer

    @staticmethod
    def _send(peer: _Peer, message: Message) -> bool:
        try:
            peer.client.send(message)
        except Unavailable:
            return False  # its queue is full: it is gone or wedged
        return True
