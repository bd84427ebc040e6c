"""Triton's compiler takes the kernels for GPUs as they are launched for published models, which needs no GPU. It
refuses what its interpreter lets pass: names, types of loops, operands that are too small for tensor cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elasticmoe.services.worker.backends.accelerator.kernels import RowGroups
from elasticmoe.services.worker.backends.accelerator.triton_kernels import (
    attention,
    kernel_set,
    products,
    routing,
    rows,
)
from elasticmoe.services.worker.backends.accelerator.triton_kernels.kernel_set import (
    DEPTH,
    HEADS,
    ROWS,
    SPLIT,
    TILES,
    WIDTH,
    TritonKernels,
)
from elasticmoe.services.worker.backends.answers import WeightedSum

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of one block, CUDA C++ programming guide, compute capabilities
POINTERS = dict.fromkeys(
    (
        "x",
        "delta",
        "weight",
        "out",
        "bias",
        "row_gate",
        "q",
        "sums",
        "maxima",
        "totals",
        "table",
        "frequencies",
        "answers",
    ),
    "*fp32",
)
POINTERS["parts"] = "*fp32"
POINTERS |= dict.fromkeys(("from_rows", "tiles", "block_ids", "positions", "blocks", "places", "ids", "at"), "*i32")
POINTERS |= {"logits": "*fp32", "weights": "*fp32", "w": "*bf16", "cache": "*bf16"}
NUMBERS = dict.fromkeys(("scale", "eps", "amplitude", "scaling"), "fp32")  # the others are whole

_PRODUCT = {"STORED": tl.bfloat16, "BLOCK_ROWS": ROWS, "BLOCK_WIDTH": WIDTH, "BLOCK_DEPTH": DEPTH}
_ATTENTION = {"IS_LATENT": False, "SPLIT": SPLIT, "BLOCK_QUERIES": TILES[2].queries // 8, "BLOCK_HEADS": 8}
_ATTENTION |= {"BLOCK_KEYS": TILES[2].keys, "BLOCK_DIM": 128, "BLOCK_TAIL": 16}
_LATENT = _ATTENTION | {"IS_LATENT": True, "BLOCK_QUERIES": 1, "BLOCK_HEADS": TILES[1].queries}
_LATENT |= {"BLOCK_KEYS": TILES[1].keys, "BLOCK_DIM": 512, "BLOCK_TAIL": 64}
_ROUTE = {"NUM_EXPERTS": 256, "TOP_K": 8, "NORMALIZES": True, "BLOCK_K": 8}
_GROUPS = {"NUM_GROUPS": 8, "TOP_GROUPS": 4, "BLOCK_GROUPS": 8, "BLOCK_SIZE": 32}
_NO_GROUPS = {"NUM_GROUPS": 1, "TOP_GROUPS": 1, "BLOCK_GROUPS": 1, "BLOCK_SIZE": 256}


def _flags(names: str, *chosen: str) -> dict[str, bool]:
    return {name: name in chosen for name in names.split()}


_PRODUCT_FLAGS = "GROUPED GATED ACCUMULATE HAS_BIAS HAS_ROW_GATE"
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "linear": (products.product_kernel, _PRODUCT | _flags(_PRODUCT_FLAGS, "ACCUMULATE", "HAS_BIAS"), 4),
    "shared": (products.product_kernel, _PRODUCT | _flags(_PRODUCT_FLAGS, "ACCUMULATE", "HAS_ROW_GATE"), 4),
    "experts": (products.product_kernel, _PRODUCT | _flags(_PRODUCT_FLAGS, "GROUPED", "GATED"), 4),
    "attention": (attention.attention_kernel, _ATTENTION, TILES[2].warps),
    "latents": (attention.attention_kernel, _LATENT, TILES[1].warps),
    "join": (attention.join_kernel, {"SPLIT": SPLIT, "BLOCK_HEADS": HEADS, "BLOCK_DIM": 512}, 4),
    "softmax": (routing.route_kernel, _ROUTE | _NO_GROUPS | _flags("IS_SOFTMAX HAS_BIAS", "IS_SOFTMAX"), 4),
    "softmax, bias": (
        routing.route_kernel,
        _ROUTE | _GROUPS | _flags("IS_SOFTMAX HAS_BIAS", "IS_SOFTMAX", "HAS_BIAS"),
        4,
    ),
    "sigmoid": (routing.route_kernel, _ROUTE | _GROUPS | _flags("IS_SOFTMAX HAS_BIAS", "HAS_BIAS"), 4),
    "norm": (rows.norm_kernel, {"BLOCK": 1024} | dict.fromkeys(("HAS_DELTA", "HAS_ROWS", "KEEPS_SUM"), True), 4),
    "rope table": (rows.rope_table_kernel, {"BLOCK": 64}, 4),
    "rotate": (rows.rotate_kernel, {"INTERLEAVED": True, "BLOCK_HEADS": HEADS, "BLOCK": 64}, 4),
    "parts": (
        products.join_parts_kernel,
        {"NUM_PARTS": 8, "BLOCK": 1024} | dict.fromkeys(("ACCUMULATE", "HAS_BIAS", "HAS_ROW_GATE"), True),
        4,
    ),
    "weighted sum": (rows.weighted_sum_kernel, {"TOP_K": 8, "BLOCK": 1024}, 4),
    "store": (rows.store_kernel, {"BLOCK_PLANES": 8, "BLOCK": 128}, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_compiled(name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants, warps = CASES[name]
    names = [parameter.name for parameter in kernel.params]
    types = POINTERS | NUMBERS | ({"w": "i64"} if constants.get("GROUPED") else {})  # the address of slots
    signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in names}
    source = ASTSource(kernel, signature, {(names.index(each),): value for each, value in constants.items()})
    options = {"num_warps": warps, "enable_fp_fusion": name != "weighted sum"}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert "cubin" in compiled.asm
    if name == "weighted sum":
        assert "fma" not in compiled.asm["ptx"], "a product that is not rounded before it is added"


def test_a_launch_looks_up_no_memory_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks the driver where each tensor lies that a kernel is given, and there may be nothing in the first
    slot: one that a rank does not hold."""
    given: list[Any] = []

    class Kernel:
        def __getitem__(self, _: object) -> Any:
            return lambda *args, **options: given.extend([*args, *options.values()])

    monkeypatch.setattr(kernel_set, "product_kernel", Kernel())
    x_RH, w_EWH, out_RW = torch.zeros(4, 8), torch.zeros(3, 16, 8, dtype=torch.bfloat16), torch.zeros(4, 16)
    counts_E = np.array([0, 4, 0], dtype=np.int32)
    kernels = TritonKernels(torch.device("cpu"))
    sent = {name: torch.from_numpy(values) for name, values in kernels.group_fields(counts_E).items()}
    kernels.expert_products(x_RH, w_EWH, out_RW, RowGroups(counts_E, sent), is_gated=False)
    assert w_EWH.data_ptr() in [one for one in given if isinstance(one, int)]
    assert all(one.data_ptr() != w_EWH.data_ptr() for one in given if isinstance(one, torch.Tensor))


