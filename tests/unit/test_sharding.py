"""What the ranks of a replica hold: shards that together are the whole, bit by bit, of every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from elasticmoe.cli.models import configs, random_checkpoint
from elasticmoe.common.capacity import DoesNotFit, load_of, size_load, sizes_of
from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.families import load_spec, parse_spec, record, records
from elasticmoe.common.families.fingerprint import fingerprint
from elasticmoe.common.layout import Layout, initial_layout, keys_on, level_replicas
from elasticmoe.common.model_spec import LatentAttentionSpec, ModelSpec, RecordKey, kv_geometry, round_up
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.sharding import Shard, sharded
from elasticmoe.services.hmm.loading.reader import Reader
from elasticmoe.services.hmm.memory.catalog import Catalog, check_integrity
from tests.device_memory import DeviceMemory
from tests.unit.loading import PAGE, World
from tests.unit.quantized import quantized_copy
from tests.unit.specs import TINY_MIXTRAL, TINY_QWEN3

# Each family, with a number of ranks that its heads can be split over; 6 ranks share 2 kv heads, 3 each.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mixtral": (configs.TINY_MIXTRAL, (2, 6)),
    "mixtral-tied": (configs.TINY_MIXTRAL | {"tie_word_embeddings": True}, (2,)),
    "qwen2": (configs.TINY_QWEN2_MOE, (3,)),
    "qwen3": (configs.TINY_QWEN3_MOE | {"mlp_only_layers": [1]}, (3,)),
    "qwen3-biases": (configs.TINY_QWEN3_MOE | {"attention_bias": True}, (3,)),
    "olmoe": (configs.TINY_OLMOE, (2, 6)),
    "granite": (configs.TINY_GRANITEMOE | {"attention_bias": True}, (2,)),
    "glm4": (configs.TINY_GLM4_MOE, (2,)),
    "glm4-lite": (configs.TINY_GLM4_MOE_LITE, (3,)),
    "deepseek2": (configs.TINY_DEEPSEEK_V2 | {"q_lora_rank": 28, "attention_bias": True}, (2, 4)),
    "deepseek3": (configs.TINY_DEEPSEEK_V3, (4,)),
}
# By which dim the shards of a tensor are joined; what is in neither is everybody's.
ROWS = {"embed", "head", "q", "kv_b"}
COLUMNS = {"out", "w2", "shared_w2"}
STACKED = {"w13", "shared_w13"}  # halves, each cut by its rows
FIRST = {"out_bias"}  # the first rank's alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def checkpoint_of(folder: Path, name: str) -> Path:
    directory = folder / name
    return directory if directory.exists() else random_checkpoint(directory, CASES[name][0], seed=5, dtype="float32")


def read_all(directory: Path, spec: ModelSpec, chunk_bytes: int = 0) -> tuple[dict[RecordKey, dict[str, Any]], int]:
    """The tensors of all base and layer records, read as the HMM reads them: all at once; and the bytes that were read
    for them."""
    wanted = [described for described in records(spec) if described.key.kind != "expert"]
    memory = DeviceMemory(sum(described.nbytes for described in wanted))
    places = [memory.address + sum(described.nbytes for described in wanted[:number]) for number in range(len(wanted))]
    with Checkpoint(directory, spec) as checkpoint:
        reader = Reader(checkpoint, lambda _: None, chunk_bytes=chunk_bytes)
        for described, address in zip(wanted, places, strict=True):
            reader.add(described, memory.device, address)
        reader.read()
        assert sum(checkpoint.bytes_read.values()) == reader.nbytes
    found: dict[RecordKey, dict[str, Any]] = {}
    for described, address in zip(wanted, places, strict=True):
        raw = bytearray(memory.device.read_bytes(address, described.nbytes))
        found[described.key] = {
            tensor.name: torch.frombuffer(
                raw[tensor.offset : tensor.offset + tensor.nbytes], dtype=getattr(torch, tensor.dtype)
            ).reshape(tensor.shape)
            for tensor in described.tensors
        }
    return found, reader.nbytes


def without_repeats(parts: list[torch.Tensor], tp: int, count: int) -> list[torch.Tensor]:
    """One of each kv head's copies, which are equal."""
    if count >= tp:
        return parts
    each = tp // count
    for first in range(0, tp, each):
        assert all(torch.equal(parts[first], other) for other in parts[first : first + each])
    return parts[::each]


