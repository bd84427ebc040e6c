"""Checkpoints in every form that transformers reads are served with its tokens, or refused with the reason."""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.families import load_spec, records
from elasticmoe.common.weights import SINGLE
from elasticmoe.native import host
from tests.unit import forms
from tests.unit.forms import BASES, SIZES, Edit, Tensors, beside, fused, renamed, same_head, without
from tests.unit.loading import World
from tests.unit.ranks import Ranks, generate
from tests.unit.test_model_parity import FLOAT32_BOUND, compare, make_streams, reference_of

transformers = pytest.importorskip("transformers")

TIED = {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEUTRAL = {"rope_scaling": None, "layer_types": None, "pad_token_id": -1, "attention_dropout": 0, "num_experts": 8}


class Case(NamedTuple):
    """A form: what is done to the base checkpoint, and how many remarks are made about it."""

    family: str
    edit: Edit = dict
    config: dict[str, Any] = {}
    drop: set[str] = set()
    num_remarks: int = 0


CASES = {
    "mixtral: every key absent": Case("mixtral", drop=set(BASES["mixtral"]) - SIZES),
    "qwen3: every key absent": Case("qwen3", drop=set(BASES["qwen3"]) - SIZES),
    "mixtral: no architectures": Case("mixtral", drop={"architectures"}),
    "qwen3: as transformers 5 writes it": Case("qwen3", config={"num_local_experts": 16}, drop={"num_experts"}),
    "qwen3: both spellings": Case("qwen3", config={"num_local_experts": 16, "num_experts": 99}),
    "mixtral: the other spelling": Case("mixtral", config={"num_experts": 8}, drop={"num_local_experts"}),
    "mixtral: neutral values": Case("mixtral", config=NEUTRAL),
    "mixtral: swish": Case("mixtral", config={"hidden_act": "swish"}),
    "mixtral: a window beyond what is served": Case("mixtral", config={"sliding_window": 100}),
    "qwen3: a window that is off": Case("qwen3", config={"sliding_window": 4}),
    "qwen3: layers with a window beyond what is served": Case(
        "qwen3",
        config={
            "use_sliding_window": True,
            "sliding_window": 100,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen3: rope_scaling beside rope_parameters": Case(
        "qwen3",
        config={"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {"type": "default"}, "rope_theta": 555},
        num_remarks=1,
    ),
    "mixtral: keys that nobody reads": Case(
        "mixtral", config={"attention_bias": True, "logit_scale": 0.1, "auto_map": {"AutoConfig": "x.Y"}}, num_remarks=2
    ),
    "mixtral: every layer dense to a reader of Qwen3": Case("mixtral", config={"mlp_only_layers": [0]}, num_remarks=1),
    "mixtral: fused": Case("mixtral", fused("mixtral")),
    "qwen3: fused": Case("qwen3", fused("qwen3")),
    "mixtral: fused, by the new name": Case("mixtral", fused("mixtral", part="mlp")),
    "mixtral: half fused, in one layer": Case("mixtral", fused("mixtral", which="gate_up", layers=[1])),
    "qwen3: half fused": Case("qwen3", fused("qwen3", which="down")),
    "mixtral: new names": Case("mixtral", renamed(r"block_sparse_moe", "mlp")),
    "qwen3: a base model's names": Case("qwen3", renamed(r"^model\.", "")),
    "mixtral: the head within the model": Case("mixtral", renamed(r"^lm_head", "model.lm_head")),
    "qwen3: tied, with a head of its own": Case("qwen3", config=TIED, num_remarks=1),
    "mixtral: tied, with a head of its own": Case("mixtral", config=TIED, num_remarks=1),
    "qwen3: tied, with the same head": Case("qwen3", same_head, config=TIED),
    "qwen3: tied, without a head": Case("qwen3", without(HEAD), config=TIED),
    "mixtral: tied, with only a head": Case("mixtral", without(EMBEDDING), config=TIED),
    "mixtral: tied, with only a base model's head": Case(
        "mixtral", lambda t: renamed(r"^lm_head", "model.lm_head")(without(EMBEDDING)(t)), config=TIED
    ),
    "mixtral: tied, with a head of another dtype": Case(
        "mixtral", lambda t: t | {HEAD: t[EMBEDDING].bfloat16()}, config=TIED, num_remarks=1
    ),
    "mixtral: biases, norms and layers that it does not have": Case(
        "mixtral",
        beside(
            model__layers__0__self_attn__q_proj__bias=(64,),
            model__layers__0__self_attn__q_norm__weight=(4,),
            model__layers__7__input_layernorm__weight=(64,),
            model__layers__0__block_sparse_moe__experts__0__w1__bias=(40,),
            lm_head__bias=(260,),
            model__layers__0__self_attn__rotary_emb__inv_freq=(2,),
        ),
        num_remarks=1,
    ),
    "qwen3: an expert in a dense layer, a feed-forward in a routed one": Case(
        "qwen3",
        beside(
            model__layers__1__mlp__experts__0__up_proj__weight=(24, 64), model__layers__0__mlp__up_proj__weight=(48, 64)
        ),
        num_remarks=1,
    ),
    "qwen3: fewer layers than are stored": Case("qwen3", config={"num_hidden_layers": 2}, num_remarks=1),
    "mixtral: half in float16": Case("mixtral", lambda t: {n: x.half() if "experts" in n else x for n, x in t.items()}),
}


def check_parity(directory: Path, reference: Any) -> None:
    streams = make_streams(2, (5, 17))
    worst, is_greedy = compare(reference, streams, generate(Ranks(directory, 2), streams, 8))
    assert worst < FLOAT32_BOUND
    assert is_greedy


@pytest.mark.parametrize("name", CASES)
def test_a_form_gives_the_tokens_of_transformers(name: str, bases: dict[str, Tensors], tmp_path: Path) -> None:
    case = CASES[name]
    tensors = case.edit(dict(bases[case.family]))
    directory = forms.write(tmp_path / "model", case.family, tensors, drop=case.drop, config=case.config)
    reference = reference_of(directory)
    with Checkpoint(directory, load_spec(directory, "float32")) as checkpoint:
        remarks = checkpoint.remarks()
    assert len(remarks) == case.num_remarks, remarks
    assert all(len(remark) < 1_000 for remark in remarks)
    check_parity(directory, reference)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("seed", range(4))
def test_random_mixtures_of_forms_give_the_tokens_of_transformers(
    family: str, seed: int, bases: dict[str, Tensors], tmp_path: Path
) -> None:
    rng = random.Random(f"{family}{seed}")
    drop = {key for key in set(BASES[family]) - SIZES | {"architectures"} if rng.random() < 0.5}
    one, other = ("num_local_experts", "num_experts")[:: 1 if family == "mixtral" else -1]
    config: dict[str, Any] = rng.choice([{}, {other: forms.NUM_EXPERTS[family]}])
    if config:
        drop.add(one)
    config |= rng.choice([{}, TIED, {"layer_types": None}, {"rope_scaling": {}}, {"rope_parameters": None}])
    config |= rng.choice([{}, {"hidden_act": "swish"}, {"sliding_window": 100, "use_sliding_window": True}])
    tensors = dict(bases[family])
    for edit in (
        rng.choice([dict, fused(family), fused(family, which="down"), fused(family, layers=[0])]),
        rng.choice([dict, renamed(r"^model\.", ""), renamed("^lm_head", "model.lm_head")]),
        rng.choice([dict, same_head, beside(unused=(3,))]),
    ):
        if edit is not same_head or EMBEDDING in tensors:
            tensors = edit(tensors)
    if "model.lm_head.weight" in tensors:
        tensors.pop(HEAD, None)
    directory = forms.write(tmp_path / "model", family, tensors, drop=drop, config=config)
    check_parity(directory, reference_of(directory))


@pytest.mark.parametrize("family", BASES)
def test_what_transformers_saves_is_served(family: str, bases: dict[str, Tensors], tmp_path: Path) -> None:
    """Its own writing, fused and not; loaded and saved twice, as fine-tuning does."""
    reference = reference_of(forms.write(tmp_path / "base", family, bases[family]))
    reference.save_pretrained(tmp_path / "fused", save_original_format=False)
    reference_of(tmp_path / "fused").save_pretrained(tmp_path / "again")
    assert any("gate_up_proj" in name for name in forms.load_file(tmp_path / "fused" / SINGLE))
    for name in ("fused", "again"):
        check_parity(tmp_path / name, reference)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mixtral", {"rope_theta": 1e4}),
        ("qwen3", {"rope_theta": 1e6}),
        ("mixtral", {"rms_norm_eps": 1e-6}),
        ("qwen3", {"rms_norm_eps": 1e-5}),
        ("qwen3", {"norm_topk_prob": True}),
        ("mixtral", {"num_experts_per_tok": 8}),
        ("qwen3", {"num_experts_per_tok": 2}),
        ("mixtral", {"sliding_window": 8}),
        ("mixtral", {"hidden_act": "gelu"}),
    ],
)
def test_a_wrong_meaning_would_be_seen(
    family: str, change: dict[str, Any], bases: dict[str, Tensors], tmp_path: Path
) -> None:
    """The proof of the proof: another value of a key moves transformers' logits by far more than the bound."""
    tokens = torch.arange(0, 200, 9)[None]
    with torch.no_grad():
        right, wrong = (
            reference_of(forms.write(tmp_path / name, family, bases[family], config=config))(tokens).logits
            for name, config in (("right", {}), ("wrong", change))
        )
    assert float((right - wrong).abs().max()) > 20 * FLOAT32_BOUND


# ---- Indexes


def test_an_index_only_says_which_files_there_are(bases: dict[str, Tensors], tmp_path: Path) -> None:
    tensors = beside(unused=(1,))(bases["qwen3"])
    directory = forms.write(tmp_path / "model", "qwen3", tensors, shards=3)
    reference = reference_of(directory)

    def change(weight_map: dict[str, str]) -> None:
        files = sorted(set(weight_map.values()))
        del weight_map[EMBEDDING]
        weight_map["model.layers.9.of_nothing"] = files[0]
        weight_map["model.norm.weight"] = next(file for file in files if file != weight_map["model.norm.weight"])

    forms.change_index(directory, change)
    with Checkpoint(directory, load_spec(directory, "float32")) as checkpoint:
        remarks = " ".join(checkpoint.remarks())
    assert "lists 1 tensor that no file has: 'model.layers.9.of_nothing'" in remarks
    assert "lists 1 tensor in another file than it names: 'model.norm.weight'" in remarks
    assert f"does not list 1 tensor that its files have: '{EMBEDDING}'" in remarks
    assert "1 tensor of the files the model does not use: 'unused'" in remarks
    check_parity(directory, reference)


def test_names_in_a_remark_are_bounded(bases: dict[str, Tensors], tmp_path: Path) -> None:
    extra = {f"{'x' * 500}{i}": torch.zeros(1) for i in range(40)}
    directory = forms.write(tmp_path / "model", "mixtral", bases["mixtral"] | extra)
    with Checkpoint(directory, load_spec(directory, "float32")) as checkpoint:
        (remark,) = checkpoint.remarks()
    assert "40 tensors" in remark
    assert "and 35 more" in remark
    assert len(remark) < 1_000


# ---- Through the loader


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("served", ["float32", "bfloat16"])
def test_fused_experts_arrive_on_their_devices_and_each_byte_is_read_once(
    family: str, served: str, world: World, bases: dict[str, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dict(bases[family])
    directory = forms.write(tmp_path / "model", family, fused(family)(plain), shards=2)
    reads: list[tuple[str, int, int]] = []
    real = host.read_into

    def read_into(fd: int, offset: int, address: int, nbytes: int) -> None:
        reads.append((os.readlink(f"/proc/self/fd/{fd}"), offset, nbytes))
        real(fd, offset, address, nbytes)

    monkeypatch.setattr(host, "read_into", read_into)
    load = world.load(directory, served)
    loaded = load.run()
    for record in records(loaded.spec):
        homes = [device for device, memory in world.memories.items() if record.key in memory.records]
        assert len(homes) == (1 if record.key.kind == "expert" else 2)
        for tensor in record.tensors:
            wanted = torch.cat([plain[source.name] for source in tensor.sources]).to(getattr(torch, tensor.dtype))
            for device in homes:
                assert torch.equal(world.tensor(device, record.key, tensor), wanted), (record.key, tensor.name)
    stored = sum(tensor.nbytes for tensor in plain.values())
    assert load.bytes_done == load.bytes_total == sum(nbytes for *_, nbytes in reads) == stored
    spans = sorted(reads)
    assert all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in itertools.pairwise(spans))


def test_a_load_warns_once_of_all_that_it_does_not_use(
    world: World, bases: dict[str, Tensors], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = beside(lm_head__bias=(260,))(bases["mixtral"])
    directory = forms.write(tmp_path / "model", "mixtral", tensors, config={**TIED, "logit_scale": 2.0}, shards=2)
    forms.change_index(directory, lambda weight_map: weight_map.pop(EMBEDDING))
    with caplog.at_level(logging.WARNING):
        assert world.load(directory).run().spec.tie_embeddings is False
    (warning,) = caplog.messages
    for part in ("'logit_scale'", "kept apart", f"'{EMBEDDING}'", "'lm_head.bias'"):
        assert part in warning


def test_comparing_a_tied_pair_stops_at_the_first_difference(
    bases: dict[str, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elasticmoe.common import weights

    monkeypatch.setattr(weights, "_COMPARED_BYTES", 1_000)
    head = bases["mixtral"][EMBEDDING].clone()
    head[-1, -1] += 1
    read: list[int] = []
    real = os.pread
    for name, other, bounds in (("last", head, (100, 200)), ("first", bases["mixtral"][HEAD], (2, 2))):
        directory = forms.write(tmp_path / name, "mixtral", bases["mixtral"] | {HEAD: other}, config=TIED)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pread", lambda fd, n, at: read.append(n) or real(fd, n, at))
            read.clear()
            assert load_spec(directory, "float32").tie_embeddings is False
        pieces = [nbytes for nbytes in read if nbytes <= 1_000 and nbytes > 100]
        assert bounds[0] <= len(pieces) <= bounds[1]


@pytest.mark.parametrize(("edit", "num_heads"), [(dict, 1), (same_head, 0)])
def test_launcher_scaler_and_loader_read_one_spec(
    edit: Edit, num_heads: int, world: World, bases: dict[str, Tensors], tmp_path: Path
) -> None:
    """A head of its own costs memory: whoever plans with it must know."""
    directory = forms.write(tmp_path / "m", "mixtral", edit(dict(bases["mixtral"])), config=TIED)
    spec = load_spec(directory, "bfloat16")
    assert spec == world.load(directory, "bfloat16").run().spec
    matrix = 260 * 64 * 2
    assert next(records(spec)).nbytes == matrix * (1 + num_heads) + 256


def test_a_sequence_beyond_the_window_is_not_loaded_for(
    world: World, bases: dict[str, Tensors], tmp_path: Path
) -> None:
    directory = forms.write(tmp_path / "m", "mixtral", bases["mixtral"], config={"sliding_window": 48})
    with pytest.raises(Exception, match="max_model_len 64 exceeds the model's sliding_window of 48 tokens"):
        world.load(directory).run()
    assert world.used == 0
    world.load(directory, max_model_len=48).run()
