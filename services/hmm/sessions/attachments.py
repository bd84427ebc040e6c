"""The handle channel's connections: which ranks are attached, what was sent to each, and what each has applied.

Handing over thousands of handles asks a driver for something for each: so their messages are made one by one, one in a
turn of the loop, and everybody else is heard in between.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec

from elasticmoe.common.clock import Clock
from elasticmoe.common.fdchannel import Channel, Listener, close_all
from elasticmoe.common.protocol.codec import Message, encode
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, ProtocolError, Unavailable
from elasticmoe.common.protocol.handles import FROM_RANK, Applied, Attach, AttachReply, FromRank, SeatMemory
from elasticmoe.common.telemetry import Logger
from elasticmoe.services.hmm.sessions.handles import Importer, MakeMessage, Offer, shares

PENDING_MAX: Final = 128  # connections that have not said who they are
PENDING_S: Final = 5.0  # that they have for it
_RECEIVE_MS: Final = 1_000
_APPLIED_MS: Final = 200  # a few bytes that were sent at once
_MESSAGES_PER_TURN: Final = 16
_SEND_BUFFER_BYTES: Final = 4 << 20  # as much of it as the system allows: most messages leave at once
_UNSENT_S: Final = 60.0  # a rank reads between two steps
_UNSENT_TURN_MS: Final = 5
_LATER: Final = (errno.EAGAIN, errno.ETOOMANYREFS)  # the socket is full, or too many descriptors are on their way
_NOTHING: Final = SeatMemory(0, (), (), (), (), ())


class _Unsent(NamedTuple):
    """The rest of a message; the descriptors go with its first byte. `kept`: those that are to be closed then."""

    data: bytes
    fds: tuple[int, ...]
    kept: tuple[int, ...]


class _Outbox:
    """Sends whole messages without waiting for the reader. Owns a duplicate of the channel's socket."""

    def __init__(self, channel: Channel[FromRank], identity: str, clock: Clock) -> None:
        """Raises Unavailable `no_descriptors` at the limit of open files."""
        self._clock = clock
        (fd,) = _duplicates((channel.fileno(),))
        self._sock = socket.socket(fileno=fd)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._identity = identity
        self._unsent: deque[_Unsent | MakeMessage] = deque()
        self._since = 0.0

    def put(self, message: Message, fds: tuple[int, ...]) -> None:
        """Send behind what is unsent, now or from `flush`. Raises Unavailable when the peer is gone, `no_descriptors`
        at the limit of open files. `fds` stay the caller's; duplicates of them are kept meanwhile."""
        if not self._unsent:
            self._since = self._clock.monotonic()
        kept = _duplicates(fds)
        self._unsent.append(_Unsent(self._framed(message), kept, kept))
        self.flush()

    def put_later(self, makers: Iterable[MakeMessage]) -> None:
        """Send what these make, each in a `make_next` of its own. Its descriptors stay open until the peer has
        answered."""
        self._unsent.extend(makers)

    def _framed(self, message: Message) -> bytes:
        raw = encode(message, sender=self._identity)
        return struct.pack("<I", len(raw)) + raw

    @property
    def is_empty(self) -> bool:
        """Whether all was sent."""
        return not self._unsent

    @property
    def is_to_make(self) -> bool:
        """Whether `make_next` has something to do: all before it was sent."""
        return bool(self._unsent) and not isinstance(self._unsent[0], _Unsent)

    def make_next(self) -> None:
        """Make and send the message that comes next, if it is still to be made. Raises what making it does, and as
        `flush`."""
        head = self._unsent[0] if self._unsent else None
        if head is not None and not isinstance(head, _Unsent):
            message, fds = head()
            self._unsent[0] = _Unsent(self._framed(message), fds, ())
            self._since = self._clock.monotonic()
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes of what is made. Raises Unavailable where the peer is gone, or did not read for
        too long."""
        while self._unsent and isinstance(head := self._unsent[0], _Unsent):
            data, fds, kept = head
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._sock.sendmsg([memoryview(data)[: 1 << 20]], rights, socket.MSG_DONTWAIT)
            except OSError as error:
                if error.errno not in _LATER:
                    raise Unavailable(f"peer is gone: {error.strerror}") from None
                if self._clock.monotonic() - self._since > _UNSENT_S:
                    raise Unavailable(f"the rank has read nothing for {_UNSENT_S:.0f} s") from None
                return
            close_all(kept)
            self._since = self._clock.monotonic()
            self._unsent[0] = _Unsent(data[sent:], (), ())
            if sent == len(data):
                self._unsent.popleft()

    def end(self) -> None:
        """Let both sides see the connection's end. What is unsent is dropped, and what was to be made is not."""
        self._drop()
        with suppress(OSError):  # the peer has ended it already
            self._sock.shutdown(socket.SHUT_RDWR)

    def _drop(self) -> None:
        for one in self._unsent:
            if isinstance(one, _Unsent):
                close_all(one.kept)
        self._unsent.clear()

    def close(self) -> None:
        """Drop what is unsent. Idempotent."""
        self._drop()
        self._sock.close()


