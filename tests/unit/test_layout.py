"""Layouts, model geometry and records."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.common.devices.factory import backend_of
from elasticmoe.common.families import record, records
from elasticmoe.common.layout import RankId, Seat, initial_layout
from elasticmoe.common.model_spec import TENSOR_ALIGN_BYTES, RecordKey, kv_geometry
from elasticmoe.common.protocol.errors import ConfigError
from tests.unit.specs import tiny_mixtral_spec, tiny_qwen3_spec


@given(
    layers=st.lists(st.sampled_from([0, 1, 5, 7, 64]), min_size=1, max_size=6),
    num_devices=st.integers(1, 8),
)
def test_initial_layout_is_balanced_within_one(layers: list[int], num_devices: int) -> None:
    layout = initial_layout(layers, [f"host:{i}" for i in range(num_devices)])
    for layer, count in enumerate(layers):
        held = [len(layout.experts_on(slot, layer)) for slot in layout.slots]
        assert sum(held) == count
        assert max(held) - min(held) <= 1
        assert len(layout.owners(layer)) == count


def test_layout_invariants_are_checked() -> None:
    layout = initial_layout([4], ["host:0", "host:1"])
    layout.check()
    broken = [
        msgspec.structs.replace(layout, homes=(((0,), (0,), (), (1,)),)),
        msgspec.structs.replace(layout, homes=(((0,), (0,), (2,), (1,)),)),
        msgspec.structs.replace(layout, homes=(((1, 0), (0,), (1,), (1,)),)),
        msgspec.structs.replace(layout, seats=(layout.seats[0], layout.seats[0])),
        msgspec.structs.replace(layout, tp=2),
        msgspec.structs.replace(layout, epoch=0),
        msgspec.structs.replace(layout, seats=(layout.seats[0], Seat(RankId(1, 0), 1, "host:0"))),
    ]
    for bad in broken:
        with pytest.raises(ValueError, match=r"\w"):
            bad.check()
    with pytest.raises(ConfigError, match="3 devices: no whole replicas of tp=2"):
        initial_layout([4], ["a", "b", "c"], tp=2)


@pytest.mark.parametrize("spec", [tiny_mixtral_spec(), tiny_qwen3_spec("bfloat16")], ids=["mixtral", "qwen3"])
def test_records_name_every_tensor_once_and_do_not_overlap(spec) -> None:  # type: ignore[no-untyped-def]
    names = []
    for item in records(spec):
        end = 0
        for tensor in item.tensors:
            assert tensor.offset % TENSOR_ALIGN_BYTES == 0
            assert tensor.offset >= end
            end = tensor.offset + tensor.nbytes
            names += [source.name for source in tensor.sources]
        assert item.nbytes >= end
        assert record(spec, item.key) == item
    assert len(names) == len(set(names))
    sizes = {record(spec, RecordKey("expert", layer, 0)).nbytes for layer in range(spec.num_layers)}
    assert len(sizes) == 1


@given(st.sampled_from([4096, 1 << 16, 1 << 21]), st.integers(1, 64), st.integers(1, 9), st.sampled_from([64, 80, 128]))
def test_kv_handles_are_filled_by_whole_blocks(granularity: int, layers: int, kv_heads: int, head_dim: int) -> None:
    spec = tiny_mixtral_spec(
        num_hidden_layers=layers, num_key_value_heads=kv_heads, num_attention_heads=kv_heads, head_dim=head_dim
    )
    geometry = kv_geometry(spec, 16, granularity, backend_of("host").kv_handle_bytes_min)
    assert geometry.handle_bytes % granularity == 0
    assert geometry.blocks_per_handle * geometry.block_stride == geometry.handle_bytes
    assert geometry.block_bytes <= geometry.block_stride <= geometry.block_bytes * 1.03 + TENSOR_ALIGN_BYTES


def test_a_simulation_may_have_more_slots_than_a_bus() -> None:
    devices = [f"host:{i}" for i in range(384)]
    with pytest.raises(ConfigError, match="384 devices exceed the limit of 64 ranks"):
        initial_layout([256], devices)
    layout = initial_layout([256], devices, slots_max=384)
    layout.check(slots_max=384)
    with pytest.raises(ValueError, match="below 64"):
        layout.check()


def test_a_replica_has_slots_by_tp_index() -> None:
    layout = initial_layout([4], [f"host:{i}" for i in range(4)], tp=2)
    moved = msgspec.structs.replace(layout, seats=tuple(reversed(layout.seats)))
    for each in (layout, moved):
        assert [each.replica_of(seat) for seat in sorted(each.seats, key=lambda seat: seat.slot)] == [
            (0, 1),
            (0, 1),
            (2, 3),
            (2, 3),
        ]
    with pytest.raises(KeyError):
        layout.seat_in(4)
