"""The table of docs/sizing.md is what the product's own check computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.cli.models.configs import QWEN3_MOE_1B, TINY_MIXTRAL
from elasticmoe.common.capacity import sizes_of, weights_on
from elasticmoe.common.config import defaults
from elasticmoe.common.devices.factory import backend_of
from elasticmoe.common.families import parse_spec
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.model_spec import kv_geometry

PAGE = (Path(__file__).parent.parent.parent / "docs" / "sizing.md").read_text()
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "rms_norm_eps": 1e-5}
# As cli/models/upcycle.py makes it of SmolLM2-135M, and as the two large models are published.
CONFIGS: dict[str, dict[str, Any]] = {
    "`tiny`": TINY_MIXTRAL,
    "`demo`": MIXTRAL
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 49152}
    | {"max_position_embeddings": 8192, "rope_theta": 100_000.0, "tie_word_embeddings": True, "eos_token_id": 2},
    "`qwen3-moe-1b`": QWEN3_MOE_1B,
    "Qwen3-30B-A3B": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu"}
    | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
    | {"num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
    | {"rope_theta": 1e6, "tie_word_embeddings": False, "norm_topk_prob": True, "decoder_sparse_step": 1}
    | {"mlp_only_layers": [], "attention_bias": False, "eos_token_id": 151645},
    "Mixtral-8x7B": MIXTRAL
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
    | {"max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": False, "eos_token_id": 2},
}
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def close(cell: str, nbytes: float) -> bool:
    """Whether a cell of the page says `nbytes`, within what its digits leave open."""
    number, unit = cell.split()
    digit = 10.0 ** -len(number.partition(".")[2])
    return abs(float(number) - nbytes / UNITS[unit]) <= 0.51 * digit


@pytest.mark.parametrize("model", CONFIGS)
def test_the_table_is_computed(model: str) -> None:
    row = re.search(rf"^\| {re.escape(model)} \|(.*)\|$", PAGE, re.MULTILINE)
    assert row is not None, model
    *weights, kv = [cell.strip() for cell in row[1].split("|")]
    spec, granularity = parse_spec(CONFIGS[model], "bfloat16"), defaults()["granularity"]
    for cell, num_devices in zip(weights, (1, 2, 4, 8), strict=True):
        layout = initial_layout(spec.num_experts_by_layer, [f"host:{i}" for i in range(num_devices)])
        most = max(weights_on(sizes_of(spec, granularity), layout).values())
        assert close(cell, most), (cell, num_devices)
    geometry = kv_geometry(spec, defaults()["block_size"], granularity, backend_of("host").kv_handle_bytes_min)
    tokens_of_handle = geometry.blocks_per_handle * defaults()["block_size"]
    assert close(kv, geometry.handle_bytes / tokens_of_handle * 2_048), kv
