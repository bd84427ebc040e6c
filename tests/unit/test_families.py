"""What config.json means: the same numbers as transformers' own config classes, or a refusal that names the key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.families import FAMILIES, load_spec, parse_spec, read_config, unread_names
from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.families.shared_keys import unread_keys
from elasticmoe.common.model_spec import WeightBlock
from elasticmoe.common.protocol.errors import CheckpointError
from tests.unit.references import CLASSES, assert_equal
from tests.unit.specs import TINY_MIXTRAL, TINY_QWEN3

transformers = pytest.importorskip("transformers")

# Read by a family, or told to change nothing, although its class in transformers does not have them.
BEYOND_THE_CLASS = {
    **{name: {"head_dim"} for name in ("qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe")},
    "deepseek_v2": {"qk_head_dim"},
    "deepseek_v3": {"head_dim", "qk_head_dim"},
    "glm4_moe_lite": {"first_k_dense_replace", "qk_head_dim"},
}
# So that a config of defaults is whole, and the keys that depend on others are read.
WHOLE: dict[str, dict[str, Any]] = {
    "oracle": {
        **{"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 4, "num_hidden_layers": 1},
        **{"vocab_size": 9, "head_dim": 4, "oracle_modulus": 257},
    },
    "qwen3_moe": {"use_sliding_window": True, "mlp_only_layers": [0]},
    "qwen2_moe": {"use_sliding_window": True, "mlp_only_layers": [0]},
    "deepseek_v2": {
        **{"num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
        **{"first_k_dense_replace": 1},
    },
    "olmoe": {"clip_qkv": 8.0},
    "glm4_moe": {"head_dim": 128},
}
MIXTRAL = TINY_MIXTRAL | {"model_type": "mixtral"}
QWEN3 = TINY_QWEN3 | {"model_type": "qwen3_moe"}


def own_fields(name: str) -> dict[str, Any]:
    """The class's fields that are not every config's."""
    shared = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    return {field.name: field for field in dataclasses.fields(CLASSES[name]) if field.name not in shared}


@pytest.mark.parametrize("name", CLASSES)
def test_a_family_has_the_keys_types_and_defaults_of_its_class(name: str) -> None:
    keys, fields = FAMILIES[name].keys, own_fields(name)
    assert set(keys) - BEYOND_THE_CLASS.get(name, set()) == set(fields)
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
    parse_spec({"model_type": FAMILIES[name].model_type, **WHOLE.get(name, {})}, "float32")
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
    config = CLASSES[name](**WHOLE.get(name, {}))
    config.to_json_file(tmp_path / "config.json", use_diff=not full)
    fields = read_config(tmp_path)
    assert unread_names(fields) == []
    assert_equal(parse_spec(fields, "bfloat16"), config)


# ---- What is refused, and by which words


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: mixtral, qwen2_moe, qwen3_moe, "),
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
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' of rope_scaling is not supported; supp"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope type 'proportional' of rope_parameters is not"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, r"rope_scaling\.factor must be a number in .* is '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor must be a number in .* is 0"),
        ({"rope_scaling": {"type": "dynamic"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, r"rope_scaling\.truncate must be true or f"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": "x"}}, r"rope_scaling\.mscale must be a number"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, r"rope_parameters\.low_freq_factor is missing"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            r"rope_scaling\.high_freq_factor 4 must be above low_freq_factor 4",
        ),
        ({"rope_parameters": {"rope_type": None}}, "rope type None of rope_parameters is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "su", "factor": 4.0}},
            "rope type 'su' of rope_scaling is not supported",
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
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported; supported: null, softmax"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported; supported: null, greedy"),
        ({"topk_method": "group_limited_greedy"}, "topk_method=.* is not supported; supported: null, greedy$"),
        ({"n_group": 8}, "n_group=8 is not supported; supported: null, 0, 1"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 is not supported; supported: null, 1"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config=.* is not supported"),
        ({"index_topk": 2048}, "index_topk=2048 is not supported; supported: null"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not supported; supported: null, True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; supported: null, 1"),
    ],
)
def test_bad_configs_are_refused_with_limit_and_value(changes: dict[str, object], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse_spec(MIXTRAL | changes, "float32")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
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