def joined(spec: ModelSpec, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole tensor `name` that these are the shards of."""
    attention, tp = spec.attention, spec.tp
    if name in ROWS:
        return torch.cat(parts)
    if name in COLUMNS:
        return torch.cat(parts, dim=1)
    if name in STACKED:
        gates, ups = zip(*((part[: len(part) // 2], part[len(part) // 2 :]) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    assert not isinstance(attention, LatentAttentionSpec)
    if name in ("qkv", "qkv_bias"):
        rank = attention.of_rank(tp)
        sizes = [rank.query_width, *([rank.num_kv_heads * rank.head_dim] * 2)]
        q, k, v = (list(each) for each in zip(*(part.split(sizes) for part in parts), strict=True))
        kv_heads = attention.num_kv_heads
        return torch.cat([*q, *without_repeats(k, tp, kv_heads), *without_repeats(v, tp, kv_heads)])
    assert name in ("q_norm", "k_norm")
    assert attention.qk_norm == "token"
    return torch.cat(parts if name == "q_norm" else without_repeats(parts, tp, attention.num_kv_heads))


def is_cut(spec: ModelSpec, name: str) -> bool:
    is_token_norm = not isinstance(spec.attention, LatentAttentionSpec) and spec.attention.qk_norm == "token"
    return name in {*ROWS, *COLUMNS, *STACKED, "qkv", "qkv_bias"} or (is_token_norm and name in ("q_norm", "k_norm"))


def check_shards(directory: Path, dtype: str, tp: int, chunk_bytes: int = 0) -> None:
    """The shards of each record are the whole one's tensors, cut as the rules say, and are read no more often."""
    whole_spec, spec = load_spec(directory, dtype), load_spec(directory, dtype, tp)
    whole, nbytes_whole = read_all(directory, whole_spec)
    shards, nbytes = read_all(directory, spec, chunk_bytes)
    assert nbytes == nbytes_whole
    assert len(shards) == tp * len(whole)
    for key, tensors in whole.items():
        parts = [shards[msgspec.structs.replace(key, shard=index)] for index in range(tp)]
        for name, tensor in tensors.items():
            if name in FIRST:
                assert torch.equal(parts[0][name], tensor)
                assert not any(name in part for part in parts[1:])
            elif is_cut(spec, name):
                assert torch.equal(joined(spec, name, [part[name] for part in parts]), tensor), (key, name)
                assert all(part[name].numel() < tensor.numel() for part in parts), (key, name)
            else:
                assert all(torch.equal(part[name], tensor) for part in parts), (key, name)


@pytest.mark.parametrize(("name", "tp"), [(name, tp) for name, (_, numbers) in CASES.items() for tp in numbers])
def test_the_shards_of_a_replica_are_the_whole(name: str, tp: int, folder: Path) -> None:
    check_shards(checkpoint_of(folder, name), "float32", tp)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek2", "qwen3"])
def test_shards_of_fp8_whose_blocks_lie_across_them(name: str, dtype: str, folder: Path, tmp_path: Path) -> None:
    """Blocks of 16 x 24 are cut by heads of 24, 16 and 10 elements, and by widths of 100."""
    directory = quantized_copy(checkpoint_of(folder, name), tmp_path / "fp8", block=(16, 24))
    check_shards(directory, dtype, CASES[name][1][0])


@pytest.mark.parametrize("chunk_bytes", [16, 1_000, 20_000])
def test_reading_may_be_cut_anywhere(chunk_bytes: int, folder: Path) -> None:
    """In the midst of a tensor, and of rows that go to several ranks."""
    directory = checkpoint_of(folder, "deepseek2")
    for dtype in ("float32", "bfloat16"):
        check_shards(directory, dtype, 2, chunk_bytes)


def test_widths_and_vocabularies_that_are_no_multiple(tmp_path: Path) -> None:
    """Shards of 37 columns and 131 tokens then differ by one."""
    config = configs.TINY_DEEPSEEK_V2 | {"intermediate_size": 75, "moe_intermediate_size": 37, "vocab_size": 263}
    directory = random_checkpoint(tmp_path / "odd", config, seed=6, dtype="float32")
    check_shards(directory, "float32", 2)
    spec = load_spec(directory, "float32", 2)
    rows = [record(spec, RecordKey("base", shard=index)).tensor("embed").shape[0] for index in range(2)]
    assert rows == [131, 132]


@pytest.mark.parametrize("count", [1, 5, 64, 151_936])
@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_shares_follow_each_other_and_differ_by_one_at_most(count: int, of: int) -> None:
    spans = [Shard(index, of).span(count) for index in range(of)]
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == count
    sizes = {Shard(index, of).size(count) for index in range(of)}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("changes", "tp", "text"),
    [
        ({}, 3, "4 attention heads are no multiple"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}, 2, "3 kv heads are no multiple"),
        ({"vocab_size": 3}, 4, "vocabulary is 3"),
        ({"mlp_only_layers": [1], "intermediate_size": 3}, 4, "feed-forward's width is 3"),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, Any], tp: int, text: str) -> None:
    base = TINY_QWEN3 if "mlp_only_layers" in changes else TINY_MIXTRAL
    with pytest.raises(InvalidRequest, match=text) as caught:
        sharded(parse_spec(base | changes, "float32"), tp)
    assert caught.value.code == "tp_unsupported"


