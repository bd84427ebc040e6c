"""Checkpoints of the families in the forms that are theirs: further layers, fused experts, parts that are not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elasticmoe.cli.models import configs, random_checkpoint
from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.families import load_spec, record
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import CheckpointError
from tests.unit.forms import Tensors
from tests.unit.ranks import read_record


def changed(
    folder: Path, config: dict[str, Any], change: Callable[[Tensors], Tensors] = dict, **keys: Any
) -> tuple[Tensors, Path]:
    """A random checkpoint's tensors, and a copy of it with other tensors and keys."""
    original = random_checkpoint(folder / "original", config, seed=3, dtype="float32")
    tensors = load_file(original / "model.safetensors")
    (folder / "changed").mkdir()
    save_file(change(dict(tensors)), folder / "changed/model.safetensors", metadata={"format": "pt"})
    (folder / "changed/config.json").write_text(json.dumps(config | keys))
    return tensors, folder / "changed"


def read(directory: Path, key: RecordKey) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A record's tensors, and the checkpoint's remarks."""
    spec = load_spec(directory, "float32")
    with Checkpoint(directory, spec) as checkpoint:
        return read_record(checkpoint, record(spec, key)), checkpoint.remarks()


@pytest.mark.parametrize("config", [configs.TINY_DEEPSEEK_V3, configs.TINY_GLM4_MOE, configs.TINY_GLM4_MOE_LITE])
def test_layers_that_predict_further_tokens_are_left_out(config: dict[str, Any], tmp_path: Path) -> None:
    further = f"model.layers.{config['num_hidden_layers']}."

    def add(tensors: Tensors) -> Tensors:
        last = f"model.layers.{config['num_hidden_layers'] - 1}."
        copied = {
            name.replace(last, further): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)
        }
        own = {"eh_proj.weight": torch.ones(96, 192), "embed_tokens.weight": torch.ones(260, 96)}
        return tensors | copied | {further + name: tensor for name, tensor in own.items()}

    tensors, directory = changed(tmp_path, config, add)
    held, (remark,) = read(directory, RecordKey("base"))
    assert torch.equal(held["embed"], tensors["model.embed_tokens.weight"])
    assert f"'{further}eh_proj.weight'" in remark


def test_granite_as_transformers_5_saves_it(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        new = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
        new |= {"router.layer.weight": "router.weight"}
        for name in list(tensors):
            for old, other in new.items():
                if name.endswith(old):
                    tensors[name.replace(old, other)] = tensors.pop(name)
        return tensors

    tensors, directory = changed(tmp_path, configs.TINY_GRANITEMOE, rename)
    assert not any("input_linear" in name for name in load_file(directory / "model.safetensors"))
    held, remarks = read(directory, RecordKey("expert", 1, 7))
    assert remarks == []
    assert torch.equal(held["w13"], tensors["model.layers.1.block_sparse_moe.input_linear.weight"][7])
    assert torch.equal(held["w2"], tensors["model.layers.1.block_sparse_moe.output_linear.weight"][7])


def test_granite_with_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    _, directory = changed(tmp_path, configs.TINY_GRANITEMOE, num_local_experts=8)
    with pytest.raises(CheckpointError, match=r"router\.layer\.weight' has the shape \[9, 96\], .* asks for \[8, 96\]"):
        read(directory, RecordKey("base"))


def test_shared_experts_that_the_config_has_not_are_not_asked_for(tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if "shared_experts" not in name}

    _, directory = changed(tmp_path, configs.TINY_DEEPSEEK_V2, drop, n_shared_experts=0)
    held, remarks = read(directory, RecordKey("layer", 2))
    assert remarks == []
    assert "shared_w13" not in held
    (directory / "config.json").write_text(json.dumps(configs.TINY_DEEPSEEK_V2))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.shared_experts\.gate_proj"):
        read(directory, RecordKey("base"))


def test_the_bias_of_the_choice_is_needed(tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if "e_score_correction_bias" not in name}

    _, directory = changed(tmp_path, configs.TINY_DEEPSEEK_V3, drop)
    with pytest.raises(
        CheckpointError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.gate\.e_score_correction_bias'"
    ):
        read(directory, RecordKey("base"))
