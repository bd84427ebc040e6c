"""Brings generations and replicas together: submits, cancels, moves, and notices losses. What ranks say: inbox.py.

What can go wrong, and who ends a stream then:
- a rank says Failed: its error, or another try elsewhere when it is retryable;
- a rank is silent for LOST_S, or another incarnation speaks in its place and does not go on with the stream: another
  try, else `rank_lost`. As a rule it does go on, since the ledger holds what its predecessor did: then it says so first
  of all, with every token from the first on;
- tokens are missing for GAP_S, or log probabilities were lost with a rank: another try, else `rank_lost`;
- the deadline passes: `deadline_exceeded`.
Another try carries the tokens that have come, and goes on behind them with the same ones as the first would have.
A stream may move while it runs: its rank says so (Moved), or another rank sends what follows, whichever comes first.
It is that rank's from then on: cancels go there, and that rank's loss is the stream's. Tokens count whoever sends them,
and late ones of the former rank do not bring it back. Where the news of two moves overtake each other, the next token
tells whose it is; a stream that waits for its first one is at worst submitted anew.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress

from elasticmoe.common.clock import SYSTEM_CLOCK, Clock
from elasticmoe.common.endpoints import Transport
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.layout import Layout, RankId
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import DeadlineExceeded, ElasticMoEError, Unavailable, Unready
from elasticmoe.common.protocol.rank import Cancel
from elasticmoe.common.protocol.router import CODEC
from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.transport import new_identity
from elasticmoe.services.router.dispatch.absence import Absence
from elasticmoe.services.router.dispatch.balancer import LOST_S, Candidate, decide
from elasticmoe.services.router.dispatch.inbox import Inbox
from elasticmoe.services.router.dispatch.links import RankLink, Spawn, spawn_task
from elasticmoe.services.router.dispatch.pace import TICK_S, Pace
from elasticmoe.services.router.dispatch.streams import Ending, Stream
from elasticmoe.services.router.dispatch.vocabulary import KnownVocabulary
from elasticmoe.services.router.dispatch.windows import RouterWindows
from elasticmoe.services.router.history import History
from elasticmoe.services.router.metrics import Metrics

log = get_logger("router")

GONE_S = 2.0  # of silence, by a rank that was taken out of the layout
GAP_S = 2.0
SUBMITS_MAX = 2  # of a request that ranks refuse
# In a row. A bound and no verdict: ranks themselves find out which request ends them (services/worker/engine/trial.py).
LOSSES_MAX = 16  # without a token in between
LOST = "rank_lost"
LEAVE_S = 5.0  # a link to a rank that left stays this long after its last stream: the rank may come back


class Dispatcher:
    """Owns the links and the streams. For one asyncio loop; `now` is the clock's monotonic time. `spawn` runs what
    listens to a link."""

    def __init__(
        self,
        transport: Transport,
        metrics: Metrics,
        history: History,
        identity: str,
        *,
        clock: Clock = SYSTEM_CLOCK,
        spawn: Spawn = spawn_task,
    ) -> None:
        self.layout: Layout | None = None
        self.links: dict[RankId, RankLink] = {}
        self.streams: dict[str, Stream] = {}
        self.vocabulary = KnownVocabulary()
        self._transport = transport
        self._metrics = metrics
        self._history = history
        self._identity = identity  # one for all links: whichever rank has the stream knows its router by it
        self._clock = clock
        self._spawn = spawn
        self._turn = 0
        self._pace = Pace()
        self._turned_at = math.inf  # no turn yet
        self._is_back = False  # from an absence, since the last turn
        self._has_waited = False  # with what it judges, for one turn
        self.windows = RouterWindows(identity, lambda: transport.connect_push("signals", identity))
        self._inbox = Inbox(self, metrics, history, clock)
        metrics.watch(self.links, lambda: self.layout)

    # ---- layout ------------------------------------------------------------------------------------------------------

    def apply_layout(self, layout: Layout, now: float) -> None:
        """Connect to replicas that came; those that left get no new work. Older and broken layouts are ignored."""
        if self.layout is not None and layout.epoch <= self.layout.epoch:
            return
        try:
            layout.check()
        except ValueError as error:
            log.error("layout is broken and ignored", epoch=layout.epoch, error=str(error))
            return
        self.layout = layout
        leaders = {seat.rank for seat in layout.seats if seat.rank.tp == 0}
        for rank in sorted(leaders):
            if rank in self.links:
                self.links[rank].left_at = self.links[rank].gone_at = None
                self.links[rank].watch(now)
            else:
                self._open_link(rank, now)
        for rank, link in self.links.items():
            if rank not in leaders and link.left_at is None:
                link.left_at = link.gone_at = now
                link.watch(now)
        log.info("layout", epoch=layout.epoch, replicas=layout.dp, tp=layout.tp)

    def _open_link(self, rank: RankId, now: float) -> RankLink:
        client = self._transport.connect_async(f"rank-{rank}", self._identity, CODEC)
        link = self.links[rank] = RankLink(rank, client, now)
        link.task = self._spawn(self._inbox.listen(link, client), f"link {rank}")
        link.watch(now)
        return link

    def link_to(self, rank: RankId, now: float) -> RankLink:
        """The link to a rank that has, or may have, a stream. One outside the layout is closed like one that left."""
        link = self.links.get(rank)
        if link is None:
            link = self._open_link(rank, now)
            link.left_at = now
        return link

    def _close_link(self, rank: RankId) -> None:
        self.links.pop(rank).close()

    def candidates(self, now: float) -> list[Candidate]:
        """All replicas that have reported and belong to the layout."""
        self._notice_absence(now)
        found = (link.candidate(now) for link in self.links.values())
        return [candidate for candidate in found if candidate is not None]

    def max_model_len(self) -> int:
        """Tokens of prompt and output together that every replica takes. Raises Unavailable before any has reported."""
        lengths = [link.status.max_model_len for link in self.links.values() if link.status and link.left_at is None]
        if not lengths:
            raise Unready("no replica has reported yet")
        return min(lengths)

    def readiness(self, now: float) -> tuple[bool, str]:
        """Whether a request would find a replica, and why."""
        rank, reason = decide(self.candidates(now), 0)
        return rank is not None, reason

    # ---- streams -----------------------------------------------------------------------------------------------------

    def open(self, stream: Stream, now: float) -> None:
        """Accept a stream and submit it. Raises Unavailable when no replica takes it: then it was not accepted."""
        self._turn += 1
        try:
            link = self._submit(stream, self.candidates(now))
        except Unavailable:
            self.windows.refused()
            raise
        self._metrics.accepted(len(stream.submit.prompt))
        self.windows.admitted(stream)
        self._history.accepted(
            stream.name,
            prompt_tokens=len(stream.submit.prompt),
            max_tokens=stream.submit.max_tokens,
            rank=str(link.rank),
        )

    def _submit(self, stream: Stream, candidates: list[Candidate]) -> RankLink:
        rank, reason = decide(candidates, self._turn)
        if rank is None:
            raise Unready(reason)
        link = self.links[rank]
        stream.seq = link.send(stream.submit)
        stream.num_submits += 1
        stream.rank, stream.sender = rank, link.sender
        self.streams[stream.submit.request_id] = stream
        self._pace.hurry()
        link.attach(stream)
        log.debug("submitted", rank=rank, reason=reason, **stream.submit.names)
        return link

    def cancel(self, stream: Stream) -> None:
        """The client left, or its other choices failed. Nothing happens to a stream that has ended."""
        if stream.end(Ending("cancelled", "cancelled")):
            self.forget(stream, tell_rank=True)

    def fail(self, stream: Stream, error: ElasticMoEError) -> None:
        """End it with `error`. Nothing happens to a stream that has ended."""
        if stream.end(Ending("error", error.code, error)):
            self.forget(stream, tell_rank=True)

    def forget(self, stream: Stream, *, tell_rank: bool) -> None:
        """The stream has ended: record it, and free what its rank holds."""
        self._release(stream, tell_rank=tell_rank)
        ending = stream.ending
        assert ending is not None
        retryable = ending.error is not None and ending.error.retryable
        self._history.terminal(stream.name, ending.kind, ending.reason, retryable=retryable, tokens=stream.num_tokens)
        now = self._clock.monotonic()
        if stream.trail is not None:
            stream.trail.write(stream, now)
        self._metrics.ended(stream, now)
        self.windows.ended(stream)

    def _release(self, stream: Stream, *, tell_rank: bool) -> None:
        request_id = stream.submit.request_id
        self.streams.pop(request_id, None)
        link = self.links.get(stream.rank) if stream.rank else None
        if link is not None:
            link.detach(stream)
            if tell_rank:
                self.say(link, Cancel(request_id))

    def say(self, link: RankLink, body: Message) -> None:
        """Send what may be lost."""
        try:
            link.send(body)
        except Unavailable as error:
            log.debug("rank does not take messages", rank=link.rank, error=error.message)

    def lose(self, stream: Stream, rank: RankId | None, now: float, *, avoid: RankId | None = None) -> None:
        """The rank that worked on it was lost: another try, else `rank_lost`."""
        error = Unavailable(f"rank {rank} was lost while it worked on the request", code=LOST)
        self.retry_or_fail(stream, error, now, avoid=avoid)

    def retry_or_fail(self, stream: Stream, error: ElasticMoEError, now: float, *, avoid: RankId | None) -> None:
        """Submit a stream anew with what it has, under another id so that the tries cannot be confused; or end it."""
        if error.code == LOST:
            stream.num_losses += 1
        else:
            stream.num_refusals += 1
        is_bounded = stream.num_losses <= LOSSES_MAX and stream.num_refusals < SUBMITS_MAX
        if not (error.retryable and is_bounded and now < stream.deadline):
            self.fail(stream, error)
            return
        try:
            self._release(stream, tell_rank=True)
            stream.restart(f"{stream.name}~{stream.num_submits}", now)
            others = [candidate for candidate in self.candidates(now) if candidate.rank != avoid]
            link = self._submit(stream, others)
        except (Unavailable, MemoryError):  # it is in no table now: nobody would come back to it
            self.fail(stream, error)
            return
        if stream.trail is not None:
            stream.trail.resubmitted(stream, link.rank, error.code, now)
        self._metrics.resubmitted.inc()
        self._history.resubmitted(stream.name, str(link.rank))
        log.warning("submitted anew", rank=link.rank, reason=error.code, **stream.submit.names)

    def move(self, stream: Stream, link: RankLink, now: float, incarnation: str = "") -> None:
        """The stream is another rank's from now on: `link`'s, in `incarnation`, or its present one if it was heard."""
        old = self.links.get(stream.rank) if stream.rank else None
        if old is not None:
            old.detach(stream)
        if stream.trail is not None:
            stream.trail.moved(stream, link.rank, now)
        stream.rank, stream.sender, stream.moved_at = link.rank, incarnation or link.sender, now
        stream.seq = 0  # it counts messages of the old link
        link.attach(stream)
        self._metrics.moved.inc()
        self._history.moved(stream.name, str(link.rank))
        log.debug("moved", rank=link.rank, **stream.submit.names)

    # ---- time --------------------------------------------------------------------------------------------------------

    def turn(self, now: float) -> None:
        """What time brings: questions to silent ranks, losses, deadlines. Called as the pace has it."""
        self._notice_absence(now)
        self._turned_at = now
        # What ranks have said meanwhile is read before they are judged; but who is always late has to judge sometimes.
        self._has_waited = self._is_back and not self._has_waited
        self._is_back = False
        for rank, link in list(self.links.items()):
            link.watch(now)
            if not self._has_waited:
                self._check_link(link, now)
            self._metrics.bad_messages.inc(link.take_bad())
            if not link.streams and link.dismissed_at is not None and now - link.dismissed_at > LEAVE_S:
                self._close_link(rank)
        for stream in list(self.streams.values()):
            if now >= stream.deadline:
                limit = stream.deadline - stream.accepted_at
                self.fail(stream, DeadlineExceeded(f"the request did not end within {limit:.0f} s"))
            elif not self._has_waited and stream.gap_since is not None and now - stream.gap_since > GAP_S:
                self.lose(stream, stream.rank, now)
        self._history.flush()
        self.windows.turn(now, self.layout.epoch if self.layout is not None else 0, self.streams.values())

    def _notice_absence(self, now: float) -> None:
        """Nobody was silent while this router did not listen. Deadlines of requests are promises to clients: they
        stay."""
        absence = Absence(self._turned_at, now)
        if absence.seconds <= 0:
            return
        self._turned_at, self._is_back = now, True
        for link in self.links.values():
            link.excuse(absence)
        for stream in self.streams.values():
            stream.excuse(absence)
        log.warning("the router stood still", seconds=round(absence.seconds, 2))

    def _check_link(self, link: RankLink, now: float) -> None:
        if not link.streams:
            return
        # Who leaves hands everything over before the layout changes: silent after that, it died with what it had.
        gone_s = min(link.silent_s(now), now - link.gone_at) if link.gone_at is not None else 0.0
        is_silent = link.silent_s(now) > LOST_S or gone_s > GONE_S
        for stream in list(link.streams.values()):
            since_s = now - max(link.changed_at, stream.moved_at)
            is_orphan = stream.sender != link.sender and since_s > link.patience_s(stream)
            if is_silent or is_orphan:
                self.lose(stream, link.rank, now, avoid=link.rank if is_silent else None)

    async def run(self) -> None:
        """Take turns for ever."""
        while True:
            try:
                failpoint("router.turn")
                self.turn(self._clock.monotonic())
                await self._pace.wait(has_work=bool(self.streams))
            except MemoryError:  # the router's end would break all its connections; the next turn looks at all of it
                with suppress(MemoryError):
                    log.error("a turn found no memory")
                with suppress(MemoryError):
                    await asyncio.sleep(TICK_S)

    def close(self) -> None:
        """End what still runs and close the links. Idempotent."""
        for stream in list(self.streams.values()):
            self.fail(stream, Unavailable("the router is shutting down", code="shutting_down"))
        for rank in list(self.links):
            self._close_link(rank)
        self.windows.close()


def router_identity() -> str:
    """This incarnation's name in messages."""
    return new_identity("router")
