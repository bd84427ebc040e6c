"""OLMoE: all layers routed, one norm over all queries and one over all keys of a token, values may be cut.
Keys and defaults: transformers 5, `OlmoeConfig`."""

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
)
from elasticmoe.common.families.records import decoder_family
from elasticmoe.common.families.rope import RopeForm
from elasticmoe.common.protocol.errors import CheckpointError

_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 50_304),
    "hidden_size": Key(int, 2_048),
    "intermediate_size": Key(int, 2_048),
    "num_hidden_layers": Key(int, 16),
    "num_attention_heads": Key(int, 16),
    "num_key_value_heads": Key(int | None, None),
    "hidden_act": Key(str, "silu"),
    "max_position_embeddings": Key(int, 4_096),
    "rms_norm_eps": Key(float, 1e-5),
    "pad_token_id": NEUTRAL_KEYS["pad_token_id"]._replace(default=1),
    "eos_token_id": Key(int | list[int] | None, 50_279),
    "tie_word_embeddings": Key(bool, False),
    "rope_parameters": Key(dict | None, None),
    "attention_bias": Key(bool, False),
    "clip_qkv": Key(float | None, None),
    "num_experts_per_tok": Key(int, 8),
    "num_experts": Key(int, 64),
    "router_aux_loss_coef": AUX_LOSS._replace(default=0.01),
    "norm_topk_prob": Key(bool, False),
    "head_dim": HEAD_DIM,
}
_CLIP_MIN: Final = 1e-6


def _parse(config: Config) -> dict[str, Any]:
    moe = routed(config, experts="num_experts", width="intermediate_size", norm_topk=config.flag("norm_topk_prob"))
    has_bias = config.flag("attention_bias")
    attention = grouped_query(
        config,
        RopeForm(theta=10_000.0, dims=0),
        head_dim=config.value("head_dim"),
        qk_norm="token",
        qkv_bias=has_bias,
        out_bias=has_bias,
        clip=0.0 if config.value("clip_qkv") is None else config.number("clip_qkv", _CLIP_MIN, 1e9),
    )
    if attention.query_width != (hidden := config.value("hidden_size")):
        raise CheckpointError(
            f"config.json: {attention.num_heads} heads of {attention.head_dim} elements are {attention.query_width}; "
            f"the norm of the queries is over the hidden size, {hidden}"
        )
    return parse_decoder(config, attention=attention, moe=moe)


OLMOE: Final = decoder_family(
    "olmoe",
    "OlmoeForCausalLM",
    keys=_KEYS,
    spellings={"num_local_experts": "num_experts"},
    parse=_parse,
)