def test_sizes_are_of_the_largest_shard(tmp_path: Path) -> None:
    spec = sharded(parse_spec(configs.TINY_DEEPSEEK_V2 | {"vocab_size": 263}, "float32"), 2)
    sizes = sizes_of(spec, 1)
    assert sizes.base == max(record(spec, RecordKey("base", shard=index)).nbytes for index in range(2))
    assert sizes.base > record(spec, RecordKey("base")).nbytes
    for layer, nbytes in enumerate(sizes.layers):
        assert nbytes == max(record(spec, RecordKey("layer", layer, shard=index)).nbytes for index in range(2))
    assert sizes.experts == sizes_of(msgspec.structs.replace(spec, tp=1), 1).experts


@pytest.mark.parametrize(("name", "tp", "ratio"), [("mixtral", 2, 2), ("mixtral", 6, 2), ("deepseek2", 4, 1)])
def test_kv_is_cut_by_kv_heads_and_latents_are_everybodys(name: str, tp: int, ratio: int) -> None:
    whole = parse_spec(CASES[name][0], "float32")
    spec = sharded(whole, tp)
    assert spec.kv_block_bytes(16) * ratio == whole.kv_block_bytes(16)
    assert kv_geometry(spec, 16, 1, 1).block_bytes == spec.kv_block_bytes(16)


def test_memory_of_another_tp_is_another_memory() -> None:
    whole = parse_spec(TINY_MIXTRAL, "float32")
    assert len({fingerprint(sharded(whole, tp)) for tp in (1, 2, 4)}) == 3


def layout_of(spec: ModelSpec, num_devices: int) -> Layout:
    return initial_layout(spec.num_experts_by_layer, [f"host:{i}" for i in range(num_devices)], tp=spec.tp)


