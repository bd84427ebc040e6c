"""A rank's connection to the HMM: by it memory is handed over, and its end is how the HMM sees the rank's death.

Without an HMM the rank serves on with what it has mapped; it introduces itself to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from elasticmoe.common.devices.factory import importer_number
from elasticmoe.common.fdchannel import close_all
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import ElasticMoEError, ProtocolError
from elasticmoe.common.protocol.handles import Applied, Attach, AttachReply, FromHmm, SeatMemory, ShareHandles
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.telemetry import get_logger

log = get_logger("rank")

ATTACH_MS = 10_000
RESUME_MS = 2_000  # the HMM listens only once it can answer; meanwhile this rank, and so all, do not step
RECEIVE_MS = 500  # for the rest of a message that has begun to come
MESSAGES_PER_LOOK = 4  # a rank steps between two looks, and importing handles takes milliseconds
RESUME_S = 0.5  # between attempts to reach a restarted HMM

Handed = tuple[ShareHandles | SeatMemory, list[int]]


class HmmConnection(Protocol):
    """What the link needs of a connection: common/fdchannel.py."""

    def fileno(self) -> int:
        """Readable at a message and at the peer's end."""

    @property
    def is_readable(self) -> bool:
        """Whether it is now."""

    @property
    def has_ended(self) -> bool:
        """Whether the peer has ended it, be there messages left or not."""

    def send(self, body: Message, *, deadline_ms: int = ...) -> None:
        """Raises Unavailable when the peer is gone."""

    def receive(self, *, deadline_ms: int) -> tuple[Received[FromHmm], list[int]]:
        """The next message and its descriptors, which are the caller's. Raises Unavailable, ProtocolError."""

    def close(self) -> None:
        """Idempotent."""


class HmmLink:
    """Owned by the rank's thread. `connect(deadline_ms)` makes a connection to the HMM, or raises Unavailable. `watch`
    and `unwatch` tell the rank's poll about its descriptor."""

    def __init__(
        self,
        connect: Callable[[int], HmmConnection],
        seat: StartRank,
        *,
        watch: Callable[[int], None],
        unwatch: Callable[[int], None],
    ) -> None:
        self._connect = connect
        self._seat = seat
        self._watch = watch
        self._unwatch = unwatch
        self._memory_id = ""
        self._channel: HmmConnection | None = None
        self._resume_at = 0.0
        self._refusal = ""  # of the latest attempt to resume

    @property
    def is_connected(self) -> bool:
        """Whether an HMM would see this connection's end."""
        return self._channel is not None

    def attach(self) -> tuple[AttachReply, list[int]]:
        """Ask for the seat's memory: the answer and its descriptors, which are the caller's; what is `handed` over
        comes next. Blocks, at most ATTACH_MS.

        Raises the HMM's refusal, Unavailable without an HMM.
        """
        reply, fds = self._introduce(is_resuming=False)
        self._memory_id = reply.memory_id
        return reply, fds

    def handed(self) -> Iterator[Handed]:
        """The messages that follow the answer, up to the first SeatMemory, each with its descriptors, which are the
        caller's. Blocks, at most ATTACH_MS for each. Raises Unavailable, DeadlineExceeded, ProtocolError."""
        while True:
            assert self._channel is not None, "`attach` has connected"
            message, fds = self._receive(self._channel, ATTACH_MS)
            yield message, fds
            if isinstance(message, SeatMemory):
                return

    def _receive(self, channel: HmmConnection, deadline_ms: int) -> Handed:
        received, fds = channel.receive(deadline_ms=deadline_ms)
        if isinstance(received.body, ShareHandles | SeatMemory):
            return received.body, fds
        close_all(fds)
        raise ProtocolError(f"{type(received.body).__name__} was not asked for")

    def look(self, readable: set[int], now: float) -> Iterator[Handed]:
        """Take what came: messages with their descriptors, which are the caller's, up to a SeatMemory, and no more than
        MESSAGES_PER_LOOK of them. Does not wait for anything that has not begun to come. Raises ElasticMoEError
        `memory_replaced` where a restarted HMM has lost the memory that this rank has mapped: nobody else can ever see
        it again."""
        channel = self._channel
        if channel is not None and channel.fileno() in readable:
            try:
                for _ in range(MESSAGES_PER_LOOK):
                    message, fds = self._receive(channel, RECEIVE_MS)
                    yield message, fds
                    if isinstance(message, SeatMemory) or not channel.is_readable:
                        return
                return
            except ElasticMoEError as error:
                log.warning("the HMM is gone; serving goes on", because=error.message)
                self.close()
        self._try_resume(now)

    def hear(self, now: float) -> None:
        """Within a step that waits for others: whether an HMM is there that will end it where they have ended. Takes no
        message. Raises as `look`."""
        if self._channel is not None and self._channel.has_ended:
            log.warning("the HMM is gone in the midst of a step")
            self.close()
        self._try_resume(now)

    def applied(self, revision: int) -> None:
        """Tell the HMM what has been reached. Where it is away, the next one asks again."""
        if self._channel is None:
            return
        try:
            self._channel.send(Applied(revision), deadline_ms=RECEIVE_MS)
        except ElasticMoEError as error:
            log.warning("the HMM is gone; serving goes on", because=error.message)
            self.close()

    def _try_resume(self, now: float) -> None:
        if self._channel is not None or now < self._resume_at:
            return
        self._resume_at = now + RESUME_S
        try:
            reply, fds = self._introduce(is_resuming=True)
        except ElasticMoEError as error:
            if error.retryable or error.message == self._refusal:  # no HMM yet, or twice a second
                log.debug("not introduced yet", because=error.message)
            else:
                self._refusal = error.message
                log.warning("the HMM refuses this rank; serving goes on", code=error.code, because=error.message)
            return
        self._refusal = ""
        close_all(fds)  # of what this rank has mapped already
        if reply.memory_id != self._memory_id:
            raise ElasticMoEError("the HMM has lost the memory that this rank has mapped", code="memory_replaced")
        log.info("introduced to the restarted HMM")

    def _introduce(self, *, is_resuming: bool) -> tuple[AttachReply, list[int]]:
        seat = self._seat
        connect_ms, answer_ms = (200, RESUME_MS) if is_resuming else (5_000, ATTACH_MS)
        channel = self._connect(connect_ms)
        try:
            importer = importer_number(seat.device)
            channel.send(Attach(seat.rank, seat.slot, seat.device, seat.incarnation, is_resuming, importer))
            received, fds = channel.receive(deadline_ms=answer_ms)
            if not isinstance(received.body, AttachReply):
                close_all(fds)
                if isinstance(received.body, Refused):
                    received.body.raise_()
                raise ProtocolError(f"{type(received.body).__name__} does not answer Attach")
        except BaseException:
            channel.close()
            raise
        self._channel = channel
        self._watch(channel.fileno())
        return received.body, fds

    def close(self) -> None:
        """End the connection: to the HMM this rank is dead, unless it introduces itself again. Idempotent."""
        if self._channel is not None:
            self._unwatch(self._channel.fileno())
            self._channel.close()
            self._channel = None
