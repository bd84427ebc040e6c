"""The HMM's catalog: what it says of placement, its serialized form, its snapshot, and the sizes of a load."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.common.capacity import check_layout, size_load
from elasticmoe.common.devices.factory import backend_of
from elasticmoe.common.families import FAMILIES, records
from elasticmoe.common.families import fingerprint as fingerprint_module
from elasticmoe.common.families.fingerprint import fingerprint
from elasticmoe.common.layout import Layout, RankId, Seat, initial_layout, keys_on
from elasticmoe.common.model_spec import (
    AttentionSpec,
    KvShape,
    ModelSpec,
    RecordKey,
    RecordSpec,
    Source,
    WeightBlock,
    kv_geometry,
    round_up,
)
from elasticmoe.common.protocol.errors import DoesNotFit, InvalidRequest, PayloadTooLarge
from elasticmoe.common.protocol.hmm import LoadModel, StageLayout
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.seat_sizes import size_bus, size_ledger
from elasticmoe.common.wording import size as told_size
from elasticmoe.services.hmm.memory import snapshot as snapshot_module
from elasticmoe.services.hmm.memory.catalog import (
    Catalog,
    DeviceEntry,
    Loaded,
    Placed,
    Span,
    Transition,
    check_integrity,
    decode,
    encode,
    keys_of,
    layouts,
    slots_of,
)
from elasticmoe.services.hmm.memory.snapshot import SLOT_BYTES, Snapshot
from tests.unit.specs import tiny_mixtral_spec, tiny_qwen3_spec

PAGE = 4096
SPEC = tiny_qwen3_spec()
DEVICES = ("host:0", "host:1", "host:2")
LAYOUT = initial_layout(SPEC.num_experts_by_layer, DEVICES[:2])
LOAD = LoadModel("load-1", "/models/x", "float32", LAYOUT, 16, 1 << 24, 64, 8, 256)
GEOMETRY = kv_geometry(SPEC, LOAD.block_size, PAGE, backend_of("host").kv_handle_bytes_min)
SIZES = {record.key: round_up(record.nbytes, PAGE) for record in records(SPEC)}


def entry_of(device: str, slot: int) -> DeviceEntry:
    placed, at = [], 0
    for key in keys_on(LAYOUT, slot):
        placed.append(Placed(key, Span(at, SIZES[key])))
        at += SIZES[key]
    kv = tuple(Span(i * GEOMETRY.handle_bytes, GEOMETRY.handle_bytes) for i in range(2))
    return DeviceEntry(device, 1 << 25, tuple(placed), kv, 16 * PAGE)


def catalog() -> Catalog:
    entries = (*(entry_of(seat.device, seat.slot) for seat in LAYOUT.seats), DeviceEntry("host:2", 1 << 25))
    return Catalog(
        granularity=PAGE,
        devices=entries,
        loaded=Loaded(LOAD, SPEC, GEOMETRY, 1 << 20, LAYOUT, "memory-1", 1 << 24, 3, "records-1"),
    )


def with_entry(index: int, **changes: Any) -> Catalog:
    whole = catalog()
    entries = list(whole.devices)
    entries[index] = msgspec.structs.replace(entries[index], **changes)
    return msgspec.structs.replace(whole, devices=tuple(entries))


def test_a_good_catalog_has_no_findings_and_survives_serialization() -> None:
    assert check_integrity(catalog()) == []
    assert decode(encode(catalog())) == catalog()
    empty = Catalog(granularity=PAGE, devices=tuple(DeviceEntry(name, PAGE) for name in DEVICES))
    assert check_integrity(empty) == []
    assert decode(encode(empty)) == empty
    assert catalog().entry("host:1").device == "host:1"
    with pytest.raises(KeyError):
        catalog().entry("host:9")


@pytest.mark.parametrize("raw", [b"", b"\x81", msgspec.msgpack.encode({"granularity": 1}), b"\xff" * 40])
def test_other_bytes_are_no_catalog(raw: bytes) -> None:
    with pytest.raises(ValueError):
        decode(raw)


def test_another_version_is_no_catalog() -> None:
    with pytest.raises(ValueError, match="version 3 is not 7"):
        decode(encode(msgspec.structs.replace(catalog(), version=3)))
    with pytest.raises(ValueError, match="version 3 is not 7"):  # whatever that one holds
        decode(msgspec.msgpack.encode({"version": 3, "transition": {"request": {"op_id": "op/0.0"}}}))


def changed_layer(**changes: Any) -> Any:
    """The builder of a layer's record, with its first tensor changed."""
    real = FAMILIES["qwen3_moe"].layer

    def build(spec: ModelSpec, layer: int, index: int) -> RecordSpec:
        record = real(spec, layer, index)
        first = msgspec.structs.replace(record.tensors[0], **changes)
        return msgspec.structs.replace(record, tensors=(first, *record.tensors[1:]))

    return build


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "norm"},
        {"shape": (24, 2)},
        {"dtype": "bfloat16"},
        {"offset": 256},
        {"sources": (Source("input_norm.weight", (48,)),)},
        {"alternatives": ((Source("input_norm.weight", (48,)),),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_fingerprint_tells_what_the_bytes_of_records_mean(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(SPEC)
    assert fingerprint(tiny_qwen3_spec()) == before
    monkeypatch.setitem(FAMILIES, "qwen3_moe", FAMILIES["qwen3_moe"]._replace(layer=changed_layer(**changes)))
    assert fingerprint(SPEC) != before


def test_a_fingerprint_tells_how_kv_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(SPEC)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint_module, "_KV_LAYOUT", -1)
        assert fingerprint(SPEC) != before
    other = property(lambda attention: KvShape(1, attention.num_kv_heads, 2 * attention.head_dim))
    monkeypatch.setattr(AttentionSpec, "kv", other)  # as many bytes in another order
    assert fingerprint(SPEC) != before


def test_a_fingerprint_tells_the_format_of_stored_weights() -> None:
    specs = [SPEC, *(msgspec.structs.replace(SPEC, weight_block=WeightBlock(128, side)) for side in (64, 128))]
    assert len({fingerprint(spec) for spec in specs}) == 3


def test_every_expert_has_one_home_and_every_device_the_rest() -> None:
    keys = [list(keys_on(LAYOUT, slot)) for slot in LAYOUT.slots]
    experts = [key for device in keys for key in device if key.kind == "expert"]
    assert sorted(experts) == sorted(key for key in SIZES if key.kind == "expert")
    for device in keys:
        assert [key for key in device if key.kind != "expert"] == [
            RecordKey("base"),
            *(RecordKey("layer", layer) for layer in range(SPEC.num_layers)),
        ]


def _finding(broken: Catalog) -> str:
    findings = check_integrity(broken)
    assert len(findings) == 1, findings
    return findings[0]


def test_findings_name_what_is_wrong() -> None:
    first = entry_of("host:0", 0)
    last = first.records[-1]
    moved = Placed(last.key, Span(first.records[0].span.offset, last.span.nbytes))
    extra = Placed(RecordKey("expert", 0, 6), Span(1 << 24, SIZES[RecordKey("expert", 0, 6)]))
    again = Placed(last.key, Span(1 << 24, last.span.nbytes))
    grown = Placed(last.key, Span(last.span.offset, last.span.nbytes + PAGE))
    shifted = Placed(last.key, Span(last.span.offset + 1, last.span.nbytes))
    assert "overlap at 0" in _finding(with_entry(0, records=(*first.records[:-1], moved)))
    assert "lacks base" in _finding(with_entry(0, records=first.records[1:]))
    assert f"lacks {last.key}" in _finding(with_entry(0, records=first.records[:-1]))
    assert "holds expert.0.6 without need" in _finding(with_entry(0, records=(*first.records, extra)))
    assert f"holds {last.key} 2 times" in _finding(with_entry(0, records=(*first.records, again)))
    assert f"{last.key} has {grown.span.nbytes} bytes" in _finding(with_entry(0, records=(*first.records[:-1], grown)))
    assert "is not granular" in _finding(with_entry(0, records=(*first.records[:-1], shifted)))
    assert "exceed the budget of 4096" in _finding(with_entry(0, budget=PAGE))
    assert "KV handles are none" in _finding(with_entry(0, kv=()))
    assert "has no ledger" in _finding(with_entry(0, ledger_bytes=0))
    assert "host:2: holds memory without a seat" in _finding(with_entry(2, kv=first.kv))
    homeless = msgspec.structs.replace(catalog(), devices=catalog().devices[1:])
    assert "host:0: has a seat but is not of this host" in _finding(homeless)
    modelless = msgspec.structs.replace(catalog(), loaded=None)
    assert check_integrity(modelless) == ["host:0: holds memory of no model", "host:1: holds memory of no model"]


def test_a_layout_of_another_model_is_found() -> None:
    other = msgspec.structs.replace(LOAD, layout=initial_layout((3, 3), DEVICES[:2]))
    broken = msgspec.structs.replace(
        catalog(), loaded=Loaded(LOAD, SPEC, GEOMETRY, 1 << 20, other.layout, "memory-1", 1 << 24, 3, "records-1")
    )
    assert "layout: its experts are not the model's" in check_integrity(broken)
    with pytest.raises(InvalidRequest, match="the layout has experts"):
        check_layout(other.layout, SPEC)
    check_layout(LAYOUT, SPEC)


# ---- Transitions

BOTH = msgspec.structs.replace(
    LAYOUT,
    epoch=2,
    seats=(*LAYOUT.seats, Seat(RankId(2, 0), 2, "host:2")),
    homes=tuple(tuple((2,) if expert == 0 else slots for expert, slots in enumerate(layer)) for layer in LAYOUT.homes),
)


def in_transition(phase: Any, *entries: DeviceEntry, forward: bool = False) -> Catalog:
    request = StageLayout(TransitionId("op-1"), BOTH, (), {}, {})
    whole = catalog()
    loaded = msgspec.structs.replace(whole.loaded, layout=BOTH if forward else LAYOUT)
    transition = Transition(request, LAYOUT, {"host:0": 2, "host:1": 2}, phase)
    return msgspec.structs.replace(whole, devices=entries or whole.devices, loaded=loaded, transition=transition)


def entry_by(device: str, *layouts_: Layout) -> DeviceEntry:
    placed, at = [], 0
    for key in sorted(keys_of(layouts_, device)):
        placed.append(Placed(key, Span(at, SIZES[key])))
        at += SIZES[key]
    kv = (Span(0, GEOMETRY.handle_bytes),)
    return DeviceEntry(device, 1 << 25, tuple(placed), kv, 16 * PAGE) if placed else DeviceEntry(device, 1 << 25)


@pytest.mark.parametrize(
    ("phase", "needed", "allowed", "forward"),
    [
        ("vacating", (LAYOUT,), (LAYOUT,), False),
        ("copying", (LAYOUT,), (LAYOUT,), False),
        ("failed", (LAYOUT,), (LAYOUT,), False),
        ("staged", (LAYOUT, BOTH), (LAYOUT, BOTH), False),
        ("committed", (LAYOUT, BOTH), (LAYOUT, BOTH), True),
        ("releasing", (BOTH,), (LAYOUT, BOTH), True),
        ("released", (BOTH,), (BOTH,), True),
        ("aborting", (LAYOUT,), (LAYOUT, BOTH), False),
        ("aborted", (LAYOUT,), (LAYOUT,), False),
    ],
)
def test_each_phase_says_what_devices_hold(phase: Any, needed: Any, allowed: Any, forward: bool) -> None:
    least = in_transition(phase, *(entry_by(device, *needed) for device in DEVICES), forward=forward)
    most = in_transition(phase, *(entry_by(device, *allowed) for device in DEVICES), forward=forward)
    assert check_integrity(least) == check_integrity(most) == []
    assert decode(encode(least)) == least
    assert least.loaded is not None
    assert layouts(least.loaded, least.transition) == (needed, allowed)
    if set(allowed) == {LAYOUT}:
        joined = in_transition(phase, *(entry_by(device, LAYOUT, BOTH) for device in DEVICES), forward=forward)
        assert "host:2: holds memory without a seat" in check_integrity(joined)
    else:
        bare = in_transition(phase, *(DeviceEntry(device, 1 << 25) for device in DEVICES), forward=forward)
        assert "host:0: lacks base" in check_integrity(bare)
    assert slots_of((LAYOUT, BOTH)) == (0, 1, 2)


# ---- Snapshot


def test_the_snapshot_keeps_the_newest_content_across_readers() -> None:
    subject = Snapshot.create()
    assert subject.read() is None
    for content in (b"one", b"two" * 1000, b"", b"four"):
        subject.write(content)
        assert Snapshot(os.dup(subject.fd)).read() == content
    assert subject.read() == b"four"
    subject.close()


@settings(max_examples=200)
@given(st.binary(max_size=64), st.binary(min_size=1, max_size=64), st.data())
def test_a_kill_at_any_byte_of_a_write_leaves_the_old_or_the_new_content(old: bytes, new: bytes, data: Any) -> None:
    before, after = Snapshot.create(), Snapshot.create()
    for subject in (before, after):
        subject.write(b"older")
        subject.write(old)
    after.write(new)
    length = len(new) + 24
    raw = os.pread(after.fd, length, SLOT_BYTES)  # the third write goes to the slot of the first
    cut = data.draw(st.integers(0, length))
    os.pwrite(before.fd, raw[:cut], SLOT_BYTES)
    restarted = Snapshot(os.dup(before.fd))
    found = restarted.read()
    # What was there before may happen to end as the new content does.
    assert found == (new if os.pread(before.fd, length, SLOT_BYTES) == raw else old)
    restarted.write(b"next")
    assert restarted.read() == b"next"
    for subject in (before, after, restarted):
        subject.close()


def test_a_catalog_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "SLOT_BYTES", 100)
    subject = Snapshot.create()
    with pytest.raises(PayloadTooLarge, match="catalog of 77 bytes exceeds the limit of 76"):
        subject.write(b"x" * 77)
    subject.close()


# ---- Sizes


def sizes_for(budget: int, **changes: Any) -> Any:
    load = msgspec.structs.replace(LOAD, **changes)
    return size_load(load, SPEC, dict.fromkeys(DEVICES, budget), PAGE).devices


def test_kv_takes_what_budget_and_limit_allow() -> None:
    by_device = sizes_for(1 << 25)
    assert set(by_device) == set(DEVICES[:2])
    for device, size in by_device.items():
        slot = DEVICES.index(device)
        assert size.keys == tuple(keys_on(LAYOUT, slot))
        assert size.weights_bytes == sum(SIZES[key] for key in size.keys)
        assert size.num_kv_handles == LOAD.kv_bytes_max // GEOMETRY.handle_bytes
    ledger = size_ledger(LOAD, PAGE).nbytes
    tight = by_device["host:0"].weights_bytes + ledger + 3 * GEOMETRY.handle_bytes + PAGE
    assert sizes_for(tight)["host:0"].num_kv_handles == 3


def test_a_budget_without_room_for_one_sequence_is_refused_with_the_figures() -> None:
    weights = sizes_for(1 << 25)["host:0"].weights_bytes
    with pytest.raises(
        DoesNotFit, match=f"budget of {told_size(PAGE)}, weights take {told_size(weights)} .*raise device_bytes"
    ):
        sizes_for(PAGE)
    with pytest.raises(
        DoesNotFit, match=r"one sequence of 256 tokens needs .* KV may take 0\.98 KiB: raise kv_bytes \(--kv-memory\)"
    ):
        sizes_for(1 << 25, kv_bytes_max=1000)
    with pytest.raises(DoesNotFit, match="the ledger"):
        sizes_for(1 << 25, max_sequences=65_536)


def test_sizes_that_the_segments_cannot_have_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no ledger of 8 rows"):
        size_ledger(msgspec.structs.replace(LOAD, block_size=1, max_model_len=1 << 20), PAGE)
    huge = msgspec.structs.replace(SPEC, hidden=1 << 40)
    with pytest.raises(InvalidRequest, match="no bus of 8 ranks"):
        size_bus(LOAD, huge, 3, PAGE)


def test_the_bus_has_room_to_grow() -> None:
    assert size_bus(LOAD, SPEC, 3, PAGE).max_ranks == 8
    assert size_bus(LOAD, SPEC, 12, PAGE).max_ranks == 12
    assert size_bus(LOAD, SPEC, 999, PAGE).max_ranks == 64
    assert size_bus(LOAD, SPEC, 3, 1 << 16).nbytes % (1 << 16) == 0


def test_a_layout_with_foreign_experts_is_refused() -> None:
    load = msgspec.structs.replace(LOAD, layout=initial_layout((5, 6), DEVICES[:2]))
    with pytest.raises(InvalidRequest, match="the layout has experts"):
        size_load(load, tiny_mixtral_spec(), dict.fromkeys(DEVICES, 1 << 30), PAGE)
