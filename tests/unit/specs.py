"""Small geometries that several tests use."""

from __future__ import annotations

from typing import Any

from elasticmoe.common.families import parse_spec
from elasticmoe.common.model_spec import ModelSpec

TINY_MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 257,
}
TINY_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def tiny_mixtral_spec(dtype: str = "float32", **changes: Any) -> ModelSpec:
    """A Mixtral of a few kilobytes."""
    return parse_spec(TINY_MIXTRAL | changes, dtype)


def tiny_qwen3_spec(dtype: str = "float32", **changes: Any) -> ModelSpec:
    """A Qwen3-MoE of a few kilobytes, with a dense layer in its midst."""
    return parse_spec(TINY_QWEN3 | changes, dtype)
