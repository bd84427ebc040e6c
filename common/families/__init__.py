"""Model families: from a checkpoint's config.json to a ModelSpec, and from a ModelSpec to its records.

What a checkpoint means is what transformers 5 makes of it (ADR 17). To add a family: one file here that says what its
keys and tensors are called and mean, and a line in `FAMILIES`. The compute side of a family lives in
`services/worker/model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from elasticmoe.common.checkpoint_files import read_json
from elasticmoe.common.families.config import Config, check_type
from elasticmoe.common.families.deepseek_v2 import DEEPSEEK_V2
from elasticmoe.common.families.deepseek_v3 import DEEPSEEK_V3
from elasticmoe.common.families.family import Family
from elasticmoe.common.families.glm4_moe import GLM4_MOE
from elasticmoe.common.families.glm4_moe_lite import GLM4_MOE_LITE
from elasticmoe.common.families.granitemoe import GRANITEMOE
from elasticmoe.common.families.mixtral import MIXTRAL
from elasticmoe.common.families.olmoe import OLMOE
from elasticmoe.common.families.oracle import ORACLE
from elasticmoe.common.families.quantization import SCALE, unread_quantization_keys, weight_block_of
from elasticmoe.common.families.qwen2_moe import QWEN2_MOE
from elasticmoe.common.families.qwen3_moe import QWEN3_MOE
from elasticmoe.common.families.rope import unread_rope_keys
from elasticmoe.common.families.shared_keys import check_shared_keys, unread_keys
from elasticmoe.common.model_spec import Dtype, ModelSpec, RecordKey, RecordSpec
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.protocol.limits import CONFIG_JSON_BYTES_MAX, VOCAB_MAX
from elasticmoe.common.sharding import sharded
from elasticmoe.common.weights import Weights, are_equal

__all__ = [
    "FAMILIES",
    "ORACLE",
    "Family",
    "load_spec",
    "parse_spec",
    "read_config",
    "record",
    "records",
    "unread_names",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITEMOE, GLM4_MOE),
        *(DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE),
        ORACLE,
    )
}
_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES.values()}
_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES.values()}


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint; its eos ids are completed from generation_config.json where there is one.

    Raises CheckpointError for a missing, oversized or malformed file.
    """
    fields = read_json(directory / "config.json", CONFIG_JSON_BYTES_MAX)
    if fields is None:
        raise CheckpointError("config.json is missing")
    _check_no_other(fields)
    generation = read_json(directory / "generation_config.json", CONFIG_JSON_BYTES_MAX) or {}
    ids = generation.get("eos_token_id")
    check_type("eos_token_id", ids, int | list[int] | None, "generation_config.json")
    if ids is not None:
        fields["eos_token_id"] = ids
    return fields


def load_spec(directory: Path, dtype: str, tp: int = 1) -> ModelSpec:
    """The ModelSpec of the checkpoint in `directory`, to be served in `dtype` by replicas of `tp` ranks. Raises
    CheckpointError; InvalidRequest (`tp_unsupported`) where it cannot be split so.

    Where config.json ties the head to the embedding, the weights have the last word: a stored head of its own that
    differs from the stored embedding is kept apart. Then, and only then, the weights' headers are read, and of these
    two tensors as much as they have in common; it blocks for that.
    """
    spec = sharded(parse_spec(read_config(directory), dtype), tp)
    family = FAMILIES[spec.family]
    if not (spec.tie_embeddings and family.head):
        return spec
    with Weights(directory) as weights:
        stored = {family.canonical(tensor.name): tensor for tensor in weights.tensors}

        def differ(end: str) -> bool:
            first, second = (stored.get(family.canonical(name + end)) for name in (family.embedding, family.head))
            return first is not None and second is not None and not are_equal(first, second)

        apart = differ("") or differ(SCALE)
    return msgspec.structs.replace(spec, tie_embeddings=False) if apart else spec


def parse_spec(fields: Mapping[str, Any], dtype: str) -> ModelSpec:
    """The ModelSpec that config.json's `fields` describe. Raises CheckpointError for anything not supported."""
    family = _family_of(fields)
    if dtype not in ("bfloat16", "float32"):
        raise CheckpointError(f"dtype {dtype!r:.40} is not supported; supported: bfloat16, float32")
    check_shared_keys(fields)
    config = Config(fields, family.keys, family.spellings)
    return ModelSpec(
        family=family.name,
        architecture=family.architecture,
        dtype=family.dtype or cast(Dtype, dtype),
        eos_token_ids=_eos_ids(fields),
        weight_block=weight_block_of(fields),
        **family.parse(config),
    )


def unread_names(fields: Mapping[str, Any]) -> list[str]:
    """What config.json's `fields`, which `parse_spec` has accepted, say and nobody reads, transformers included."""
    family = _family_of(fields)
    known = {**family.keys, **family.spellings}
    return [*unread_keys(fields, known), *unread_rope_keys(fields), *unread_quantization_keys(fields)]


def records(spec: ModelSpec) -> Iterator[RecordSpec]:
    """All records of a model: of each tp index base, then each layer's; then each expert's."""
    family = FAMILIES[spec.family]
    for index in range(spec.tp):
        yield family.base(spec, index)
        for layer in range(spec.num_layers):
            yield family.layer(spec, layer, index)
    for layer, count in enumerate(spec.num_experts_by_layer):
        for expert in range(count):
            yield family.expert(spec, layer, expert)


def record(spec: ModelSpec, key: RecordKey) -> RecordSpec:
    """The record called `key`."""
    family = FAMILIES[spec.family]
    if key.kind == "expert":
        return family.expert(spec, key.layer, key.expert)
    return family.layer(spec, key.layer, key.shard) if key.kind == "layer" else family.base(spec, key.shard)


def _family_of(fields: Mapping[str, Any]) -> Family:
    """By `model_type`, as transformers chooses; where that is absent, by the first of the `architectures`."""
    if "model_type" in fields:
        name = fields["model_type"]
        family = _BY_MODEL_TYPE.get(name) if isinstance(name, str) else None
        if family is None:
            supported = ", ".join(_BY_MODEL_TYPE)
            raise CheckpointError(f"config.json: model_type {name!r:.80} is not supported; supported: {supported}")
        return family
    architectures = fields.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    family = _BY_ARCHITECTURE.get(name) if isinstance(name, str) else None
    if family is None:
        supported = ", ".join(_BY_ARCHITECTURE)
        raise CheckpointError(f"config.json: architecture {name!r:.80} is not supported; supported: {supported}")
    return family


def _eos_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids. An absent key means none: transformers' generation, too, does not take a class's default.
    Ids that no vocabulary has, such as -1 for "none", can never be sampled."""
    value = fields.get("eos_token_id")
    check_type("eos_token_id", value, int | list[int] | None)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < VOCAB_MAX))


def _check_no_other(fields: Mapping[str, Any]) -> None:
    """transformers takes the config.VERSION.json that a config.json lists, by its own version."""
    listed = fields.get("configuration_files", [])
    if not isinstance(listed, list) or any(re.fullmatch(r"config\..+\.json", str(name)) for name in listed):
        raise CheckpointError(f"config.json: configuration_files={listed!r:.80} is not supported: only config.json is")
