"""Weights in FP8 with scales in blocks: the conversion bit by bit, and what a load makes of such checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.families import load_spec, records, unread_names
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.weights import SINGLE
from elasticmoe.native import convert, host
from elasticmoe.services.hmm.loading import reader as reader_module
from tests.unit.forms import Tensors
from tests.unit.loading import World
from tests.unit.quantized import FP8, dequantized, quantized_copy, stored
from tests.unit.specs import TINY_MIXTRAL, TINY_QWEN3

BLOCK = (16, 24)  # so small that tiny models have many, with the last ones cut off
SIZES = [(1, 1), (3, 5), (128, 128), (129, 127), (200, 300), (576, 40), (64, 1000)]


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


# ---- The conversion


def converted(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    block: tuple[int, int],
    dtype: torch.dtype,
    instruction_set: str = "",
    cut: int = 1 << 30,
) -> tuple[torch.Tensor, bool]:
    """What the native code makes of a matrix, `cut` elements at a time, and whether all are numbers."""
    out, (rows, columns) = torch.empty(codes.shape, dtype=dtype), codes.shape
    are_numbers = True
    for first in range(0, codes.size, cut):
        count = min(cut, codes.size - first)
        are_numbers &= convert.dequantize_e4m3(
            codes.ctypes.data + first,
            first,
            count,
            rows,
            columns,
            *block,
            scales.ctypes.data,
            dtype.itemsize,
            out.data_ptr() + first * dtype.itemsize,
            instruction_set,
        )
    return out, are_numbers


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("name", convert.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_code_with_many_scales_is_the_product_rounded_once(name: str, dtype: torch.dtype) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    rng = np.random.default_rng(1)
    scales = np.exp2(rng.uniform(-126, 117, (64, 1))).astype(np.float32)
    scales[:6, 0] = [1, 0, -1.5, 2.0**-149, 1e-40, 3.0]  # also where products are subnormal
    out, are_numbers = converted(codes, scales, (1, 256), dtype, name)
    wanted = dequantized(torch.from_numpy(codes).view(FP8), torch.from_numpy(scales), (1, 256), dtype)
    is_nan = torch.from_numpy((codes & 0x7F) == 0x7F)
    assert torch.equal(torch.isnan(out), is_nan)
    assert torch.equal(bits(out)[~is_nan], bits(wanted)[~is_nan])
    assert not are_numbers


@pytest.mark.parametrize("name", convert.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (16, 24), (1, 128)], ids=str)
def test_blocks_may_be_cut_off_and_reading_may_be_cut_anywhere(
    shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, name: str
) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 0x7F, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    scales = rng.uniform(-2, 2, grid).astype(np.float32)
    wanted = dequantized(torch.from_numpy(codes).view(FP8), torch.from_numpy(scales), block, dtype)
    for cut in (1 << 30, 1 + codes.size // 3, 37):
        out, are_numbers = converted(codes, scales, block, dtype, name, cut)
        assert are_numbers
        assert torch.equal(bits(out), bits(wanted))


@pytest.mark.parametrize("at", [0, 15, 16, 299])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_one_that_is_not_a_number_is_seen_wherever_it_is(code: int, at: int) -> None:
    codes = np.zeros((1, 300), np.uint8)
    codes[0, at] = code
    for name in convert.instruction_sets():
        out, are_numbers = converted(codes, np.ones((1, 3), np.float32), (128, 128), torch.bfloat16, name)
        assert not are_numbers
        assert torch.isnan(out).nonzero().tolist() == [[0, at]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"first": 1}, "first [+] count is 513"),
        ({"first": -1}, "first must not be negative"),
        ({"num_rows": 3}, "first [+] count is 512"),
        ({"block_rows": 0}, "a block must have"),
        ({"itemsize": 8}, "itemsize must be 2 or 4"),
        ({"scales_addr": 0}, "scales is null"),
        ({"out_addr": 2}, "not aligned"),
        ({"instruction_set": "mmx"}, "no such instruction set"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], text: str) -> None:
    memory = np.zeros(4096, np.float32)
    fields = {"src_addr": memory.ctypes.data, "first": 0, "count": 512, "num_rows": 4, "depth": 128}
    fields |= {"block_rows": 128, "block_cols": 128, "scales_addr": memory.ctypes.data + 4096, "itemsize": 4}
    with pytest.raises(ValueError, match=text):
        convert.dequantize_e4m3(**fields | {"out_addr": memory.ctypes.data + 8192} | change)


# ---- Whole checkpoints


def checkpoint(directory: Path, config: dict[str, Any], scale_dtype: torch.dtype, *, shards: int = 2) -> Path:
    source = random_checkpoint(directory / "source", config, seed=5, dtype="float32", shards=shards)
    return quantized_copy(source, directory / "fp8", block=BLOCK, scale_dtype=scale_dtype)


def whole(tensors: Tensors, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as it is to be served."""
    tensor = tensors[name]
    if tensor.dtype != FP8:
        return tensor.to(dtype)
    return dequantized(tensor, tensors[name + "_scale_inv"], BLOCK, dtype)


