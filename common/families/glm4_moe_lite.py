"""GLM-4.7-Flash: DeepSeek-V3's latent attention and router; which layers are dense is a list.
Keys and defaults: transformers 5, `Glm4MoeLiteConfig`."""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.decoder import (
    NEUTRAL_KEYS,
    TRAINING,
    latent,
    num_layers_of,
    parse_decoder,
    sigmoid_routed,
)
from elasticmoe.common.families.records import decoder_family
from elasticmoe.common.families.rope import RopeForm
from elasticmoe.common.protocol.errors import CheckpointError

_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 154_880),
    "hidden_size": Key(int, 2_048),
    "intermediate_size": Key(int, 10_240),
    "moe_intermediate_size": Key(int, 1_536),
    "num_hidden_layers": Key(int, 47),
    "num_attention_heads": Key(int, 20),
    "num_key_value_heads": Key(int, 20),
    "n_shared_experts": Key(int, 1),
    "n_routed_experts": Key(int, 64),
    "routed_scaling_factor": Key(float, 1.8),
    "kv_lora_rank": Key(int, 512),
    "q_lora_rank": Key(int | None, 768),
    "qk_rope_head_dim": Key(int, 64),
    "v_head_dim": Key(int, 256),
    "qk_nope_head_dim": Key(int, 192),
    "n_group": Key(int, 1),
    "topk_group": Key(int, 1),
    "num_experts_per_tok": Key(int, 4),
    "norm_topk_prob": Key(bool, True),
    "hidden_act": Key(str, "silu"),
    "max_position_embeddings": Key(int, 202_752),
    "rms_norm_eps": Key(float, 1e-5),
    "bos_token_id": NEUTRAL_KEYS["bos_token_id"]._replace(default=0),
    "eos_token_id": Key(int | list[int] | None, 1),
    "pretraining_tp": Key(int, 1, TRAINING),
    "tie_word_embeddings": Key(bool, False),
    "rope_parameters": Key(dict | None, None),
    "rope_interleave": Key(bool, True),
    "mlp_layer_types": Key(list[str] | None, None),
    "attention_bias": Key(bool, False),
    # Of published configs: how DeepSeek says which layers are dense. transformers reads the list alone.
    "first_k_dense_replace": Key(int | None, None),
    "qk_head_dim": Key(int, None, "the sum of its two parts"),  # an attribute, which transformers writes
}


def _dense_layers(config: Config) -> tuple[int, ...]:
    """By `mlp_layer_types`; without it the first layer is dense."""
    layers, types = num_layers_of(config), config.value("mlp_layer_types")
    if types is None:
        types = ["dense"] + ["sparse"] * (layers - 1)
    if len(types) != layers or not set(types) <= {"dense", "sparse"}:
        raise CheckpointError(f"config.json: mlp_layer_types must be {layers} times dense or sparse, is {types!r:.80}")
    dense = tuple(layer for layer, kind in enumerate(types) if kind == "dense")
    leading = config.value("first_k_dense_replace")
    if leading is not None and dense != tuple(range(leading)):
        raise CheckpointError(
            f"config.json: first_k_dense_replace is {leading}, but by mlp_layer_types the dense layers are {dense}"
        )
    return dense


def _parse(config: Config) -> dict[str, Any]:
    form = RopeForm(theta=10_000.0, dims=0, interleaved=config.flag("rope_interleave"), has_mscale=True)
    return parse_decoder(
        config, attention=latent(config, form), moe=sigmoid_routed(config), dense_layers=_dense_layers(config)
    )


GLM4_MOE_LITE: Final = decoder_family(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    keys=_KEYS,
    spellings={"num_local_experts": "n_routed_experts", "head_dim": "qk_rope_head_dim"},
    parse=_parse,
)
