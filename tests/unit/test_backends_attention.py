"""Attention of every kind on the compute backends: a row's bits, what they agree on, and what they refuse.

Shape suffixes: N rows, C width of qkv or of latent and shared key, O width of what attention gives, W a row's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from elasticmoe.common.model_spec import (
    DTYPE_BYTES,
    AttentionSpec,
    KvGeometry,
    KvShape,
    LatentAttentionSpec,
    RopeScaling,
    RopeSpec,
)
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.factory import open_backend
from elasticmoe.services.worker.model.batch import Batch, BatchPart
from elasticmoe.services.worker.model.weights import KvCache
from tests.device_memory import DeviceMemory
from tests.unit.backends import ON_CPU
from tests.unit.kernel_memory import random

LAYERS, BLOCK_SIZE, NUM_BLOCKS, LAYER = 2, 4, 64, 1
BY_DTYPE = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

YARN = RopeScaling("yarn", 4.0, 16, fast=32.0, slow=1.0)
SPECS: dict[str, AttentionSpec | LatentAttentionSpec] = {
    "grouped": AttentionSpec(6, 2, 24, RopeSpec(1e4, 24), 24**-0.5),
    "head norms": AttentionSpec(6, 2, 24, RopeSpec(1e4, 24), 0.2, qk_norm="head"),
    "token norms and clip": AttentionSpec(6, 2, 24, RopeSpec(1e4, 24), 0.2, qk_norm="token", clip=1.0),
    "partial": AttentionSpec(4, 4, 20, RopeSpec(1e4, 10, scaling=YARN, amplitude=1.14), 0.2),
    "interleaved": AttentionSpec(4, 1, 16, RopeSpec(1e4, 12, interleaved=True), 0.2),
    "latent": LatentAttentionSpec(16, 0, 64, 16, 12, RopeSpec(1e4, 8, True, YARN, 1.14), 0.2),
    "latent, odd": LatentAttentionSpec(5, 0, 37, 6, 9, RopeSpec(1e4, 10), 0.2),
}
BY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class Cache:
    """Blocks full of NaN."""

    def __init__(self, kv: KvShape, dtype: str) -> None:
        self.kv, self.dtype = kv, dtype
        inside = (LAYERS, kv.planes, kv.heads, BLOCK_SIZE, kv.width)
        nbytes = LAYERS * kv.elements * BLOCK_SIZE * DTYPE_BYTES[dtype]
        stride = nbytes + 256
        memory = self._memory = DeviceMemory(NUM_BLOCKS * stride)
        memory.device.write_bytes(memory.address, b"\xff" * (NUM_BLOCKS * stride))
        strides = (stride // DTYPE_BYTES[dtype], *torch.empty(inside, device="meta").stride())
        blocks = memory.device.wrap(memory.range, 0, (NUM_BLOCKS, *inside), strides, dtype)
        geometry = KvGeometry(BLOCK_SIZE, nbytes, stride, NUM_BLOCKS, NUM_BLOCKS * stride)
        self.cache = KvCache(blocks, NUM_BLOCKS, geometry, memory.device, memory.address)


class Layer:
    """One layer of attention, on one backend and cache. A row's input: qkv; or queries, then latent and shared key."""

    def __init__(self, name: str, spec: AttentionSpec | LatentAttentionSpec, dtype: str) -> None:
        self.backend, self.spec, self.cache = open_backend(name), spec, Cache(spec.kv, dtype)
        width = spec.query_width + (spec.kv.elements if isinstance(spec, AttentionSpec) else spec.kv.width)
        self.width = width

    def run(self, chunks: Sequence[tuple[int, int, list[int]]], x_NW: torch.Tensor) -> torch.Tensor:
        """`chunks`: of each part the first position, the number of rows and the blocks."""
        backend, spec, n = self.backend, self.spec, len(x_NW)
        parts = [BatchPart([0] * count, start, blocks, 0) for start, count, blocks in chunks]
        step = backend.check_batch(Batch(parts, BLOCK_SIZE), self.cache.cache)
        rope_ND, out_NO = backend.empty(n, spec.rope.dims), backend.empty(n, spec.out_width)
        backend.rope_table(spec.rope, rope_ND)(step)
        if isinstance(spec, AttentionSpec):
            qkv_NC, norms = x_NW.clone(), norms_of(spec)
            backend.store_kv(spec, LAYER, qkv_NC, rope_ND, norms, 1e-6)(step)
            backend.attention(spec, LAYER, qkv_NC, out_NO)(step)
        else:
            q_NQ, kv_NC = (
                part.clone(memory_format=torch.contiguous_format)
                for part in x_NW.split([spec.query_width, spec.kv.width], 1)
            )
            norm, kv_b = random(spec.kv_rank, seed=3), kv_b_of(spec, self.cache.dtype)
            backend.store_latent(spec, LAYER, q_NQ, kv_NC, rope_ND, norm, 1e-6)(step)
            backend.latent_attention(spec, LAYER, q_NQ, kv_b, out_NO)(step)
        return out_NO


def norms_of(spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor] | None:
    if spec.qk_norm == "none":
        return None
    heads = (spec.num_heads, spec.num_kv_heads) if spec.qk_norm == "token" else (1, 1)
    return random(heads[0] * spec.head_dim, seed=1), random(heads[1] * spec.head_dim, seed=2)


def kv_b_of(spec: LatentAttentionSpec, dtype: str) -> torch.Tensor:
    rows = spec.num_heads * (spec.nope_dim + spec.v_dim)
    return (random(rows, spec.kv_rank, seed=4) * spec.kv_rank**-0.5).to(TORCH_DTYPES[dtype])


