"""Random Mixtral and Qwen3-MoE checkpoints, under the tensor names that their Hugging Face hub checkpoints have.

Each tensor is drawn from its own generator, seeded by (seed, tensor name): a tensor's values depend neither on the
order of writing nor on the number of shards.

Shape legend: D hidden, Q = heads x head_dim, K = kv_heads x head_dim, F an FFN's width, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elasticmoe.cli.models.byte_tokenizer import write_byte_tokenizer
from elasticmoe.cli.models.checkpoint import (
    Progress,
    TensorPlan,
    check_seed,
    parse_dtype,
    staged_directory,
    write_json,
    write_weights,
)

# An embedding below 1 lets attention and experts, not the last token alone, decide the next token: lost context shows.
_EMBEDDING_STD = 0.5
# Queries are longer than keys, so that attention picks tokens out. Otherwise it averages over all of them, which makes
# the positions of a long prompt alike: few experts get most tokens, and one lost token changes little. Much more than 2
# makes the model so sensitive that bfloat16 rounding decides tokens.
_QUERY_GAIN = 2.0
_NORM_STD = 0.05
_BIAS_STD = 0.1


def random_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    dtype: str,
    shards: int = 1,
    tokenizer: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write random weights for a Mixtral or Qwen3-MoE `config` (the content of a hub `config.json`) into `directory`.

    Writes `config.json` (with `torch_dtype` set to `dtype`), the weights in at most `shards` files, and, with
    `tokenizer`, the byte-level tokenizer filled up to the vocabulary's size. `seed` >= 0; `dtype` is "bfloat16" or
    "float32". Linear weights have a standard deviation of 1/sqrt(fan_in), norms are 1 plus a little noise; queries have
    twice that size.

    Atomic: `directory` must be absent or empty and appears complete or not at all. Returns it. Raises ValueError for a
    config that is not one of these families or lacks a field, for a bad argument and for a folder that is not empty.
    """
    torch_dtype = parse_dtype(dtype)
    plans = random_plans(config, seed)
    with staged_directory(directory) as stage:
        write_json(stage / "config.json", {**config, "torch_dtype": dtype})
        if tokenizer:
            write_byte_tokenizer(stage, vocab_size=positive(config, "vocab_size"))
        write_weights(stage, plans, torch_dtype, shards=shards, progress=progress)
    return directory


def random_plans(config: Mapping[str, Any], seed: int) -> list[TensorPlan]:
    """The tensors of `config`'s family, with seeded random values. Raises ValueError like `random_checkpoint`."""
    check_seed(seed)
    architectures = config.get("architectures") or [None]
    layer_shapes = _FAMILIES.get(architectures[0])
    if layer_shapes is None:
        raise ValueError(f"architecture {architectures[0]!r} is not supported; known: {', '.join(_FAMILIES)}")
    vocab_VD = (positive(config, "vocab_size"), positive(config, "hidden_size"))
    is_tied = bool(config.get("tie_word_embeddings", False))
    embedding_std = 1 / math.sqrt(vocab_VD[1]) if is_tied else _EMBEDDING_STD
    specs = [_Spec("model.embed_tokens.weight", vocab_VD, embedding_std)]
    for layer in range(positive(config, "num_hidden_layers")):
        specs += layer_shapes(config, layer)
    specs.append(_norm("model.norm.weight", vocab_VD[1]))
    if not is_tied:
        specs.append(_linear("lm_head.weight", *vocab_VD))
    return [TensorPlan(spec.name, spec.shape, partial(_draw, spec, seed)) for spec in specs]


def positive(config: Mapping[str, Any], key: str) -> int:
    """`config[key]` as an int >= 1. Raises ValueError that names the key if it is absent or anything else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config needs {key} as a whole number of at least 1, got {value!r}")
    return value


def generator_of(seed: int, name: str) -> np.random.Generator:
    """The random generator of tensor `name`: equal for equal (seed, name), independent of every other tensor's."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype=np.uint32)
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *words.tolist()])))


