"""Mixtral: every layer routed, no norm of queries and keys.
Keys and defaults: transformers 5, models/mixtral/configuration_mixtral.py."""

from __future__ import annotations

import re
from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.decoder import (
    AUX_LOSS,
    NEUTRAL_KEYS,
    TRAINING,
    grouped_query,
    parse_decoder,
    routed,
    window_of,
)
from elasticmoe.common.families.records import Names, decoder_family
from elasticmoe.common.families.rope import RopeForm

_KEYS: Final[dict[str, Key]] = {
    **NEUTRAL_KEYS,
    "vocab_size": Key(int, 32_000),
    "hidden_size": Key(int, 4_096),
    "intermediate_size": Key(int, 14_336),
    "num_hidden_layers": Key(int, 32),
    "num_attention_heads": Key(int, 32),
    "num_key_value_heads": Key(int, 8),
    "head_dim": Key(int | None, None),
    "hidden_act": Key(str, "silu"),
    "max_position_embeddings": Key(int, 131_072),
    "rms_norm_eps": Key(float, 1e-5),
    "tie_word_embeddings": Key(bool, False),
    "sliding_window": Key(int | None, None),
    "num_experts_per_tok": Key(int, 2),
    "num_local_experts": Key(int, 8),
    "rope_parameters": Key(dict | None, None),
    "bos_token_id": NEUTRAL_KEYS["bos_token_id"]._replace(default=1),
    "eos_token_id": Key(int | list[int] | None, 2),
    "router_jitter_noise": Key(float, 0.0, TRAINING),
    "router_aux_loss_coef": AUX_LOSS,
}
_NAMES: Final = Names(
    gate="block_sparse_moe.gate.weight",
    experts="block_sparse_moe.experts",
    w1="w1.weight",
    w3="w3.weight",
    w2="w2.weight",
    all_w13="block_sparse_moe.experts.gate_up_proj",
    all_w2="block_sparse_moe.experts.down_proj",
)


def _parse(config: Config) -> dict[str, Any]:
    moe = routed(config, experts="num_local_experts", width="intermediate_size", norm_topk=True)
    head_dim = config.value("head_dim") or None  # 0, too, means that it follows from the hidden size
    attention = grouped_query(config, RopeForm(theta=1_000_000.0, dims=0), head_dim=head_dim)
    return parse_decoder(config, attention=attention, moe=moe, window=window_of(config))


MIXTRAL: Final = decoder_family(
    "mixtral",
    "MixtralForCausalLM",
    keys=_KEYS,
    spellings={"num_experts": "num_local_experts"},
    parse=_parse,
    names=_NAMES,
    renamed={".block_sparse_moe.": ".mlp."},
    expert_names=re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.w[123]\.weight"),
)
