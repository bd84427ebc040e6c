"""Tensor parallelism as data of the spec: which part of each tensor the rank of a tp index holds. Pure (ADR 37).

Attention is cut by heads: the rows of what makes queries, keys and values, the columns of the output projection.
Ordinary and shared feed-forwards are cut by their width: rows of gate and up, columns of down. Embedding and head are
cut by the vocabulary. What is added once is rank 0's (the output projection's bias); all else that is small is
everybody's. Experts are not cut: they are spread over the ranks of all replicas.
"""

from __future__ import annotations

from typing import Final

import msgspec

from elasticmoe.common.model_spec import AttentionSpec, ModelSpec, Source
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.wording import counted


class Shard(msgspec.Struct, frozen=True):
    """The share of one of `of` ranks."""

    index: int
    of: int

    def span(self, count: int) -> tuple[int, int]:
        """[begin, end) of `count` things, which follow each other rank by rank; shares differ by one at most."""
        return count * self.index // self.of, count * (self.index + 1) // self.of

    def size(self, count: int) -> int:
        """How many of `count` things it has."""
        begin, end = self.span(count)
        return end - begin

    def rows(self, source: Source, unit: int = 1) -> Source:
        """Its part of a matrix's rows, or of a vector, `unit` of which stay together."""
        return self._cut(source, 0, unit)

    def columns(self, source: Source, unit: int = 1) -> Source:
        """Its part of a matrix's columns, `unit` of which stay together."""
        return self._cut(source, 1, unit)

    def _cut(self, source: Source, axis: int, unit: int) -> Source:
        begin, end = self.span(source.shape[axis] // unit)
        return source.cut(axis, begin * unit, end * unit)

    def of_kv_heads(self, count: int) -> Shard:
        """The share of `count` kv heads: those that its heads read, one where there are fewer than ranks."""
        return self if count >= self.of else Shard(self.index * count // self.of, count)


WHOLE: Final = Shard(0, 1)
"""The share of a rank that is a replica by itself."""


def sharded(spec: ModelSpec, tp: int) -> ModelSpec:
    """The model for replicas of `tp` ranks. Raises InvalidRequest (`tp_unsupported`) where it cannot be cut so."""
    attention = spec.attention
    if attention.num_heads % tp:
        raise _unsupported(tp, f"its {counted(attention.num_heads, 'attention head')} are no multiple of that")
    if isinstance(attention, AttentionSpec) and attention.num_kv_heads % tp and tp % attention.num_kv_heads:
        heads = counted(attention.num_kv_heads, "kv head")
        raise _unsupported(tp, f"its {heads} are no multiple of that, nor is it one of them")
    widths = {"vocabulary": spec.vocab}
    if spec.dense_layers:
        widths["ordinary feed-forward's width"] = spec.dense_width
    if spec.moe.shared_width:
        widths["shared experts' width"] = spec.moe.shared_width
    for what, width in widths.items():
        if width < tp:
            raise _unsupported(tp, f"its {what} is {width}")
    return msgspec.structs.replace(spec, tp=tp)


def shard_of(spec: ModelSpec, index: int) -> Shard:
    """The share of a replica's rank. Raises ValueError for one that the replica does not have."""
    if not 0 <= index < spec.tp:
        raise ValueError(f"tp index {index} is not below tp {spec.tp}")
    return Shard(index, spec.tp)


def _unsupported(tp: int, why: str) -> InvalidRequest:
    return InvalidRequest(f"the model cannot be split over {tp} devices (tp): {why}", code="tp_unsupported")
