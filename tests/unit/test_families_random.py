"""Random configs mean the same numbers as transformers' own config classes and models, or are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.families import FAMILIES, parse_spec, read_config
from elasticmoe.common.protocol.errors import CheckpointError
from tests.unit.references import CLASSES, LATENT, SIGMOID, assert_equal, expert_width_of, head_dim_of, num_experts_of

transformers = pytest.importorskip("transformers")

MULTIPLIERS = ("residual_multiplier", "logits_scaling", "embedding_multiplier", "attention_multiplier")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5e5},
    {"rope_theta": 500_000},
    {"rope_theta": None},
    {"rope_parameters": None, "rope_scaling": None},
    {"rope_parameters": {}, "rope_theta": 1234.5},
    {"rope_parameters": {"rope_theta": 700.0}},
    {"rope_parameters": {"type": "default", "rope_theta": 700}, "rope_theta": 9e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {}},
    {"rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 1.0}, "partial_rotary_factor": 1},
    {"rope_parameters": {"rope_theta": 700.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor": 1},
    {"partial_rotary_factor": 0.25},
    {"partial_rotary_factor": None},
    {"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": {"type": "default"}, "rope_theta": 88.0},
    {"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e4},
    {"rope_scaling": {"rope_type": "linear", "factor": 3, "mscale_all_dim": 1.0}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 7.3, "mscale_all_dim": 0.5}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
    {"rope_parameters": {"rope_theta": 700.0, "factor": 4.0}},
    {"rope_scaling": YARN},
    {"rope_scaling": YARN | {"type": "yarn", "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 0, "attention_factor": None}},
    {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000},
    {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.4}, "rope_theta": 1e5},
    {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0}},
    {"rope_scaling": YARN | {"mscale_all_dim": 1}},
    {"rope_scaling": YARN | {"attention_factor": 1.25, "factor": 0.5}},
    {"rope_scaling": YARN | {"factor": None}},
    {"rope_scaling": YARN | {"factor": None, "mscale_all_dim": 1.0}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 128},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}, "rope_theta": 500000.0},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
    {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
    {"rope_scaling": [1]},
    {"rope_scaling": False},
]


def options_of(name: str, layers: int, heads: int) -> dict[str, list[Any]]:
    """What a family's own keys may be."""
    sparse = {"mlp_only_layers": [None, [], [0], [1, 99, -1]], "decoder_sparse_step": [1, 2, 3, 100, -2]}
    sparse |= {"use_sliding_window": [True, False], "max_window_layers": [0, 1, 28]}
    shared = {"n_shared_experts": [0, 1, 2], "routed_scaling_factor": [1.0, 2.5], "first_k_dense_replace": [0, 1, 9]}
    groups = {"n_group": [1, 2, 3], "topk_group": [1, 1, 2], "n_routed_experts": [6, 8, 12, 24]}
    latent = {"q_lora_rank": [None, 12], "kv_lora_rank": [10, 16], "qk_nope_head_dim": [6, 12], "v_head_dim": [5, 8]}
    latent |= {"qk_rope_head_dim": [16, 16, 6], "head_dim": [16], "num_key_value_heads": [heads, heads, 1]}
    own: dict[str, dict[str, list[Any]]] = {
        "qwen3_moe": sparse,
        "qwen2_moe": sparse | {"qkv_bias": [True, False], "shared_expert_intermediate_size": [16, 24]},
        "olmoe": {"clip_qkv": [None, 8.0, 8]},
        "granitemoe": {key: [1, 12.0, 0.25] for key in MULTIPLIERS},
        "glm4_moe": shared | groups | {"use_qk_norm": [True, False], "num_nextn_predict_layers": [1]},
        "deepseek_v2": shared | groups | latent | {"topk_method": ["greedy", "group_limited_greedy", None, "x"]},
        "deepseek_v3": shared | groups | latent | {"rope_interleave": [True, False, None]},
        "glm4_moe_lite": shared
        | groups
        | latent
        | {"mlp_layer_types": [None, None, ["dense"] * layers, ["x"]]}
        | {"first_k_dense_replace": [1, 1, 0]},
    }
    return own.get(name, {})


