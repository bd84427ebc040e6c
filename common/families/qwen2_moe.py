"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): biases of q, k and v, a shared expert behind a gate.
Keys and defaults: transformers 5, `Qwen2MoeConfig`."""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key, refuse_value
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
from elasticmoe.common.families.records import Names, decoder_family
from elasticmoe.common.families.rope import RopeForm
from elasticmoe.common.protocol.limits import HIDDEN_MAX

_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 151_936),
    "hidden_size": Key(int, 2_048),
    "intermediate_size": Key(int, 5_632),
    "num_hidden_layers": Key(int, 24),
    "num_attention_heads": Key(int, 16),
    "num_key_value_heads": Key(int | None, 16),
    "hidden_act": Key(str, "silu"),
    "max_position_embeddings": Key(int, 32_768),
    "rms_norm_eps": Key(float, 1e-6),
    "tie_word_embeddings": Key(bool, False),
    "rope_parameters": Key(dict | None, None),
    "use_sliding_window": Key(bool, False),
    "sliding_window": Key(int | None, 4_096),
    "max_window_layers": Key(int, 28),
    "decoder_sparse_step": Key(int, 1),
    "moe_intermediate_size": Key(int, 1_408),
    "shared_expert_intermediate_size": Key(int, 5_632),
    "num_experts_per_tok": Key(int, 4),
    "num_experts": Key(int, 60),
    "norm_topk_prob": Key(bool, False),
    "router_aux_loss_coef": AUX_LOSS,
    "mlp_only_layers": Key(list[int] | None, None),
    "qkv_bias": Key(bool, True),
    "layer_types": Key(list[str] | None, None),
    "eos_token_id": Key(int | list[int] | None, None),
    "head_dim": HEAD_DIM,
}
_NAMES: Final = Names(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight")


def _window(config: Config) -> int | None:
    """The window, where a layer has it: those that `layer_types` names, or every other one of the first
    `max_window_layers`. Without `use_sliding_window` its width is 0, so that none may have it."""
    types, first = config.value("layer_types"), config.value("max_window_layers")
    if not config.flag("use_sliding_window"):
        return None
    if config.value("sliding_window") is None:
        refuse_value("sliding_window", None, ("a number with use_sliding_window",))
    slides = first > 0 if types is None else "sliding_attention" in types
    return window_of(config) if slides else None


def _parse(config: Config) -> dict[str, Any]:
    moe = routed(
        config,
        experts="num_experts",
        norm_topk=config.flag("norm_topk_prob"),
        shared_width=config.integer("shared_expert_intermediate_size", 1, HIDDEN_MAX),
        shared_gate=True,
    )
    config.integer("num_key_value_heads", 1, HIDDEN_MAX)  # the class allows null, its model does not
    attention = grouped_query(
        config,
        RopeForm(theta=10_000.0, dims=0),
        head_dim=config.value("head_dim"),
        qkv_bias=config.flag("qkv_bias"),
    )
    return parse_decoder(
        config, attention=attention, moe=moe, window=_window(config), dense_layers=sparse_steps(config)
    )


QWEN2_MOE: Final = decoder_family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    keys=_KEYS,
    parse=_parse,
    names=_NAMES,
)
