"""Loading: good checkpoints arrive exactly, bad ones are refused before memory is touched and leave nothing behind.

Longer than other files because every way to damage a checkpoint is a case of its own over the same few helpers.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.families import parse_spec, records
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.model_spec import TensorSpec
from elasticmoe.common.protocol.errors import CheckpointError, DoesNotFit, InvalidRequest, Unavailable
from elasticmoe.common.protocol.limits import SAFETENSORS_HEADER_BYTES_MAX
from elasticmoe.common.weights import INDEX, SINGLE
from elasticmoe.common.wording import size
from elasticmoe.native import host
from elasticmoe.native.bus import Bus
from elasticmoe.native.ledger import Ledger
from elasticmoe.services.hmm.loading import reader as reader_module
from elasticmoe.services.hmm.loading.convert import convert
from elasticmoe.services.hmm.memory.catalog import Loaded
from tests.unit.loading import BUDGET, World
from tests.unit.quantized import stored
from tests.unit.specs import TINY_MIXTRAL, TINY_QWEN3


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint in three files. Not to be changed: `copied` is."""
    return random_checkpoint(
        tmp_path_factory.mktemp("models") / "mixtral", TINY_MIXTRAL, seed=1, dtype="float32", shards=3
    )


@pytest.fixture
def copied(mixtral: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for path in mixtral.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path: Path, header: dict[str, Any] | bytes, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


# ---- Good checkpoints


@pytest.mark.parametrize("config", [TINY_MIXTRAL, TINY_QWEN3], ids=["mixtral", "qwen3"])
@pytest.mark.parametrize("served", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
def test_every_tensor_arrives_on_every_device_that_needs_it(
    world: World, tmp_path: Path, config: dict[str, Any], served: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_STAGING_BYTES", 4096)  # so that pieces are cut
    monkeypatch.setattr(reader_module, "_CHUNK_BYTES", 4096)
    directory = random_checkpoint(tmp_path / "m", config, seed=2, dtype="float32", shards=2)
    for path in shards(directory):
        save_file({name: t.to(getattr(torch, kept)) for name, t in load_file(path).items()}, path)
    source = stored(directory)
    load = world.load(directory, served)
    loaded = load.run()
    for record in records(loaded.spec):
        homes = [device for device, memory in world.memories.items() if record.key in memory.records]
        assert len(homes) == (1 if record.key.kind == "expert" else 2)
        for tensor in record.tensors:
            wanted = torch.cat([source[part.name] for part in tensor.sources]).to(getattr(torch, tensor.dtype))
            for device in homes:
                assert torch.equal(world.tensor(device, record.key, tensor), wanted), (device, record.key, tensor.name)
    assert load.bytes_done == load.bytes_total == sum(t.nbytes for t in source.values())
    assert all(memory.device.check_integrity() == [] for memory in world.memories.values())


def test_each_byte_is_read_once(world: World, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: dict[str, list[tuple[int, int]]] = {}
    real = host.read_into

    def read_into(fd: int, offset: int, address: int, nbytes: int) -> None:
        reads.setdefault(Path(os.readlink(f"/proc/self/fd/{fd}")).name, []).append((offset, nbytes))
        real(fd, offset, address, nbytes)

    monkeypatch.setattr(host, "read_into", read_into)
    load = world.load(mixtral)
    load.run()
    for path in shards(mixtral):
        body = len(header_of(path)[1])
        at = path.stat().st_size - body
        for offset, nbytes in sorted(reads[path.name]):  # no gap, no overlap
            assert offset == at
            at += nbytes
        assert at == path.stat().st_size
        assert load.bytes_read[path.name] == body


def test_ledgers_and_bus_are_formatted_and_kv_is_there(world: World, mixtral: Path) -> None:
    loaded = world.load(mixtral).run()
    for memory in world.memories.values():
        assert memory.ledger is not None
        ledger = Ledger(memory.ledger.address, memory.ledger.nbytes)
        assert (ledger.num_rows, ledger.max_tokens, ledger.max_blocks) == (4, 64, 4)
        assert len(memory.kv) == 4 << 20 >> 21
        assert {handle.nbytes for handle in memory.kv} == {loaded.kv.handle_bytes}
    bus = world.segment.bus
    assert isinstance(bus, Bus)
    assert (bus.max_ranks, bus.max_tokens, bus.hidden, bus.top_k) == (8, 32, 32, 2)
    assert bus.membership() == (0, 0, False, 0)
    assert loaded.bus_bytes == world.segment.shared.nbytes


def test_one_file_without_index_and_harmless_extras_are_taken(world: World, tmp_path: Path) -> None:
    directory = random_checkpoint(tmp_path / "m", TINY_QWEN3, seed=3, dtype="bfloat16")
    tensors = load_file(directory / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: it is the embedding
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        tensors[name] = torch.ones(8)
    save_file(tensors, directory / SINGLE)
    load = world.load(directory, "bfloat16", devices=1)
    assert isinstance(load.run(), Loaded)
    extras = tensors["lm_head.weight"].nbytes + 2 * 32
    assert load.bytes_total == sum(tensor.nbytes for tensor in tensors.values()) - extras


# ---- Bad checkpoints


def flip_name(directory: Path) -> None:
    path = shards(directory)[1]
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"model.layers")] ^= 1
    path.write_bytes(raw)


def truncate(directory: Path) -> None:
    os.truncate(shards(directory)[-1], shards(directory)[-1].stat().st_size - 1)


def truncate_header(directory: Path) -> None:
    os.truncate(shards(directory)[0], 100)


def truncate_length(directory: Path) -> None:
    os.truncate(shards(directory)[0], 7)


def lengthen(directory: Path) -> None:
    with open(shards(directory)[0], "ab") as file:
        file.write(b"\0")


def huge_header(directory: Path) -> None:
    raw = shards(directory)[0].read_bytes()
    shards(directory)[0].write_bytes(struct.pack("<Q", SAFETENSORS_HEADER_BYTES_MAX + 1) + raw[8:])


def astronomic_header(directory: Path) -> None:
    raw = shards(directory)[0].read_bytes()
    shards(directory)[0].write_bytes(b"\xff" * 8 + raw[8:])


def duplicate_name(directory: Path) -> None:
    header, body = header_of(shards(directory)[0])
    entries = [f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in header.items()]
    write(shards(directory)[0], ("{" + ",".join([*entries, entries[-1]]) + "}").encode(), body)


def nested_header(directory: Path) -> None:
    write(shards(directory)[0], b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")


def list_header(directory: Path) -> None:
    write(shards(directory)[0], b"[]", b"")


def not_json(directory: Path) -> None:
    write(shards(directory)[0], b"{nonsense}", b"")


def change_entry(field: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        header, body = header_of(shards(directory)[0])
        name = next(name for name in header if name != "__metadata__" and len(header[name]["shape"]) == 2)
        header[name][field] = change(header[name][field])
        write(shards(directory)[0], header, body)

    return act


def retype(dtype: torch.dtype) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        tensors = load_file(shards(directory)[0])
        name = sorted(tensors)[0]
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, shards(directory)[0])

    return act


def transpose(directory: Path) -> None:
    tensors = load_file(shards(directory)[0])
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, shards(directory)[0])


def overlap(directory: Path) -> None:
    header, body = header_of(shards(directory)[0])
    names = [name for name in header if name != "__metadata__"]
    same_size = {tuple(header[name]["shape"]): name for name in names}
    first = next(name for name in names if same_size[tuple(header[name]["shape"])] != name)
    header[first]["data_offsets"] = header[same_size[tuple(header[first]["shape"])]]["data_offsets"]
    write(shards(directory)[0], header, body)


def gap(directory: Path) -> None:
    header, body = header_of(shards(directory)[0])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [offset + 4 for offset in header[last]["data_offsets"]]
    write(shards(directory)[0], header, body + b"\0" * 4)


def drop_tensor(directory: Path) -> None:
    tensors = load_file(shards(directory)[0])
    name = sorted(tensors)[-1]
    del tensors[name]
    save_file(tensors, shards(directory)[0])
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"][name]
    (directory / INDEX).write_text(json.dumps(index))


def copy_shard(directory: Path) -> None:
    shards(directory)[1].write_bytes(shards(directory)[0].read_bytes())


def lose_shard(directory: Path) -> None:
    shards(directory)[1].unlink()


def shard_is_a_fifo(directory: Path) -> None:
    path = shards(directory)[1]
    path.unlink()
    os.mkfifo(path)


def shard_is_a_folder(directory: Path) -> None:
    path = shards(directory)[1]
    path.unlink()
    path.mkdir()


def index_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        (directory / INDEX).write_text(json.dumps(change(index)))

    return act


def escape(index: dict[str, Any]) -> dict[str, Any]:
    name = next(iter(index["weight_map"]))
    return {"weight_map": {**index["weight_map"], name: "../secret.safetensors"}}


def no_weights(directory: Path) -> None:
    for path in (*shards(directory), directory / INDEX):
        path.unlink()


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a changed name": (flip_name, "checkpoint lacks the tensor"),
    "truncated": (truncate, r"its header describes \d+"),
    "truncated in the header": (truncate_header, r"header of \d+ bytes exceeds the file of 100 bytes"),
    "truncated in the length": (truncate_length, "has 7 bytes, too few"),
    "too long": (lengthen, "its header describes"),
    "huge header": (huge_header, r"header of 8388609 bytes is not within \[2, 8388608\]"),
    "astronomic header": (astronomic_header, "header of 18446744073709551615 bytes"),
    "duplicate name": (duplicate_name, "has the name '.*' twice"),
    "nested header": (nested_header, "is not valid JSON"),
    "list header": (list_header, "is not a JSON object"),
    "not json": (not_json, "is not valid JSON"),
    "unknown dtype": (change_entry("dtype", lambda _: "Q7"), "has the dtype 'Q7'"),
    "another dtype": (change_entry("dtype", lambda _: "F16"), "give another number"),
    "negative shape": (change_entry("shape", lambda shape: [-shape[0], -shape[1]]), "has the shape"),
    "fractional shape": (change_entry("shape", lambda shape: [float(n) for n in shape]), "has the shape"),
    "true shape": (change_entry("shape", lambda shape: [True, *shape]), "has the shape"),
    "flattened shape": (change_entry("shape", lambda shape: [shape[0] * shape[1]]), "config.json asks for"),
    "swapped shape": (change_entry("shape", lambda shape: shape[::-1]), "config.json asks for"),
    "overflowing shape": (change_entry("shape", lambda shape: [1 << 62, 1 << 62, *shape]), "give another number"),
    "backward offsets": (change_entry("data_offsets", lambda offsets: offsets[::-1]), "give another number"),
    "three offsets": (change_entry("data_offsets", lambda offsets: [*offsets, 0]), "has the data_offsets"),
    "an overlap": (overlap, "a gap or an overlap"),
    "a gap": (gap, "a gap or an overlap"),
    "float64": (retype(torch.float64), "has the dtype F64; supported"),
    "int32": (retype(torch.int32), "has the dtype I32; supported"),
    "transposed": (transpose, "config.json asks for"),
    "missing tensor": (drop_tensor, "checkpoint lacks the tensor"),
    "a shard twice": (copy_shard, "is in .* and, called|checkpoint lacks the tensor"),
    "missing shard": (lose_shard, "cannot be read: No such file"),
    "a fifo": (shard_is_a_fifo, "is not a regular file"),
    "a folder": (shard_is_a_folder, "is not a regular file|cannot be read"),
    "index out of the folder": (index_with(escape), "is not a plain .safetensors file name"),
    "index without map": (index_with(lambda _: {}), "must have a weight_map"),
    "index that is a list": (index_with(lambda _: []), "must hold a JSON object"),
    "no weights": (no_weights, f"has neither {SINGLE} nor"),
    "no config": (no_config, "config.json is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_and_takes_no_memory(world: World, copied: Path, case: str) -> None:
    spoil, text = BAD[case]
    load = world.load(copied)
    spoil(copied)
    with pytest.raises(CheckpointError, match=text) as caught:
        load.run()
    assert str(copied.parent) not in caught.value.message
    assert world.used == world.pages == 0


@pytest.mark.parametrize("path", ["absent", "config.json", "a" * 300, "nul\0", "absent/../.."])
def test_a_path_that_is_no_folder_of_a_checkpoint_is_refused(world: World, copied: Path, path: str) -> None:
    load = world.load(copied, model_path=str(copied / path))
    with pytest.raises(CheckpointError):
        load.run()
    assert world.used == 0


def test_too_many_tensors_are_refused(world: World, copied: Path) -> None:
    header, body = header_of(shards(copied)[0])
    header |= {f"e{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    write(shards(copied)[0], header, body)
    with pytest.raises(CheckpointError, match=r"100\d\d\d tensors exceed the limit of 100000"):
        world.load(copied).run()


@given(st.data())
def test_no_flipped_bit_of_a_header_passes_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("flip")
    sizes = {"hidden_size": 4, "head_dim": 4, "num_hidden_layers": 1, "vocab_size": 3, "oracle_modulus": 257}
    sizes |= {"num_local_experts": 1, "num_experts_per_tok": 1}
    spec = parse_spec({"model_type": "oracle_moe", **sizes}, "float32")
    tensors = [tensor for record in records(spec) for tensor in record.tensors]
    stored = {source.name: torch.ones(source.shape) for tensor in tensors for source in tensor.sources}
    save_file(stored, directory / SINGLE, metadata={"m": "v"})

    def places() -> list[Any]:
        with Checkpoint(directory, spec) as checkpoint:
            return [piece.part[1:] for tensor in tensors for piece in checkpoint.pieces(tensor)]

    before = places()
    raw = bytearray((directory / SINGLE).read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    at = data.draw(st.integers(0, 8 + length - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    (directory / SINGLE).write_bytes(raw)
    try:
        after = places()
    except CheckpointError:
        return
    assert after == before  # white space or the metadata's text, which nothing depends on


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    world: World, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoint.pieces

    def pieces(self: Checkpoint, tensor: TensorSpec) -> Any:
        os.truncate(shards(copied)[2], 1000)
        return real(self, tensor)

    monkeypatch.setattr(Checkpoint, "pieces", pieces)
    with pytest.raises(CheckpointError, match="cannot be read"):
        world.load(copied).run()
    assert world.used == world.pages == 0


def test_a_file_that_is_rewritten_while_it_is_read_is_refused(
    world: World, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoint.pieces

    def pieces(self: Checkpoint, tensor: TensorSpec) -> Any:
        os.utime(shards(copied)[0], ns=(1, 1))
        return real(self, tensor)

    monkeypatch.setattr(Checkpoint, "pieces", pieces)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        world.load(copied).run()
    assert world.used == world.pages == 0


# ---- Other failures of a load


def test_any_failing_allocation_fails_the_load_and_leaves_nothing(
    world: World, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, failing = host.allocate, 0, 0

    def allocate(fd: int, offset: int, nbytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise OSError(12, "Cannot allocate memory")
        real(fd, offset, nbytes)

    monkeypatch.setattr(host, "allocate", allocate)
    while True:
        calls = 0
        try:
            world.load(mixtral).run()
            break
        except DoesNotFit:
            assert world.used == world.pages == 0
        failing += 1
    assert failing == sum(len(memory.records) + len(memory.kv) + 1 for memory in world.memories.values())


def test_an_abort_ends_the_load_and_leaves_nothing(world: World, mixtral: Path) -> None:
    load = world.load(mixtral)
    load.abort()
    with pytest.raises(Unavailable) as caught:
        load.run()
    assert caught.value.code == "aborted"
    assert world.used == world.pages == 0


def test_what_does_not_fit_is_refused_with_the_figures(world: World, mixtral: Path) -> None:
    with pytest.raises(DoesNotFit, match=f"budget of {size(BUDGET)}, weights take"):
        world.load(mixtral, max_sequences=65_536).run()
    assert world.used == 0


def test_a_layout_of_another_model_is_refused(world: World, mixtral: Path) -> None:
    with pytest.raises(InvalidRequest, match="the layout has experts"):
        world.load(mixtral, layout=initial_layout((5, 6), ["host:0"])).run()


# ---- Conversion


def converted(raw: bytes, stored_dtype: str, served: str) -> bytes:
    size = {"F32": 4, "F16": 2, "BF16": 2}[stored_dtype]
    out = bytearray(len(raw) // size * (4 if served == "float32" else 2))
    convert(memoryview(bytearray(raw)), stored_dtype, served, memoryview(out))  # type: ignore[arg-type]
    return bytes(out)


@pytest.mark.parametrize("stored_dtype", ["F16", "BF16"])
@pytest.mark.parametrize("served", ["float32", "bfloat16"])
def test_every_half_converts_as_in_torch(stored_dtype: str, served: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).tobytes()
    kind = torch.float16 if stored_dtype == "F16" else torch.bfloat16
    target = getattr(torch, served)
    wanted = torch.frombuffer(bytearray(every), dtype=kind).to(target)
    found = torch.frombuffer(bytearray(converted(every, stored_dtype, served)), dtype=target)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=256))
def test_floats_round_to_bfloat16_as_in_torch(bits: list[int]) -> None:
    edges = [b & 0xFFFF0000 | low for b in bits[:64] for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    raw = np.array(bits + edges, np.uint32).tobytes()
    wanted = torch.frombuffer(bytearray(raw), dtype=torch.float32).to(torch.bfloat16)
    found = torch.frombuffer(bytearray(converted(raw, "F32", "bfloat16")), dtype=torch.bfloat16)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num().view(torch.int16), wanted.nan_to_num().view(torch.int16))
