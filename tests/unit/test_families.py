"""What config.json means: the same numbers as transformers' own config classes, or a refusal that names the key."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.families import FAMILIES, load_spec, parse_spec, read_config, unread_names
from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.shared_keys import unread_keys
from elasticmoe.common.model_spec import ModelSpec, WeightBlock
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import PROMPT_TOKENS_MAX
from tests.unit.specs import TINY_MIXTRAL, TINY_QWEN3

transformers = pytest.importorskip("transformers")

CLASSES = {"mixtral": transformers.MixtralConfig, "qwen3_moe": transformers.Qwen3MoeConfig}
# Read by a family although its class in transformers does not have them.
BEYOND_THE_CLASS = {"mixtral": set(), "qwen3_moe": {"head_dim"}}
MIXTRAL = TINY_MIXTRAL | {"model_type": "mixtral"}
QWEN3 = TINY_QWEN3 | {"model_type": "qwen3_moe"}


def own_fields(name: str) -> dict[str, Any]:
    """The class's fields that are not every config's."""
    shared = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    return {field.name: field for field in dataclasses.fields(CLASSES[name]) if field.name not in shared}


@pytest.mark.parametrize("name", CLASSES)
def test_a_family_has_the_keys_types_and_defaults_of_its_class(name: str) -> None:
    keys, fields = FAMILIES[name].keys, own_fields(name)
    assert set(keys) - BEYOND_THE_CLASS[name] == set(fields)
    for key, field in fields.items():
        kind = dict | None if key == "rope_parameters" else field.type
        assert keys[key][:2] == Key(kind, field.default)[:2], key


@pytest.mark.parametrize("name", FAMILIES)
def test_each_key_is_read_or_known_to_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = {"rope_parameters", "eos_token_id"}  # by the code for all families
    real = Config.value

    def value(self: Config, key: str) -> Any:
        read.add(key)
        return real(self, key)

    monkeypatch.setattr(Config, "value", value)
    oracle = {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 4, "num_hidden_layers": 1}
    oracle |= {"vocab_size": 9, "head_dim": 4, "oracle_modulus": 257}
    qwen3 = {"use_sliding_window": True, "mlp_only_layers": [0]}  # so that the keys that depend on these are read
    parse_spec(
        {"model_type": FAMILIES[name].model_type, **{"oracle": oracle, "qwen3_moe": qwen3}.get(name, {})}, "float32"
    )
    keys = FAMILIES[name].keys
    assert {key for key in keys if not keys[key].neutral} == read & set(keys)


@pytest.mark.parametrize("name", CLASSES)
def test_a_family_has_the_spellings_of_its_class(name: str) -> None:
    fields = own_fields(name)
    pairs = [(a, b) if b in fields else (b, a) for a, b in CLASSES[name].attribute_map.items()]
    assert FAMILIES[name].spellings == dict(pairs)


def test_keys_of_every_config_are_known() -> None:
    every = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    every |= set(transformers.GenerationConfig._get_default_generation_params())
    every |= {"torch_dtype", "rope_scaling", "rope_theta", "partial_rotary_factor", "per_layer_config", "_commit_hash"}
    assert unread_keys(dict.fromkeys(every - {"use_cache"}), {}) == []


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("full", [True, False])
def test_a_config_as_transformers_writes_it_is_read_whole(name: str, full: bool, tmp_path: Path) -> None:
    config = CLASSES[name]()
    config.to_json_file(tmp_path / "config.json", use_diff=not full)
    fields = read_config(tmp_path)
    assert unread_names(fields) == []
    assert_equal(parse_spec(fields, "bfloat16"), config)


# ---- Against transformers, on random configs


def head_dim_of(config: Any) -> int:
    """As the models' code finds it."""
    derived = config.hidden_size // config.num_attention_heads
    return getattr(config, "head_dim", derived) if config.model_type == "qwen3_moe" else config.head_dim or derived


def dense_of(config: Any) -> tuple[int, ...]:
    """As Qwen3MoeDecoderLayer chooses; Mixtral has no dense layers."""
    if config.model_type == "mixtral":
        return ()
    only, step = config.mlp_only_layers, config.decoder_sparse_step
    return tuple(i for i in range(config.num_hidden_layers) if i in only or (i + 1) % step != 0)