@pytest.mark.parametrize("config", [TINY_MIXTRAL, TINY_QWEN3], ids=["mixtral", "qwen3"])
@pytest.mark.parametrize("served", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_a_load_gives_what_a_dequantized_copy_would(
    world: World,
    tmp_path: Path,
    config: dict[str, Any],
    served: str,
    scale_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where tensors are stacked of several, each with scales of its own."""
    monkeypatch.setattr(reader_module, "_STAGING_BYTES", 1001)  # so that pieces are cut, in the midst of rows too
    directory = checkpoint(tmp_path, config, scale_dtype)
    tensors, load = stored(directory), world.load(directory, served)
    loaded = load.run()
    for record in records(loaded.spec):
        homes = [device for device, memory in world.memories.items() if record.key in memory.records]
        for tensor in record.tensors:
            dtype = getattr(torch, tensor.dtype)
            wanted = torch.cat([whole(tensors, source.name, dtype) for source in tensor.sources])
            for device in homes:
                assert torch.equal(world.tensor(device, record.key, tensor), wanted), (record.key, tensor.name)
    assert load.bytes_done == load.bytes_total == sum(tensor.nbytes for tensor in tensors.values())
    with Checkpoint(directory, loaded.spec) as verified:
        assert verified.remarks() == []


def test_experts_in_one_tensor_have_their_scales_in_one(world: World, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, TINY_QWEN3, torch.float32, shards=1)
    apart, names = stored(directory), ("gate_proj", "up_proj", "down_proj")
    together: Tensors = {name: tensor for name, tensor in apart.items() if ".experts." not in name}
    for layer in (0, 2):
        at = f"model.layers.{layer}.mlp.experts."
        gate, up, down = ([apart[f"{at}{expert}.{name}.weight"] for expert in range(7)] for name in names)
        # A block may not reach from gate to up here, as 20 rows are no multiple of 16: so they are quantized anew.
        both = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        rng = torch.Generator().manual_seed(layer)
        together |= {at + "gate_up_proj": both, at + "down_proj": torch.stack(down)}
        together[at + "gate_up_proj_scale_inv"] = torch.rand((7, 3, 2), generator=rng)
        together[at + "down_proj_scale_inv"] = torch.rand((7, 3, 1), generator=rng)
    save_file(together, directory / SINGLE)
    spec = world.load(directory).run().spec
    for record in records(spec):
        if record.key.kind != "expert":
            continue
        device = next(name for name, memory in world.memories.items() if record.key in memory.records)
        for tensor, name in zip(record.tensors, ("gate_up_proj", "down_proj"), strict=True):
            full = f"model.layers.{record.key.layer}.mlp.experts.{name}"
            codes, scales = together[full][record.key.expert], together[full + "_scale_inv"][record.key.expert]
            wanted = dequantized(codes, scales, BLOCK, torch.float32)
            assert torch.equal(world.tensor(device, record.key, tensor), wanted)


def test_each_byte_is_read_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: dict[str, list[tuple[int, int]]] = {}
    real = host.read_into

    def read_into(fd: int, offset: int, address: int, nbytes: int) -> None:
        reads.setdefault(Path(f"/proc/self/fd/{fd}").readlink().name, []).append((offset, nbytes))
        real(fd, offset, address, nbytes)

    monkeypatch.setattr(host, "read_into", read_into)
    monkeypatch.setattr(reader_module, "_STAGING_BYTES", 1 << 14)
    directory = checkpoint(tmp_path, TINY_QWEN3, torch.float32)
    load = world.load(directory, "bfloat16")
    load.run()
    for path in directory.glob("*.safetensors"):
        at = path.stat().st_size - load.bytes_read[path.name]
        for offset, nbytes in sorted(reads[path.name]):
            assert offset == at
            assert nbytes <= 1 << 14
            at += nbytes
        assert at == path.stat().st_size


def test_a_tied_head_with_other_scales_stays_apart(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, TINY_QWEN3, torch.float32, shards=1)
    tensors = stored(directory)
    embedding, grid = "model.embed_tokens.weight", (-(-260 // 16), 2)
    tensors[embedding] = tensors[embedding].to(FP8)
    tensors |= {"lm_head.weight": tensors[embedding].clone(), embedding + "_scale_inv": torch.ones(grid)}
    for factor, is_tied in ((1.0, True), (2.0, False)):
        tensors["lm_head.weight_scale_inv"] = torch.full(grid, factor)
        save_file(tensors, directory / SINGLE)
        spec = load_spec(directory, "float32")
        assert spec.tie_embeddings is is_tied
        Checkpoint(directory, spec).close()


# ---- What is refused

Q, SCALE = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight_scale_inv"
REFUSED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a weight without scales": (lambda t: t.pop(SCALE), f"'{Q}' has the dtype F8_E4M3 and no '{SCALE}'"),
    "scales without a weight": (lambda t: t.pop(Q), f"lacks the tensor '{Q}'"),
    "scales of a weight that is not quantized": (
        lambda t: t.update({Q: t[Q].to(torch.bfloat16)}),
        f"'{SCALE}' has scales for '{Q}', which is stored in BF16, not in F8_E4M3",
    ),
    "scales of another shape": (
        lambda t: t.update({SCALE: torch.ones(2, 2)}),
        rf"'{SCALE}' has the shape \[2, 2\], config.json asks for \[4, 2\]",
    ),
    "scales of another dtype": (
        lambda t: t.update({SCALE: t[SCALE].to(torch.float64)}),
        "has the dtype F64; supported: F32, BF16, F16, F8_E8M0",
    ),
    "E5M2": (
        lambda t: t.update({Q: t[Q].to(torch.float8_e5m2)}),
        "has the dtype F8_E5M2; supported: F32, F16, BF16, F8_E4M3",
    ),
    "a scale for each tensor": (
        lambda t: t.update({SCALE.removesuffix("_inv"): torch.ones(()), SCALE: None}),
        "quantized with FP8 with a scale for each tensor or row",
    ),
    "a norm": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(FP8)}),
        "'model.norm.weight' has the dtype F8_E4M3 and no 'model.norm.weight_scale_inv'",
    ),
    "an infinite scale": (lambda t: t[SCALE].__setitem__((3, 1), torch.inf), f"'{SCALE}' has the scale inf"),
    "a scale that is not a number": (lambda t: t[SCALE].__setitem__((0, 0), torch.nan), "has the scale nan"),
    "a scale that lets weights overflow": (lambda t: t[SCALE].__setitem__((0, 0), 1e36), "has the scale 1e[+]36"),
    "a weight that is not a number": (
        lambda t: t[Q].view(torch.uint8).__setitem__((47, 47), 0xFF),
        f"'{Q}' has a weight that is not a number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_is_refused_and_leaves_nothing(world: World, tmp_path: Path, case: str) -> None:
    change, text = REFUSED[case]
    directory = checkpoint(tmp_path, TINY_QWEN3 | {"tie_word_embeddings": False}, torch.float32, shards=1)
    tensors = stored(directory)
    change(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / SINGLE)
    with pytest.raises(CheckpointError, match=text):
        world.load(directory, "bfloat16").run()
    assert world.used == world.pages == 0


CONFIGS: dict[str, tuple[Any, str]] = {
    "static activations": ({"activation_scheme": "static"}, "FP8, activation_scheme='static' .*supported: dynamic"),
    "e5m2": ({"fmt": "e5m2"}, "FP8, fmt='e5m2' .*supported: e4m3"),
    "FP4 experts": ({"expert_dtype": "fp4"}, "FP8, expert_dtype='fp4'"),
    "no blocks": ({"weight_block_size": None}, "FP8 with a scale for each tensor"),
    "one number": ({"weight_block_size": 128}, "weight_block_size must be two integers"),
    "an empty block": ({"weight_block_size": [0, 128]}, r"is \[0, 128\]"),
    "a truth": ({"weight_block_size": [True, 128]}, r"is \[True, 128\]"),
    "a tiny block": ({"weight_block_size": [1, 32]}, "whose product is at least 128"),
    "another method": ({"quant_method": "mxfp8"}, "quantized with MXFP8"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_other_kinds_of_fp8_are_refused_by_name(tmp_path: Path, case: str) -> None:
    change, text = CONFIGS[case]
    directory = checkpoint(tmp_path, TINY_MIXTRAL, torch.float32, shards=1)
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] |= change
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=text):
        load_spec(directory, "float32")


def test_fp8_that_config_json_does_not_announce_is_refused(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, TINY_MIXTRAL, torch.float32, shards=1)
    fields = json.loads((directory / "config.json").read_text())
    del fields["quantization_config"]
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="quantized with FP8 in blocks") as caught:
        Checkpoint(directory, load_spec(directory, "float32"))
    assert caught.value.code == "quantization_unsupported"


def test_what_a_quantization_config_says_beside_is_told(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, TINY_MIXTRAL, torch.float32, shards=1)
    fields = json.loads((directory / "config.json").read_text())
    assert unread_names(fields) == []
    fields["quantization_config"] |= {"scale_fmt": "ue8m0", "kv_cache": 1}  # the first as in DeepSeek-V3.1
    assert unread_names(fields) == ["quantization_config.kv_cache"]