def test_a_device_holds_its_ranks_shards_and_its_experts() -> None:
    layout = layout_of(sharded(parse_spec(TINY_MIXTRAL, "float32"), 2), 4)
    for seat in layout.seats:
        keys = list(keys_on(layout, seat.slot))
        assert {key.shard for key in keys if key.kind != "expert"} == {seat.rank.tp}
        assert {key.shard for key in keys if key.kind == "expert"} == {0}
        assert len({str(key) for key in keys}) == len(keys) == len(set(keys))


def test_a_load_fills_both_ranks_of_a_replica(world: World, folder: Path) -> None:
    """Each with its own shards and half of the experts, and as many KV handles. No byte is read twice."""
    directory = checkpoint_of(folder, "mixtral")
    spec = load_spec(directory, "float32", 2)
    load = world.load(directory)
    load = world.load(
        directory, layout=msgspec.structs.replace(load.request.layout, tp=2, seats=layout_of(spec, 2).seats)
    )
    loaded = load.run()
    assert loaded.spec == spec
    entries = tuple(memory.entry() for memory in world.memories.values())
    assert check_integrity(Catalog(granularity=PAGE, devices=entries, loaded=loaded)) == []
    whole, _ = read_all(directory, load_spec(directory, "float32"))
    for name, split in (("embed", 0), ("head", 0)):
        parts = [
            world.tensor(device, key, record(spec, key).tensor(name))
            for device, key in (("host:0", RecordKey("base")), ("host:1", RecordKey("base", shard=1)))
        ]
        assert torch.equal(torch.cat(parts, dim=split), whole[RecordKey("base")][name])
    assert len({len(entry.kv) for entry in entries}) == 1
    sizes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert load.bytes_done == load.bytes_total == sum(load.bytes_read.values()) < sizes


def test_all_ranks_of_a_replica_have_as_many_kv_handles() -> None:
    """As the one with the least room, at the load and in a plan; other replicas may have more."""
    spec = sharded(parse_spec(TINY_MIXTRAL, "float32"), 2)
    layout = layout_of(spec, 4)
    load = load_of(ScalerConfig(run_dir="/nowhere", model="/m", tp=2, devices="host:4", max_model_len=64), spec, layout)
    budgets = {seat.device: 8 << 20 for seat in layout.seats}
    even = size_load(load, spec, budgets, PAGE).devices
    small = size_load(load, spec, budgets | {"host:1": 6 << 20}, PAGE).devices
    assert {device.num_kv_handles for device in even.values()} == {even["host:0"].num_kv_handles}
    assert small["host:0"].num_kv_handles == small["host:1"].num_kv_handles < even["host:0"].num_kv_handles
    assert small["host:2"].num_kv_handles == small["host:3"].num_kv_handles == even["host:2"].num_kv_handles
    with pytest.raises(DoesNotFit, match="host:1"):
        size_load(load, spec, budgets | {"host:1": 1 << 20}, PAGE)
    assert level_replicas({"host:0": 3, "host:1": 5, "host:2": 9, "host:3": 7}, layout) == {
        "host:0": 3, "host:1": 3, "host:2": 7, "host:3": 7,
    }  # fmt: skip


def test_a_spec_and_a_layout_of_different_tp_are_a_mistake() -> None:
    spec = parse_spec(TINY_MIXTRAL, "float32")
    load = load_of(ScalerConfig(run_dir="/nowhere", model="/m", max_model_len=64), spec, layout_of(sharded(spec, 2), 2))
    with pytest.raises(ValueError, match="tp 1, the layout has tp 2"):
        size_load(load, spec, {"host:0": 8 << 20, "host:1": 8 << 20}, PAGE)


def test_names_tell_shards_apart() -> None:
    assert str(RecordKey("layer", 3)) == "layer.3"
    assert str(RecordKey("layer", 3, shard=1)) == "layer.3.t1"
    assert str(RecordKey("base", shard=2)) == "base.t2"
    assert round_up(sizes_of(parse_spec(TINY_MIXTRAL, "float32"), PAGE).base, PAGE) % PAGE == 0