def draw(rng: random.Random, name: str) -> dict[str, Any]:
    """A config that people or tools might write: keys left out, both spellings, nulls, now and then a wrong form."""
    heads, layers = rng.choice([4, 8, 16]), rng.choice([2, 3, 6])
    hidden = heads * 2 * rng.randrange(2, 9)
    options: dict[str, list[Any]] = {
        "vocab_size": [260, 999],
        "hidden_size": [hidden],
        "intermediate_size": [24, 40],
        "num_hidden_layers": [layers],
        "num_attention_heads": [heads],
        "num_key_value_heads": [heads, heads // 2, 1],
        "head_dim": [8, 24, 16],
        "hidden_act": ["silu", "swish"],
        "max_position_embeddings": [256, 4096, 2_000_000],
        "rms_norm_eps": [1e-6, 1e-5, 0.001],
        "tie_word_embeddings": [True, False],
        "sliding_window": [None, None, None, 100, 5000],
        "num_experts_per_tok": [1, 2, 3],
        "eos_token_id": [None, 5, [5, 6]],
        "pad_token_id": [None, 0, -1],
        "layer_types": [None, ["full_attention"] * layers, ["attention"] * layers],
        "num_local_experts": [5, 8, 130],
        "num_experts": [6, 9, 128],
        "attention_dropout": [0, 0.0, 0.5],
        "output_router_logits": [True, False],
        "router_aux_loss_coef": [0.0, 0.02],
        "attention_bias": [False, True],
        "use_cache": [False, True],
        "unheard_of": [1, None, {}],
    }
    if name not in ("mixtral", "granitemoe"):
        options |= {"moe_intermediate_size": [20, 12], "norm_topk_prob": [True, False]}
    options |= options_of(name, layers, heads)
    fields = {key: rng.choice(values) for key, values in options.items() if rng.random() < 0.7}
    if rng.random() < 0.25:
        spoiled = rng.choice(sorted(fields))
        fields[spoiled] = rng.choice([None, True, "x", 0, 4.0, [1.0], {}, "gelu"])
    return {"model_type": name, "architectures": [FAMILIES[name].architecture], **fields, **rng.choice(ROPES)}


def has_sizes(config: Any) -> bool:
    """Whether every size is a number of which there is one at least."""
    sizes = [config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size]
    sizes += [num_experts_of(config), config.num_experts_per_tok, config.num_attention_heads, expert_width_of(config)]
    sizes += [config.max_position_embeddings - 1, config.num_key_value_heads]
    if config.model_type in LATENT:
        sizes += [config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim]
        sizes += [1 if config.q_lora_rank is None else config.q_lora_rank]
    if config.model_type == "qwen2_moe":
        sizes.append(config.shared_expert_intermediate_size)
    if hasattr(config, "first_k_dense_replace") and config.model_type != "glm4_moe_lite":
        sizes.append(config.first_k_dense_replace + 1 if type(config.first_k_dense_replace) is int else None)
    return all(type(size) is int and size > 0 for size in sizes) and config.rms_norm_eps <= 1


def has_rope(config: Any) -> bool:
    """Whether the rotary embedding can be made, and is of a built kind."""
    rope, kind = config.rope_parameters, config.model_type
    share = rope.get("partial_rotary_factor")
    dims = config.qk_rope_head_dim if kind in LATENT else head_dim_of(config)
    if kind == "glm4_moe" and share is not None:
        dims = int(dims * share)
    elif share not in (None, 1):
        return False
    needs_factor = rope["rope_type"] != "default" and (rope["rope_type"] != "yarn" or rope.get("mscale_all_dim"))
    return (
        dims >= 2
        and dims % 2 == 0
        and (dims > 2 or rope["rope_type"] != "dynamic")
        and type(rope["rope_theta"]) in (int, float)
        and rope["rope_theta"] > 0
        and rope["rope_type"] in ("default", "linear", "dynamic", "yarn", "llama3")
        and not (needs_factor and kind in LATENT and rope["factor"] is None)
        and rope.get("high_freq_factor", 2) > rope.get("low_freq_factor", 1)
    )


def has_heads(config: Any) -> bool:
    """Whether the parts of the attention fit together."""
    kind, heads, kv_heads = config.model_type, config.num_attention_heads, config.num_key_value_heads
    if kind in LATENT:
        return kv_heads == heads and (kind != "deepseek_v3" or config.head_dim == config.qk_rope_head_dim)
    head_dim = head_dim_of(config)
    is_one = type(head_dim) is int and head_dim > 0 and head_dim % 2 == 0 and heads % kv_heads == 0
    return is_one and (kind != "olmoe" or head_dim * heads == config.hidden_size)


def has_router(config: Any) -> bool:
    """Whether a choice can be made."""
    kind, experts, top_k = config.model_type, num_experts_of(config), config.num_experts_per_tok
    if kind == "deepseek_v2":
        if config.norm_topk_prob or config.topk_method not in ("greedy", "group_limited_greedy"):
            return False
        if config.topk_method == "greedy":
            return top_k <= experts
    elif kind not in SIGMOID:
        return top_k <= experts
    groups, chosen = config.n_group, config.topk_group
    if not all(type(number) is int and number > 0 for number in (groups, chosen)) or top_k > experts:
        return False
    each = experts // groups
    is_whole = experts % groups == 0 and chosen <= groups and top_k <= chosen * each
    return is_whole and (kind == "deepseek_v2" or each > 1)


def has_rest(config: Any) -> bool:
    """Whether what only some families have can be made, and is built."""
    kind, window = config.model_type, getattr(config, "sliding_window", None)
    if kind in ("mixtral", "qwen3_moe"):
        is_windowed = window is None or window > 1
    elif kind == "qwen2_moe":
        is_windowed = not config.use_sliding_window or (
            window is not None and (window > 1 or "sliding_attention" not in config.layer_types)
        )
    else:
        is_windowed = window is None
    if kind == "glm4_moe_lite":
        types, leading = config.mlp_layer_types, getattr(config, "first_k_dense_replace", None)
        is_listed = len(types) == config.num_hidden_layers and set(types) <= {"dense", "sparse"}
        dense = [layer for layer, each in enumerate(types) if each == "dense"]
        return (
            is_windowed and is_listed and (leading is None or (type(leading) is int and dense == list(range(leading))))
        )
    is_multiplied = kind != "granitemoe" or all(
        type(value) in (int, float) and (value > 0 or name in MULTIPLIERS[2:])
        for name in MULTIPLIERS
        for value in [getattr(config, name)]
    )
    clip = getattr(config, "clip_qkv", None)
    return (
        is_windowed
        and is_multiplied
        and getattr(config, "decoder_sparse_step", 1) != 0
        and not getattr(config, "mlp_bias", False)
        and (kind != "olmoe" or clip is None or clip > 0)
        and getattr(config, "n_shared_experts", 0) >= 0
    )


def is_built(config: Any) -> bool:
    """Whether a config that transformers takes is one that we have to take too: its model can be made, and asks for
    nothing that is not built here."""
    return (
        has_sizes(config)
        and config.hidden_act in ("silu", "swish")
        and has_heads(config)
        and has_rope(config)
        and has_router(config)
        and has_rest(config)
    )


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore")  # of transformers, about what is drawn
def test_random_configs_mean_what_they_mean_to_transformers(name: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{name}{seed}")
    outcomes = {"equal": 0, "refused by both": 0, "not built": 0}
    transformers.utils.logging.set_verbosity_error()
    for _ in range(150):
        fields = draw(rng, name)
        (tmp_path / "config.json").write_text(json.dumps(fields))
        try:
            wanted = transformers.AutoConfig.from_pretrained(tmp_path)
        except Exception:  # each validator has its own
            wanted = None
        try:
            spec = parse_spec(read_config(tmp_path), "float32")
        except CheckpointError as error:
            spec, reason = None, error.message
        if spec is None:
            assert wanted is None or not is_built(wanted), f"{reason}: {fields}"
            outcomes["refused by both" if wanted is None else "not built"] += 1
        else:
            assert wanted is not None, f"transformers refuses {fields}"
            assert_equal(spec, wanted)
            outcomes["equal"] += 1
    assert min(outcomes.values()) >= 5, outcomes
