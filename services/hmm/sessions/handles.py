"""What a rank is handed: its seat's memory, as messages say it, and the handles and descriptors that they name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from elasticmoe.common.devices.base import Device, FdToken, Handle, Token
from elasticmoe.common.devices.driver import Lost
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import Conflict, NotFound
from elasticmoe.common.protocol.handles import (
    Attach,
    AttachReply,
    RecordHandle,
    Routing,
    SeatMemory,
    Segment,
    SharedFd,
    SharedHandle,
    SharedKey,
    SharedMailbox,
    ShareHandles,
)
from elasticmoe.common.protocol.limits import FDS_MAX
from elasticmoe.services.hmm.memory.catalog import Loaded, Transition, keys_of, layouts, slots_of
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.memory import DeviceMemory

HANDLES_MAX: Final = FDS_MAX  # of one message, which takes either process some milliseconds to make or to take

MakeMessage = Callable[[], tuple[ShareHandles, tuple[int, ...]]]
"""Makes a message when its turn has come; its descriptors are the device's."""


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


class Offer(NamedTuple):
    """What a SeatMemory needs beside it: the descriptors that it indexes, and by id the handles of `device` that it
    names."""

    fds: tuple[int, ...]
    device: Device
    handles: dict[int, Handle]


class View(NamedTuple):
    """What a seat shall have mapped: its records, KV handles in order, and the layouts whose routing it may need."""

    records: dict[RecordKey, Handle]
    kv: list[Handle]
    layouts: tuple[Layout, ...]


class Importer:
    """The process of a rank as drivers know it. `number`: as Attach has it; `attached`: slots of the ranks that live,
    as they come and go; `has_resumed`: it was a predecessor of this HMM that it had its memory from."""

    def __init__(self, number: int, attached: Container[int] = (), *, has_resumed: bool = False) -> None:
        self.number = number
        self.attached = attached
        self._has_resumed = has_resumed
        self._is_admitted = False  # to its own device
        self._admitted: set[Handle] = set()

    def admit(self, device: Device) -> None:
        """Let it import what is shared of its own device from now on. Said once, and not where this process has lost
        the device while the rank goes on there. Raises DeviceError; driver_failed to a rank that comes anew."""
        if not self._is_admitted:
            if not self._has_resumed:
                device.check_usable()
            device.admit([self.number])
            self._is_admitted = True

    def may_have(self, handle: Handle) -> bool:
        """Whether it may have imported what another device has."""
        return self._has_resumed or handle in self._admitted

    def admit_to(self, device: Device, handle: Handle) -> None:
        """Let it import what another device has. A driver is asked once: what it was admitted to, it may import until
        it ends. Raises DeviceError."""
        if handle not in self._admitted:
            device.admit_to(handle, (self.number,))
            self._admitted = {one for one in self._admitted if one.is_live} | {handle}


class Importers:
    """The latest rank's of each slot. A rank that resumes is the process that it was: what it was admitted to then, it
    has still, also where the device has failed since."""

    def __init__(self, attached: Container[int]) -> None:
        self._attached = attached
        self._by_slot: dict[int, tuple[str, Importer]] = {}

    def of(self, request: Attach) -> Importer:
        """Of the rank that asks to be attached."""
        known = self._by_slot.get(request.slot)
        if known is None or known[0] != request.incarnation:
            importer = Importer(request.importer, self._attached, has_resumed=request.resume)
            known = self._by_slot[request.slot] = (request.incarnation, importer)
        return known[1]


def full_view(memory: DeviceMemory, loaded: Loaded, transition: Transition | None) -> View:
    """All memory of the device, for a rank that attaches. What is on its way out is taken from that rank afterwards, as
    from any other."""
    needed, allowed = layouts(loaded, transition)
    is_needed = any(layout.seat_on(memory.device.name) for layout in needed)
    return View(memory.records, memory.kv, needed if is_needed else allowed)


def wanted_view(memory: DeviceMemory, loaded: Loaded, transition: Transition | None) -> View | None:
    """What the rank on `memory`'s device shall have; None where its seat has left: then the rank keeps what it has."""
    needed, _ = layouts(loaded, transition)
    name = memory.device.name
    keys = keys_of(needed, name)
    if not keys:
        return None
    kv = memory.kv
    if transition is not None and transition.phase == "vacating":
        kv = kv[: transition.request.kv_handles.get(name, len(kv))]
    routed = needed
    if transition is not None and transition.phase in ("vacating", "copying"):
        # Told early, so that a rank that gets nothing else is prepared before the copies are over.
        routed = (transition.before, transition.after)
    return View({key: handle for key, handle in memory.records.items() if key in keys}, kv, routed)


def seat_memory(view: View, memory: DeviceMemory, holdings: Holdings, importer: Importer) -> tuple[SeatMemory, Offer]:
    """The message for `view`, whose revision is still to be set, and what it needs. The rank, which is the process
    `importer`, is admitted to the mailboxes that are new. Raises as calling what `shares` gives does.
    """
    fds, name = _Fds(), memory.device.id_of
    slots = slots_of(view.layouts)
    seat = SeatMemory(
        revision=0,
        records=tuple(RecordHandle(key, name(handle)) for key, handle in view.records.items()),
        kv=tuple(name(handle) for handle in view.kv),
        routings=tuple(
            Routing(layout.epoch, tuple(layout.owners(layer) for layer in range(len(layout.homes))))
            for layout in view.layouts
        ),
        slots=slots,
        doorbells=tuple(fds.add(holdings.doorbells[slot]) for slot in slots),
        mailboxes=tuple(_mailboxes(view, holdings, importer, fds)),
        replica=_replica_on(memory.device.name, view.layouts),
    )
    handles = {name(handle): handle for handle in (*view.records.values(), *view.kv)}
    return seat, Offer(tuple(fds.all), memory.device, handles)


