"""Qwen3-MoE: some layers may be dense, queries and keys are normed per head.
Keys and defaults: transformers 5, models/qwen3_moe/configuration_qwen3_moe.py."""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.decoder import (
    AUX_LOSS,
    HEAD_DIM,
    NEUTRAL_KEYS,
    grouped_query,
    parse_decoder,
    routed,
    sparse_steps,
    window_of,
)
from elasticmoe.common.families.records import decoder_family
from elasticmoe.common.families.rope import RopeForm

_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 151_936),
    "hidden_size": Key(int, 2_048),
    "intermediate_size": Key(int, 6_144),
    "num_hidden_layers": Key(int, 24),
    "num_attention_heads": Key(int, 32),
    "num_key_value_heads": Key(int, 4),
    "hidden_act": Key(str, "silu"),
    "max_position_embeddings": Key(int, 32_768),
    "rms_norm_eps": Key(float, 1e-6),
    "tie_word_embeddings": Key(bool, False),
    "rope_parameters": Key(dict | None, None),
    "attention_bias": Key(bool, False),
    "use_sliding_window": Key(bool, False),
    "sliding_window": Key(int | None, 4_096),
    "decoder_sparse_step": Key(int, 1),
    "moe_intermediate_size": Key(int, 768),
    "num_experts_per_tok": Key(int, 8),
    "num_experts": Key(int, 128),
    "norm_topk_prob": Key(bool, False),
    "mlp_only_layers": Key(list[int] | None, None),
    "eos_token_id": Key(int | list[int] | None, None),
    "router_aux_loss_coef": AUX_LOSS,
    "head_dim": HEAD_DIM,
}


def _parse(config: Config) -> dict[str, Any]:
    has_bias = config.flag("attention_bias")
    attention = grouped_query(
        config,
        RopeForm(theta=10_000.0, dims=0),
        head_dim=config.value("head_dim"),
        qk_norm="head",
        qkv_bias=has_bias,
        out_bias=has_bias,
    )
    moe = routed(config, experts="num_experts", norm_topk=config.flag("norm_topk_prob"))
    window = window_of(config) if config.flag("use_sliding_window") else None
    return parse_decoder(config, attention=attention, moe=moe, window=window, dense_layers=sparse_steps(config))


QWEN3_MOE: Final = decoder_family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    keys=_KEYS,
    spellings={"num_local_experts": "num_experts"},
    parse=_parse,
)
