"""The records of a decoder: which tensors lie in them, and what those are called in checkpoints.

Norms, biases and the router's gate are kept in float32: they are small, and the router's choice is sensitive. Of a
replica of several ranks each has its shard of base and layers (sharding.py), and experts whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.family import Family
from elasticmoe.common.model_spec import (
    AttentionSpec,
    LatentAttentionSpec,
    ModelSpec,
    RecordBuilder,
    RecordKey,
    RecordSpec,
    Source,
)
from elasticmoe.common.sharding import Shard, shard_of

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
# Layer and expert of one expert's tensor, by the names that most families have (see Names).
EXPERT_NAMES: Final = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight")


class Names(NamedTuple):
    """Where families' checkpoints differ, below a layer's prefix: the router's weights and the bias of its choice; the
    experts (empty: they are stored in one tensor only), an expert's three matrices, and all experts' in one; the shared
    experts and the gate of their output."""

    gate: str = "mlp.gate.weight"
    gate_bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts"
    w1: str = "gate_proj.weight"
    w3: str = "up_proj.weight"
    w2: str = "down_proj.weight"
    all_w13: str = "mlp.experts.gate_up_proj"
    all_w2: str = "mlp.experts.down_proj"
    shared: str = "mlp.shared_experts"
    shared_gate: str = ""


MOST_NAMES: Final = Names()  # of the families that have nothing of their own


def decoder_family(
    name: str,
    architecture: str,
    *,
    keys: Mapping[str, Key],
    parse: Callable[[Config], dict[str, Any]],
    spellings: Mapping[str, str] | None = None,
    names: Names = Names(),
    renamed: Mapping[str, str] | None = None,
    expert_names: re.Pattern[str] | None = EXPERT_NAMES,
) -> Family:
    """The family of a decoder, called `name` here and as its model_type, whose tensors are called as `names` says; the
    rest is as of Family."""
    return Family(
        name=name,
        model_type=name,
        architecture=architecture,
        keys=keys,
        spellings=spellings or {},
        parse=parse,
        expert=decoder_expert(names),
        layer=decoder_layer(names),
        base=decoder_base,
        renamed=renamed or {},
        expert_names=expert_names,
        embedding=EMBEDDING,
        head=HEAD,
    )


def decoder_base(spec: ModelSpec, index: int) -> RecordSpec:
    """Embedding, final norm and, where it is not the embedding, the head, as the rank of tp index `index` has them. Of
    a tied pair either may be stored."""
    shard = shard_of(spec, index)
    embedding, head = (shard.rows(Source(name, (spec.vocab, spec.hidden))) for name in (EMBEDDING, HEAD))
    builder = RecordBuilder(RecordKey("base", shard=index))
    builder.add("embed", spec.dtype, embedding, alternatives=((head,),) if spec.tie_embeddings else ())
    builder.add("final_norm", "float32", Source("model.norm.weight", (spec.hidden,)))
    if not spec.tie_embeddings:
        builder.add("head", spec.dtype, head)
    return builder.build()


def decoder_layer(names: Names) -> Callable[[ModelSpec, int, int], RecordSpec]:
    """The builder of a layer's record, as the rank of a tp index has it."""

    def build(spec: ModelSpec, layer: int, index: int) -> RecordSpec:
        at, hidden, shard = f"model.layers.{layer}.", spec.hidden, shard_of(spec, index)
        builder = RecordBuilder(RecordKey("layer", layer, shard=index))
        builder.add("input_norm", "float32", Source(at + "input_layernorm.weight", (hidden,)))
        if isinstance(spec.attention, LatentAttentionSpec):
            _add_latent(builder, spec, spec.attention, at + "self_attn.", shard)
        else:
            _add_grouped(builder, spec, spec.attention, at + "self_attn.", shard)
        builder.add("post_norm", "float32", Source(at + "post_attention_layernorm.weight", (hidden,)))
        if layer in spec.dense_layers:
            _add_feed_forward(builder, spec, "", at + "mlp", spec.dense_width, shard)
        else:
            _add_router(builder, spec, names, at, shard)
        return builder.build()

    return build


def decoder_expert(names: Names) -> Callable[[ModelSpec, int, int], RecordSpec]:
    """The builder of an expert's record. Its matrices are stored each for itself, or all experts' of a layer in one
    tensor, gate over up, as transformers 5 holds them and writes them with `save_original_format=False`."""

    def build(spec: ModelSpec, layer: int, expert: int) -> RecordSpec:
        at = f"model.layers.{layer}."
        hidden, width, experts = spec.hidden, spec.moe.expert_width, spec.moe.num_experts
        gate_up = Source(at + names.all_w13, (2 * width, hidden), expert, experts)
        all_down = Source(at + names.all_w2, (hidden, width), expert, experts)
        builder = RecordBuilder(RecordKey("expert", layer, expert))
        if not names.experts:
            return builder.add("w13", spec.dtype, gate_up).add("w2", spec.dtype, all_down).build()
        one = f"{at}{names.experts}.{expert}."
        gate, up = (Source(one + name, (width, hidden)) for name in (names.w1, names.w3))
        down = Source(one + names.w2, (hidden, width))
        builder.add("w13", spec.dtype, gate, up, alternatives=((gate_up,),))
        builder.add("w2", spec.dtype, down, alternatives=((all_down,),))
        return builder.build()

    return build