def assert_equal(spec: ModelSpec, config: Any) -> None:
    """Every number of the spec is what transformers' config has, after its own defaulting."""
    is_mixtral = config.model_type == "mixtral"
    width = config.intermediate_size if is_mixtral else config.moe_intermediate_size
    dense = dense_of(config)
    window = config.sliding_window or 0
    positions = min(config.max_position_embeddings, PROMPT_TOKENS_MAX)
    found = {
        "family": spec.family,
        "layers": spec.num_layers,
        "hidden": spec.hidden,
        "vocab": spec.vocab,
        "positions": spec.max_positions,
        "window": spec.sliding_window,
        "eps": spec.norm_eps,
        "tie": spec.tie_embeddings,
        "heads": (spec.attention.num_heads, spec.attention.num_kv_heads, spec.attention.head_dim),
        "qk_norm": spec.attention.qk_norm,
        "scale": spec.attention.scale,
        "theta": spec.attention.rope.theta,
        "moe": (spec.moe.num_experts, spec.moe.top_k, spec.moe.expert_width, spec.moe.norm_topk),
        "dense": (spec.dense_layers, spec.dense_width),
    }
    assert config.rope_parameters["rope_type"] == "default"
    assert config.hidden_act in ("silu", "swish")
    assert not getattr(config, "attention_bias", False) or is_mixtral
    wanted = {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "positions": min(positions, window or positions),
        "window": window,
        "eps": config.rms_norm_eps,
        "tie": config.tie_word_embeddings,
        "heads": (config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)),
        "qk_norm": not is_mixtral,
        "scale": pytest.approx(head_dim_of(config) ** -0.5, rel=1e-15),
        "theta": config.rope_parameters["rope_theta"],
        "moe": (config.num_experts, config.num_experts_per_tok, width, is_mixtral or config.norm_topk_prob),
        "dense": (dense, config.intermediate_size if dense else 0),
    }
    assert found == wanted


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
    {"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": {"type": "default"}, "rope_theta": 88.0},
    {"rope_parameters": {"rope_theta": 700.0}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e4},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
    {"rope_parameters": {"rope_theta": 700.0, "factor": 4.0}},
    {"rope_scaling": [1]},
    {"rope_scaling": False},
]


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
        "sliding_window": [None, 100, 5000],
        "num_experts_per_tok": [1, 2, 3],
        "eos_token_id": [None, 5, [5, 6]],
        "pad_token_id": [None, 0, -1],
        "layer_types": [None, ["full_attention"] * layers, ["attention"] * layers],
        "num_local_experts": [5, 8, 130],
        "num_experts": [6, 9, 128],
        "attention_dropout": [0, 0.0, 0.5],
        "output_router_logits": [True, False],
        "router_aux_loss_coef": [0.0, 0.02],
        "use_cache": [False, True],
        "unheard_of": [1, None, {}],
    }
    if name == "qwen3_moe":
        options |= {
            "moe_intermediate_size": [20, 12],
            "norm_topk_prob": [True, False],
            "mlp_only_layers": [None, [], [0], [1, 99, -1]],
            "decoder_sparse_step": [1, 2, 3, 100, -2],
            "use_sliding_window": [True, False],
            "attention_bias": [False, False, False, True],
            "max_window_layers": [1, 28, None],
        }
    fields = {key: rng.choice(values) for key, values in options.items() if rng.random() < 0.7}
    if rng.random() < 0.25:
        spoiled = rng.choice(sorted(fields))
        fields[spoiled] = rng.choice([None, True, "x", 0, 4.0, [1.0], {}, "gelu"])
    return {"model_type": name, "architectures": [FAMILIES[name].architecture], **fields, **rng.choice(ROPES)}


