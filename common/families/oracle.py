"""The oracle model: exact integer arithmetic over what is really in memory (docs/oracle.md). transformers does not know
it: there are no defaults but those that its documentation gives."""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.family import Family
from elasticmoe.common.model_spec import (
    AttentionSpec,
    LatentAttentionSpec,
    ModelSpec,
    MoeSpec,
    RecordBuilder,
    RecordKey,
    RecordSpec,
    RopeSpec,
    Source,
)
from elasticmoe.common.protocol.limits import EXPERTS_MAX, LAYERS_MAX, PROMPT_TOKENS_MAX, TOP_K_EXPERTS_MAX, VOCAB_MAX

_SHAPED_LIKE_A_DECODER: Final = "there so that the config looks like a decoder's"
_KEYS: Final[dict[str, Key]] = {
    "hidden_size": Key(int),
    "num_local_experts": Key(int),
    "num_experts_per_tok": Key(int),
    "num_hidden_layers": Key(int),
    "vocab_size": Key(int),
    "max_position_embeddings": Key(int, 4_096),
    "head_dim": Key(int),
    "oracle_modulus": Key(int),
    "oracle_kv_planes": Key(int, 2),
    "oracle_step_us": Key(int, 0),
    "oracle_token_us": Key(int, 0),
    "oracle_sequence_us": Key(int, 0),
    "oracle_kv_ns": Key(int, 0),
    "oracle_row_us": Key(int, 0),
    "eos_token_id": Key(int | list[int] | None, None),
    "bos_token_id": Key(int | None, None, "the tokenizer's files say which tokens are special"),
    "num_attention_heads": Key(int, 1, _SHAPED_LIKE_A_DECODER),
    "num_key_value_heads": Key(int, 1, _SHAPED_LIKE_A_DECODER),
    "intermediate_size": Key(int, 4, _SHAPED_LIKE_A_DECODER),
    "tie_word_embeddings": Key(bool, False, _SHAPED_LIKE_A_DECODER),
}

# What a step takes at the least, in place of an accelerator's time (docs/oracle.md). A full step stays within seconds.
_PACE_MAX: Final[dict[str, int]] = {
    "step_us": 1_000_000,
    "token_us": 1_000,
    "sequence_us": 10_000,
    "kv_ns": 100_000,
    "row_us": 1_000,
}


def _parse(config: Config) -> dict[str, Any]:
    hidden = config.integer("hidden_size", 1, 4_096)
    dim = config.integer("head_dim", 1, 1_024)
    experts = config.integer("num_local_experts", 1, EXPERTS_MAX)
    moe = MoeSpec(
        num_experts=experts,
        top_k=config.integer("num_experts_per_tok", 1, min(experts, TOP_K_EXPERTS_MAX)),
        expert_width=1,
        norm_topk=False,
    )
    return {
        "num_layers": config.integer("num_hidden_layers", 1, LAYERS_MAX),
        "hidden": hidden,
        "vocab": config.integer("vocab_size", 1, VOCAB_MAX),
        "max_positions": config.integer("max_position_embeddings", 2, PROMPT_TOKENS_MAX),
        "norm_eps": 0.0,
        "tie_embeddings": True,
        "attention": _attention(dim, config.integer("oracle_kv_planes", 1, 2)),
        "moe": moe,
        "constants": (
            ("modulus", config.integer("oracle_modulus", 257, 65_521)),
            *((name, config.integer(f"oracle_{name}", 0, most)) for name, most in _PACE_MAX.items()),
        ),
    }


def _attention(dim: int, planes: int) -> AttentionSpec | LatentAttentionSpec:
    """What the cache looks like is what counts: 2 x `dim` numbers, as keys and values or side by side as a latent and a
    shared key. Each of the `dim` numbers that are read from it stands for a head: ranks of a replica share them."""
    rope = RopeSpec(10_000.0, dim)
    if planes == 2:
        return AttentionSpec(dim, 1, dim, rope, scale=1.0)
    return LatentAttentionSpec(dim, q_rank=0, kv_rank=dim, nope_dim=dim, v_dim=dim, rope=rope, scale=1.0)


def _base(spec: ModelSpec, index: int) -> RecordSpec:
    builder = RecordBuilder(RecordKey("base", shard=index))
    builder.add("embed", "float32", Source("model.embed.weight", (spec.vocab, spec.hidden)))
    builder.add("head", "float32", Source("model.head.salt", (spec.hidden,)))
    return builder.build()


def _layer(spec: ModelSpec, layer: int, index: int) -> RecordSpec:
    salt = Source(f"model.layers.{layer}.attn.salt", (spec.hidden,))
    return RecordBuilder(RecordKey("layer", layer, shard=index)).add("salt", "float32", salt).build()


def _expert(spec: ModelSpec, layer: int, expert: int) -> RecordSpec:
    at = f"model.layers.{layer}.experts.{expert}."
    builder = RecordBuilder(RecordKey("expert", layer, expert))
    for name in ("mul", "add"):
        builder.add(name, "float32", Source(at + name, (spec.hidden,)))
    return builder.build()


ORACLE: Final = Family(
    name="oracle",
    model_type="oracle_moe",
    architecture="OracleMoeForCausalLM",
    keys=_KEYS,
    spellings={},
    parse=_parse,
    expert=_expert,
    layer=_layer,
    base=_base,
    dtype="float32",  # which alone holds its whole numbers exactly
)
