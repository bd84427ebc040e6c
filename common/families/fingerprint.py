"""What the bytes of a loaded model mean, in a few characters: two that differ must not be taken for each other.

Memory outlives the process that filled it, and so may come into the hands of another version of this package. Where
that one would lay records out, name or convert tensors in another way, it must load them anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from elasticmoe.common.families import record
from elasticmoe.common.model_spec import ModelSpec, RecordKey, RecordSpec

# Of what becomes of stored elements on their way: stacking, rounding, dequantizing. To be raised with any of them.
_TRANSFORMS: Final = 1
# Of what lies where in a block of KV: the order of layers, planes, heads and tokens, and what was done to keys and
# values before. Blocks outlive processes, too, and are read by others. To be raised with any of that.
_KV_LAYOUT: Final = 1


def fingerprint(spec: ModelSpec, described: Callable[[RecordKey], RecordSpec] | None = None) -> str:
    """Of the records and the KV of `spec`, as this package lays them out and fills them: a digest over the spec, with
    the format of stored weights and the shape of a token's KV, and over each tensor's name, shape, dtype, offset and
    sources. Takes a millisecond or two, and less where the caller has the records `described` already."""
    described = described or partial(record, spec)
    versions = (_TRANSFORMS, _KV_LAYOUT)
    digest = hashlib.blake2b(msgspec.msgpack.encode((versions, spec, spec.rank_attention.kv)), digest_size=16)
    for key in _keys(spec):
        digest.update(msgspec.msgpack.encode(described(key)))
    return digest.hexdigest()


def _keys(spec: ModelSpec) -> list[RecordKey]:
    """One expert stands for all of its layer, which differ by their number alone."""
    keys = [RecordKey("expert", layer, 0) for layer, count in enumerate(spec.num_experts_by_layer) if count]
    for index in range(spec.tp):
        keys.append(RecordKey("base", shard=index))
        keys += (RecordKey("layer", layer, shard=index) for layer in range(spec.num_layers))
    return keys
