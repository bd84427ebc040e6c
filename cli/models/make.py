"""The named models and the one function that makes them."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from elasticmoe.cli.models import byte_tokenizer
from elasticmoe.cli.models.checkpoint import Progress, num_shards_for, parse_dtype, staged_directory
from elasticmoe.cli.models.fp8 import quantize_files
from elasticmoe.cli.models.oracle import LATENT_CONFIG, PACED_CONFIG, make_oracle
from elasticmoe.cli.models.random_weights import random_checkpoint, random_plans

_BYTE_LEVEL: dict[str, Any] = {
    "vocab_size": byte_tokenizer.VOCAB_SIZE,
    "bos_token_id": byte_tokenizer.BOS_ID,
    "eos_token_id": byte_tokenizer.EOS_ID,
}

# Odd sizes on purpose: nothing is a power of two, so code that assumes one fails here.
TINY_MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 96,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "num_local_experts": 7,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    **_BYTE_LEVEL,
}

TINY_QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_size": 96,
    "intermediate_size": 200,
    "moe_intermediate_size": 40,
    "mlp_only_layers": [],
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "num_experts": 11,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    **_BYTE_LEVEL,
}

QWEN3_MOE_1B: dict[str, Any] = TINY_QWEN3_MOE | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 32768,
    "vocab_size": 32768,
}


class _Maker(Protocol):
    def __call__(self, directory: Path, *, seed: int, dtype: str, progress: Progress | None) -> Path: ...


@dataclass(frozen=True, slots=True)
class _Model:
    """A named model: what it is in a few words, the dtype it has unless told otherwise, and its maker."""

    summary: str
    dtype: str
    make: _Maker


def make_model(
    name: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make the model `name` (see `model_names`) in `directory` and return `directory`.

    Blocks: well under a second for the tiny models, up to a minute for the large ones, which write 1.4 to 2.1 GB and
    hold about 1 GB of memory. Equal (name, seed, dtype) give equal files. `dtype` ("bfloat16" or "float32")
    replaces the model's own; `progress(bytes_done, bytes_total)` is called after each tensor. Only `demo` uses the
    network, once: its source is kept in the user's cache folder.

    Atomic: `directory` must be absent or empty and appears complete or not at all. Raises ValueError for an unknown
    name (the text lists the known ones), a bad seed or dtype, a folder that is not empty, too little disk space, or a
    download that fails or does not have the expected hash; OSError when reading or writing fails.
    """
    model = _MODELS.get(name)
    if model is None:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_MODELS)}")
    return model.make(directory, seed=seed, dtype=dtype or model.dtype, progress=progress)


def model_names() -> dict[str, str]:
    """The names that `make_model` knows, each with a few words on what it is."""
    return {name: model.summary for name, model in _MODELS.items()}


def _random(config: dict[str, Any]) -> _Maker:
    def make(directory: Path, *, seed: int, dtype: str, progress: Progress | None) -> Path:
        shards = num_shards_for(random_plans(config, seed), parse_dtype(dtype))
        return random_checkpoint(
            directory, config, seed=seed, dtype=dtype, shards=shards, tokenizer=True, progress=progress
        )

    return make


def _quantized(make_source: _Maker) -> _Maker:
    def make(directory: Path, *, seed: int, dtype: str, progress: Progress | None) -> Path:
        with staged_directory(directory) as stage:
            source = make_source(stage / "source", seed=seed, dtype=dtype, progress=_share(progress, 0))
            quantize_files(source, stage, progress=_share(progress, 1))
            shutil.rmtree(source)
        return directory

    return make


def _share(progress: Progress | None, half: int) -> Progress | None:
    """Of two steps that take about as long."""
    return None if progress is None else lambda done, total: progress(half * total + done, 2 * total)


def _demo(directory: Path, *, seed: int, dtype: str, progress: Progress | None) -> Path:
    # Imported here because only this model needs the gguf package, and what that imports.
    from elasticmoe.cli.models.upcycle import make_demo

    return make_demo(directory, seed=seed, dtype=dtype, progress=progress)


_MODELS: Mapping[str, _Model] = {
    "tiny-mixtral": _Model("random Mixtral: 3 layers, 7 experts top-2", "float32", _random(TINY_MIXTRAL)),
    "tiny-qwen3-moe": _Model("random Qwen3-MoE: 3 layers, 11 experts top-3", "float32", _random(TINY_QWEN3_MOE)),
    "oracle": _Model("integer model whose every token plain arithmetic predicts, for tests", "float32", make_oracle),
    "oracle-latent": _Model(
        "the oracle with a KV cache as of latent attention", "float32", partial(make_oracle, config=LATENT_CONFIG)
    ),
    "oracle-paced": _Model(
        "the oracle with a stand-in for accelerator time, for benchmarks of scaling",
        "float32",
        partial(make_oracle, config=PACED_CONFIG),
    ),
    "qwen3-moe-1b": _Model("random Qwen3-MoE of 1.04 B weights: 64 experts top-8", "bfloat16", _random(QWEN3_MOE_1B)),
    "qwen3-moe-1b-fp8": _Model(
        "the same, quantized to FP8 in blocks, as models are published", "bfloat16", _quantized(_random(QWEN3_MOE_1B))
    ),
    "demo": _Model("SmolLM2-135M-Instruct as an 8-expert Mixtral of 0.69 B: answers in English", "bfloat16", _demo),
}
