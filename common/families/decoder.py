"""The decoder that several families are: RMS norms, grouped-query attention with rotary embedding, routed experts.

A family's own file says what its keys mean and how its tensors are called; what they have in common is here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.rope import rope_of
from elasticmoe.common.model_spec import AttentionSpec, ModelSpec, MoeSpec, RecordBuilder, RecordKey, RecordSpec, Source
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import HIDDEN_MAX, LAYERS_MAX, PROMPT_TOKENS_MAX, VOCAB_MAX

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
ACTIVATIONS: Final = ("silu", "swish")  # two names of one function in transformers' ACT2FN
_HEADS_MAX: Final = 1_024
_INT_MAX: Final = (1 << 63) - 1

_TRAINING: Final = "for training only"
_TOKENIZER: Final = "the tokenizer's files say which tokens are special"
# Keys that the families of this decoder have in common and that change nothing.
NEUTRAL_KEYS: Final[dict[str, Key]] = {
    "initializer_range": Key(float, 0.02, _TRAINING),
    "attention_dropout": Key(float | int, 0.0, _TRAINING),
    "output_router_logits": Key(bool, False, _TRAINING),
    "router_aux_loss_coef": Key(float, 0.001, _TRAINING),
    "use_cache": Key(bool, True, "there is always a KV cache"),
    "pad_token_id": Key(int | None, None, _TOKENIZER),
    "bos_token_id": Key(int | None, None, _TOKENIZER),
}


def parse_decoder(
    config: Config, *, qk_norm: bool, moe: MoeSpec, window: int | None, head_dim: int | None, default_theta: float
) -> dict[str, Any]:
    """The fields of ModelSpec that all decoders take from the same keys. `window`: tokens that attention sees, None:
    all; `head_dim`: None where it follows from the hidden size. Raises CheckpointError."""
    config.must_be("hidden_act", *ACTIVATIONS)
    hidden = config.integer("hidden_size", 1, HIDDEN_MAX)
    heads = config.integer("num_attention_heads", 1, _HEADS_MAX)
    kv_heads = config.integer("num_key_value_heads", 1, _HEADS_MAX)
    layers = config.integer("num_hidden_layers", 1, LAYERS_MAX)
    _check_layer_types(config, layers, window)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} heads are no multiple of {kv_heads} kv heads")
    if moe.top_k > moe.num_experts:
        raise CheckpointError(f"config.json: top-k {moe.top_k} exceeds the {moe.num_experts} experts")
    positions = min(config.integer("max_position_embeddings", 2, _INT_MAX), PROMPT_TOKENS_MAX)
    return {
        "num_layers": layers,
        "hidden": hidden,
        "vocab": config.integer("vocab_size", 1, VOCAB_MAX),
        "max_positions": min(positions, window or positions),
        "sliding_window": window or 0,
        "norm_eps": config.number("rms_norm_eps", 0.0, 1.0),
        "tie_embeddings": config.flag("tie_word_embeddings"),
        "attention": AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_checked_head_dim(hidden // heads if head_dim is None else head_dim),
            qk_norm=qk_norm,
            rope=rope_of(config.fields, default_theta),
        ),
        "moe": moe,
    }


def window_of(config: Config) -> int | None:
    """`sliding_window`: with it a token sees itself and the tokens before it, this many in all. Raises
    CheckpointError for one in which no sequence fits."""
    if config.value("sliding_window") is None:
        return None
    return config.integer("sliding_window", 2, _INT_MAX)


def _checked_head_dim(head_dim: int) -> int:
    if not 2 <= head_dim <= 1_024:
        raise CheckpointError(f"config.json: head_dim must be an integer in [2, 1024], is {head_dim}")
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim must be even for rotary embeddings, is {head_dim}")
    return head_dim


def _check_layer_types(config: Config, layers: int, window: int | None) -> None:
    """transformers lets `layer_types` size the caches, and windows all layers of these families or none."""
    types = config.fields.get("layer_types")
    if types is None:
        return
    allowed = ("full_attention", "attention") + (("sliding_attention",) if window else ())
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"config.json: layer_types must be a list of {layers} types, is {types!r:.80}")
    other = next((each for each in types if each not in allowed), None)
    if other is not None:
        raise CheckpointError(
            f"config.json: layer type {other!r:.40} is not supported; supported: {', '.join(allowed)}"
        )


# ---- Records --------------------------------------------------------------------------------------------------------


class Names(NamedTuple):
    """Where a family's checkpoints differ: the router's name, the experts' and those of an expert's three matrices."""

    gate: str
    experts: str
    w1: str
    w3: str
    w2: str


def decoder_base(spec: ModelSpec) -> RecordSpec:
    """Embedding, final norm and, where it is not the embedding, the head. Of a tied pair either may be stored."""
    shape = (spec.vocab, spec.hidden)
    builder = RecordBuilder(RecordKey("base"))
    tied = ((Source(HEAD, shape),),) if spec.tie_embeddings else ()
    builder.add("embed", spec.dtype, Source(EMBEDDING, shape), alternatives=tied)
    builder.add("final_norm", "float32", Source("model.norm.weight", (spec.hidden,)))
    if not spec.tie_embeddings:
        builder.add("head", spec.dtype, Source(HEAD, shape))
    return builder.build()


def decoder_layer(names: Names) -> Callable[[ModelSpec, int], RecordSpec]:
    """The builder of a layer's record. Norms and the router's gate are kept in float32: they are small, and the
    router's choice is sensitive."""

    def build(spec: ModelSpec, layer: int) -> RecordSpec:
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


def decoder_expert(names: Names) -> Callable[[ModelSpec, int, int], RecordSpec]:
    """The builder of an expert's record. Its matrices are stored each for itself, or all experts' of a layer in one
    tensor, gate over up, as transformers 5 holds them and writes them with `save_original_format=False`."""

    def build(spec: ModelSpec, layer: int, expert: int) -> RecordSpec:
        at = f"model.layers.{layer}.{names.experts}."
        hidden, width, experts = spec.hidden, spec.moe.expert_width, spec.moe.num_experts
        gate, up = (Source(f"{at}{expert}.{name}", (width, hidden)) for name in (names.w1, names.w3))
        down = Source(f"{at}{expert}.{names.w2}", (hidden, width))
        gate_up = Source(at + "gate_up_proj", (2 * width, hidden), expert, experts)
        all_down = Source(at + "down_proj", (hidden, width), expert, experts)
        builder = RecordBuilder(RecordKey("expert", layer, expert))
        builder.add("w13", spec.dtype, gate, up, alternatives=((gate_up,),))
        builder.add("w2", spec.dtype, down, alternatives=((all_down,),))
        return builder.build()

    return build
