"""The oracle model's checkpoint: integers in float32, from which tests compute every next token by plain arithmetic.

The model exists to make loss visible: its next token depends on the whole cached history and on the weights of the
experts that were routed to, exactly, so one lost block or one wrong expert gives another token.

Tensors, all float32 holding whole numbers in [1, modulus), modulus 65521 (a prime; below 2**16, so that products fit
int64 and values are exact in float32). H = hidden_size, V = vocab_size, layers N, experts E:

    model.embed.weight                 [V, H]   one row per token
    model.layers.N.attn.salt           [H]      mixed into what layer N reads back from the KV cache
    model.layers.N.experts.E.mul       [H]      expert E's factor
    model.layers.N.experts.E.add       [H]      expert E's summand
    model.head.salt                    [H]      mixed into the choice of the next token

A KV cache entry has 2 x head_dim floats per token and layer: in two planes, or in one (LATENT_CONFIG).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elasticmoe.cli.models import byte_tokenizer
from elasticmoe.cli.models.checkpoint import (
    Progress,
    TensorPlan,
    check_seed,
    staged_directory,
    write_json,
    write_weights,
)
from elasticmoe.cli.models.random_weights import generator_of, positive

MODULUS = 65521

ORACLE_CONFIG: dict[str, Any] = {
    "architectures": ["OracleMoeForCausalLM"],
    "model_type": "oracle_moe",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 12,
    "num_experts_per_tok": 3,
    "intermediate_size": 4,
    "max_position_embeddings": 32768,
    "vocab_size": byte_tokenizer.VOCAB_SIZE,
    "oracle_modulus": MODULUS,
    "tie_word_embeddings": False,
    "bos_token_id": byte_tokenizer.BOS_ID,
    "eos_token_id": byte_tokenizer.EOS_ID,
    "torch_dtype": "float32",
}

# The same in a cache that is shaped as latent attention's: one plane, and a width that is no power of two.
LATENT_CONFIG: dict[str, Any] = ORACLE_CONFIG | {"head_dim": 18, "oracle_kv_planes": 1}

# A device that decodes 16 sequences in about 30 ms and computes some 4,000 prompt tokens a second alone; of a wider
# deployment each rank computes its share of all experts' rows.
PACED_CONFIG: dict[str, Any] = ORACLE_CONFIG | {
    "oracle_step_us": 10_000,
    "oracle_token_us": 80,
    "oracle_sequence_us": 400,
    "oracle_kv_ns": 800,
    "oracle_row_us": 25,
}


def make_oracle(
    directory: Path,
    *,
    seed: int,
    dtype: str,
    progress: Progress | None = None,
    config: Mapping[str, Any] = ORACLE_CONFIG,
) -> Path:
    """Write the oracle checkpoint (one file, about 45 kB) with its byte-level tokenizer. Atomic. `config`: the
    oracle's, with another cache or a pace; the tensors are the same.

    Raises ValueError if `dtype` is not float32, which its whole numbers need, if `seed` is negative, or if `directory`
    is not empty.
    """
    if dtype != "float32":
        raise ValueError(f"the oracle model holds whole numbers that only float32 keeps exact, got dtype {dtype!r}")
    check_seed(seed)
    with staged_directory(directory) as stage:
        write_json(stage / "config.json", config)
        byte_tokenizer.write_byte_tokenizer(stage)
        plans = [TensorPlan(name, shape, partial(_draw, name, shape, seed)) for name, shape in _shapes()]
        write_weights(stage, plans, torch.float32, shards=1, progress=progress)
    return directory


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = positive(ORACLE_CONFIG, "hidden_size")
    yield "model.embed.weight", (positive(ORACLE_CONFIG, "vocab_size"), hidden)
    for layer in range(positive(ORACLE_CONFIG, "num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.attn.salt", (hidden,)
        for expert in range(positive(ORACLE_CONFIG, "num_local_experts")):
            yield f"{prefix}.experts.{expert}.mul", (hidden,)
            yield f"{prefix}.experts.{expert}.add", (hidden,)
    yield "model.head.salt", (hidden,)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = generator_of(seed, name).integers(1, MODULUS, size=shape, dtype=np.int64)
    return torch.from_numpy(values.astype(np.float32))