def test_weights_of_experts_are_read_in_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen bytes at once, as those of linears: the first slot's address is a number, not a tensor."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants, warps = CASES["experts"]
    names = [parameter.name for parameter in kernel.params]
    constants = constants | {"w_depth": 1}  # as Triton takes a number that is 1
    types = POINTERS | NUMBERS | {"w": "i64"}
    signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in names}
    in_sixteens = {(at,): [["tt.divisibility", 16]] for at, each in enumerate(names) if each not in constants}
    given = {(names.index(each),): value for each, value in constants.items()}
    source = ASTSource(kernel, signature, given, in_sixteens)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert "ld.global.b16" not in compiled.asm["ptx"]
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        TritonKernels(torch.device("cpu")).expert_products(
            torch.zeros(4, 8),
            torch.zeros(3 * 16 * 8 + 1, dtype=torch.bfloat16)[1:].view(3, 16, 8),
            torch.zeros(4, 16),
            RowGroups(np.array([0, 4, 0], dtype=np.int32), {}),
            is_gated=False,
        )


def test_answers_are_summed_by_a_kernel_that_rounds_products(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, _: object) -> Any:
            return lambda *_, **options: given.update(options)

    monkeypatch.setattr(kernel_set, "weighted_sum_kernel", Kernel())
    total = WeightedSum(
        torch.zeros(4, 8), torch.zeros(6, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(2, 8), True
    )
    TritonKernels(torch.device("cpu")).weighted_sum(total, 2)
    assert given["enable_fp_fusion"] is False
