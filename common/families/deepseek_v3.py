"""DeepSeek-V3 and R1: latent attention, sigmoid router with a bias for the choice and groups, a shared expert.
Keys and defaults: transformers 5, `DeepseekV3Config`."""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.decoder import (
    NEUTRAL_KEYS,
    PREDICTORS,
    TRAINING,
    latent,
    leading_dense,
    parse_decoder,
    sigmoid_routed,
)
from elasticmoe.common.families.records import decoder_family
from elasticmoe.common.families.rope import RopeForm

_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 129_280),
    "hidden_size": Key(int, 7_168),
    "intermediate_size": Key(int, 18_432),
    "moe_intermediate_size": Key(int, 2_048),
    "num_hidden_layers": Key(int, 61),
    "num_attention_heads": Key(int, 128),
    "num_key_value_heads": Key(int | None, 128),
    "n_shared_experts": Key(int, 1),
    "n_routed_experts": Key(int, 256),
    "routed_scaling_factor": Key(float, 2.5),
    "kv_lora_rank": Key(int, 512),
    "q_lora_rank": Key(int | None, 1_536),
    "qk_rope_head_dim": Key(int, 64),
    "v_head_dim": Key(int | None, 128),
    "qk_nope_head_dim": Key(int, 128),
    "n_group": Key(int | None, 8),
    "topk_group": Key(int | None, 4),
    "num_experts_per_tok": Key(int | None, 8),
    "first_k_dense_replace": Key(int | None, 3),
    "norm_topk_prob": Key(bool | None, True),
    "hidden_act": Key(str, "silu"),
    "max_position_embeddings": Key(int, 4_096),
    "rms_norm_eps": Key(float, 1e-6),
    "bos_token_id": NEUTRAL_KEYS["bos_token_id"]._replace(default=0),
    "eos_token_id": Key(int | list[int] | None, 1),
    "pretraining_tp": Key(int | None, 1, TRAINING),
    "tie_word_embeddings": Key(bool, False),
    "rope_parameters": Key(dict | None, None),
    "rope_interleave": Key(bool | None, True),
    "attention_bias": Key(bool, False),
    "attention_dropout": Key(float | int | None, 0.0, TRAINING),
    "num_mtp_layers": Key(int, 1, PREDICTORS),
    # Attributes, which transformers writes. The rotary embedding takes the first from config.json.
    "head_dim": Key(int, None),
    "qk_head_dim": Key(int, None, "the sum of its two parts"),
}


def _parse(config: Config) -> dict[str, Any]:
    config.must_be("head_dim", None, config.value("qk_rope_head_dim"))
    form = RopeForm(theta=10_000.0, dims=0, interleaved=config.flag("rope_interleave"), has_mscale=True)
    return parse_decoder(
        config, attention=latent(config, form), moe=sigmoid_routed(config), dense_layers=leading_dense(config)
    )


DEEPSEEK_V3: Final = decoder_family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    keys=_KEYS,
    spellings={"num_local_experts": "n_routed_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    parse=_parse,
)
