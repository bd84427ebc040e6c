"""What config.json says of the decoder that all families are: RMS norms, attention with rotary embedding, experts.

A family's own file says what its keys mean and which parts it takes; what they have in common is here. How their
tensors are called is in records.py.
"""

from __future__ import annotations

from typing import Any, Final

from elasticmoe.common.families.config import Config, Key, refuse_value
from elasticmoe.common.families.rope import RopeForm, rope_of, score_factor_of
from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, MoeSpec
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import (
    EXPERTS_MAX,
    HIDDEN_MAX,
    LAYERS_MAX,
    PROMPT_TOKENS_MAX,
    TOP_K_EXPERTS_MAX,
    VOCAB_MAX,
)

ACTIVATIONS: Final = ("silu", "swish")  # two names of one function in transformers' ACT2FN
_HEADS_MAX: Final = 1_024
_HEAD_DIM_MAX: Final = 1_024
_RANK_MAX: Final = 16_384
_INT_MAX: Final = (1 << 63) - 1
_FACTOR_MAX: Final = 1e6
_SHARED: Final = {"n_shared_experts": 0, "moe_intermediate_size": 1}  # each with its lower bound

TRAINING: Final = "for training only"
PREDICTORS: Final = "layers that predict further tokens are not loaded, as transformers does not"
_TOKENIZER: Final = "the tokenizer's files say which tokens are special"
# Keys that all families of this decoder have and that change nothing; types and defaults are those of most.
NEUTRAL_KEYS: Final[dict[str, Key]] = {
    "initializer_range": Key(float, 0.02, TRAINING),
    "attention_dropout": Key(float | int, 0.0, TRAINING),
    "output_router_logits": Key(bool, False, TRAINING),
    "use_cache": Key(bool, True, "there is always a KV cache"),
    "pad_token_id": Key(int | None, None, _TOKENIZER),
    "bos_token_id": Key(int | None, None, _TOKENIZER),
}
# Not of the config classes, which keep it as it comes: the models' code reads it and cannot do with null.
HEAD_DIM: Final = Key(int, None)
AUX_LOSS: Final = Key(float, 0.001, TRAINING)  # router_aux_loss_coef


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
    _check_unread(config, moe)
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
    heads = config.integer("num_attention_heads", 1, _HEADS_MAX)
    if (kv_heads := config.value("num_key_value_heads")) not in (None, heads):
        refuse_value("num_key_value_heads", kv_heads, (heads,))
    return LatentAttentionSpec(
        num_heads=heads,
        q_rank=0 if q_rank is None else config.integer("q_lora_rank", 1, _RANK_MAX),
        kv_rank=config.integer("kv_lora_rank", 1, _RANK_MAX),
        nope_dim=nope,
        v_dim=config.integer("v_head_dim", 1, _HEAD_DIM_MAX),
        rope=rope_of(config.fields, form, positions),
        scale=(nope + turned) ** -0.5 * score_factor_of(config.fields, form),
        bias=config.flag("attention_bias"),
    )


def routed(config: Config, *, experts: str, width: str = "moe_intermediate_size", **parts: Any) -> MoeSpec:
    """Routed experts by the keys `experts` and `width`; `parts`: the other fields of MoeSpec that are not the usual.
    Raises CheckpointError."""
    return MoeSpec(
        num_experts=config.integer(experts, 1, EXPERTS_MAX),
        top_k=config.integer("num_experts_per_tok", 1, TOP_K_EXPERTS_MAX),
        expert_width=config.integer(width, 1, HIDDEN_MAX),
        **parts,
    )


def sigmoid_routed(config: Config) -> MoeSpec:
    """The router that DeepSeek-V3 has and GLM took over: sigmoids, a bias for the choice, groups, one shared
    feed-forward. Raises CheckpointError."""
    return routed(
        config,
        experts="n_routed_experts",
        norm_topk=config.flag("norm_topk_prob"),
        scoring="sigmoid",
        has_bias=True,
        num_groups=config.integer("n_group", 1, EXPERTS_MAX),
        top_groups=config.integer("topk_group", 1, EXPERTS_MAX),
        scaling=config.number("routed_scaling_factor", -_FACTOR_MAX, _FACTOR_MAX),
        shared_width=shared_width_of(config),
    )


def shared_width_of(config: Config) -> int:
    """Width of the `n_shared_experts` experts that every token takes, together; 0: there are none. Raises
    CheckpointError."""
    count, width = (config.integer(name, low, HIDDEN_MAX) for name, low in _SHARED.items())
    if count * width > HIDDEN_MAX:
        raise CheckpointError(
            f"config.json: n_shared_experts {count} of width {width} exceed {HIDDEN_MAX} elements in all"
        )
    return count * width


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


def leading_dense(config: Config) -> tuple[int, ...]:
    """Layers with an ordinary feed-forward: the first `first_k_dense_replace`. Raises CheckpointError."""
    return tuple(range(min(config.integer("first_k_dense_replace", 0, _INT_MAX), num_layers_of(config))))


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
        raise CheckpointError(f"config.json: groups are chosen by their two best experts; {groups} groups have 1 each")
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


def _topk_methods(config: Config, moe: MoeSpec) -> tuple[str | None, ...]:
    if moe.has_bias:
        return (None, "noaux_tc")
    return (None, "greedy", "group_limited_greedy") if config.has("n_group") else (None, "greedy")


def _check_unread(config: Config, moe: MoeSpec) -> None:
    """Keys by which checkpoints say how they were trained, and which transformers does not read in every family: they
    must say what is computed. A window beside a family that has none cuts transformers' cache, and only that."""
    said: dict[str, tuple[Any, ...]] = {
        "scoring_func": (None, moe.scoring),
        "topk_method": _topk_methods(config, moe),
        "n_group": (None, 0, 1),
        "routed_scaling_factor": (None, 1),
        "norm_topk_prob": (None, moe.norm_topk),
        "moe_layer_freq": (None, 1),
    }
    if not config.has("sliding_window"):
        said["sliding_window"] = (None,)
    for name, allowed in said.items():
        if not config.has(name) and config.fields.get(name) not in allowed:
            refuse_value(name, config.fields[name], allowed)
