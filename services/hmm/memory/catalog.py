"""What lives where: the HMM's knowledge, as one immutable value that survives it in the keeper's snapshot. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import msgspec

from elasticmoe.common.capacity import sizes_of
from elasticmoe.common.layout import Layout, keys_on
from elasticmoe.common.model_spec import KvGeometry, ModelSpec, RecordKey
from elasticmoe.common.protocol.hmm import LoadModel, StageLayout
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.seat_sizes import size_mailbox

Phase = Literal[
    "vacating", "copying", "staged", "committed", "releasing", "released", "aborting", "aborted", "failed"
]  # scaler.TransitionStatus has them, and `flipped`, which only the bus knows

VERSION = 7  # of the serialized form


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Where a page handle lies in its space of its device, in bytes, and the driver's name for it (0: none)."""

    offset: int
    nbytes: int
    key: int = 0


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """A weight record and its handle."""

    key: RecordKey
    span: Span


class DeviceEntry(msgspec.Struct, frozen=True):
    """One device: its budget in bytes, its weight records, its KV handles in order of their blocks, the bytes of its
    rank's ledger (0: none), which is memory of the host, and its rank's mailbox, where the exchange needs one."""

    device: str
    budget: int
    records: tuple[Placed, ...] = ()
    kv: tuple[Span, ...] = ()
    ledger_bytes: int = 0
    mailbox: Span | None = None

    @property
    def weights_bytes(self) -> int:
        """Bytes of weight records, padding included."""
        return sum(placed.span.nbytes for placed in self.records)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV handles."""
        return sum(span.nbytes for span in self.kv)

    @property
    def mailbox_bytes(self) -> int:
        """Bytes of the mailbox; 0 without one."""
        return self.mailbox.nbytes if self.mailbox is not None else 0


class Loaded(msgspec.Struct, frozen=True):
    """The model that is in memory, and the command that brought it there. `layout` is the one in force; `memory_id`
    names this memory's creation; `footprint`: bytes of weights and KV of one device at the load, and
    `kv_handles` of it. `records`: fingerprint of the records as they were laid out and filled."""

    load: LoadModel
    spec: ModelSpec
    kv: KvGeometry
    bus_bytes: int
    layout: Layout
    memory_id: str
    footprint: int
    kv_handles: int
    records: str


class Transition(msgspec.Struct, frozen=True):
    """The way from the layout `before` to that of `request`, the latest one also when it is over. `kv_before`: KV
    handles of each device of `before` when it began."""

    request: StageLayout
    before: Layout
    kv_before: dict[str, int]
    phase: Phase
    bytes_done: int = 0
    bytes_total: int = 0
    peak_pages: dict[str, int] = {}
    error: Refused | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.phase in ("released", "aborted")

    @property
    def after(self) -> Layout:
        """Where it leads."""
        return self.request.layout

    @property
    def names(self) -> dict[str, str]:
        """What logs call it by."""
        return {"operation_id": self.request.id.op, "attempt": str(self.request.id)}


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """All devices of the host. `loaded` is None while no model is complete in memory."""

    granularity: int
    devices: tuple[DeviceEntry, ...]
    loaded: Loaded | None = None
    transition: Transition | None = None
    version: int = VERSION

    def entry(self, device: str) -> DeviceEntry:
        """The entry of `device`. Raises KeyError."""
        for entry in self.devices:
            if entry.device == device:
                return entry
        raise KeyError(device)


class _Version(msgspec.Struct):
    version: int


_decoder = msgspec.msgpack.Decoder(Catalog)
_version_decoder = msgspec.msgpack.Decoder(_Version)


def encode(catalog: Catalog) -> bytes:
    """The serialized form."""
    return msgspec.msgpack.encode(catalog)


def decode(raw: bytes) -> Catalog:
    """The catalog in `raw`. Raises ValueError for anything else, another version included."""
    try:
        if (version := _version_decoder.decode(raw).version) != VERSION:
            raise ValueError(f"catalog version {version} is not {VERSION}")
        return _decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None


def layouts(loaded: Loaded, transition: Transition | None) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
    """(needed, allowed): whose records every device must hold now, and whose it may still hold. What is needed by none
    of the first is on its way out."""
    if transition is None or transition.is_over or transition.phase in ("vacating", "copying", "failed"):
        return (loaded.layout,), (loaded.layout,)
    both = (transition.before, transition.after)
    if transition.phase in ("staged", "committed"):
        return both, both
    return ((transition.after,) if transition.phase == "releasing" else (transition.before,)), both


def keys_of(wanted: Iterable[Layout], device: str) -> set[RecordKey]:
    """The records that belong on `device` by any of the layouts."""
    seats = ((layout, layout.seat_on(device)) for layout in wanted)
    return {key for layout, seat in seats if seat is not None for key in keys_on(layout, seat.slot)}


def slots_of(wanted: Iterable[Layout]) -> tuple[int, ...]:
    """All slots of the layouts, ascending."""
    return tuple(sorted({slot for layout in wanted for slot in layout.slots}))


def check_integrity(catalog: Catalog) -> list[str]:
    """Findings; empty when all is well. Spans do not overlap, sizes are those of the model, budgets hold, and every
    record is exactly where a layout wants it that counts now (so every expert of every layer has a home)."""
    findings: list[str] = []
    for entry in catalog.devices:
        findings += _check_spans(entry, catalog.granularity)
        used = entry.weights_bytes + entry.kv_bytes + entry.ledger_bytes + entry.mailbox_bytes
        if used > entry.budget:
            findings.append(f"{entry.device}: {used} bytes exceed the budget of {entry.budget}")
    if catalog.loaded is None:
        findings += [f"{entry.device}: holds memory of no model" for entry in catalog.devices if _is_used(entry)]
    else:
        findings += _check_placement(catalog, catalog.loaded)
    return findings


def _is_used(entry: DeviceEntry) -> bool:
    return bool(entry.records or entry.kv or entry.ledger_bytes or entry.mailbox)


def _check_spans(entry: DeviceEntry, granularity: int) -> list[str]:
    findings = []
    weights = tuple(placed.span for placed in entry.records)
    mailboxes = (entry.mailbox,) if entry.mailbox is not None else ()
    for space, spans in (("weights", weights), ("kv", entry.kv), ("mailbox", mailboxes)):
        end = 0
        for span in sorted(spans, key=lambda span: span.offset):
            if span.offset < end:
                findings.append(f"{entry.device}.{space}: two handles overlap at {span.offset}")
            if span.offset % granularity or span.nbytes % granularity or span.nbytes <= 0:
                findings.append(f"{entry.device}.{space}: ({span.offset}, {span.nbytes}) is not granular")
            end = max(end, span.offset + span.nbytes)
    return findings


def _check_placement(catalog: Catalog, loaded: Loaded) -> list[str]:
    findings = []
    needed, allowed = layouts(loaded, catalog.transition)
    for layout in allowed:
        try:
            layout.check()
        except ValueError as error:
            findings.append(f"layout: {error}")
        if tuple(len(experts) for experts in layout.homes) != loaded.spec.num_experts_by_layer:
            return [*findings, "layout: its experts are not the model's"]
    sizes = sizes_of(loaded.spec, catalog.granularity)
    for entry in catalog.devices:
        wanted, may_hold = keys_of(needed, entry.device), keys_of(allowed, entry.device)
        held = Counter(placed.key for placed in entry.records)
        if not may_hold:
            if _is_used(entry):
                findings.append(f"{entry.device}: holds memory without a seat")
            continue
        findings += [f"{entry.device}: lacks {key}" for key in sorted(wanted - set(held))]
        findings += [f"{entry.device}: holds {key} without need" for key in sorted(set(held) - may_hold)]
        findings += [f"{entry.device}: holds {key} {count} times" for key, count in held.items() if count > 1]
        findings += [
            f"{entry.device}: {placed.key} has {placed.span.nbytes} bytes, not {sizes.of(placed.key)}"
            for placed in entry.records
            if placed.key in may_hold and placed.span.nbytes != sizes.of(placed.key)
        ]
        if (wanted and not entry.kv) or any(span.nbytes != loaded.kv.handle_bytes for span in entry.kv):
            findings.append(f"{entry.device}: KV handles are none, or not of {loaded.kv.handle_bytes} bytes")
        if wanted and not entry.ledger_bytes:
            findings.append(f"{entry.device}: has no ledger")
        mailbox_bytes = size_mailbox(loaded.load, loaded.spec, catalog.granularity)
        if entry.mailbox_bytes != mailbox_bytes and (wanted or entry.mailbox):
            findings.append(f"{entry.device}: its mailbox has {entry.mailbox_bytes} bytes, not {mailbox_bytes}")
    known = {entry.device for entry in catalog.devices}
    absent = {seat.device for layout in allowed for seat in layout.seats} - known
    return findings + [f"{device}: has a seat but is not of this host" for device in sorted(absent)]