@dataclass(frozen=True, slots=True)
class _Spec:
    """One tensor's name, shape and the normal distribution that its values come from."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def _draw(spec: _Spec, seed: int) -> torch.Tensor:
    values = generator_of(seed, spec.name).standard_normal(spec.shape, dtype=np.float32)
    values *= np.float32(spec.std)
    values += np.float32(spec.mean)
    return torch.from_numpy(values)


def _linear(name: str, num_out: int, num_in: int, *, gain: float = 1.0) -> _Spec:
    return _Spec(name, (num_out, num_in), gain / math.sqrt(num_in))


def _norm(name: str, width: int, *, mean: float = 1.0) -> _Spec:
    return _Spec(name, (width,), _NORM_STD, mean)


def _mixtral_layer(config: Mapping[str, Any], layer: int) -> Iterator[_Spec]:
    prefix = f"model.layers.{layer}"
    hidden = positive(config, "hidden_size")
    yield from _attention(config, prefix, query_gain=_QUERY_GAIN, has_bias=False)
    num_experts, width = positive(config, "num_local_experts"), positive(config, "intermediate_size")
    _check_top_k(config, num_experts)
    yield _linear(f"{prefix}.block_sparse_moe.gate.weight", num_experts, hidden)
    for expert in range(num_experts):
        yield from _ffn(f"{prefix}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"), hidden, width)


def _qwen3_moe_layer(config: Mapping[str, Any], layer: int) -> Iterator[_Spec]:
    prefix = f"model.layers.{layer}"
    hidden, names = positive(config, "hidden_size"), ("gate_proj", "up_proj", "down_proj")
    yield from _attention(config, prefix, query_gain=1.0, has_bias=bool(config.get("attention_bias", False)))
    # The norm undoes what the projection's size is, so the queries get theirs here.
    yield _norm(f"{prefix}.self_attn.q_norm.weight", _head_dim(config), mean=_QUERY_GAIN)
    yield _norm(f"{prefix}.self_attn.k_norm.weight", _head_dim(config))
    step = positive(config, "decoder_sparse_step") if "decoder_sparse_step" in config else 1
    if layer in (config.get("mlp_only_layers") or []) or (layer + 1) % step:
        yield from _ffn(f"{prefix}.mlp", names, hidden, positive(config, "intermediate_size"))
        return
    num_experts, width = positive(config, "num_experts"), positive(config, "moe_intermediate_size")
    _check_top_k(config, num_experts)
    yield _linear(f"{prefix}.mlp.gate.weight", num_experts, hidden)
    for expert in range(num_experts):
        yield from _ffn(f"{prefix}.mlp.experts.{expert}", names, hidden, width)


_FAMILIES: Mapping[str, Callable[[Mapping[str, Any], int], Iterator[_Spec]]] = {
    "MixtralForCausalLM": _mixtral_layer,
    "Qwen3MoeForCausalLM": _qwen3_moe_layer,
}


def _head_dim(config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return positive(config, "head_dim")
    return positive(config, "hidden_size") // positive(config, "num_attention_heads")


def _check_top_k(config: Mapping[str, Any], num_experts: int) -> None:
    top_k = positive(config, "num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(f"config asks for {top_k} experts per token and has only {num_experts}")


def _attention(config: Mapping[str, Any], prefix: str, *, query_gain: float, has_bias: bool) -> Iterator[_Spec]:
    hidden, head_dim = positive(config, "hidden_size"), _head_dim(config)
    heads, kv_heads = positive(config, "num_attention_heads"), positive(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(f"config has {heads} attention heads, which {kv_heads} key-value heads do not divide")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"config has head_dim {head_dim}; rotary embedding needs an even one")
    yield _norm(f"{prefix}.input_layernorm.weight", hidden)
    yield _norm(f"{prefix}.post_attention_layernorm.weight", hidden)
    num_q, num_k = heads * head_dim, kv_heads * head_dim
    projections = (("q", num_q, hidden), ("k", num_k, hidden), ("v", num_k, hidden), ("o", hidden, num_q))
    for name, num_out, num_in in projections:
        gain = query_gain if name == "q" else 1.0
        yield _linear(f"{prefix}.self_attn.{name}_proj.weight", num_out, num_in, gain=gain)
        if has_bias:
            yield _Spec(f"{prefix}.self_attn.{name}_proj.bias", (num_out,), _BIAS_STD)


def _ffn(prefix: str, names: tuple[str, str, str], hidden: int, width: int) -> Iterator[_Spec]:
    """Gate [F, D], up [F, D] and down [D, F], under the family's own `names` in that order."""
    gate, up, down = names
    yield _linear(f"{prefix}.{gate}.weight", width, hidden)
    yield _linear(f"{prefix}.{up}.weight", width, hidden)
    yield _linear(f"{prefix}.{down}.weight", hidden, width)
