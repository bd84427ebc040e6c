"""Migration of sequences as the rank's loop sees it: messages go in, `turn` does what can be done without waiting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from elasticmoe.common.endpoints import Transport
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.ids import CommandId
from elasticmoe.common.protocol.peer import Reserved, Taken
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.rank import HandOver, MoveTarget, RankCommand, Reserve, Unreserve
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.sequence import RequestKey, Sequence
from elasticmoe.services.worker.migration.incoming import REMEMBERED_MAX, Incoming
from elasticmoe.services.worker.migration.outgoing import Outgoing
from elasticmoe.services.worker.migration.targets import Targets


class Migration:
    """Both sides of all hand-overs of one rank. Only the rank's loop thread calls it, between two steps: never between
    `engine.plan` and `engine.compute`. It never blocks. `sender`: the identity of the asking rank, its incarnation.
    """

    def __init__(
        self,
        seat: StartRank,
        engine: Engine,
        transport: Transport,
        *,
        watch: Callable[[int], None],
        unwatch: Callable[[int], None],
    ) -> None:
        """`transport` leads to the HMM and to other ranks. `watch` makes the loop's poll return when a descriptor is
        readable; `turn` then has to be called."""
        self._engine = engine
        self._targets = Targets(seat.rank)
        self._outgoing = Outgoing(
            seat, engine, self._targets, transport, watch=watch, unwatch=unwatch, on_taken=self._note_gone
        )
        self._incoming = Incoming(seat, engine, self.cancel)
        self._gone: OrderedDict[RequestKey, RankId] = OrderedDict()  # where sequences went, the latest of them
        self._now = 0.0
        self.handed_over = 0

    # ---- the rank's figures ---------------------------------------------------------------------------------------

    @property
    def is_leaving(self) -> bool:
        """Whether every sequence has to go, also those that come."""
        return self._targets.is_leaving

    @property
    def command_id(self) -> CommandId | None:
        """Of the command in force; None before the first."""
        return self._targets.command_id

    @property
    def num_moving(self) -> int:
        """Sequences on their way to another rank, from the first question to the last answer. Until they are handed
        over they also count as running or waiting."""
        return len(self._outgoing.transfers)

    @property
    def taken_over(self) -> int:
        """Sequences that came from other ranks so far."""
        return self._incoming.taken_over

    @property
    def num_expected(self) -> int:
        """Sequences of other ranks that a place is kept for."""
        return self._incoming.num_places

    @property
    def is_handing(self) -> bool:
        """Whether the next turn hands over sequences that run, so that streams wait for the two steps after the one
        that comes now: in transit, and with the rank that they come to."""
        return self._outgoing.is_handing

    @property
    def has_work(self) -> bool:
        """Whether `turn` should be called within some milliseconds: a sequence moves, or is to be moved."""
        if self._outgoing.transfers:
            return True
        return bool(self._targets.wanted(self._outgoing.on_the_way)) and bool(self._outgoing.candidates)

    # ---- messages -------------------------------------------------------------------------------------------------

    def obey(self, command: RankCommand) -> None:
        """Replace the command in force. Sequences on their way to ranks that are no targets any more stay, unless they
        were handed over already."""
        self._targets.obey(command)

    def reserve(self, sender: str, message: Reserve) -> Reserved:
        """Keep a place for another rank's sequence. Raises an ElasticMoEError that says why not; idempotent."""
        return self._incoming.reserve(sender, message, is_leaving=self.is_leaving)

    def unreserve(self, sender: str, message: Unreserve) -> None:
        """Free that place, or end the sequence that `sender` has handed over: it goes on there, or was cancelled."""
        self._incoming.unreserve(sender, message)

    def take(self, sender: str, message: HandOver, now: float) -> Taken:
        """Go on with another rank's sequence. The caller has checked its token ids. Raises an ElasticMoEError, and then
        nothing has changed; idempotent."""
        taken = self._incoming.take(sender, message, now)
        self._gone.pop((message.router, message.request.request_id), None)  # it may have come back
        return taken

    def cancel(self, router: bytes, request_id: str) -> None:
        """End a request here and wherever it went from here."""
        self._engine.cancel(router, request_id)
        for transfer in list(self._outgoing.transfers):
            sequence = transfer.sequence
            if (sequence.peer, sequence.request.request_id) == (router, request_id) and transfer.stage != "draining":
                self._outgoing.give_up(transfer, self._now)
        rank = self._gone.pop((router, request_id), None)
        if rank is not None:
            self._outgoing.tell(rank, Unreserve(request_id, router), self._now)

    def turn(self, now: float, members: int) -> list[tuple[bytes, Message]]:
        """Receive answers; begin, advance and end hand-overs. `members`: bit mask of the slots that step together.
        Returns what is to be told to routers."""
        self._now = now
        self._incoming.expire(now)
        return self._outgoing.turn(now, members)

    def ask_again(self) -> None:
        """A rank may have died with what it was asked, and another is in its place: sequences that were handed over and
        not answered for are handed over again at the next turn."""
        self._outgoing.ask_again()

    def close(self) -> None:
        """Close the sockets. Sequences stay with the engine."""
        self._outgoing.close()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _note_gone(self, sequence: Sequence, target: MoveTarget) -> None:
        self.handed_over += 1
        self._gone[sequence.peer, sequence.request.request_id] = target.rank
        if len(self._gone) > REMEMBERED_MAX:
            self._gone.popitem(last=False)
