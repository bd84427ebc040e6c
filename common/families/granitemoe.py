"""GraniteMoE: all layers routed; embeddings, scores, residuals, logits have factors; experts are stored in one tensor.
Keys and defaults: transformers 5, `GraniteMoeConfig`."""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.decoder import (
    HEAD_DIM,
    NEUTRAL_KEYS,
    TRAINING,
    grouped_query,
    parse_decoder,
    routed,
)
from elasticmoe.common.families.records import Names, decoder_family
from elasticmoe.common.families.rope import RopeForm

_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 32_000),
    "hidden_size": Key(int, 4_096),
    "intermediate_size": Key(int, 11_008),
    "num_hidden_layers": Key(int, 32),
    "num_attention_heads": Key(int, 32),
    "num_key_value_heads": Key(int | None, None),
    "hidden_act": Key(str, "silu"),
    "max_position_embeddings": Key(int, 2_048),
    "rms_norm_eps": Key(float, 1e-6),
    "bos_token_id": NEUTRAL_KEYS["bos_token_id"]._replace(default=1),
    "eos_token_id": Key(int | list[int] | None, 2),
    "tie_word_embeddings": Key(bool, False),
    "rope_parameters": Key(dict | None, None),
    "attention_bias": Key(bool, False),
    "attention_dropout": Key(float | int | None, 0.0, TRAINING),
    "embedding_multiplier": Key(float | int | None, 1.0),
    "logits_scaling": Key(float | int | None, 1.0),
    "residual_multiplier": Key(float | int | None, 1.0),
    "attention_multiplier": Key(float | int | None, 1.0),
    "num_local_experts": Key(int | None, 8),
    "num_experts_per_tok": Key(int | None, 2),
    "output_router_logits": Key(bool | None, False, TRAINING),
    "router_aux_loss_coef": Key(float | None, 0.001, TRAINING),
    "head_dim": HEAD_DIM,
}
_EXPERTS: Final = "block_sparse_moe.experts."
_NAMES: Final = Names(
    gate="block_sparse_moe.router.layer.weight",
    experts="",
    all_w13="block_sparse_moe.input_linear.weight",
    all_w2="block_sparse_moe.output_linear.weight",
)
_FACTOR_MAX: Final = 1e6


def _parse(config: Config) -> dict[str, Any]:
    def above_0(name: str) -> float:
        return config.number(name, 1 / _FACTOR_MAX, _FACTOR_MAX)

    has_bias = config.flag("attention_bias")
    attention = grouped_query(
        config,
        RopeForm(theta=10_000.0, dims=0),
        head_dim=config.value("head_dim"),
        qkv_bias=has_bias,
        out_bias=has_bias,
        scale=config.number("attention_multiplier", -_FACTOR_MAX, _FACTOR_MAX),
    )
    moe = routed(config, experts="num_local_experts", width="intermediate_size", norm_topk=True)
    return parse_decoder(config, attention=attention, moe=moe) | {
        "embedding_factor": config.number("embedding_multiplier", -_FACTOR_MAX, _FACTOR_MAX),
        "residual_factor": above_0("residual_multiplier"),
        "logits_factor": 1 / above_0("logits_scaling"),
    }


GRANITEMOE: Final = decoder_family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    keys=_KEYS,
    parse=_parse,
    names=_NAMES,
    renamed={
        "block_sparse_moe.input_linear.weight": _EXPERTS + "gate_up_proj",
        "block_sparse_moe.output_linear.weight": _EXPERTS + "down_proj",
        "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
    },
    expert_names=None,
)
