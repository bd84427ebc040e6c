"""Random checkpoints of every family, under the tensor names that their Hugging Face hub checkpoints have.

Which tensors there are, and of which shapes, `common/families` says: those that a family's records are made of. Each is
drawn from its own generator, seeded by (seed, tensor name): a tensor's values depend neither on the order of writing
nor on the number of shards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elasticmoe.cli.models.byte_tokenizer import write_byte_tokenizer
from elasticmoe.cli.models.checkpoint import (
    Progress,
    TensorPlan,
    check_seed,
    parse_dtype,
    staged_directory,
    write_json,
    write_weights,
)
from elasticmoe.common.families import ORACLE, parse_spec, record
from elasticmoe.common.model_spec import LatentAttentionSpec, ModelSpec, RecordKey, Source, TensorSpec
from elasticmoe.common.protocol.errors import CheckpointError

# An embedding below 1 lets attention and experts, not the last token alone, decide the next token: lost context shows.
_EMBEDDING_STD = 0.5
# Queries are longer than keys, so that attention picks tokens out. Otherwise it averages over all of them, which makes
# the positions of a long prompt alike: few experts get most tokens, and one lost token changes little. Much more than 2
# makes the model so sensitive that bfloat16 rounding decides tokens.
_QUERY_GAIN = 2.0
_NORM_STD = 0.05
_BIAS_STD = 0.1


def random_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    dtype: str,
    shards: int = 1,
    tokenizer: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write random weights for a `config` (the content of a hub `config.json`) of any family into `directory`.

    Writes `config.json` (with `torch_dtype` set to `dtype`), the weights in at most `shards` files, and, with
    `tokenizer`, the byte-level tokenizer filled up to the vocabulary's size. `seed` >= 0; `dtype` is "bfloat16" or
    "float32". Linear weights have a standard deviation of 1/sqrt(fan_in), norms are 1 plus a little noise; queries have
    twice that size. What a family stores fused is fused.

    Atomic: `directory` must be absent or empty and appears complete or not at all. Returns it. Raises ValueError for a
    config that cannot be served, for a bad argument and for a folder that is not empty.
    """
    torch_dtype = parse_dtype(dtype)
    plans = random_plans(config, seed)
    with staged_directory(directory) as stage:
        write_json(stage / "config.json", {**config, "torch_dtype": dtype})
        if tokenizer:
            write_byte_tokenizer(stage, vocab_size=positive(config, "vocab_size"))
        write_weights(stage, plans, torch_dtype, shards=shards, progress=progress)
    return directory


def random_plans(config: Mapping[str, Any], seed: int) -> list[TensorPlan]:
    """The tensors of `config`'s family, with seeded random values. Raises ValueError like `random_checkpoint`."""
    check_seed(seed)
    try:
        spec = parse_spec(config, "float32")
    except CheckpointError as error:
        raise ValueError(error.message) from None
    if spec.family == ORACLE.name:
        raise ValueError(f"the weights of {spec.architecture} are whole numbers, which `make_oracle` writes")
    specs = {of.name: of for tensor in _in_order(spec) for of in _drawn(spec, tensor)}
    return [TensorPlan(of.name, of.shape, partial(_draw, of, seed)) for of in specs.values()]


def _in_order(spec: ModelSpec) -> Iterator[TensorSpec]:
    """The tensors of all records as checkpoints have them: embedding, layer by layer, then the end."""
    embedding, *end = record(spec, RecordKey("base")).tensors
    yield embedding
    for layer, count in enumerate(spec.num_experts_by_layer):
        yield from record(spec, RecordKey("layer", layer)).tensors
        for expert in range(count):
            yield from record(spec, RecordKey("expert", layer, expert)).tensors
    yield from end


def _drawn(spec: ModelSpec, tensor: TensorSpec) -> Iterator[_Spec]:
    """What a record's tensor is made of. Of all experts in one tensor, each yields the same."""
    for source in tensor.sources:
        fan_in = source.shape[-1]
        if tensor.name.endswith("norm"):
            # A norm undoes what the projection's size is, so the queries get theirs here.
            yield _Spec(source.name, source.shape, _NORM_STD, _QUERY_GAIN if tensor.name == "q_norm" else 1.0)
        elif tensor.name.endswith("bias"):
            yield _Spec(source.name, source.shape, _BIAS_STD)
        elif tensor.name == "embed" and not spec.tie_embeddings:
            yield _Spec(source.name, source.shape, _EMBEDDING_STD)
        else:
            gain = _QUERY_GAIN if _gives_queries(spec, tensor, source) else 1.0
            yield _Spec(source.name, source.stored_shape, gain / math.sqrt(fan_in))


def _gives_queries(spec: ModelSpec, tensor: TensorSpec, source: Source) -> bool:
    """Whether queries come from this tensor, and no norm after it."""
    if isinstance(spec.attention, LatentAttentionSpec):
        return tensor.name == "q"
    return spec.attention.qk_norm == "none" and tensor.name == "qkv" and source == tensor.sources[0]


def positive(config: Mapping[str, Any], key: str) -> int:
    """`config[key]` as an int >= 1. Raises ValueError that names the key if it is absent or anything else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config needs {key} as a whole number of at least 1, got {value!r}")
    return value


def generator_of(seed: int, name: str) -> np.random.Generator:
    """The random generator of tensor `name`: equal for equal (seed, name), independent of every other tensor's."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype=np.uint32)
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *words.tolist()])))


@dataclass(frozen=True, slots=True)
class _Spec:
    """One tensor's name, shape and the normal distribution that its values come from."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def _draw(spec: _Spec, seed: int) -> torch.Tensor:
    values = generator_of(seed, spec.name).standard_normal(spec.shape, dtype=np.float32)
    values *= np.float32(spec.std)
    values += np.float32(spec.mean)
    return torch.from_numpy(values)
