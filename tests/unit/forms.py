"""Small checkpoints in the forms that people have: other names, fused tensors, heads of their own, wrong indexes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from elasticmoe.cli.models import random_checkpoint

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], Tensors]

# Wherever a family has a default that a small model can have, it stands here, so that the key can be left out.
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 260,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "vocab_size": 260,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
SIZES = {"architectures", "model_type", "hidden_size", "intermediate_size", "moe_intermediate_size"}
SIZES |= {"num_hidden_layers", "num_attention_heads", "vocab_size", "mlp_only_layers", "num_experts"}
BASES = {"mixtral": MIXTRAL, "qwen3": QWEN3}
NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3": ("gate_proj", "up_proj", "down_proj")}
NUM_EXPERTS = {"mixtral": 8, "qwen3": 16}
PART = {"mixtral": "block_sparse_moe", "qwen3": "mlp"}


def base_tensors(directory: Path, family: str) -> Tensors:
    """Random weights of a family's base config, with a head of their own; embeddings so small that eps matters."""
    random_checkpoint(directory, BASES[family], seed=11, dtype="float32")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 0.01
    return tensors


def write(
    directory: Path,
    family: str,
    tensors: Tensors,
    *,
    drop: Collection[str] = (),
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint of `tensors` with the base config without `drop` and with `config`; with shards, it has an index."""
    directory.mkdir(parents=True)
    fields = {key: value for key, value in BASES[family].items() if key not in drop} | dict(config or {})
    (directory / "config.json").write_text(json.dumps(fields))
    stored = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    index: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = dict(list(stored.items())[shard::shards])
        index |= dict.fromkeys(own, name)
        save_file(own, directory / name, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def change_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Let `change` alter the index's map in place."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def fused(family: str, *, which: str = "both", part: str = "", layers: Collection[int] = range(9)) -> Edit:
    """All experts of a layer in one tensor: `which` of gate_up, down or both, under the name `part`."""

    def edit(tensors: Tensors) -> Tensors:
        gate, up, down = NAMES[family]
        result = dict(tensors)
        for name in tensors:
            match = re.fullmatch(rf"(model\.layers\.(\d+)\.){PART[family]}\.experts\.0\.{gate}\.weight", name)
            if match is None or int(match[2]) not in layers:
                continue
            old, new = f"{match[1]}{PART[family]}.experts.", f"{match[1]}{part or PART[family]}.experts."

            def take(what: str, old: str = old) -> list[torch.Tensor]:
                return [result.pop(f"{old}{expert}.{what}.weight") for expert in range(NUM_EXPERTS[family])]

            if which in ("gate_up", "both"):
                pairs = zip(take(gate), take(up), strict=True)
                result[new + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            if which in ("down", "both"):
                result[new + "down_proj"] = torch.stack(take(down))
        return result

    return edit


def renamed(pattern: str, replacement: str) -> Edit:
    """Every name with `pattern` replaced."""
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


def without(*names: str) -> Edit:
    """All but `names`."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def beside(**shapes: tuple[int, ...]) -> Edit:
    """Further tensors of threes, by names whose dots are written as two underscores."""

    def edit(tensors: Tensors) -> Tensors:
        return tensors | {name.replace("__", "."): torch.full(shape, 3.0) for name, shape in shapes.items()}

    return edit


def same_head(tensors: Tensors) -> Tensors:
    """The head a copy of the embedding."""
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