def _add_grouped(builder: RecordBuilder, spec: ModelSpec, attention: AttentionSpec, at: str, shard: Shard) -> None:
    hidden, dim = spec.hidden, attention.head_dim
    kv_shard = shard.of_kv_heads(attention.num_kv_heads)
    widths = {"q": attention.query_width, **dict.fromkeys("kv", attention.num_kv_heads * dim)}
    shards = {"q": shard, **dict.fromkeys("kv", kv_shard)}

    def taken(end: str, *inner: int) -> list[Source]:
        sources = {name: Source(f"{at}{name}_proj.{end}", (width, *inner)) for name, width in widths.items()}
        return [shards[name].rows(source, dim) for name, source in sources.items()]

    builder.add("qkv", spec.dtype, *taken("weight", hidden))
    if attention.qkv_bias:
        builder.add("qkv_bias", "float32", *taken("bias"))
    for name in "qk" if attention.qk_norm != "none" else "":
        norm = Source(f"{at}{name}_norm.weight", (dim if attention.qk_norm == "head" else widths[name],))
        builder.add(f"{name}_norm", "float32", norm if attention.qk_norm == "head" else shards[name].rows(norm, dim))
    _add_out(builder, spec, at, dim, attention.num_heads, shard, has_bias=attention.out_bias)


def _add_latent(builder: RecordBuilder, spec: ModelSpec, attention: LatentAttentionSpec, at: str, shard: Shard) -> None:
    """kv_b stays as it is stored, a head's rows for keys before those for values: nothing is computed while reading.
    What leads to the ranks of queries and latents is everybody's, as all heads read these."""
    hidden, query, rank = spec.hidden, attention.query_width, attention.kv_rank

    def add_lora(name: str, stem: str, width: int) -> None:
        builder.add(name, spec.dtype, Source(f"{at}{stem}.weight", (width, hidden)))
        if attention.bias:
            builder.add(f"{name}_bias", "float32", Source(f"{at}{stem}.bias", (width,)))

    if attention.q_rank:
        add_lora("q_a", "q_a_proj", attention.q_rank)
        builder.add("q_a_norm", "float32", Source(at + "q_a_layernorm.weight", (attention.q_rank,)))
    q = ("q_b_proj", attention.q_rank) if attention.q_rank else ("q_proj", hidden)
    per_query = query // attention.num_heads
    builder.add("q", spec.dtype, shard.rows(Source(f"{at}{q[0]}.weight", (query, q[1])), per_query))
    add_lora("kv_a", "kv_a_proj_with_mqa", attention.kv.width)
    builder.add("kv_a_norm", "float32", Source(at + "kv_a_layernorm.weight", (rank,)))
    per_head = attention.nope_dim + attention.v_dim
    kv_b = Source(at + "kv_b_proj.weight", (attention.num_heads * per_head, rank))
    builder.add("kv_b", spec.dtype, shard.rows(kv_b, per_head))
    _add_out(builder, spec, at, attention.v_dim, attention.num_heads, shard, has_bias=attention.bias)


def _add_out(
    builder: RecordBuilder, spec: ModelSpec, at: str, dim: int, num_heads: int, shard: Shard, *, has_bias: bool
) -> None:
    """The columns of the rank's heads. Their products are added up over the ranks, so that the bias is one rank's."""
    out = Source(at + "o_proj.weight", (spec.hidden, num_heads * dim))
    builder.add("out", spec.dtype, shard.columns(out, dim))
    if has_bias and shard.index == 0:
        builder.add("out_bias", "float32", Source(at + "o_proj.bias", (spec.hidden,)))


def _add_router(builder: RecordBuilder, spec: ModelSpec, names: Names, at: str, shard: Shard) -> None:
    moe, hidden = spec.moe, spec.hidden
    builder.add("gate", "float32", Source(at + names.gate, (moe.num_experts, hidden)))
    if moe.has_bias:
        builder.add("gate_bias", "float32", Source(at + names.gate_bias, (moe.num_experts,)))
    if moe.shared_width:
        _add_feed_forward(builder, spec, "shared_", at + names.shared, moe.shared_width, shard)
    if moe.shared_gate:
        builder.add("shared_gate", "float32", Source(at + names.shared_gate, (1, hidden)))


def _add_feed_forward(builder: RecordBuilder, spec: ModelSpec, prefix: str, at: str, width: int, shard: Shard) -> None:
    """An ordinary feed-forward, whose matrices are called the same in all families."""
    gate, up = (Source(f"{at}.{name}_proj.weight", (width, spec.hidden)) for name in ("gate", "up"))
    builder.add(prefix + "w13", spec.dtype, shard.rows(gate), shard.rows(up))
    down = Source(f"{at}.down_proj.weight", (spec.hidden, width))
    builder.add(prefix + "w2", spec.dtype, shard.columns(down))