def is_built(config: Any) -> bool:
    """Whether a config that transformers takes is one that we have to take too: its model can be made, and asks for
    nothing that is not built here."""
    sizes = [config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size]
    sizes += [config.num_experts, config.num_experts_per_tok, config.num_attention_heads, config.num_key_value_heads]
    sizes += [config.max_position_embeddings - 1, getattr(config, "moe_intermediate_size", 1)]
    if not all(type(size) is int and size > 0 for size in sizes):
        return False
    head_dim, window, parameters = head_dim_of(config), config.sliding_window, config.rope_parameters
    can_be_made = (
        (type(head_dim) is int and head_dim > 0 and head_dim % 2 == 0)
        and config.num_attention_heads % config.num_key_value_heads == 0
        and config.num_experts_per_tok <= config.num_experts
        and type(parameters["rope_theta"]) in (int, float)
        and parameters["rope_theta"] > 0
        and (window is None or window > 1)
        and getattr(config, "decoder_sparse_step", 1) != 0
    )
    return (
        can_be_made
        and config.hidden_act in ("silu", "swish")
        and parameters["rope_type"] == "default"
        and not (config.model_type == "qwen3_moe" and config.attention_bias)
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


# ---- What is refused, and by which words


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: mixtral, qwen3_moe, oracle_moe"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": -1}, r"hidden_size must be an integer in \[1, 65536\], is -1"),
        ({"hidden_size": "32"}, "hidden_size must be an integer, is '32'"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers must be an integer, is 2\.0"),
        ({"num_experts": 5.0}, r"num_experts must be an integer, is 5\.0"),
        ({"vocab_size": True}, "vocab_size must be an integer, is True"),
        ({"num_key_value_heads": None}, "num_key_value_heads must be an integer, is None"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a floating-point number, is 0"),
        ({"initializer_range": "x"}, "initializer_range must be a floating-point number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, is 1"),
        ({"head_dim": "8"}, "head_dim must be an integer or null, is '8'"),
        ({"num_experts_per_tok": 9}, "top-k 9 exceeds the 5 experts"),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3 kv heads"),
        ({"sliding_window": 1}, r"sliding_window must be an integer in \[2, "),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 2 types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer type 'linear_attention' is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer type 'sliding_attention' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' of rope_scaling is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear' of rope_scaling is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3' of rope_parameters is not supported"),
        ({"rope_parameters": {"rope_type": None}}, "rope type None of rope_parameters is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope type 'yarn' of rope_scaling is not supported",
        ),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, "type 'yarn' and the rope_type 'default'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            r"per layer type \(rope_parameters\.full_attention\) are not supported",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5 is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported; supported: null, 1"),
        ({"rope_theta": "10000"}, "rope_theta must be a number"),
        ({"rope_theta": None}, "rope_theta must be a number"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: silu, swish"),
        ({"hidden_act": {"name": "silu"}}, "hidden_act must be a string"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"eos_token_id": "x"}, "eos_token_id must be an integer or a list of integers or null, is 'x'"),
        ({"is_causal": False}, "is_causal=False is not supported"),
        ({"is_causal": None}, "is_causal=None is not supported"),
        ({"attention_chunk_size": 8}, "attention_chunk_size=8 is not supported; supported: null"),
        ({"kv_sharing_modes": ["reuse", "reuse"]}, "kv_sharing_modes=.* is not supported"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 4}}}, "per_layer_config=.* is not supported"),
        ({"text_config": {"hidden_size": 8}}, "text_config=.* is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors' is not supported"),
    ],
)
def test_bad_configs_are_refused_with_limit_and_value(changes: dict[str, object], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse_spec(MIXTRAL | changes, "float32")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported; supported: False"),
        ({"head_dim": None}, "head_dim must be an integer, is None"),
        ({"norm_topk_prob": None}, "norm_topk_prob must be true or false"),
        ({"mlp_only_layers": [1.0]}, "mlp_only_layers must be a list of integers or null"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must not be 0"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be an integer in"),
    ],
)
def test_bad_configs_of_qwen3_are_refused(changes: dict[str, object], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse_spec(QWEN3 | changes, "float32")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"GPTQ, 4 bit \(quantization_config"),
        ({"quant_method": "awq", "w_bit": 4}, "AWQ, 4 bit"),
        ({"quant_method": "fp8", "weight_block_size": None}, "FP8 with a scale for each tensor"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "FBGEMM FP8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt"),
        ({"quantization": {"quant_algo": "NVFP4"}, "producer": {"name": "modelopt"}}, "'NVFP4'"),
        ({"quant_method": "auto-round", "bits": 4}, "AutoRound, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bit"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "a_new_one", "bits": 2}, "'a_new_one', 2 bit"),
        ({}, "an unnamed method"),
        ([1], "an unnamed method"),
    ],
)
def test_a_quantization_is_named(config: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"quantized with {name}") as caught:
        parse_spec(MIXTRAL | {"quantization_config": config}, "float32")
    assert caught.value.code == "quantization_unsupported"
    assert parse_spec(MIXTRAL | {"quantization_config": None}, "float32").weight_block is None


