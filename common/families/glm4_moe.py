"""GLM-4.5 and 4.6: grouped-query attention, half of each head rotates, DeepSeek-V3's router and shared expert.
Keys and defaults: transformers 5, `Glm4MoeConfig`."""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.decoder import (
    HEAD_DIM,
    NEUTRAL_KEYS,
    PREDICTORS,
    grouped_query,
    leading_dense,
    parse_decoder,
    sigmoid_routed,
)
from elasticmoe.common.families.records import decoder_family
from elasticmoe.common.families.rope import RopeForm

_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 151_552),
    "hidden_size": Key(int, 4_096),
    "intermediate_size": Key(int, 10_944),
    "num_hidden_layers": Key(int, 46),
    "num_attention_heads": Key(int, 96),
    "num_key_value_heads": Key(int, 8),
    "hidden_act": Key(str, "silu"),
    "max_position_embeddings": Key(int, 131_072),
    "rms_norm_eps": Key(float, 1e-5),
    "tie_word_embeddings": Key(bool, False),
    "rope_parameters": Key(dict | None, None),
    "attention_bias": Key(bool, False),
    "moe_intermediate_size": Key(int, 1_408),
    "num_experts_per_tok": Key(int, 8),
    "n_shared_experts": Key(int, 1),
    "n_routed_experts": Key(int, 128),
    "routed_scaling_factor": Key(float, 1.0),
    "n_group": Key(int, 1),
    "topk_group": Key(int, 1),
    "first_k_dense_replace": Key(int, 1),
    "norm_topk_prob": Key(bool, True),
    "use_qk_norm": Key(bool, False),
    "eos_token_id": Key(int | list[int] | None, None),
    "num_mtp_layers": Key(int, 1, PREDICTORS),
    "head_dim": HEAD_DIM,
}


def _parse(config: Config) -> dict[str, Any]:
    attention = grouped_query(
        config,
        RopeForm(theta=10_000.0, dims=0, share=0.5),
        head_dim=config.value("head_dim"),
        qk_norm="head" if config.flag("use_qk_norm") else "none",
        qkv_bias=config.flag("attention_bias"),  # of q, k and v alone
    )
    return parse_decoder(config, attention=attention, moe=sigmoid_routed(config), dense_layers=leading_dense(config))


GLM4_MOE: Final = decoder_family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    keys=_KEYS,
    spellings={"num_local_experts": "n_routed_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    parse=_parse,
)
