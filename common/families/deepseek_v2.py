"""DeepSeek-V2: latent attention, softmax router, shared experts; the first layers are dense.
Keys and defaults: transformers 5, `DeepseekV2Config`."""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.decoder import (
    NEUTRAL_KEYS,
    TRAINING,
    latent,
    leading_dense,
    parse_decoder,
    routed,
    shared_width_of,
)
from elasticmoe.common.families.records import decoder_family
from elasticmoe.common.families.rope import RopeForm
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import EXPERTS_MAX

_OVERWRITTEN: Final = "the class sets it from the rotating elements"
_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 102_400),
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
    "pretraining_tp": Key(int | None, 1, TRAINING),
    "tie_word_embeddings": Key(bool, False),
    "rope_parameters": Key(dict | None, None),
    "attention_bias": Key(bool, False),
    "attention_dropout": Key(float | None, 0.0, TRAINING),
    "mlp_bias": Key(bool, False),
    "head_dim": Key(int | None, None, _OVERWRITTEN),
    "qk_head_dim": Key(int, None, _OVERWRITTEN),  # an attribute, which transformers writes
    "first_k_dense_replace": Key(int, 0),
    "kv_lora_rank": Key(int, 512),
    "q_lora_rank": Key(int | None, 1_536),
    "n_group": Key(int | None, None),
    "n_routed_experts": Key(int, 64),
    "n_shared_experts": Key(int, 2),
    "qk_nope_head_dim": Key(int, 128),
    "qk_rope_head_dim": Key(int, 64),
    "routed_scaling_factor": Key(float, 1.0),
    "topk_group": Key(int | None, None),
    "topk_method": Key(str | None, "greedy"),
    "norm_topk_prob": Key(bool | None, False),
    "v_head_dim": Key(int, 128),
    "num_experts_per_tok": Key(int | None, None),
    "moe_intermediate_size": Key(int, 1_407),
}


def _parse(config: Config) -> dict[str, Any]:
    """Of groups, those that are not chosen have scores of 0 in transformers; here they are out. The two differ only
    where fewer than k scores of the chosen groups are above 0."""
    config.must_be("mlp_bias", False)
    config.must_be("norm_topk_prob", False, None)  # transformers never divides the weights by their sum
    config.must_be("topk_method", "greedy", "group_limited_greedy")
    groups: dict[str, Any] = {}
    if config.value("topk_method") == "group_limited_greedy":
        groups = {"num_groups": config.integer("n_group", 1, EXPERTS_MAX)}
        groups["top_groups"] = config.integer("topk_group", 1, EXPERTS_MAX)
    moe = routed(
        config,
        experts="n_routed_experts",
        norm_topk=False,
        scaling=config.number("routed_scaling_factor", -1e6, 1e6),
        shared_width=shared_width_of(config),
        **groups,
    )
    attention = latent(config, RopeForm(theta=10_000.0, dims=0, interleaved=True, has_mscale=True))
    if (hidden := config.value("hidden_size")) % attention.num_heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is no multiple of {attention.num_heads} heads")
    return parse_decoder(config, attention=attention, moe=moe, dense_layers=leading_dense(config))


DEEPSEEK_V2: Final = decoder_family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    keys=_KEYS,
    spellings={"num_experts": "n_routed_experts"},
    parse=_parse,
)
