"""The named models and the one function that makes them."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from elasticmoe.cli.models import configs
from elasticmoe.cli.models.checkpoint import Progress, num_shards_for, parse_dtype, staged_directory
from elasticmoe.cli.models.fp8 import quantize_files
from elasticmoe.cli.models.oracle import LATENT_CONFIG, PACED_CONFIG, make_oracle
from elasticmoe.cli.models.random_weights import random_checkpoint, random_plans


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

    Blocks: well under a second for the tiny models, up to some minutes for the large ones, which write 1.4 to 3.5 GB
    and hold about 1 GB of memory. Equal (name, seed, dtype) give equal files. `dtype` ("bfloat16" or "float32")
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
    "tiny-mixtral": _Model("random Mixtral: 3 layers, 7 experts top-2", "float32", _random(configs.TINY_MIXTRAL)),
    "tiny-qwen2-moe": _Model(
        "random Qwen2-MoE: 3 layers, 9 experts top-3 and a shared one", "float32", _random(configs.TINY_QWEN2_MOE)
    ),
    "tiny-qwen3-moe": _Model(
        "random Qwen3-MoE: 3 layers, 11 experts top-3", "float32", _random(configs.TINY_QWEN3_MOE)
    ),
    "tiny-olmoe": _Model("random OLMoE: 3 layers, 11 experts top-3", "float32", _random(configs.TINY_OLMOE)),
    "tiny-granitemoe": _Model(
        "random GraniteMoE: 3 layers, 9 experts top-3", "float32", _random(configs.TINY_GRANITEMOE)
    ),
    "tiny-glm4-moe": _Model(
        "random GLM-4-MoE: 3 layers, 15 experts in 3 groups top-4", "float32", _random(configs.TINY_GLM4_MOE)
    ),
    "tiny-glm4-moe-lite": _Model(
        "random GLM-4-MoE-Lite: 3 layers, latent attention, 11 experts top-3",
        "float32",
        _random(configs.TINY_GLM4_MOE_LITE),
    ),
    "tiny-deepseek-v2": _Model(
        "random DeepSeek-V2: 3 layers, latent attention, 10 experts in 5 groups top-3",
        "float32",
        _random(configs.TINY_DEEPSEEK_V2),
    ),
    "tiny-deepseek-v3": _Model(
        "random DeepSeek-V3: 3 layers, latent attention, 21 experts in 3 groups top-4",
        "float32",
        _random(configs.TINY_DEEPSEEK_V3),
    ),
    "oracle": _Model("integer model whose every token plain arithmetic predicts, for tests", "float32", make_oracle),
    "oracle-latent": _Model(
        "the oracle with a KV cache as of latent attention", "float32", partial(make_oracle, config=LATENT_CONFIG)
    ),
    "oracle-paced": _Model(
        "the oracle with a stand-in for accelerator time, for benchmarks of scaling",
        "float32",
        partial(make_oracle, config=PACED_CONFIG),
    ),
    "qwen3-moe-1b": _Model(
        "random Qwen3-MoE of 1.04 B weights: 64 experts top-8", "bfloat16", _random(configs.QWEN3_MOE_1B)
    ),
    "qwen3-moe-1b-fp8": _Model(
        "the same, quantized to FP8 in blocks, as models are published",
        "bfloat16",
        _quantized(_random(configs.QWEN3_MOE_1B)),
    ),
    "deepseek-v2-lite-cut": _Model(
        "random DeepSeek-V2 of 1.75 B weights: the widths of DeepSeek-V2-Lite, 6 layers, 32 experts top-6",
        "bfloat16",
        _random(configs.DEEPSEEK_V2_LITE_CUT),
    ),
    "demo": _Model("SmolLM2-135M-Instruct as an 8-expert Mixtral of 0.69 B: answers in English", "bfloat16", _demo),
}
