"""What ranks say to the router: heard, and taken to the streams and links that it is about.

What follows of it for a stream (another try, another rank, its end) is the dispatcher's to do.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from elasticmoe.common.clock import Clock
from elasticmoe.common.endpoints import AsyncClientEnd
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Received
from elasticmoe.common.protocol.errors import ElasticMoEError, ProtocolError, RequestFailed
from elasticmoe.common.protocol.rank import Cancel
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.router import (
    Delta,
    Failed,
    MayMove,
    Moved,
    RankStatus,
    RankTimes,
    Suspected,
    Tokens,
    ToRouter,
    WantVocabulary,
)
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.router.dispatch.links import RankLink
from elasticmoe.services.router.history import History
from elasticmoe.services.router.metrics import Metrics

if TYPE_CHECKING:
    from elasticmoe.services.router.dispatch.dispatcher import Dispatcher

log = get_logger("router")

AFTER_SHORTAGE_S = 0.01


class Inbox:
    """For the dispatcher's loop; links and streams are the dispatcher's."""

    def __init__(self, dispatcher: Dispatcher, metrics: Metrics, history: History, clock: Clock) -> None:
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._history = history
        self._clock = clock

    async def listen(self, link: RankLink, client: AsyncClientEnd[ToRouter]) -> None:
        """Take every message of `client` until cancelled. One that cannot be digested is logged and dropped."""
        while True:
            try:
                received = await client.receive()
            except MemoryError:  # as if it had been lost on its way
                with suppress(MemoryError):
                    log.error("no memory for a message", rank=link.rank)
                with suppress(MemoryError):
                    await asyncio.sleep(AFTER_SHORTAGE_S)
                continue
            try:
                self.take(link, received, self._clock.monotonic())
            except Exception:
                with suppress(MemoryError):
                    log.exception("message could not be handled", rank=link.rank, kind=type(received.body).__name__)
            await asyncio.sleep(0)  # a flood of messages must not keep their readers from running

    def take(self, link: RankLink, received: Received[ToRouter], now: float) -> None:
        """One message of a rank. Whatever it says, the loop goes on."""
        if link.hear(received, now):
            log.warning("another process speaks for the rank", rank=link.rank, sender=received.sender)
            link.watch(now)
        body = received.body
        if isinstance(body, Tokens):
            for delta in body.deltas:
                self._on_delta(link, delta, now)
        elif isinstance(body, RankStatus):
            self._on_status(link, body, now)
        elif isinstance(body, Failed):
            self._on_failed(link, body, now)
        elif isinstance(body, Suspected):
            if body.request_id in link.streams:
                link.streams[body.request_id].suspicion = body.suspicion
        elif isinstance(body, RankTimes):
            stream = link.streams.get(body.request_id)
            if stream is not None and stream.trail is not None:
                stream.trail.timed(body, link.rank, now)
        elif isinstance(body, WantVocabulary):
            for piece in self._dispatcher.vocabulary.pieces(body.digest):
                self._dispatcher.say(link, piece)
        elif isinstance(body, Moved):
            self._on_moved(link, body, now)
        elif isinstance(body, MayMove):
            self._on_may_move(link, body, now)
        elif isinstance(body, Refused):
            self._on_refused(link, body, received.seq, now)

    def _on_status(self, link: RankLink, status: RankStatus, now: float) -> None:
        try:
            link.report(status, now)
            self._metrics.recomputed.inc(link.take_recomputed())
        except ProtocolError as error:
            log.error("rank sent nonsense", rank=link.rank, error=error.message)
            self._metrics.bad_messages.inc()

    def _on_delta(self, link: RankLink, delta: Delta, now: float) -> None:
        stream = self._dispatcher.streams.get(delta.request_id)
        if stream is None:
            if delta.finish is None:  # a cancel was lost or is still on its way
                self._dispatcher.say(link, Cancel(delta.request_id))
            return
        if stream.rank == link.rank:
            stream.sender = link.sender  # its present incarnation has taken it over
        elif delta.index + len(delta.ids) > stream.reach:
            self._dispatcher.move(stream, link, now)
        if stream.trail is not None and stream.rank == link.rank:
            stream.trail.heard(stream, now)
        if stream.rank == link.rank and stream.lacks(delta):
            self._dispatcher.lose(stream, link.rank, now)
            return
        index, first_at, last_at = stream.num_tokens, stream.first_at, stream.last_at
        try:
            ids = stream.accept(delta, now)
        except ProtocolError as error:
            log.error("rank sent nonsense", rank=link.rank, error=error.message, **stream.submit.names)
            self._metrics.bad_messages.inc()
            self._dispatcher.fail(stream, ElasticMoEError("the engine sent an invalid answer"))
            return
        except Exception:  # a bug here must not cost the step's other requests their tokens
            log.exception("tokens could not be taken", rank=link.rank, **stream.submit.names)
            self._dispatcher.fail(stream, ElasticMoEError("tokens could not be taken"))
            return
        if ids:
            if stream.trail is not None:
                stream.trail.went_on(now)
            stream.last_at, stream.num_losses = now, 0
            if first_at is None:
                stream.first_at = now
                if stream.rank in self._dispatcher.links:
                    self._dispatcher.links[stream.rank].started(stream)
            self._history.chunk(stream.name, index, ids)
            seconds, is_first = now - (stream.accepted_at if first_at is None else last_at), first_at is None
            self._metrics.tokens(len(ids), seconds, is_first)
            self._dispatcher.windows.tokens(seconds, is_first)
        if stream.ending is not None:
            self._dispatcher.forget(stream, tell_rank=delta.finish is None)

    def _leads(self, rank: RankId, link: RankLink) -> bool:
        """Whether what `link` says can be true: that `rank` has, or gets, a sequence."""
        if rank.tp == 0 and rank.replica >= 0:
            return True
        log.error("rank sent nonsense", rank=link.rank, error=f"{rank} does not lead a replica")
        self._metrics.bad_messages.inc()
        return False

    def _on_may_move(self, link: RankLink, news: MayMove, now: float) -> None:
        if self._leads(news.rank, link) and news.request_id in link.streams and news.rank not in self._dispatcher.links:
            self._dispatcher.link_to(news.rank, now)

    def _on_moved(self, link: RankLink, moved: Moved, now: float) -> None:
        if not self._leads(moved.rank, link):
            return
        stream = self._dispatcher.streams.get(moved.request_id)
        if stream is None:  # it ended before, and the cancel went to a rank that did not have it any more
            self._dispatcher.say(self._dispatcher.link_to(moved.rank, now), Cancel(moved.request_id))
        elif stream.rank == link.rank != moved.rank:
            new = self._dispatcher.link_to(moved.rank, now)
            self._dispatcher.move(stream, new, now, moved.incarnation)
            new.watch(now)

    def _on_failed(self, link: RankLink, failed: Failed, now: float) -> None:
        stream = self._dispatcher.streams.get(failed.request_id)
        if stream is None and failed.code == RequestFailed.code:  # of an earlier try, that had gone on unheard
            stream = next((one for one in self._dispatcher.streams.values() if one.was(failed.request_id)), None)
        if stream is None:
            return
        error = ElasticMoEError(failed.message, code=failed.code, retryable=failed.retryable)
        self._dispatcher.retry_or_fail(stream, error, now, avoid=link.rank)

    def _on_refused(self, link: RankLink, refused: Refused, seq: int, now: float) -> None:
        log.warning("rank refused a message", rank=link.rank, code=refused.code, reason=refused.message)
        for stream in [stream for stream in link.streams.values() if seq and stream.seq == seq]:
            error = ElasticMoEError(refused.message, code=refused.code, retryable=refused.retryable)
            self._dispatcher.retry_or_fail(stream, error, now, avoid=link.rank)
