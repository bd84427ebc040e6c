"""What transformers makes of a config of each family, read as its models' code reads it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, ModelSpec
from elasticmoe.common.protocol.limits import PROMPT_TOKENS_MAX
from elasticmoe.services.worker.model.rope import inverse_frequencies

transformers = pytest.importorskip("transformers")

STEMS = {
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
    "granitemoe": "GraniteMoe",
    "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
}
CLASSES = {name: getattr(transformers, f"{stem}Config") for name, stem in STEMS.items()}
LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite"}
SIGMOID = {"deepseek_v3", "glm4_moe", "glm4_moe_lite"}
WIDTHS = {"mixtral": "intermediate_size", "olmoe": "intermediate_size", "granitemoe": "intermediate_size"}
EXPERTS = {
    **dict.fromkeys(("mixtral", "granitemoe"), "num_local_experts"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), "num_experts"),
}


def modeling(kind: str) -> Any:
    """The module of a family's model."""
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def head_dim_of(config: Any) -> Any:
    """As the models' code finds it."""
    derived = config.hidden_size // config.num_attention_heads
    return config.head_dim or derived if config.model_type == "mixtral" else getattr(config, "head_dim", derived)


def num_experts_of(config: Any) -> Any:
    """Of a layer with experts."""
    return getattr(config, EXPERTS.get(config.model_type, "n_routed_experts"))


def expert_width_of(config: Any) -> Any:
    """Of one expert."""
    return getattr(config, WIDTHS.get(config.model_type, "moe_intermediate_size"))


def dense_of(config: Any) -> tuple[int, ...]:
    """As the families' decoder layers choose."""
    layers, kind = range(config.num_hidden_layers), config.model_type
    if kind in ("qwen2_moe", "qwen3_moe"):
        only, step = config.mlp_only_layers, config.decoder_sparse_step
        return tuple(i for i in layers if i in only or (i + 1) % step != 0)
    if kind == "glm4_moe_lite":
        return tuple(i for i in layers if config.mlp_layer_types[i] != "sparse")
    return tuple(i for i in layers if i < getattr(config, "first_k_dense_replace", 0))


def window_of(config: Any) -> int:
    """The shortest window of any layer; 0: there is none."""
    if config.model_type == "qwen2_moe" and "sliding_attention" not in config.layer_types:
        return 0
    return getattr(config, "sliding_window", None) or 0


def _scale_of(config: Any) -> float:
    kind = config.model_type
    if kind in LATENT:
        plain = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
        return modeling(kind).yarn_apply_mscale(config.rope_parameters, plain)
    return config.attention_multiplier if kind == "granitemoe" else head_dim_of(config) ** -0.5


def _attention_of(config: Any) -> dict[str, Any]:
    kind, has_bias = config.model_type, bool(getattr(config, "attention_bias", False))
    wanted = {"num_heads": config.num_attention_heads, "scale": pytest.approx(_scale_of(config), rel=1e-14)}
    if kind in LATENT:
        return wanted | {
            "q_rank": config.q_lora_rank or 0,
            "kv_rank": config.kv_lora_rank,
            "nope_dim": config.qk_nope_head_dim,
            "v_dim": config.v_head_dim,
            "norm_eps": 1e-6,
            "bias": has_bias,
        }
    norms = {"qwen3_moe": "head", "olmoe": "token"}
    return wanted | {
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim_of(config),
        "qk_norm": "head" if getattr(config, "use_qk_norm", False) else norms.get(kind, "none"),
        "qkv_bias": config.qkv_bias if kind == "qwen2_moe" else has_bias and kind != "mixtral",
        "out_bias": has_bias and kind in ("qwen3_moe", "olmoe", "granitemoe"),
        "clip": getattr(config, "clip_qkv", None) or 0.0,
    }


def _moe_of(config: Any) -> dict[str, Any]:
    kind, width = config.model_type, expert_width_of(config)
    always = {"mixtral": True, "granitemoe": True, "deepseek_v2": False}
    is_grouped = kind in SIGMOID or getattr(config, "topk_method", "") == "group_limited_greedy"
    shared = getattr(config, "n_shared_experts", 0) * width
    return {
        "num_experts": num_experts_of(config),
        "top_k": config.num_experts_per_tok,
        "expert_width": width,
        "norm_topk": always[kind] if kind in always else bool(config.norm_topk_prob),
        "scoring": "sigmoid" if kind in SIGMOID else "softmax",
        "has_bias": kind in SIGMOID,
        "num_groups": config.n_group if is_grouped else 1,
        "top_groups": config.topk_group if is_grouped else 1,
        "scaling": getattr(config, "routed_scaling_factor", 1.0),
        "shared_width": config.shared_expert_intermediate_size if kind == "qwen2_moe" else shared,
        "shared_gate": kind == "qwen2_moe",
    }


def _fields(spec: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in wanted}


def assert_rope(spec: AttentionSpec | LatentAttentionSpec, config: Any) -> None:
    """The frequencies, bit by bit, and the factor of cosines and sines that transformers' rotary embedding has."""
    if getattr(config, "head_dim", 0) is None:  # of Mixtral; some rotary types cannot do with null
        config.head_dim = head_dim_of(config)
    rotary = getattr(modeling(config.model_type), f"{STEMS[config.model_type]}RotaryEmbedding")(config)
    assert torch.equal(inverse_frequencies(spec.rope), rotary.inv_freq), spec.rope
    assert spec.rope.amplitude == pytest.approx(rotary.attention_scaling, rel=1e-14)
    is_v2 = config.model_type == "deepseek_v2"
    assert spec.rope.interleaved == (is_v2 or bool(getattr(config, "rope_interleave", False)))


def assert_equal(spec: ModelSpec, config: Any) -> None:
    """Every number of the spec is what transformers' config has, after its own defaulting."""
    kind, window, dense = config.model_type, window_of(config), dense_of(config)
    positions = min(config.max_position_embeddings, PROMPT_TOKENS_MAX)
    wanted: dict[str, Any] = {
        "family": kind,
        "num_layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "max_positions": min(positions, window or positions),
        "sliding_window": window,
        "norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        "dense_layers": dense,
        "dense_width": config.intermediate_size if dense else 0,
        "embedding_factor": getattr(config, "embedding_multiplier", 1.0),
        "residual_factor": getattr(config, "residual_multiplier", 1.0),
        "logits_factor": pytest.approx(1 / getattr(config, "logits_scaling", 1.0), rel=1e-14),
    }
    assert _fields(spec, wanted) == wanted
    attention, moe = _attention_of(config), _moe_of(config)
    assert _fields(spec.attention, attention) == attention
    assert set(attention) | {"rope"} == set(spec.attention.__struct_fields__)
    assert _fields(spec.moe, moe) == moe
    assert set(moe) == set(spec.moe.__struct_fields__)
    assert config.hidden_act in ("silu", "swish")
    assert_rope(spec.attention, config)