@BY_DTYPE
@BY_SPEC
@pytest.mark.parametrize("name", ON_CPU)
def test_bits_do_not_depend_on_chunks_or_company(
    name: str, spec: AttentionSpec | LatentAttentionSpec, dtype: str
) -> None:
    layer = Layer(name, spec, dtype)
    x_NW, company_NW = random(70, layer.width), random(9, layer.width, seed=8)
    whole = layer.run([(0, 70, list(range(18)))], x_NW)
    assert torch.isfinite(whole).all()
    at, got = 0, []
    for count in (1, 1, 33, 2, 32, 1):
        rows = torch.cat([company_NW, x_NW[at : at + count], company_NW])
        chunks = [(0, 9, list(range(40, 43))), (at, count, list(range(20, 38))), (0, 9, list(range(50, 53)))]
        got.append(layer.run(chunks, rows)[9 : 9 + count])
        at += count
    assert torch.equal(torch.cat(got), whole)


@BY_DTYPE
@BY_SPEC
def test_backends_nearly_agree(spec: AttentionSpec | LatentAttentionSpec, dtype: str) -> None:
    outs, kept = [], []
    for name in ON_CPU:
        layer = Layer(name, spec, dtype)
        outs.append(layer.run([(0, 60, list(range(15))), (0, 1, [20])], random(61, layer.width)))
        kept.append(layer.cache.cache.blocks[:15, LAYER].to(torch.float32, copy=True))
    first, *others = outs
    for other in others:
        # What is stored in bfloat16 may be rounded the other way.
        bound = 1e-5 if dtype == "float32" else 2e-2
        assert float((first - other).abs().max()) < bound * float(first.abs().max())
    for other in kept[1:]:
        assert float((kept[0] - other).abs().max()) <= 2**-7 * float(kept[0].abs().max())


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("planes", [1, 2])
def test_whole_numbers_of_one_plane_or_two(name: str, planes: int) -> None:
    check_whole_numbers(open_backend(name), Cache(KvShape(planes, 1, 10 // planes), "float32"))


def check_whole_numbers(backend: ComputeBackend, cache: Cache) -> None:
    kv_NE = torch.randint(0, 65_521, (6, 10), generator=torch.Generator().manual_seed(1)).float()
    out_NE = backend.empty(6, 10)
    step = backend.check_batch(Batch([BatchPart([0] * 6, 0, [3, 5], 0)], BLOCK_SIZE), cache.cache)
    backend.whole_number_attention(LAYER, 65_521, 17, kv_NE, out_NE)(step)
    want = [sum(int(value) * 17 ** (5 - j) for j, value in enumerate(column)) % 65_521 for column in kv_NE.T]
    assert out_NE[-1].tolist() == want


@pytest.mark.parametrize("name", ON_CPU)
def test_tensors_of_attention_are_checked_when_an_operation_is_made(name: str) -> None:
    backend = open_backend(name)
    grouped, normed, latent = (SPECS[key] for key in ("grouped", "head norms", "latent"))
    assert isinstance(grouped, AttentionSpec)
    assert isinstance(normed, AttentionSpec)
    assert isinstance(latent, LatentAttentionSpec)
    qkv, rope, weight = torch.zeros(2, 240), torch.zeros(2, 24), torch.zeros(24)
    q, kv, turned = torch.zeros(2, latent.query_width), torch.zeros(2, 72), torch.zeros(2, 8)
    kv_b, out = torch.zeros(16 * 28, 64), torch.zeros(2, latent.out_width)

    def refused(operation: str, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=r"must be|norms"):
            getattr(backend, operation)(*arguments)

    refused("store_kv", grouped, 0, qkv, rope, (weight, weight), 1e-6)
    refused("store_kv", normed, 0, qkv, rope, None, 1e-6)
    refused("store_kv", normed, 0, qkv, rope, (weight, torch.zeros(25)), 1e-6)
    refused("store_kv", grouped, 0, qkv, torch.zeros(2, 22), None, 1e-6)
    refused("store_latent", latent, 0, q[:, 1:].clone(), kv, turned, torch.zeros(64), 1e-6)
    refused("store_latent", latent, 0, q, kv[:, 1:].clone(), turned, torch.zeros(64), 1e-6)
    refused("store_latent", latent, 0, q, kv, turned, torch.zeros(72), 1e-6)
    refused("latent_attention", latent, 0, q, kv_b[1:].clone(), out)
    refused("latent_attention", latent, 0, q, kv_b.T, out)
    refused("latent_attention", latent, 0, q, kv_b, out[:, 1:].clone())
    refused("embed", torch.zeros(5, 4).half(), 1.0, torch.zeros(2, 4))
    x_NH, w13, w2 = torch.zeros(2, 4), torch.zeros(6, 4), torch.zeros(4, 3)
    refused("shared_experts", x_NH, w13, w2, torch.zeros(4), 3, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="must be"):
        backend.linear(x_NH, w2.T.contiguous(), torch.zeros(2, 3), bias_W=torch.zeros(4))


def test_a_cache_of_another_kind_is_refused() -> None:
    """A step reads the cache only then."""
    spec = SPECS["latent"]
    assert isinstance(spec, LatentAttentionSpec)
    backend: ComputeBackend = open_backend("host")
    q, out, kv_b = torch.zeros(1, spec.query_width), torch.zeros(1, spec.out_width), kv_b_of(spec, "float32")
    attend = backend.latent_attention(spec, LAYER, q, kv_b, out)
    for cache, text in (
        (Cache(KvShape(2, 1, 72), "float32"), "one plane"),
        (Cache(KvShape(1, 1, 72), "bfloat16"), "dtype of the cache"),
    ):
        step = backend.check_batch(Batch([BatchPart([0], 0, [0], 0)], BLOCK_SIZE), cache.cache)
        with pytest.raises(ValueError, match=text):
            attend(step)
