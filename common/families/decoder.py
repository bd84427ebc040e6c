"""What config.json says of the decoder that all families are: RMS norms, attention with rotary embedding, experts.

A family's own file says what its keys mean and which parts it takes; what they have in common is here. How their
tensors are called is in records.py.
"""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.rope import RopeForm, rope_of, score_factor_of
from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, MoeSpec
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import HIDDEN_MAX, LAYERS_MAX, PROMPT_TOKENS_MAX, VOCAB_MAX

ACTIVATIONS: Final = ("silu", "swish")  # two names of one function in transformers' ACT2FN
_HEADS_MAX: Final = 1_024
_HEAD_DIM_MAX: Final = 1_024
_RANK_MAX: Final = 16_384
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
    config: Config,
    *,
    attention: AttentionSpec | LatentAttentionSpec,
    moe: MoeSpec,
    window: int | None = None,
    dense_layers: tuple[int, ...] = (),
) -> dict[str, Any]:
    """The fields of ModelSpec that all decoders take from the same keys. `window`: tokens that attention sees, None:
    all. Raises CheckpointError."""
    config.must_be("hidden_act", *ACTIVATIONS)
    layers = num_layers_of(config)
    _check_layer_types(config, layers, window)
    check_moe(moe)
    positions = min(config.integer("max_position_embeddings", 2, _INT_MAX), PROMPT_TOKENS_MAX)
    return {
        "num_layers": layers,
        "hidden": config.integer("hidden_size", 1, HIDDEN_MAX),
        "vocab": config.integer("vocab_size", 1, VOCAB_MAX),
        "max_positions": min(positions, window or positions),
        "sliding_window": window or 0,
        "norm_eps": config.number("rms_norm_eps", 0.0, 1.0),
        "tie_embeddings": config.flag("tie_word_embeddings"),
        "attention": attention,
        "moe": moe,
        "dense_layers": dense_layers,
        "dense_width": config.integer("intermediate_size", 1, HIDDEN_MAX) if dense_layers else 0,
    }


def num_layers_of(config: Config) -> int:
    """`num_hidden_layers`."""
    return config.integer("num_hidden_layers", 1, LAYERS_MAX)


def grouped_query(config: Config, rope: RopeForm, *, head_dim: int | None = None, **parts: Any) -> AttentionSpec:
    """Grouped-query attention by the usual keys; `head_dim`: None where it follows from the hidden size; `rope.dims` is
    put in. `parts`: the other fields of AttentionSpec that are not the usual. Raises CheckpointError."""
    hidden = config.integer("hidden_size", 1, HIDDEN_MAX)
    heads = config.integer("num_attention_heads", 1, _HEADS_MAX)
    # null: as many as there are heads, where a family's class allows null
    kv_heads = heads if config.value("num_key_value_heads") is None else config.integer("num_key_value_heads", 1, heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} heads are no multiple of {kv_heads} kv heads")
    dim = _checked_head_dim(hidden // heads if head_dim is None else head_dim)
    positions = config.integer("max_position_embeddings", 2, _INT_MAX)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rope=rope_of(config.fields, rope._replace(dims=dim), positions),
        **{"scale": dim**-0.5, **parts},
    )


def latent(config: Config, rope: RopeForm) -> LatentAttentionSpec:
    """Latent attention by the keys of DeepSeek's configs; `rope.dims` is put in. Raises CheckpointError."""
    nope, turned = (config.integer(f"qk_{name}_head_dim", 1, _HEAD_DIM_MAX) for name in ("nope", "rope"))
    form = rope._replace(dims=turned)
    q_rank = config.value("q_lora_rank")
    positions = config.integer("max_position_embeddings", 2, _INT_MAX)
    return LatentAttentionSpec(
        num_heads=config.integer("num_attention_heads", 1, _HEADS_MAX),
        q_rank=0 if q_rank is None else config.integer("q_lora_rank", 1, _RANK_MAX),
        kv_rank=config.integer("kv_lora_rank", 1, _RANK_MAX),
        nope_dim=nope,
        v_dim=config.integer("v_head_dim", 1, _HEAD_DIM_MAX),
        rope=rope_of(config.fields, form, positions),
        scale=(nope + turned) ** -0.5 * score_factor_of(config.fields, form),
        bias=config.flag("attention_bias"),
    )


def window_of(config: Config) -> int | None:
    """`sliding_window`: with it a token sees itself and the tokens before it, this many in all. Raises
    CheckpointError for one in which no sequence fits."""
    if config.value("sliding_window") is None:
        return None
    return config.integer("sliding_window", 2, _INT_MAX)


def sparse_steps(config: Config) -> tuple[int, ...]:
    """Layers with an ordinary feed-forward by Qwen's keys: those that are named, and all but every
    `decoder_sparse_step`-th. Raises CheckpointError."""
    only, step = set(config.value("mlp_only_layers") or ()), config.value("decoder_sparse_step")
    if step == 0:
        raise CheckpointError("config.json: decoder_sparse_step must not be 0")
    return tuple(layer for layer in range(num_layers_of(config)) if layer in only or (layer + 1) % step)


def check_moe(moe: MoeSpec) -> None:
    """Raise CheckpointError for a router that cannot choose."""
    experts, groups, chosen = moe.num_experts, moe.num_groups, moe.top_groups
    if moe.top_k > experts:
        raise CheckpointError(f"config.json: top-k {moe.top_k} exceeds the {experts} experts")
    if groups == 1:
        return
    if experts % groups:
        raise CheckpointError(f"config.json: {experts} experts are no multiple of {groups} groups")
    if chosen > groups:
        raise CheckpointError(f"config.json: topk_group {chosen} exceeds the {groups} groups")
    if moe.scoring == "sigmoid" and experts // groups < 2:
        raise CheckpointError(
            f"config.json: groups are chosen by their two best experts; {groups} groups have one each"
        )
    if moe.top_k > chosen * (experts // groups):
        raise CheckpointError(
            f"config.json: top-k {moe.top_k} exceeds the {chosen * (experts // groups)} experts of {chosen} groups"
        )


def _checked_head_dim(head_dim: int) -> int:
    if not 2 <= head_dim <= _HEAD_DIM_MAX:
        raise CheckpointError(f"config.json: head_dim must be an integer in [2, {_HEAD_DIM_MAX}], is {head_dim}")
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
