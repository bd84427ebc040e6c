"""The export side of the handle channel: which ranks are attached, and what each of them is handed."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping
from typing import Final

from common.devices.base import Handle
from common.fdchannel import Channel, Listener
from common.layout import RankId, Seat
from common.protocol.errors import Conflict, ElasticMoEError, NotFound
from common.protocol.handles import TO_HMM, Attach, AttachReply, Extent, RecordExtent
from common.protocol.replies import refusal
from common.telemetry import Logger
from services.hmm.catalog import Loaded
from services.hmm.memory import BusSegment, DeviceMemory

PENDING_MAX: Final = 128  # connections that have not said who they are
PENDING_S: Final = 5.0  # that they have for it
_RECEIVE_MS: Final = 1_000
_SEND_MS: Final = 2_000  # a rank that asked and does not read must not hold up the loop for longer


class _Fds:
    """Descriptors of one message, each once."""

    def __init__(self) -> None:
        self.all: list[int] = []
        self._index: dict[int, int] = {}

    def add(self, fd: int) -> int:
        """The index of `fd` in the message."""
        if fd not in self._index:
            self._index[fd] = len(self.all)
            self.all.append(fd)
        return self._index[fd]


def attach_reply(
    loaded: Loaded,
    memory: DeviceMemory,
    segment: BusSegment,
    doorbells: Mapping[int, int],
    granularity: int,
) -> tuple[AttachReply, tuple[int, ...]]:
    """What the rank on `memory`'s device is handed: the message, and the descriptors that it indexes, each once."""
    fds = _Fds()

    def export(handle: Handle) -> Extent:
        token = memory.device.export(handle)
        return Extent(fds.add(token.fd), token.offset, token.nbytes)

    assert memory.ledger is not None, "a seat's device has a ledger"
    layout = loaded.layout
    reply = AttachReply(
        spec=loaded.spec,
        layout_epoch=layout.epoch,
        granularity=granularity,
        records=tuple(RecordExtent(key, export(handle)) for key, handle in memory.records.items()),
        kv=tuple(export(handle) for handle in memory.kv),
        kv_geometry=loaded.kv,
        # Address space for all KV that the device could ever hold: experts that leave make room for it.
        kv_bytes_reserved=memory.device.budget // loaded.kv.handle_bytes * loaded.kv.handle_bytes,
        bus=Extent(fds.add(segment.fd), 0, segment.nbytes),
        ledger=export(memory.ledger),
        slots=layout.slots,
        doorbells=tuple(fds.add(doorbells[slot]) for slot in layout.slots),
        owners=tuple(layout.owners(layer) for layer in range(len(layout.homes))),
    )
    return reply, tuple(fds.all)


class Attached:
    """A living rank: its connection, and who it is."""

    def __init__(self, channel: Channel[Attach], rank: RankId, slot: int, incarnation: str) -> None:
        self.channel = channel
        self.rank = rank
        self.slot = slot
        self.incarnation = incarnation


class Attachments:
    """The handle channel's listener and connections. Belongs to the service's loop. The service says what may be
    attached (`admit`) and hears of ends from `poll`."""

    def __init__(self, listener: Listener, identity: str, log: Logger) -> None:
        self._listener = listener
        self._identity = identity
        self._log = log
        self._pending: dict[int, tuple[Channel[Attach], float]] = {}
        self.by_slot: dict[int, Attached] = {}

    def fds(self) -> set[int]:
        """What the loop has to watch."""
        living = {attached.channel.fileno() for attached in self.by_slot.values()}
        return {self._listener.fileno(), *self._pending, *living}

    def ended(self, ready: set[int]) -> list[Attached]:
        """Take out the ranks whose connections ended: what is readable there is the end, or a breach of protocol."""
        return [self._end(slot) for slot, one in list(self.by_slot.items()) if one.channel.fileno() in ready]

    def ended_now(self, slot: int) -> Attached | None:
        """The rank of `slot`, taken out, if its connection ended after the loop last looked."""
        if slot not in self.by_slot:
            return None
        poller = select.poll()
        poller.register(self.by_slot[slot].channel.fileno(), select.POLLIN)
        return self._end(slot) if poller.poll(0) else None

    def _end(self, slot: int) -> Attached:
        attached = self.by_slot.pop(slot)
        attached.channel.close()
        return attached

    def accept(self, ready: set[int]) -> None:
        """Take new connections, and drop those that did not say who they are in time."""
        now = time.monotonic()
        for fd in [fd for fd, (_, since) in self._pending.items() if now - since > PENDING_S]:
            self._log.warning("silent connection dropped", after_s=PENDING_S)
            self._pending.pop(fd)[0].close()
        if self._listener.fileno() not in ready:
            return
        while True:
            try:
                channel = self._listener.accept(self._identity, TO_HMM)
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

    def requests(self, ready: set[int]) -> list[tuple[Channel[Attach], Attach]]:
        """Who asks to be attached; each channel is now the caller's, to `admit` or `refuse`."""
        found = []
        for fd in ready & set(self._pending):
            channel, _ = self._pending.pop(fd)
            try:
                received, fds = channel.receive(deadline_ms=_RECEIVE_MS)
            except ElasticMoEError as error:
                self._log.warning("bad attach", code=error.code, reason=error.message)
                self.refuse(channel, error)
                continue
            for received_fd in fds:  # nobody asked for them
                os.close(received_fd)
            found.append((channel, received.body))
        return found

    def refuse(self, channel: Channel[Attach], error: ElasticMoEError) -> None:
        """Answer Refused and end the connection."""
        try:
            channel.send(refusal(error), deadline_ms=_RECEIVE_MS)
        except ElasticMoEError:
            pass  # the peer is gone: nobody is left to be told
        channel.close()

    def admit(self, channel: Channel[Attach], request: Attach, reply: AttachReply, fds: tuple[int, ...]) -> None:
        """Answer with the seat's memory; from now on the connection stands for the rank's life.

        Raises Conflict where another rank is attached there; Unavailable, DeadlineExceeded when the peer is gone.
        """
        if request.slot in self.by_slot:
            other = self.by_slot[request.slot]
            raise Conflict(f"slot {request.slot} is held by {other.incarnation}, which is alive")
        channel.send(reply, () if request.resume else fds, deadline_ms=_SEND_MS)
        self.by_slot[request.slot] = Attached(channel, request.rank, request.slot, request.incarnation)

    def close(self) -> None:
        """End all connections and the listener. Idempotent."""
        for attached in self.by_slot.values():
            attached.channel.close()
        for channel, _ in self._pending.values():
            channel.close()
        self.by_slot.clear()
        self._pending.clear()
        self._listener.close()


def seat_for(loaded: Loaded | None, request: Attach) -> Seat:
    """The seat that `request` names. Raises Conflict while no model is ready, NotFound where the layout differs."""
    if loaded is None:
        raise Conflict("no model is ready", code="not_ready")
    for seat in loaded.layout.seats:
        if (seat.rank, seat.slot, seat.device) == (request.rank, request.slot, request.device):
            return seat
    raise NotFound(
        f"layout {loaded.layout.epoch} has no seat of rank {request.rank} in slot {request.slot} on {request.device}"
    )
