"""Model families: from a checkpoint's config.json to a ModelSpec, and from a ModelSpec to its records.

A family is two functions: `parse` (strict: every number is bounded) and `records` (checkpoint names and shapes of each
stored tensor). To add one, write both and enter it in FAMILIES by its `architectures` name. The compute side of a
family lives in `services/worker/model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from common.checkpoint_files import read_json
from common.model_spec import (
    AttentionSpec,
    Dtype,
    ModelSpec,
    MoeSpec,
    RecordBuilder,
    RecordKey,
    RecordSpec,
    RopeSpec,
    Source,
)
from common.protocol.errors import CheckpointError
from common.protocol.limits import (
    CONFIG_JSON_BYTES_MAX,
    EXPERTS_MAX,
    HIDDEN_MAX,
    LAYERS_MAX,
    PROMPT_TOKENS_MAX,
    TOP_K_EXPERTS_MAX,
    VOCAB_MAX,
)


class Family(NamedTuple):
    """One model family. `expert`, `layer` and `base` build the three kinds of records."""

    name: str
    parse: Callable[[Config], dict[str, Any]]
    expert: Callable[[ModelSpec, int, int], RecordSpec]
    layer: Callable[[ModelSpec, int], RecordSpec]
    base: Callable[[ModelSpec], RecordSpec]


class Config:
    """Strict reader of config.json's fields. Every error names the field, the limit and the value."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]. Raises CheckpointError."""
        value = self.fields.get(name)
        if value is None:
            value = default
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(f"config.json: {name} must be an integer in [{low}, {high}], is {value!r:.80}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]. Raises CheckpointError."""
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None or type(value) not in (int, float) or not low <= value <= high:
            raise CheckpointError(f"config.json: {name} must be a number in [{low}, {high}], is {value!r:.80}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean. Raises CheckpointError."""
        value = self.fields.get(name, default)
        if type(value) is not bool:
            raise CheckpointError(f"config.json: {name} must be true or false, is {value!r:.80}")
        return value

    def must_be(self, name: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Refuse a field whose value changes the computation in a way that is not implemented."""
        value = self.fields.get(name, default)
        if value not in allowed:
            raise CheckpointError(f"config.json: {name}={value!r:.80} is not supported; supported: {list(allowed)}")

    def rope(self) -> RopeSpec:
        """Rotary parameters, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        parameters = self.fields.get("rope_parameters") or self.fields.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise CheckpointError(f"config.json: rope parameters must be an object, are {parameters!r:.80}")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"config.json: rope type {kind!r:.40} is not supported; supported: default")
        merged = Config({"rope_theta": self.fields.get("rope_theta"), **parameters})
        return RopeSpec(merged.number("rope_theta", 1.0, 1e9, 10_000.0))

    def eos(self) -> tuple[int, ...]:
        """End-of-sequence ids: an id or a list of ids."""
        value = self.fields.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < VOCAB_MAX for i in ids):
            raise CheckpointError(f"config.json: eos_token_id must be token ids, is {value!r:.80}")
        return tuple(ids)


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint; its eos ids are completed from generation_config.json where there is one.

    Raises CheckpointError for a missing, oversized or malformed file.
    """
    fields = read_json(directory / "config.json", CONFIG_JSON_BYTES_MAX)
    if fields is None:
        raise CheckpointError("config.json is missing")
    generation = read_json(directory / "generation_config.json", CONFIG_JSON_BYTES_MAX) or {}
    ids = generation.get("eos_token_id")
    if ids is not None:
        fields["eos_token_id"] = ids
    return fields


def load_spec(directory: Path, dtype: str) -> ModelSpec:
    """The ModelSpec of the checkpoint in `directory`, to be served in `dtype`. Raises CheckpointError."""
    fields = read_config(directory)
    return parse_spec(fields, dtype)


def parse_spec(fields: dict[str, Any], dtype: str) -> ModelSpec:
    """The ModelSpec that config.json's `fields` describe. Raises CheckpointError for anything not supported."""
    architectures = fields.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(f"config.json: architecture {name!r:.80} is not supported; supported: {sorted(FAMILIES)}")
    if dtype not in ("bfloat16", "float32"):
        raise CheckpointError(f"dtype {dtype!r:.40} is not supported; supported: bfloat16, float32")
    config = Config(fields)
    parsed = family.parse(config)
    spec = ModelSpec(
        family=family.name,
        architecture=cast(str, name),
        dtype=cast(Dtype, "float32" if family.name == "oracle" else dtype),
        eos_token_ids=config.eos(),
        **parsed,
    )
    if spec.moe.top_k > spec.moe.num_experts:
        raise CheckpointError(f"config.json: top-k {spec.moe.top_k} exceeds the {spec.moe.num_experts} experts")
    if spec.attention.num_heads % spec.attention.num_kv_heads:
        raise CheckpointError(
            f"config.json: {spec.attention.num_heads} heads are no multiple of {spec.attention.num_kv_heads} kv heads"
        )
    return spec


def records(spec: ModelSpec) -> Iterator[RecordSpec]:
    """All records of a model: base, then each layer's, then each expert's."""
    family = FAMILIES[spec.architecture]
    yield family.base(spec)
    for layer in range(spec.num_layers):
        yield family.layer(spec, layer)
    for layer, count in enumerate(spec.num_experts_by_layer):
        for expert in range(count):
            yield family.expert(spec, layer, expert)


def record(spec: ModelSpec, key: RecordKey) -> RecordSpec:
    """The record called `key`."""
    family = FAMILIES[spec.architecture]
    if key.kind == "expert":
        return family.expert(spec, key.layer, key.expert)
    return family.layer(spec, key.layer) if key.kind == "layer" else family.base(spec)


# ---- Mixtral and Qwen3-MoE: one decoder, other names ----------------------------------------------------------------


def _parse_decoder(config: Config, *, qk_norm: bool, moe: MoeSpec, window_on: bool) -> dict[str, Any]:
    config.must_be("hidden_act", ("silu",), "silu")
    config.must_be("attention_bias", (False,), False)
    hidden = config.integer("hidden_size", 1, HIDDEN_MAX)
    heads = config.integer("num_attention_heads", 1, 1_024)
    positions = config.integer("max_position_embeddings", 1, PROMPT_TOKENS_MAX, 4096)
    window = config.fields.get("sliding_window") if window_on else None
    if window is not None and config.integer("sliding_window", 1, 1 << 31) < positions:
        raise CheckpointError(
            f"config.json: sliding_window={window} below max_position_embeddings={positions} is not supported"
        )
    return {
        "num_layers": config.integer("num_hidden_layers", 1, LAYERS_MAX),
        "hidden": hidden,
        "vocab": config.integer("vocab_size", 1, VOCAB_MAX),
        "max_positions": positions,
        "norm_eps": config.number("rms_norm_eps", 0.0, 1.0, 1e-5),
        "tie_embeddings": config.flag("tie_word_embeddings", False),
        "attention": AttentionSpec(
            num_heads=heads,
            num_kv_heads=config.integer("num_key_value_heads", 1, 1_024, heads),
            head_dim=_even(config.integer("head_dim", 2, 1_024, hidden // heads)),
            qk_norm=qk_norm,
            rope=config.rope(),
        ),
        "moe": moe,
    }


def _even(head_dim: int) -> int:
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim must be even for rotary embeddings, is {head_dim}")
    return head_dim


def _parse_mixtral(config: Config) -> dict[str, Any]:
    moe = MoeSpec(
        num_experts=config.integer("num_local_experts", 1, EXPERTS_MAX),
        top_k=config.integer("num_experts_per_tok", 1, TOP_K_EXPERTS_MAX),
        expert_width=config.integer("intermediate_size", 1, HIDDEN_MAX),
        norm_topk=True,
    )
    return _parse_decoder(config, qk_norm=False, moe=moe, window_on=True)


def _parse_qwen3_moe(config: Config) -> dict[str, Any]:
    moe = MoeSpec(
        num_experts=config.integer("num_experts", 1, EXPERTS_MAX),
        top_k=config.integer("num_experts_per_tok", 1, TOP_K_EXPERTS_MAX),
        expert_width=config.integer("moe_intermediate_size", 1, HIDDEN_MAX),
        norm_topk=config.flag("norm_topk_prob", False),
    )
    window_on = config.flag("use_sliding_window", False)
    parsed = _parse_decoder(config, qk_norm=True, moe=moe, window_on=window_on)
    layers = parsed["num_layers"]
    step = config.integer("decoder_sparse_step", 1, LAYERS_MAX, 1)
    only = config.fields.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(i) is int and 0 <= i < layers for i in only):
        raise CheckpointError(f"config.json: mlp_only_layers must be layers below {layers}, is {only!r:.80}")
    dense = tuple(i for i in range(layers) if i in only or (i + 1) % step)
    if dense:
        parsed["dense_width"] = config.integer("intermediate_size", 1, HIDDEN_MAX)
    return {**parsed, "dense_layers": dense}


def _decoder_base(spec: ModelSpec) -> RecordSpec:
    builder = RecordBuilder(RecordKey("base"))
    builder.add("embed", spec.dtype, Source("model.embed_tokens.weight", (spec.vocab, spec.hidden)))
    builder.add("final_norm", "float32", Source("model.norm.weight", (spec.hidden,)))
    if not spec.tie_embeddings:
        builder.add("head", spec.dtype, Source("lm_head.weight", (spec.vocab, spec.hidden)))
    return builder.build()


class _Names(NamedTuple):
    """Where a family's checkpoints differ: the router's name and the names of an expert's three matrices."""

    gate: str
    expert: str
    w1: str
    w3: str
    w2: str


_MIXTRAL = _Names("block_sparse_moe.gate.weight", "block_sparse_moe.experts", "w1.weight", "w3.weight", "w2.weight")
_QWEN3 = _Names("mlp.gate.weight", "mlp.experts", "gate_proj.weight", "up_proj.weight", "down_proj.weight")


def _decoder_layer(names: _Names) -> Callable[[ModelSpec, int], RecordSpec]:
    def build(spec: ModelSpec, layer: int) -> RecordSpec:
        """Norms and the router's gate are kept in float32: they are small, and the router's choice is sensitive."""
        at = f"model.layers.{layer}."
        hidden, attention = spec.hidden, spec.attention
        query, kv = attention.num_heads * attention.head_dim, spec.kv_width
        builder = RecordBuilder(RecordKey("layer", layer))
        builder.add("input_norm", "float32", Source(at + "input_layernorm.weight", (hidden,)))
        builder.add(
            "qkv",
            spec.dtype,
            Source(at + "self_attn.q_proj.weight", (query, hidden)),
            Source(at + "self_attn.k_proj.weight", (kv, hidden)),
            Source(at + "self_attn.v_proj.weight", (kv, hidden)),
        )
        if attention.qk_norm:
            builder.add("q_norm", "float32", Source(at + "self_attn.q_norm.weight", (attention.head_dim,)))
            builder.add("k_norm", "float32", Source(at + "self_attn.k_norm.weight", (attention.head_dim,)))
        builder.add("out", spec.dtype, Source(at + "self_attn.o_proj.weight", (hidden, query)))
        builder.add("post_norm", "float32", Source(at + "post_attention_layernorm.weight", (hidden,)))
        if layer in spec.dense_layers:
            width = spec.dense_width
            gate, up = (Source(f"{at}mlp.{name}_proj.weight", (width, hidden)) for name in ("gate", "up"))
            builder.add("w13", spec.dtype, gate, up)
            builder.add("w2", spec.dtype, Source(at + "mlp.down_proj.weight", (hidden, width)))
        else:
            builder.add("gate", "float32", Source(at + names.gate, (spec.moe.num_experts, hidden)))
        return builder.build()

    return build


def _decoder_expert(names: _Names) -> Callable[[ModelSpec, int, int], RecordSpec]:
    def build(spec: ModelSpec, layer: int, expert: int) -> RecordSpec:
        at = f"model.layers.{layer}.{names.expert}.{expert}."
        hidden, width = spec.hidden, spec.moe.expert_width
        builder = RecordBuilder(RecordKey("expert", layer, expert))
        builder.add("w13", spec.dtype, Source(at + names.w1, (width, hidden)), Source(at + names.w3, (width, hidden)))
        builder.add("w2", spec.dtype, Source(at + names.w2, (hidden, width)))
        return builder.build()

    return build


# ---- The oracle model: exact integer arithmetic over what is really in memory (docs/oracle.md) ----------------------


def _parse_oracle(config: Config) -> dict[str, Any]:
    hidden = config.integer("hidden_size", 1, 4_096)
    moe = MoeSpec(
        num_experts=config.integer("num_local_experts", 1, EXPERTS_MAX),
        top_k=config.integer("num_experts_per_tok", 1, TOP_K_EXPERTS_MAX),
        expert_width=1,
        norm_topk=False,
    )
    return {
        "num_layers": config.integer("num_hidden_layers", 1, LAYERS_MAX),
        "hidden": hidden,
        "vocab": config.integer("vocab_size", 1, VOCAB_MAX),
        "max_positions": config.integer("max_position_embeddings", 1, PROMPT_TOKENS_MAX, 4096),
        "norm_eps": 0.0,
        "tie_embeddings": True,
        "attention": AttentionSpec(1, 1, config.integer("head_dim", 1, 1_024), False, RopeSpec(10_000.0)),
        "moe": moe,
        "modulus": config.integer("oracle_modulus", 257, 65_521),
    }


def _oracle_base(spec: ModelSpec) -> RecordSpec:
    builder = RecordBuilder(RecordKey("base"))
    builder.add("embed", "float32", Source("model.embed.weight", (spec.vocab, spec.hidden)))
    builder.add("head", "float32", Source("model.head.salt", (spec.hidden,)))
    return builder.build()


def _oracle_layer(spec: ModelSpec, layer: int) -> RecordSpec:
    salt = Source(f"model.layers.{layer}.attn.salt", (spec.hidden,))
    return RecordBuilder(RecordKey("layer", layer)).add("salt", "float32", salt).build()


def _oracle_expert(spec: ModelSpec, layer: int, expert: int) -> RecordSpec:
    at = f"model.layers.{layer}.experts.{expert}."
    builder = RecordBuilder(RecordKey("expert", layer, expert))
    for name in ("mul", "add"):
        builder.add(name, "float32", Source(at + name, (spec.hidden,)))
    return builder.build()


FAMILIES: dict[str, Family] = {
    "MixtralForCausalLM": Family(
        "mixtral", _parse_mixtral, _decoder_expert(_MIXTRAL), _decoder_layer(_MIXTRAL), _decoder_base
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", _parse_qwen3_moe, _decoder_expert(_QWEN3), _decoder_layer(_QWEN3), _decoder_base
    ),
    "OracleMoeForCausalLM": Family("oracle", _parse_oracle, _oracle_expert, _oracle_layer, _oracle_base),
}