class Attached:
    """A living rank: its connection, who it is, and its memory as last `sent`, of which `applied` is the revision that
    it has mapped. `importer`: its process, to drivers. `shared`: ids of the handles that it has, or was sent.
    `version`: of the HMM's view when that was made."""

    def __init__(self, channel: Channel[FromRank], request: Attach, outbox: _Outbox) -> None:
        self.channel = channel
        self.rank = request.rank
        self.slot = request.slot
        self.device = request.device
        self.incarnation = request.incarnation
        self.importer = Importer(request.importer)
        self.outbox = outbox
        self.sent = _NOTHING
        self.shared: set[int] = set()
        self.applied = 0
        self.version = -1

    def close(self) -> None:
        """End the connection."""
        self.outbox.close()
        self.channel.close()


class Attachments:
    """The handle channel's listener and connections. Belongs to the service's loop. The service says what may be
    attached (`admit`), and hears of ends from `take`."""

    def __init__(self, listener: Listener, identity: str, log: Logger, clock: Clock) -> None:
        self._clock = clock
        self._listener = listener
        self._identity = identity
        self._log = log
        self._pending: dict[int, tuple[Channel[FromRank], float]] = {}
        self._revision = 0
        self._last_made = -1  # the slot that a message was made for last
        self.by_slot: dict[int, Attached] = {}

    def open(self) -> None:
        """Let ranks connect from now on."""
        self._listener.open()

    def fds(self) -> set[int]:
        """What the loop has to watch."""
        living = {attached.channel.fileno() for attached in self.by_slot.values()}
        return {self._listener.fileno(), *self._pending, *living}

    def turn_ms(self, otherwise: int) -> int:
        """How long the loop may sleep: shorter while something could not be sent, and not while some is to be made."""
        outboxes = [attached.outbox for attached in self.by_slot.values()]
        if any(outbox.is_to_make for outbox in outboxes):
            return 0
        return otherwise if all(outbox.is_empty for outbox in outboxes) else _UNSENT_TURN_MS

    # ---- Attached ranks

    def _next_revision(self) -> int:
        """Greater than all before it, those of a former HMM of this machine included."""
        self._revision = max(self._revision + 1, self._clock.monotonic_ns() // 1_000_000)
        return self._revision

    def take(self, ready: set[int]) -> list[Attached]:
        """Take in what ranks have applied, send what is unsent, of what is still to be made one message, and take out
        the ranks whose connections ended."""
        ended = []
        for slot, attached in list(self.by_slot.items()):
            try:
                attached.outbox.flush()
                if attached.channel.fileno() in ready:
                    self._receive(attached)
            except ElasticMoEError as error:
                ended.append(self._end(slot, error))
        self._make_next()
        return ended

    def _make_next(self) -> None:
        """For the next rank in turn."""
        waiting = [slot for slot, attached in self.by_slot.items() if attached.outbox.is_to_make]
        if waiting:
            self._last_made = min(waiting, key=lambda slot: (slot <= self._last_made, slot))
            self._make_for(self.by_slot[self._last_made])

    def _make_for(self, attached: Attached) -> None:
        try:
            attached.outbox.make_next()
        except ElasticMoEError as error:  # DoesNotFit, too, of a driver
            self._give_up(attached, error)

    def ended_now(self, slot: int) -> Attached | None:
        """The rank of `slot`, taken out, if its connection ended after the loop last looked."""
        if slot not in self.by_slot:
            return None
        try:
            self._receive(self.by_slot[slot])
        except ElasticMoEError as error:
            return self._end(slot, error)
        return None

    def _receive(self, attached: Attached) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            if not attached.channel.is_readable:
                return
            received, fds = attached.channel.receive(deadline_ms=_APPLIED_MS)
            close_all(fds)  # nobody asked for them
            body = received.body
            if not isinstance(body, Applied) or body.revision > attached.sent.revision:
                raise ProtocolError(f"{type(body).__name__} is not what an attached rank may say now")
            attached.applied = max(attached.applied, body.revision)

    def _end(self, slot: int, error: ElasticMoEError) -> Attached:
        attached = self.by_slot.pop(slot)
        attached.close()
        if isinstance(error, ProtocolError):
            self._log.warning("rank breaks the protocol", slot=slot, reason=error.message)
        return attached

    def share(self, attached: Attached, tell: Callable[[Importer], tuple[SeatMemory, Offer]]) -> None:
        """`update` with what `tell` says to its process. A failure of that shows as the rank's end, too: a driver may
        refuse to share with a process that has just ended, and that must not end this one."""
        try:
            seat, offer = tell(attached.importer)
        except ElasticMoEError as error:  # DoesNotFit, too, of a driver
            self._give_up(attached, error)
            return
        self.update(attached, seat, offer)

    def update(self, attached: Attached, seat: SeatMemory, offer: Offer) -> None:
        """Send a seat's memory, and what of its handles the rank does not have, unless it is what was sent last but for
        the revision. Many handles are on their way for some turns; none of them may be given back meanwhile, nor before
        the rank has said that it does without. A failure shows as its end."""
        if msgspec.structs.replace(seat, revision=0) == msgspec.structs.replace(attached.sent, revision=0):
            return
        seat = msgspec.structs.replace(seat, revision=self._next_revision())
        attached.sent = seat
        try:
            attached.outbox.put_later(shares(offer, attached.shared))
            attached.outbox.put(seat, offer.fds)
        except Unavailable as error:
            self._give_up(attached, error)
        attached.shared = set(offer.handles)
        self._make_for(attached)  # the first at once: most have no more

    def _give_up(self, attached: Attached, error: ElasticMoEError) -> None:
        """The next turn takes it out. A rank that lives resumes, and is sent everything anew."""
        if not isinstance(error, Unavailable):
            self._log.error("memory cannot be shared", slot=attached.slot, code=error.code, reason=error.message)
        else:
            self._log.warning("rank cannot be told", slot=attached.slot, code=error.code, reason=error.message)
        attached.outbox.end()

    # ---- New connections

    def accept(self, ready: set[int]) -> None:
        """Take new connections, and drop those that did not say who they are in time."""
        now = self._clock.monotonic()
        for fd in [fd for fd, (_, since) in self._pending.items() if now - since > PENDING_S]:
            self._log.warning("silent connection dropped", after_s=PENDING_S)
            self._pending.pop(fd)[0].close()
        if self._listener.fileno() not in ready:
            return
        while True:
            try:
                channel = self._listener.accept(self._identity, FROM_RANK)
            except ElasticMoEError as error:
                self._log.warning("connection refused", code=error.code, reason=error.message)
                continue
            if channel is None:
                return
            if len(self._pending) >= PENDING_MAX:
                self._log.warning("connection refused", code="too_many", limit=PENDING_MAX)
                channel.close()
                continue
            self._pending[channel.fileno()] = (channel, now)

    def requests(self, ready: set[int]) -> list[tuple[Channel[FromRank], Attach]]:
        """Who asks to be attached; each channel is now the caller's, to `admit` or `refuse`."""
        found = []
        for fd in ready & set(self._pending):
            channel, _ = self._pending.pop(fd)
            try:
                received, fds = channel.receive(deadline_ms=_RECEIVE_MS)
                close_all(fds)  # nobody asked for them
                if not isinstance(received.body, Attach):
                    raise ProtocolError(f"{type(received.body).__name__} is not how a rank introduces itself")
            except ElasticMoEError as error:
                self._log.warning("bad attach", code=error.code, reason=error.message)
                self.refuse(channel, error)
                continue
            found.append((channel, received.body))
        return found

    def refuse(self, channel: Channel[FromRank], error: ElasticMoEError) -> None:
        """Answer Refused and end the connection, with the rank that was admitted by it."""
        for slot in [slot for slot, one in self.by_slot.items() if one.channel is channel]:
            self.by_slot.pop(slot).outbox.close()
        channel.refuse(error, deadline_ms=_RECEIVE_MS)
        channel.close()

    def check_vacant(self, slot: int) -> None:
        """Raise Conflict where another rank is attached to `slot`."""
        if slot in self.by_slot:
            raise Conflict(f"slot {slot} is held by {self.by_slot[slot].incarnation}, which is alive")

    def admit(self, channel: Channel[FromRank], request: Attach, reply: AttachReply, fds: tuple[int, ...]) -> Attached:
        """Answer; from now on the connection stands for the rank's life. `update` is to send its memory.

        Raises Conflict where another rank is attached there; Unavailable when the peer is gone.
        """
        self.check_vacant(request.slot)
        outbox = _Outbox(channel, self._identity, self._clock)
        try:
            outbox.put(reply, fds)
        except BaseException:
            outbox.close()
            raise
        attached = self.by_slot[request.slot] = Attached(channel, request, outbox)
        return attached

    def close(self) -> None:
        """End all connections and the listener. Idempotent."""
        for attached in self.by_slot.values():
            attached.close()
        for channel, _ in self._pending.values():
            channel.close()
        self.by_slot.clear()
        self._pending.clear()
        self._listener.close()


def _duplicates(fds: Iterable[int]) -> tuple[int, ...]:
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError as error:
        close_all(made)
        text = f"no descriptors to tell a rank of its memory: {error.strerror}"
        raise Unavailable(text, code="no_descriptors") from None
    return tuple(made)
