"""Checkpoints that cannot be served are refused by name: what is wrong with them, and what they are instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.families import load_spec
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.weights import INDEX, SINGLE
from tests.unit import forms
from tests.unit.forms import Edit, Tensors, fused, renamed, without

TIED = {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expert(family: str, index: int, what: int = 0, layer: int = 0) -> str:
    return f"model.layers.{layer}.{forms.PART[family]}.experts.{index}.{forms.NAMES[family][what]}.weight"


REFUSED: dict[str, tuple[str, Edit, dict[str, Any], str]] = {
    "an expert too many": (
        "mixtral",
        lambda t: t | {expert("mixtral", 8): t[expert("mixtral", 0)]},
        {},
        "has 'model.layers.0.block_sparse_moe.experts.8.w1.weight'; layer 0 has 8 experts",
    ),
    "fewer experts than are stored": ("qwen3", dict, {"num_experts": 8}, "has the shape .16, 64., config.json asks"),
    "a matrix is missing": ("qwen3", without(expert("qwen3", 3, 1)), {}, "lacks the tensor '.*3.up_proj.weight'"),
    "fused and not": ("mixtral", lambda t: t | fused("mixtral")(t), {}, "has the same weights as .* and '"),
    "fused, and one expert not": (
        "qwen3",
        lambda t: fused("qwen3")(t) | {expert("qwen3", 2): t[expert("qwen3", 2)]},
        {},
        r"has the same weights as '.*\.gate_up_proj' and '.*2\.gate_proj",
    ),
    "fused and transposed": (
        "mixtral",
        lambda t: {n: x.transpose(1, 2) if n.endswith("gate_up_proj") else x for n, x in fused("mixtral")(t).items()},
        {},
        r"gate_up_proj' has the shape \[8, 64, 80\], config.json asks for \[8, 80, 64\]",
    ),
    "fused, with experts too many": ("mixtral", fused("mixtral"), {"num_local_experts": 7}, "has the shape"),
    "the same tensor by two names": (
        "qwen3",
        lambda t: t | {"norm.weight": t["model.norm.weight"]},
        {},
        "'model.norm.weight' is in model.safetensors and, called 'norm.weight', in|"
        "'norm.weight' is in model.safetensors and, called 'model.norm.weight', in",
    ),
    "no head": ("qwen3", without(HEAD), {}, "lacks the tensor 'lm_head.weight'"),
    "tied, neither": ("qwen3", without(HEAD, EMBEDDING), TIED, "lacks the tensor 'model.embed_tokens.weight'"),
    "tied, a head of another shape": (
        "qwen3",
        lambda t: t | {HEAD: t[HEAD][:9]},
        TIED,
        "'lm_head.weight' has the shape",
    ),
    "fp8": (
        "mixtral",
        lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)},
        {},
        "'model.norm.weight' has the dtype F8_E4M3, and config.json no quantization_config",
    ),
    "fp8 with scales": (
        "mixtral",
        lambda t: (
            {n: x.to(torch.float8_e4m3fn) if "q_proj" in n else x for n, x in t.items()}
            | {"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)}
        ),
        {},
        r"quantized with FP8 in blocks \(model.safetensors has '.*q_proj\.weight_scale_inv'",
    ),
    "quantized by bitsandbytes": (
        "qwen3",
        lambda t: (
            t
            | {
                "model.layers.0.self_attn.o_proj.weight": torch.zeros(9, 1, dtype=torch.uint8),
                "model.layers.0.self_attn.o_proj.weight.quant_map": torch.ones(16),
            }
        ),
        {},
        "quantized with bitsandbytes",
    ),
    "quantized, and config.json does not say so": (
        "mixtral",
        renamed(r"w1\.weight$", "w1.qweight"),
        {},
        r"quantized with GPTQ or AWQ \(model.safetensors has '.*\.w1\.qweight'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(name: str, bases: dict[str, Tensors], tmp_path: Path) -> None:
    family, edit, config, text = REFUSED[name]
    directory = forms.write(tmp_path / "model", family, edit(dict(bases[family])), config=config)
    with pytest.raises(CheckpointError, match=text):
        Checkpoint(directory, load_spec(directory, "float32"))


@pytest.mark.parametrize("where", ["model.safetensors", "model-00002-of-00003.safetensors", INDEX, "config.json"])
def test_a_pointer_of_git_lfs_is_named(where: str, bases: dict[str, Tensors], tmp_path: Path) -> None:
    shards = 1 if where == SINGLE else 3
    directory = forms.write(tmp_path / "model", "mixtral", bases["mixtral"], shards=shards)
    (directory / where).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError, match=rf"^{where} is a Git LFS pointer") as caught:
        Checkpoint(directory, load_spec(directory, "float32"))
    assert caught.value.code == "lfs_pointer"


@pytest.mark.parametrize(
    ("files", "text", "code"),
    [
        (
            {"pytorch_model.bin": b"x"},
            r"only in PyTorch's format \('pytorch_model\.bin'\)",
            "weights_format_unsupported",
        ),
        (
            {"pytorch_model.bin.index.json": b"{}", "pytorch_model-1.bin": b""},
            "PyTorch's",
            "weights_format_unsupported",
        ),
        ({"consolidated.00.pth": b""}, r"PyTorch's format \('consolidated", "weights_format_unsupported"),
        ({"model-Q4_K_M.gguf": b"GGUF"}, r"GGUF format \('model-Q4", "weights_format_unsupported"),
        ({"model-00001-of-00002.safetensors": b""}, "neither .*; it has 'model-00001-of-00002", "bad_checkpoint"),
        ({}, "neither model.safetensors nor", "bad_checkpoint"),
        (
            {"adapter_config.json": b'{"base_model_name_or_path": "some/base"}', "model.safetensors": b""},
            "is an adapter of 'some/base', which is not applied",
            "adapter_unsupported",
        ),
    ],
)
def test_weights_of_other_forms_are_named(files: dict[str, bytes], text: str, code: str, tmp_path: Path) -> None:
    directory = forms.write(tmp_path / "model", "mixtral", {"x": torch.ones(1)})
    (directory / SINGLE).unlink()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        Checkpoint(directory, load_spec(directory, "float32"))
    assert caught.value.code == code


def test_a_tensor_in_two_files_is_refused(bases: dict[str, Tensors], tmp_path: Path) -> None:
    directory = forms.write(tmp_path / "m", "mixtral", bases["mixtral"], shards=2)
    first, second = (directory / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    name, tensor = next(iter(forms.load_file(first).items()))
    save_file({**forms.load_file(second), name: tensor}, second)
    with pytest.raises(CheckpointError, match=rf"'{name}' is in {first.name} and, called '{name}', in {second.name}"):
        Checkpoint(directory, load_spec(directory, "float32"))
