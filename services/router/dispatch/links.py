"""The router's connection to one replica: to its leader, the rank with tp index 0, which speaks for the replica.

A link outlives the process at its other end: the socket reconnects by itself, and a new process is told by the sender's
uuid in its messages. What is true of the rank is what it said last; silence makes it doubtful, then lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from elasticmoe.common.endpoints import AsyncClientEnd
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import ProtocolError, Unavailable
from elasticmoe.common.protocol.rank import Unwatch, Watch
from elasticmoe.common.protocol.router import RankStatus, Tokens, ToRouter
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.router.dispatch.absence import Absence
from elasticmoe.services.router.dispatch.balancer import LOST_S, Candidate
from elasticmoe.services.router.dispatch.streams import Stream

log = get_logger("router")

WATCH_EVERY_S = 1.6  # a rank that has been silent for this long is asked: it speaks each second by itself
EMPTY_S = 0.3  # patience with a new incarnation that has not named a stream, once its status has come
ADOPT_S = 2.0  # where the stream may wait there unnamed, submitted while nobody was there
WATCH_BUSY_S = 0.25  # and one that has streams: another process may be in its place, which does not know this router


class Task(Protocol):
    """What runs beside the caller until it is told to end."""

    def cancel(self) -> object:
        """Let it end. Idempotent."""


Spawn = Callable[[Coroutine[Any, Any, None], str], Task]


def spawn_task(coroutine: Coroutine[Any, Any, None], name: str) -> Task:
    """Run `coroutine` in the running asyncio loop."""
    return asyncio.create_task(coroutine, name=name)


class RankLink:
    """A connection, which it owns, and what its rank reported. For one asyncio loop; times are of the monotonic clock.

    `streams`: those that this rank works on, by request id. `sender` names the incarnation heard last, `changed_at` is
    when it appeared. `gone_at`: when a layout without the rank followed on one with it. `left_at`: the same, or when
    the link was opened to a rank outside the layout; the link stays until its streams have ended, or are another
    rank's. Then the rank is told that no request follows (Unwatch), so that it can end; `dismissed_at` is when.
    Whatever is sent after that is preceded by another Watch.
    """

    def __init__(self, rank: RankId, client: AsyncClientEnd[ToRouter], now: float) -> None:
        self.rank = rank
        self.streams: dict[str, Stream] = {}
        self.status: RankStatus | None = None
        self.heard_at = now
        self.sender = ""
        self.changed_at = now
        self.left_at: float | None = None
        self.gone_at: float | None = None
        self.dismissed_at: float | None = None
        self._status_at = -WATCH_EVERY_S
        self._status_sender = ""
        self._unstarted: dict[str, int] = {}  # prompt tokens by request id, of streams without a token
        self._tokens_unstarted = 0
        self._progress_at = now
        self._watched_at = -WATCH_EVERY_S
        self._is_dismissed = False  # Unwatch was the last thing that was said
        self._num_bad = 0
        self._num_recomputed = 0
        self._client = client
        self.task: Task | None = None  # that listens to it

    def attach(self, stream: Stream) -> None:
        """The rank works on `stream` from now on."""
        request_id = stream.submit.request_id
        self.streams[request_id] = stream
        if stream.is_untouched:
            self._unstarted[request_id] = len(stream.submit.prompt)
            self._tokens_unstarted += len(stream.submit.prompt)

    def started(self, stream: Stream) -> None:
        """Its first token has come: the prompt is computed. Idempotent."""
        self._tokens_unstarted -= self._unstarted.pop(stream.submit.request_id, 0)

    def detach(self, stream: Stream) -> None:
        """The rank does not work on `stream` any more. Idempotent."""
        self.started(stream)
        self.streams.pop(stream.submit.request_id, None)

    def take_bad(self) -> int:
        """Messages that could not be decoded, since the last call."""
        new, self._num_bad = self._client.num_bad - self._num_bad, self._client.num_bad
        return new

    def take_recomputed(self) -> int:
        """Tokens that the rank has computed once more, since the last call."""
        new, self._num_recomputed = self._num_recomputed, 0
        return new

    @property
    def has_reported(self) -> bool:
        """The present incarnation has sent a status, so that what it said before has come too."""
        return self.status is not None and self._status_sender == self.sender

    @property
    def has_no_requests(self) -> bool:
        """The present incarnation says so; what its predecessor said does not count."""
        status = self.status if self.has_reported else None
        return status is not None and status.running + status.waiting == 0

    def send(self, body: Message) -> int:
        """Queue a message; returns its seq. Raises Unavailable when the rank does not take messages."""
        if self._is_dismissed and not isinstance(body, Watch):
            self._client.send(Watch())
        seq = self._client.send(body)
        self._is_dismissed = isinstance(body, Unwatch)
        return seq

    def hear(self, received: Received[ToRouter], now: float) -> bool:
        """Note who speaks; True when it is not the incarnation that spoke before.

        Streams that were moved here before the rank was ever heard are those of the incarnation that speaks first.
        """
        self.heard_at = now
        if isinstance(received.body, Tokens):
            self._progress_at = now
        if received.sender == self.sender:
            return False
        is_change = self.sender != ""
        for stream in self.streams.values():
            stream.sender = stream.sender or received.sender
        self._is_dismissed = False  # this incarnation was not told yet
        self.sender, self.changed_at, self._progress_at = received.sender, now, now
        self._status_at = self._watched_at = -WATCH_EVERY_S  # it does not know this router yet: ask at once
        self._status_sender = ""
        return is_change

    def report(self, status: RankStatus, now: float) -> None:
        """Take a status. Raises ProtocolError for one that cannot be true; then the last one stands."""
        counts = (status.running, status.waiting, status.tokens_queued, status.blocks_free)
        if status.rank != self.rank or min(counts) < 0 or status.blocks_free > status.blocks_total:
            raise ProtocolError(f"status of {self.rank} is of {status.rank}, or has impossible counts")
        if status.max_model_len < 1:
            raise ProtocolError(f"status of {self.rank} has max_model_len {status.max_model_len}")
        last = self.status
        if last is None or status.progress != last.progress or status.running + status.waiting == 0:
            self._progress_at = now
        before = last.recomputed if last is not None and last.incarnation == status.incarnation else 0
        self._num_recomputed += max(0, status.recomputed - before)
        self.status, self._status_at, self._status_sender = status, now, self.sender

    def watch(self, now: float) -> None:
        """Ask for a status when none came for WATCH_EVERY_S. A rank that left and has no streams is dismissed, once."""
        is_needed = self.left_at is None or bool(self.streams)
        if not is_needed and self._is_dismissed:
            return
        was_dismissed = self._is_dismissed
        asked_s = now - max(self._status_at, self._watched_at)
        is_busy = bool(self.streams) and now - self.heard_at >= WATCH_BUSY_S
        if is_needed and not was_dismissed and asked_s < (WATCH_BUSY_S if is_busy else WATCH_EVERY_S):
            return
        self._watched_at = now
        if is_needed:
            self.dismissed_at = None
        elif self.dismissed_at is None:
            self.dismissed_at = now  # also where it takes no message
        try:
            self.send(Watch() if is_needed else Unwatch())
            if not is_needed:
                self.dismissed_at = now
            elif was_dismissed:  # its silence was asked for, and its last status says nothing about now
                self.heard_at, self.status = now, None
        except Unavailable as error:
            log.debug("rank does not take messages", rank=self.rank, error=error.message)

    def excuse(self, absence: Absence) -> None:
        """What it did not say while the router did not listen is no silence."""
        self.heard_at = absence.moved(self.heard_at)
        self.changed_at = absence.moved(self.changed_at)
        self._progress_at = absence.moved(self._progress_at)
        if self.gone_at is not None:
            self.gone_at = absence.moved(self.gone_at)

    def silent_s(self, now: float) -> float:
        """Seconds since the last message; since the link's beginning when there was none."""
        return now - self.heard_at

    def patience_s(self, stream: Stream) -> float:
        """How long a stream may be here while the present incarnation is not the one that has it."""
        if stream.moved_at > self.changed_at:  # to one that has not spoken yet: what its predecessor said means nothing
            return LOST_S if self.heard_at <= stream.moved_at else ADOPT_S
        is_unnamed = self.has_no_requests or (self.has_reported and not stream.is_untouched)
        return EMPTY_S if is_unnamed else ADOPT_S if stream.is_untouched else LOST_S

    def candidate(self, now: float) -> Candidate | None:
        """What the balancer may know; None before the first status and for a rank that left.

        Statuses lag behind by up to a tenth of a second, so the router's own count of what it sent counts where it is
        larger: otherwise a burst would go to one replica.
        """
        status = self.status
        if status is None or self.left_at is not None:
            return None
        return Candidate(
            rank=self.rank,
            requests=max(status.running + status.waiting, len(self.streams)),
            tokens_queued=max(status.tokens_queued, self._tokens_unstarted),
            blocks_free=status.blocks_free,
            blocks_total=status.blocks_total,
            silent_s=self.silent_s(now),
            stalled_s=now - self._progress_at,
            is_leaving=status.is_leaving,
        )

    def close(self) -> None:
        """Hear nothing more, and close the connection. Idempotent."""
        if self.task is not None:
            self.task.cancel()
        self._client.close()