def test_every_quantization_of_transformers_has_a_name_and_one_is_read() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    methods = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    assert {"fp8", "bitsandbytes", "torchao"} < methods
    for method in methods - {"fp8"}:
        with pytest.raises(CheckpointError, match=r"quantized with [^']") as caught:  # not by what config.json calls it
            parse_spec(MIXTRAL | {"quantization_config": {"quant_method": method}}, "float32")
        assert caught.value.code == "quantization_unsupported"
        with pytest.raises(CheckpointError, match=r"compression_config of config\.json"):
            parse_spec(MIXTRAL | {"compression_config": {"quant_method": method}}, "float32")
    for block in ([128, 128], [64, 32]):
        spec = parse_spec(
            MIXTRAL | {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}, "float32"
        )
        assert spec.weight_block == WeightBlock(*block)


# ---- Which family, which file


def test_the_model_type_decides_and_alone_is_enough() -> None:
    wanted = parse_spec(MIXTRAL, "float32")
    for architectures in (None, [], ["LlamaForCausalLM", "MixtralForCausalLM"], ["Qwen3MoeForCausalLM"], "x"):
        assert parse_spec(MIXTRAL | {"architectures": architectures}, "float32") == wanted
    assert parse_spec(TINY_MIXTRAL, "float32") == wanted  # of old: only architectures
    with pytest.raises(CheckpointError, match=r"architecture 'BertModel' is not supported; supported: Mixtral"):
        parse_spec({"architectures": ["BertModel"]}, "float32")


def test_keys_that_nobody_reads_are_told_and_change_nothing() -> None:
    extra = {"logit_scale": 0.5, "clip_qkv": 8, "auto_map": {}, "temperature": 0.2, "torch_dtype": "float16"}
    extra["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default", "factor": 4.0}
    fields = MIXTRAL | extra
    assert parse_spec(fields, "float32") == parse_spec(MIXTRAL, "float32")
    assert unread_names(fields) == ["clip_qkv", "logit_scale", "rope_parameters.factor"]
    both = fields | {"rope_scaling": {"type": "default"}}
    assert unread_names(both) == ["clip_qkv", "logit_scale", "rope_parameters"]


def test_eos_ids_come_from_generation_config_first_and_never_from_a_default(tmp_path: Path) -> None:
    def ids(config: dict[str, Any], generation: dict[str, Any] | None) -> tuple[int, ...]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "generation_config.json").write_text(json.dumps(generation or {}))
        return parse_spec(read_config(tmp_path), "float32").eos_token_ids

    without = {key: value for key, value in MIXTRAL.items() if key != "eos_token_id"}
    assert ids(without, None) == ()
    assert ids(without | {"eos_token_id": [7, 7, -1, 1 << 70]}, None) == (7,)
    assert ids(MIXTRAL, {"eos_token_id": None}) == (257,)
    assert ids(MIXTRAL, {"eos_token_id": [3, 4]}) == (3, 4)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be"):
        ids(MIXTRAL, {"eos_token_id": 3.0})


def test_a_config_that_points_to_another_file_is_refused(tmp_path: Path) -> None:
    for listed in (["config.4.0.0.json"], "x", None):
        (tmp_path / "config.json").write_text(json.dumps(MIXTRAL | {"configuration_files": listed}))
        with pytest.raises(CheckpointError, match=r"configuration_files=.* is not supported"):
            read_config(tmp_path)
    for listed in ([], ["config.json"]):
        (tmp_path / "config.json").write_text(json.dumps(MIXTRAL | {"configuration_files": listed}))
        assert read_config(tmp_path)["hidden_size"] == MIXTRAL["hidden_size"]


def test_without_tied_embeddings_no_weights_are_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert load_spec(tmp_path, "float32").tie_embeddings is False
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="has neither"):
        load_spec(tmp_path, "float32")