def shares(offer: Offer, known: Collection[int]) -> list[MakeMessage]:
    """What makes the messages that hand over what is offered and not `known`, each when it is called, in their order:
    only then is a driver asked to share. Calling one raises DeviceError; DoesNotFit where the driver lacks
    memory; Unavailable at the limit of open files."""
    fresh = [(name, handle) for name, handle in offer.handles.items() if name not in known]
    return [
        partial(_share_some, offer.device, fresh[at : at + HANDLES_MAX]) for at in range(0, len(fresh), HANDLES_MAX)
    ]


def _share_some(device: Device, some: Sequence[tuple[int, Handle]]) -> tuple[ShareHandles, tuple[int, ...]]:
    fds = _Fds()
    handles = tuple(_shared(name, device.export(handle), fds) for name, handle in some)
    return ShareHandles(handles), tuple(fds.all)


def _shared(name: int, token: Token, fds: _Fds) -> SharedHandle:
    if isinstance(token, FdToken):
        return SharedHandle(name, token.nbytes, SharedFd(fds.add(token.fd), token.offset, token.key))
    return SharedHandle(name, token.nbytes, SharedKey(token.key))


def replica_devices(device: str, layouts: tuple[Layout, ...]) -> tuple[str, ...]:
    """Devices of the ranks of the replica that has one on `device`, by their tp index; that alone where no layout has
    it any more."""
    layout = next((layout for layout in layouts if layout.seat_on(device) is not None), None)
    if layout is None:
        return (device,)
    return tuple(layout.seat_in(slot).device for slot in _replica_on(device, layouts))


def _replica_on(device: str, layouts: tuple[Layout, ...]) -> tuple[int, ...]:
    """Slots of the replica that has a seat on `device`; all layouts that have that seat have the same replica."""
    seats = ((layout, layout.seat_on(device)) for layout in layouts)
    return next((layout.replica_of(seat) for layout, seat in seats if seat is not None), ())


def _mailboxes(view: View, holdings: Holdings, importer: Importer, fds: _Fds) -> Iterator[SharedMailbox]:
    """Mailboxes of the view's seats, as far as they are made. A seat whose memory is still on its way has none yet.

    Of a device that has failed, one is for ranks that may have it already, and for all while the rank there lives: then
    only this process has lost the device. Any other rank would end by its import, and the layout that leaves the device
    out could never begin."""
    seats = {seat.slot: seat for layout in view.layouts for seat in layout.seats}
    for slot, seat in sorted(seats.items()):
        memory = holdings.memories[seat.device]
        if memory.mailbox is None:
            continue
        if memory.device.failure and slot not in importer.attached and not importer.may_have(memory.mailbox):
            continue
        try:
            token = memory.device.export(memory.mailbox)
            importer.admit_to(memory.device, memory.mailbox)
        except Lost:
            continue
        yield SharedMailbox(slot, _shared(memory.device.id_of(memory.mailbox), token, fds))


def _share(fds: _Fds, shared: HostShared) -> Segment:
    return Segment(fds.add(shared.fd), shared.nbytes)


def attach_reply(memory: DeviceMemory, holdings: Holdings) -> tuple[AttachReply, tuple[int, ...]]:
    """What the rank on `memory`'s device is told first when it attaches, and its descriptors. Raises NotFound where the
    seat has left and its memory was given back: a rank that was thought to have ended may come to resume all the same;
    DeviceError.
    """
    loaded, segment = holdings.loaded, holdings.segment
    assert loaded is not None, "a seat is of a loaded model"
    assert segment is not None, "a loaded model has a bus"
    if memory.ledger is None:
        raise NotFound(f"the seat on {memory.device.name} has left, and its memory was given back")
    fds = _Fds()
    reply = AttachReply(
        memory_id=loaded.memory_id,
        spec=loaded.spec,
        fingerprint=loaded.records,
        granularity=holdings.granularity,
        kv_geometry=loaded.kv,
        # Address space for all KV that the device could ever hold: experts that leave make room for it.
        kv_bytes_reserved=min(memory.device.budget, memory.device.range_bytes_max)
        // loaded.kv.handle_bytes
        * loaded.kv.handle_bytes,
        bus=_share(fds, segment.shared),
        ledger=_share(fds, memory.ledger),
        exchange=loaded.load.exchange,
        identity=memory.device.identity,
    )
    return reply, tuple(fds.all)


def seat_for(loaded: Loaded | None, transition: Transition | None, request: Attach) -> Seat:
    """The seat that `request` names: of the layout in force, or of one that is staged; a rank that only resumes may
    also be of one that has left. Raises Conflict while no model is ready, NotFound where there is no such seat."""
    if loaded is None:
        raise Conflict("no model is ready", code="not_ready")
    open_ = [loaded.layout]
    if transition is not None and transition.phase == "staged":
        open_.append(transition.after)
    if transition is not None and request.resume:
        open_ += layouts(loaded, transition)[1]
    for layout in open_:
        for seat in layout.seats:
            if (seat.rank, seat.slot, seat.device) == (request.rank, request.slot, request.device):
                return seat
    raise NotFound(
        f"layout {loaded.layout.epoch} has no seat of rank {request.rank} in slot {request.slot} on {request.device}"
    )
