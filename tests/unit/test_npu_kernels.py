"""The kernels of NPUs: their calls are those that the vendor declares, and what they make of operators that follow the
vendor's pages is what the other backends compute. Nothing here has run on an NPU.

Shape suffixes: as in test_backends.py.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elasticmoe.cli.bench import accel
from elasticmoe.cli.bench.accel_answers import promise_of
from elasticmoe.cli.models import random_checkpoint
from elasticmoe.cli.models.configs import QWEN3_MOE_1B, TINY_MIXTRAL
from elasticmoe.common.config import defaults
from elasticmoe.common.families import load_spec, parse_spec
from elasticmoe.common.model_spec import AttentionSpec, KvShape, LatentAttentionSpec, MoeSpec, RopeSpec
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.worker.backends.accelerator.npu_kernels import attention, cache, kernel_set, routing
from elasticmoe.services.worker.backends.accelerator.npu_kernels.kernel_set import OPERATORS
from elasticmoe.services.worker.backends.factory import open_backend
from elasticmoe.services.worker.backends.torch_rows import routed
from tests.devices import npu_operators, vendor
from tests.unit import test_backends_attention
from tests.unit.ranks import Ranks, generate
from tests.unit.test_backends import BY_DTYPE, HIDDEN, MAKERS, ROUTERS, WIDTH, random_of
from tests.unit.test_backends_attention import YARN, Layer
from tests.unit.test_model_parity import CONFIGS, FLOAT32_BOUND, compare, make_streams, reference_of

SOURCES = [Path(module.__file__ or "") for module in (attention, cache, kernel_set, routing)]
WHEELS = pytest.mark.parametrize("wheel", vendor.OPERATORS, ids=lambda wheel: wheel.requirement)
BLOCK_SIZE = 16
# What the calls leave out, and what it has to mean.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "npu_fused_infer_attention_score": {
        "pse_shift": None,
        "antiquant_mode": 0,
        "inner_precise": 0,
        "softmax_lse_flag": False,
        "key_shared_prefix": None,
        "query_padding_size": None,
        "atten_mask": None,
        "block_table": None,
        "query_rope": None,
    },
    "npu_grouped_matmul.List": {"bias": None, "scale": None, "act_type": 0, "output_dtype": None, "group_type": None},
    "npu_rotary_mul": {"rotate": None},
}
SPECS: dict[str, AttentionSpec | LatentAttentionSpec] = {
    "grouped": AttentionSpec(6, 2, 32, RopeSpec(1e4, 32), 32**-0.5),
    "head norms": AttentionSpec(4, 4, 16, RopeSpec(1e4, 8, scaling=YARN, amplitude=1.14), 0.2, qk_norm="head"),
    "token norms and clip": AttentionSpec(6, 2, 48, RopeSpec(1e4, 48), 0.2, qk_norm="token", clip=1.0),
    "interleaved": AttentionSpec(4, 1, 16, RopeSpec(1e4, 12, interleaved=True), 0.2),
    "latent": LatentAttentionSpec(33, 0, 512, 16, 12, RopeSpec(1e4, 64, True, YARN, 1.14), 0.05),
    "latent, few heads": LatentAttentionSpec(5, 0, 512, 6, 9, RopeSpec(1e4, 64), 0.05),
}


@pytest.fixture(scope="module")
def operators() -> Iterator[None]:
    """Those of the vendor, on the CPU."""
    with npu_operators.defined():
        yield


def calls() -> list[tuple[str, ast.Call]]:
    """Each call of an operator in the sources, by the operator's name and overload."""
    found = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name.startswith("torch.ops.npu."):
                    found.append((name.removeprefix("torch.ops.npu."), node))
    return found


