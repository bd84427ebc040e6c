"""config.json of published models, as it lies on the hub: read whole, with the remarks that one would expect."""

from __future__ import annotations

from typing import Any

import pytest

from elasticmoe.common.families import parse_spec, unread_names
from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, ModelSpec
from elasticmoe.common.protocol.errors import CheckpointError

pytest.importorskip("transformers")

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
DEEPSEEK: dict[str, Any] = {
    **{"attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu"},
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    **{"initializer_range": 0.02, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_layer_freq": 1},
    **{"pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "seq_aux": True},
    **{"rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.33.1"},
    **{"use_cache": True, "v_head_dim": 128},
}
DEEPSEEK_V2_LITE = DEEPSEEK | {
    **{"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400},
    **{"bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048},
    **{"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64},
    **{"n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6},
    **{"num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0},
    **{"scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy"},
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
DEEPSEEK_V3 = DEEPSEEK | {
    **{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280},
    **{"bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "n_group": 8},
    **{"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1},
    **{"norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61},
    **{"num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "routed_scaling_factor": 2.5},
    **{"scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc"},
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
GLM_4_5_AIR: dict[str, Any] = {
    **{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "vocab_size": 151552, "head_dim": 128},
    **{"attention_bias": True, "attention_dropout": 0.0, "pad_token_id": 151329, "hidden_act": "silu"},
    **{"eos_token_id": [151329, 151336, 151338], "hidden_size": 4096, "partial_rotary_factor": 0.5},
    **{"initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 131072},
    **{"moe_intermediate_size": 1408, "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1},
    **{"topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "routed_scaling_factor": 1.0},
    **{"num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers": 46, "num_key_value_heads": 8},
    **{"num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.54.0"},
    **{"use_cache": True, "use_qk_norm": False},
}
QWEN_1_5_MOE: dict[str, Any] = {
    **{"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 151936},
    **{"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu"},
    **{"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192},
    **{"max_window_layers": 21, "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16},
    **{"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": True},
    **{"use_sliding_window": False, "decoder_sparse_step": 1, "num_experts_per_tok": 4, "num_experts": 60},
    **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "norm_topk_prob": False},
    **{"output_router_logits": False, "router_aux_loss_coef": 0.001},
}
OLMOE: dict[str, Any] = {
    **{"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 50304, "attention_bias": False},
    **{"attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048},
    **{"initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096, "num_experts": 64},
    **{"norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 16},
    **{"num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05},
    **{"rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True},
}
GRANITE_1B_A400M: dict[str, Any] = {
    **{"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "vocab_size": 49155},
    **{"attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625, "bos_token_id": 0},
    **{"embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 1024},
    **{"initializer_range": 0.02, "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 4096},
    **{"num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8},
    **{"num_local_experts": 32, "output_router_logits": False, "pad_token_id": 0, "residual_multiplier": 0.22},
    **{"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.0},
    **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.46.0.dev0"},
    "use_cache": True,
}
PUBLISHED = {
    "DeepSeek-V2-Lite": DEEPSEEK_V2_LITE,
    "DeepSeek-V3": DEEPSEEK_V3,
    "GLM-4.5-Air": GLM_4_5_AIR,
    "Qwen1.5-MoE-A2.7B": QWEN_1_5_MOE,
    "OLMoE-1B-7B-0924": OLMOE,
    "granite-3.0-1b-a400m": GRANITE_1B_A400M,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_whole(name: str) -> None:
    fields = PUBLISHED[name]
    spec = parse_spec(fields, "bfloat16")
    assert unread_names(fields) == []
    assert spec.architecture == fields["architectures"][0]


def attention_of(name: str) -> tuple[ModelSpec, AttentionSpec | LatentAttentionSpec]:
    spec = parse_spec(PUBLISHED[name], "bfloat16")
    return spec, spec.attention


def test_what_they_mean() -> None:
    """The numbers that people know of these models."""
    for name, layers in (("DeepSeek-V2-Lite", 27), ("DeepSeek-V3", 61)):
        spec, attention = attention_of(name)
        assert isinstance(attention, LatentAttentionSpec)
        assert attention.kv.elements == 576
        assert spec.kv_block_bytes(16) == 576 * 16 * layers * 2
        assert attention.rope.amplitude == 1.0
    # 1.59 and 1.87 times what the width of a head alone gives.
    scales = [attention_of(name)[1].scale * 192**0.5 for name in ("DeepSeek-V2-Lite", "DeepSeek-V3")]
    assert scales == [pytest.approx(1.5896, abs=1e-4), pytest.approx(1.8739, abs=1e-4)]
    spec, attention = attention_of("GLM-4.5-Air")
    assert isinstance(attention, AttentionSpec)
    assert (attention.rope.dims, attention.qkv_bias, attention.out_bias, attention.qk_norm) == (64, True, False, "none")
    assert spec.dense_layers == (0,)
    assert attention_of("Qwen1.5-MoE-A2.7B")[0].sliding_window == 0
    granite = parse_spec(GRANITE_1B_A400M, "bfloat16")
    assert (granite.residual_factor, granite.logits_factor) == (0.22, 1 / 6)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("DeepSeek-V2-Lite", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ("DeepSeek-V2-Lite", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported"),
        ("DeepSeek-V2-Lite", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        ("DeepSeek-V2-Lite", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("DeepSeek-V2-Lite", {"num_key_value_heads": 8}, "num_key_value_heads=8 is not supported; supported: 16"),
        ("DeepSeek-V2-Lite", {"n_shared_experts": None}, "n_shared_experts must be an integer, is None"),
        ("DeepSeek-V2-Lite", {"hidden_size": 2056}, "hidden_size 2056 is no multiple of 16 heads"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ("DeepSeek-V3", {"head_dim": 192}, "head_dim=192 is not supported"),
        ("DeepSeek-V3", {"n_group": 7}, "256 experts are no multiple of 7 groups"),
        ("DeepSeek-V3", {"topk_group": 9}, "topk_group 9 exceeds the 8 groups"),
        ("DeepSeek-V3", {"n_group": 256}, "256 groups have 1 each"),
        ("DeepSeek-V3", {"n_group": 64, "topk_group": 1}, "top-k 8 exceeds the 4 experts of 1 groups"),
        ("DeepSeek-V3", {"n_shared_experts": 33}, "n_shared_experts 33 of width 2048 exceed 65536"),
        ("DeepSeek-V3", {"rope_theta": 1}, "rope_theta must not be 1 with the rope type 'yarn' of rope_scaling"),
        (
            "DeepSeek-V3",
            {"rope_scaling": YARN | {"original_max_position_embeddings": None}},
            r"rope_scaling\.original_max_position_embeddings must be a number",
        ),
        ("DeepSeek-V3", {"qk_rope_head_dim": 63}, "63 of 63 elements of a head rotate"),
        ("GLM-4.5-Air", {"partial_rotary_factor": 0.01}, "1 of 128 elements of a head rotate"),
        ("GLM-4.5-Air", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be a number"),
        ("GLM-4.5-Air", {"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True, "sliding_window": None}, "sliding_window=None is not"),
        ("OLMoE-1B-7B-0924", {"head_dim": 64}, "16 heads of 64 elements are 1024"),
        ("OLMoE-1B-7B-0924", {"clip_qkv": 0.0}, "clip_qkv must be a number"),
        ("granite-3.0-1b-a400m", {"residual_multiplier": 0}, "residual_multiplier must be a number"),
        ("granite-3.0-1b-a400m", {"logits_scaling": 0.0}, "logits_scaling must be a number"),
        ("granite-3.0-1b-a400m", {"num_local_experts": None}, "num_local_experts must be an integer in"),
    ],
)
def test_what_would_change_the_mathematics_is_refused(name: str, change: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse_spec(PUBLISHED[name] | change, "bfloat16")


def test_a_window_of_some_layers_ends_sequences() -> None:
    """Qwen2-MoE slides in every other of the first layers: then no sequence may be longer than the window."""
    slides = QWEN_1_5_MOE | {"use_sliding_window": True, "sliding_window": 100}
    assert parse_spec(slides, "float32").max_positions == 100
    assert parse_spec(slides | {"max_window_layers": 0}, "float32").max_positions == 8192
    full = {"layer_types": ["full_attention"] * 24}
    assert parse_spec(slides | full, "float32").max_positions == 8192
    with pytest.raises(CheckpointError, match="layer type 'sliding_attention' is not supported"):
        parse_spec(QWEN_1_5_MOE | {"layer_types": ["sliding_attention"] * 24}, "float32")


def test_lists_of_layers_and_the_keys_that_they_took_the_place_of() -> None:
    glm: dict[str, Any] = {"model_type": "glm4_moe_lite", "num_hidden_layers": 3}
    assert parse_spec(glm, "float32").dense_layers == (0,)
    assert parse_spec(glm | {"first_k_dense_replace": 1}, "float32").dense_layers == (0,)
    types = {"mlp_layer_types": ["sparse", "dense", "sparse"]}
    assert parse_spec(glm | types, "float32").dense_layers == (1,)
    for change, text in (
        ({"first_k_dense_replace": 2}, r"first_k_dense_replace is 2, but by mlp_layer_types .* \(0,\)"),
        ({"mlp_layer_types": ["sparse"]}, "must be 3 times dense or sparse"),
        ({"mlp_layer_types": ["sparse", "moe", "dense"]}, "must be 3 times dense or sparse"),
    ):
        with pytest.raises(CheckpointError, match=text):
            parse_spec(glm | change, "float32")
    assert parse_spec(glm | {"head_dim": 32}, "float32").attention.rope.dims == 32  # another spelling of the width
