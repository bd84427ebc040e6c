"""What lives where: the HMM's knowledge, as one immutable value that survives it in the keeper's snapshot. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from common.families import records
from common.layout import Layout
from common.model_spec import KvGeometry, ModelSpec, RecordKey, round_up
from common.protocol.hmm import LoadModel

VERSION = 1  # of the serialized form


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Where a page handle lies in its space of its device, in bytes."""

    offset: int
    nbytes: int


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """A weight record and its handle."""

    key: RecordKey
    span: Span


class DeviceEntry(msgspec.Struct, frozen=True):
    """One device: its budget in bytes, its weight records, its KV handles in order of their blocks, its ledger."""

    device: str
    budget: int
    records: tuple[Placed, ...] = ()
    kv: tuple[Span, ...] = ()
    ledger: Span | None = None

    @property
    def weights_bytes(self) -> int:
        """Bytes of weight records, padding included."""
        return sum(placed.span.nbytes for placed in self.records)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV handles."""
        return sum(span.nbytes for span in self.kv)

    @property
    def other_bytes(self) -> int:
        """Bytes of everything else."""
        return self.ledger.nbytes if self.ledger else 0


class Loaded(msgspec.Struct, frozen=True):
    """The model that is in memory, and the command that brought it there."""

    load: LoadModel
    spec: ModelSpec
    kv: KvGeometry
    bus_bytes: int

    @property
    def layout(self) -> Layout:
        """The layout in force."""
        return self.load.layout


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """All devices of the host. `loaded` is None while no model is complete in memory."""

    granularity: int
    devices: tuple[DeviceEntry, ...]
    loaded: Loaded | None = None
    version: int = VERSION

    def entry(self, device: str) -> DeviceEntry:
        """The entry of `device`. Raises KeyError."""
        for entry in self.devices:
            if entry.device == device:
                return entry
        raise KeyError(device)


_decoder = msgspec.msgpack.Decoder(Catalog)


def encode(catalog: Catalog) -> bytes:
    """The serialized form."""
    return msgspec.msgpack.encode(catalog)


def decode(raw: bytes) -> Catalog:
    """The catalog in `raw`. Raises ValueError for anything else, another version included."""
    try:
        catalog = _decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None
    if catalog.version != VERSION:
        raise ValueError(f"catalog version {catalog.version} is not {VERSION}")
    return catalog


def keys_on(layout: Layout, slot: int) -> Iterator[RecordKey]:
    """The records that belong on the device of `slot`: base, all layers, and the experts that live there."""
    yield RecordKey("base")
    for layer in range(len(layout.homes)):
        yield RecordKey("layer", layer)
    for layer in range(len(layout.homes)):
        for expert in layout.experts_on(slot, layer):
            yield RecordKey("expert", layer, expert)


def check_integrity(catalog: Catalog) -> list[str]:
    """Findings; empty when all is well. Spans do not overlap, sizes are those of the model, budgets hold, and every
    record is exactly where the layout wants it (so every expert of every layer has a home)."""
    findings: list[str] = []
    for entry in catalog.devices:
        findings += _check_spans(entry, catalog.granularity)
        used = entry.weights_bytes + entry.kv_bytes + entry.other_bytes
        if used > entry.budget:
            findings.append(f"{entry.device}: {used} bytes exceed the budget of {entry.budget}")
    if catalog.loaded is None:
        findings += [f"{entry.device}: holds memory of no model" for entry in catalog.devices if _is_used(entry)]
    else:
        findings += _check_placement(catalog, catalog.loaded)
    return findings


def _is_used(entry: DeviceEntry) -> bool:
    return bool(entry.records or entry.kv or entry.ledger)


def _check_spans(entry: DeviceEntry, granularity: int) -> list[str]:
    findings = []
    ledger = (entry.ledger,) if entry.ledger else ()
    weights = tuple(placed.span for placed in entry.records)
    for space, spans in (("weights", weights), ("kv", entry.kv), ("shared", ledger)):
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
    layout = loaded.layout
    try:
        layout.check()
    except ValueError as error:
        findings.append(f"layout: {error}")
    if tuple(len(experts) for experts in layout.homes) != loaded.spec.num_experts_by_layer:
        findings.append("layout: its experts are not the model's")
    sizes = {record.key: round_up(record.nbytes, catalog.granularity) for record in records(loaded.spec)}
    seats = {seat.device: seat for seat in layout.seats}
    for entry in catalog.devices:
        seat = seats.pop(entry.device, None)
        if seat is None:
            if _is_used(entry):
                findings.append(f"{entry.device}: holds memory without a seat")
            continue
        held = Counter(placed.key for placed in entry.records)
        wanted = set(keys_on(layout, seat.slot))
        findings += [f"{entry.device}: lacks {key}" for key in sorted(wanted - set(held))]
        findings += [f"{entry.device}: holds {key} without need" for key in sorted(set(held) - wanted)]
        findings += [f"{entry.device}: holds {key} {count} times" for key, count in held.items() if count > 1]
        findings += [
            f"{entry.device}: {placed.key} has {placed.span.nbytes} bytes, not {sizes.get(placed.key)}"
            for placed in entry.records
            if placed.span.nbytes != sizes.get(placed.key)
        ]
        if not entry.kv or any(span.nbytes != loaded.kv.handle_bytes for span in entry.kv):
            findings.append(f"{entry.device}: KV handles are none, or not of {loaded.kv.handle_bytes} bytes")
        if entry.ledger is None:
            findings.append(f"{entry.device}: has no ledger")
    findings += [f"{device}: has a seat but is not of this host" for device in seats]
    return findings