def keywords_of(name: str, call: ast.Call) -> set[str]:
    """What a call names; `**options` are all that the source of attention puts into such a dictionary."""
    named = {keyword.arg for keyword in call.keywords if keyword.arg}
    if any(keyword.arg is None for keyword in call.keywords):
        assert name == "npu_fused_infer_attention_score"
        for node in ast.walk(ast.parse(Path(attention.__file__ or "").read_text())):
            if (
                isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
                and "options" in ast.unparse(node).split()[0]
            ):
                inside = list(ast.walk(node))
                keys = [key for each in inside if isinstance(each, ast.Dict) for key in each.keys]
                keys += [each.slice for each in inside if isinstance(each, ast.Subscript)]
                named |= {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_fused":
                named |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return named


@WHEELS
def test_calls_are_those_that_the_vendor_declares(wheel: vendor.Headers) -> None:
    declared = npu_operators.declarations(wheel)
    found = calls()
    assert {name.partition(".")[0] for name, _ in found} == set(OPERATORS)
    for name, call in found:
        arguments = torch._C.parse_schema(declared[name]).arguments
        by_name = {argument.name: argument for argument in arguments}
        positional = [argument for argument in arguments if not argument.kwarg_only]
        named = keywords_of(name, call)
        assert named <= set(by_name), name
        assert len(call.args) <= len(positional), name
        given = {argument.name for argument in positional[: len(call.args)]} | named
        assert not {each.name for each in positional[: len(call.args)]} & named, name
        left_out = [argument for argument in arguments if argument.name not in given]
        assert all(argument.has_default_value() for argument in left_out), name
        for argument, means in LEFT_OUT.get(name, {}).items():
            assert by_name[argument].default_value == means, (name, argument)


def test_the_operators_are_asked_for_when_a_backend_is_opened() -> None:
    with pytest.raises(
        ConfigError, match=r"--compute torch_npu needs npu_fused_infer_attention_score.*install"
    ) as caught:
        open_backend("torch_npu")
    assert caught.value.code == "no_compute"


@pytest.mark.usefixtures("operators")
@BY_DTYPE
@pytest.mark.parametrize("make", MAKERS)
def test_operations_nearly_agree(make: Any, dtype: torch.dtype) -> None:
    x_NH = random_of(40, HIDDEN)
    got, want = (make(dtype)(open_backend(name), x_NH) for name in ("torch_npu", "torch"))
    # Products of bfloat16 are rounded to it, activations before them too.
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((got - want).abs().max()) < bound * max(1.0, float(want.abs().max()))


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("counts", [[3], [0, 0, 4, 0], [1] * 300, [0, 5, 0, 1, *[0] * 140, 7]], ids=len)
def test_experts_in_calls_of_up_to_128(counts: list[int]) -> None:
    """More experts than a call takes, a single one, and slots that are not touched: they hold NaN."""
    num, hidden, width = len(counts), 24, 10
    moe, total = MoeSpec(num, 1, width, False), sum(counts)
    w13, w2 = random_of(num, 2 * width, hidden, seed=1), random_of(num, hidden, width, seed=2)
    for absent in np.flatnonzero(np.array(counts) == 0).tolist():
        w13[absent], w2[absent] = float("nan"), float("nan")
    rows = [random_of(total + 2, hidden, seed=3) for _ in range(2)]
    for name, rows_RH in zip(("torch_npu", "torch"), rows, strict=True):
        open_backend(name).experts(w13, w2, moe, hidden)(rows_RH, torch.tensor(counts, dtype=torch.int32), total)
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moe", ROUTERS, ids=str)
def test_rows_are_routed_as_one_by_one(moe: MoeSpec) -> None:
    """Equals by their ids, and distinct ids whatever the logits are."""
    logits_NE, bias_E = random_of(30, moe.num_experts).round(decimals=1), random_of(moe.num_experts, seed=5) / 10
    bias = bias_E if moe.has_bias else None
    ids_NK, weights_NK = routing.route_rows(logits_NE, bias, moe)
    for row, logits_E in enumerate(logits_NE):
        want_ids, want_weights = routed(logits_E, bias, moe)
        assert ids_NK[row].tolist() == want_ids.tolist()
        torch.testing.assert_close(weights_NK[row], want_weights)
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits_NE[:, 1::2] = bad
        ids_NK, _ = routing.route_rows(logits_NE, bias, moe)
        assert all(len(set(ids)) == moe.top_k and min(ids) >= 0 for ids in ids_NK.tolist())


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("name", SPECS)
def test_attention_in_chunks_and_single_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole prompt beside a single token, then chunks and single tokens in any order: as the torch backend, whose
    blocks are not of 16 tokens alone. Blocks that no part names hold NaN."""
    monkeypatch.setattr(test_backends_attention, "BLOCK_SIZE", BLOCK_SIZE)
    layers = [Layer(backend, SPECS[name], "bfloat16") for backend in ("torch_npu", "torch")]
    x_NW = random_of(80, layers[0].width)
    table, other, third = [7, 3, 9, 1], [20, 21], [30]
    steps = [
        [(0, 37, table), (0, 1, other), (0, 3, third)],
        [(1, 1, other), (37, 1, table)],
        [(3, 1, third), (38, 20, table), (2, 17, other)],
    ]
    at = 0
    for chunks in steps:
        count = sum(rows for _, rows, _ in chunks)
        rows_NW = x_NW[at % 20 : at % 20 + count]
        got, want = (layer.run(chunks, rows_NW) for layer in layers)
        assert torch.isfinite(got).all()
        assert float((got - want).abs().max()) < 3e-2 * float(want.abs().max())
        at += count
    kept = [layer.cache.cache.blocks[[7, 3, 20]].float().nan_to_num(-1.0) for layer in layers]
    assert float((kept[0] - kept[1]).abs().max()) <= 2**-7 * float(kept[1].abs().max())


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("planes", [1, 2])
def test_whole_numbers(planes: int) -> None:
    """In float32, as the oracle has them: exact."""
    kept = test_backends_attention.Cache(KvShape(planes, 1, 10 // planes), "float32")
    test_backends_attention.check_whole_numbers(open_backend("torch_npu"), kept)


LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
BFLOAT16_BOUND = 0.2  # of logits; 0.16 was seen: processors add products up in orders of their own


def logits_of(directory: Path, dtype: str) -> tuple[float, bool]:
    """See `compare`: two ranks, two streams on each, in chunks."""
    backend = partial(open_backend, "torch_npu")
    ranks = Ranks(directory, 2, dtype=dtype, backend=backend, block_size=BLOCK_SIZE)
    streams = make_streams(2, (21, 3), num_tokens=3)
    return compare(reference_of(directory), streams, generate(ranks, streams, 3), 3)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"head_dim": 32}),
        ("deepseek3", LATENT),
        ("glm4", {"head_dim": 32}),
        ("granite", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    ],
)
def test_whole_models_as_transformers(
    name: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, which the vendor's attention does not take: all but the rounding is seen so."""
    monkeypatch.setattr(kernel_set, "_limits", lambda *_: [])
    monkeypatch.setattr(npu_operators, "ATTENDED", [torch.float32])
    directory = random_checkpoint(tmp_path / "model", CONFIGS[name] | changes, seed=3, dtype="float32")
    worst, is_greedy = logits_of(directory, "float32")
    assert worst < FLOAT32_BOUND
    assert is_greedy


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 4}),
        ("deepseek3", LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}),
    ],
)
def test_whole_models_in_bfloat16(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """As close to float32 as bfloat16 lets it be, where all experts are taken: others are chosen where two are near."""
    directory = random_checkpoint(tmp_path / "model", CONFIGS[name] | changes, seed=3, dtype="bfloat16")
    worst, _ = logits_of(directory, "bfloat16")
    assert worst < BFLOAT16_BOUND


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("name", "dtype", "block_size", "changes", "text"),
    [
        ("qwen3", "float32", 16, {}, "float32, but bfloat16"),
        ("qwen3", "bfloat16", 8, {"head_dim": 32}, "KV blocks of 8 tokens, but of multiples of 16 up to 512"),
        ("qwen3", "bfloat16", 16, {"head_dim": 24}, "heads of 24, but of multiples of 16"),
        ("deepseek3", "bfloat16", 16, {}, r"latents of \d+ \+ \d+, but of 512 \+ 64"),
        ("deepseek3", "bfloat16", 32, {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "in blocks of 32 tokens"),
    ],
)
def test_what_is_not_computed_is_refused_before_it_runs(
    name: str, dtype: str, block_size: int, changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    directory = random_checkpoint(tmp_path / "model", CONFIGS[name] | changes, seed=3, dtype=dtype)
    with pytest.raises(
        ConfigError, match=f"--compute torch_npu does not compute .*{text}.*: use --compute torch"
    ) as got:
        open_backend("torch_npu").check_model(load_spec(directory, dtype), block_size)
    assert got.value.code == "no_compute"


@pytest.mark.usefixtures("operators")
def test_what_the_vendor_forbids_is_refused_by_the_tests_operators() -> None:
    """So that a call which breaks a rule fails here: each on purpose."""
    operators = torch.ops.npu
    x = torch.ones(4, WIDTH)
    q, pages = torch.zeros(2, 4, 1, 32).bfloat16(), torch.zeros(3, 2, 16, 32).bfloat16()
    table = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    options = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "BNSD", "block_table": table}
    options |= {"block_size": 16, "actual_seq_lengths_kv": [20, 9]}
    operators.npu_fused_infer_attention_score(q, pages, pages, **options)
    attend = operators.npu_fused_infer_attention_score
    for broken, text in (
        (lambda: attend(q.float(), pages, pages, **options), "16 bits"),
        (lambda: attend(q, pages[:, :, ::2], pages[:, :, ::2], **options | {"block_size": 8}), "gaps"),
        (lambda: attend(q, pages, pages, **options | {"actual_seq_lengths_kv": [20, 20]}), "no fewer pages"),
        (lambda: attend(q, pages, pages, **options | {"block_table": table.long()}), "int32"),
        (lambda: attend(q, pages, pages, **options | {"sparse_mode": 3}), "2048"),
        (lambda: operators.npu_rms_norm(x, x[0].bfloat16()), "dtype"),
        (lambda: operators.npu_rotary_mul(x[:, None, None], 2 * x[:, None, None], x[:, None, None]), r"\[-1, 1\]"),
        (lambda: operators.npu_grouped_matmul.List([x], [x.t()], group_list=[4], split_item=3), "2 to 128"),
        (lambda: operators.npu_scatter_nd_update_(x[:, ::2], torch.zeros(1, 1).int(), x[:1, ::2]), "gaps"),
    ):
        with pytest.raises(npu_operators.Refused, match=text):
            broken()
    with pytest.raises(RuntimeError, match="Unknown keyword argument"):
        operators.npu_swiglu(x, axis=1)


def test_what_bench_accel_measures_by_default_fits() -> None:
    parser = argparse.ArgumentParser()
    accel.add_arguments(parser)
    assert (parser.get_default("model"), parser.get_default("sized_model")) == ("tiny-mixtral", "qwen3-moe-1b")
    for config in (TINY_MIXTRAL, QWEN3_MOE_1B):
        limits = kernel_set._limits(parse_spec(config, promise_of("torch_npu").dtype), defaults()["block_size"])
        assert [what for is_wrong, what in limits if is_wrong] == []
