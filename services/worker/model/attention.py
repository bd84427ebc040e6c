"""Attention of the decoder: what a layer keeps in the KV cache, and how it is read.

Another kind is another class with the same methods; `attention_of` chooses by the spec.
Shape suffixes: N rows, H hidden, Q width of the queries, C width of qkv or of latent and shared key, D elements that
rotate, O width of what attention gives, A rank of the queries' projection.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec
import torch

from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, ModelSpec
from elasticmoe.services.worker.backends.base import BatchOp, ComputeBackend, Mirror, Op
from elasticmoe.services.worker.model.program import Program


class ResidualStream(NamedTuple):
    """What a layer reads and writes, float32 with room for a step's rows: the normed `x_NH`, and the residual, to which
    the layer's output is added. Where a replica has several ranks it goes to `partial_NH` instead, added up over them,
    and is left to the next norm."""

    x_NH: torch.Tensor
    residual_NH: torch.Tensor
    partial_NH: Mirror | None = None


class Attention(Protocol):
    """The attention layers of one model: what they share, and what a step does in each."""

    prepare: BatchOp
    """What is computed once for all layers of a step."""

    def write(
        self, program: Program, layer: int, tensors: dict[str, torch.Tensor], stream: ResidualStream, eps: float
    ) -> None:
        """One layer, over its record's tensors: x is read, its attention is added to the residual. Where a replica has
        several ranks, they meet in it."""


def attention_of(backend: ComputeBackend, spec: ModelSpec, max_tokens: int) -> Attention:
    """A rank's part of the attention of `spec`, with buffers for steps of at most `max_tokens` rows."""
    attention = spec.rank_attention
    if isinstance(attention, LatentAttentionSpec):
        return LatentAttention(backend, attention, max_tokens)
    return GroupedQueryAttention(backend, attention, max_tokens, spec.tp)


class GroupedQueryAttention:
    """See Attention. Owns the buffers of all its layers."""

    def __init__(self, backend: ComputeBackend, spec: AttentionSpec, max_tokens: int, tp: int = 1) -> None:
        self._backend, self._spec = backend, spec
        self._replica_norm: ReplicaNorm | None = None
        self._qkv_NC = backend.empty(max_tokens, spec.query_width + 2 * spec.num_kv_heads * spec.head_dim)
        self._out_NO = backend.empty(max_tokens, spec.out_width)
        self._rope_ND = backend.empty(max_tokens, spec.rope.dims)
        self.prepare = backend.rope_table(spec.rope, self._rope_ND)
        if tp > 1 and spec.qk_norm == "token":
            self._replica_norm = ReplicaNorm(backend, spec, self._qkv_NC, tp)
            self._spec = msgspec.structs.replace(spec, qk_norm="none")

    def write(
        self, program: Program, layer: int, tensors: dict[str, torch.Tensor], stream: ResidualStream, eps: float
    ) -> None:
        """See Attention."""
        backend, spec, qkv_NC = self._backend, self._spec, self._qkv_NC
        norms = None if spec.qk_norm == "none" else (tensors["q_norm"], tensors["k_norm"])
        program.compute(backend.linear(stream.x_NH, tensors["qkv"], qkv_NC, bias_W=tensors.get("qkv_bias")))
        if self._replica_norm is not None:
            self._replica_norm.write(program, tensors, eps)
        program.compute_batch(
            backend.store_kv(spec, layer, qkv_NC, self._rope_ND, norms, eps),
            backend.attention(spec, layer, qkv_NC, self._out_NO),
        )
        _write_output(program, backend, self._out_NO, tensors, stream)


class LatentAttention:
    """See Attention. Owns the buffers of all its layers."""

    def __init__(self, backend: ComputeBackend, spec: LatentAttentionSpec, max_tokens: int) -> None:
        self._backend, self._spec = backend, spec
        self._q_NQ = backend.empty(max_tokens, spec.query_width)
        self._low_NA, self._normed_NA = (backend.empty(max_tokens, spec.q_rank) for _ in range(2))
        self._kv_NC = backend.empty(max_tokens, spec.kv.width)
        self._out_NO = backend.empty(max_tokens, spec.out_width)
        self._rope_ND = backend.empty(max_tokens, spec.rope.dims)
        self.prepare = backend.rope_table(spec.rope, self._rope_ND)

    def write(
        self, program: Program, layer: int, tensors: dict[str, torch.Tensor], stream: ResidualStream, eps: float
    ) -> None:
        """See Attention. The norms of the two ranks have an epsilon of their own, whatever the model's is."""
        del eps
        backend, spec = self._backend, self._spec
        program.compute(
            *self._queries(tensors, stream),
            backend.linear(stream.x_NH, tensors["kv_a"], self._kv_NC, bias_W=tensors.get("kv_a_bias")),
        )
        program.compute_batch(
            backend.store_latent(
                spec, layer, self._q_NQ, self._kv_NC, self._rope_ND, tensors["kv_a_norm"], spec.norm_eps
            ),
            backend.latent_attention(spec, layer, self._q_NQ, tensors["kv_b"], self._out_NO),
        )
        _write_output(program, backend, self._out_NO, tensors, stream)

    def _queries(self, tensors: dict[str, torch.Tensor], stream: ResidualStream) -> tuple[Op, ...]:
        backend, spec = self._backend, self._spec
        if not spec.q_rank:
            return (backend.linear(stream.x_NH, tensors["q"], self._q_NQ),)
        return (
            backend.linear(stream.x_NH, tensors["q_a"], self._low_NA, bias_W=tensors.get("q_a_bias")),
            backend.rms_norm(self._low_NA, None, tensors["q_a_norm"], spec.norm_eps, self._normed_NA),
            backend.linear(self._normed_NA, tensors["q"], self._q_NQ),
        )


class ReplicaNorm:
    """The norm of queries and keys over all heads of a token, of which a rank has some: the ranks add up the squares.

    A kv head that several ranks have is counted by each: it is then so in `counts`, too."""

    def __init__(self, backend: ComputeBackend, spec: AttentionSpec, qkv_NC: torch.Tensor, tp: int) -> None:
        query, key = spec.query_width, spec.num_kv_heads * spec.head_dim
        self._backend, self._qkv_NC = backend, qkv_NC
        self._parts = ((0, query), (query, query + key))
        self._counts = (query * tp, key * tp)
        self._squares_NC = backend.empty(*qkv_NC.shape)
        self._sums_N2 = backend.mirror(qkv_NC.shape[0], 2)
        chosen_2C = torch.zeros(2, qkv_NC.shape[1])
        for row, (begin, end) in zip(chosen_2C, self._parts, strict=True):
            row[begin:end] = 1
        self._chosen_2C = chosen_2C.to(backend.device)
        self._square = backend.square(qkv_NC, self._squares_NC)
        self._add_up = backend.linear(self._squares_NC, self._chosen_2C, self._sums_N2.device)

    def write(self, program: Program, tensors: dict[str, torch.Tensor], eps: float) -> None:
        """One layer's, with its weights: in place, of the rows in qkv."""
        sums_N2 = self._sums_N2
        program.compute(self._square, self._add_up)
        program.meet(lambda exchange, n: exchange.reduce(sums_N2, None, sums_N2, n))
        for at, (name, (begin, end), count) in enumerate(
            zip(("q_norm", "k_norm"), self._parts, self._counts, strict=True)
        ):
            x_NW, squares_N = self._qkv_NC[:, begin:end], sums_N2.device[:, at]
            program.compute(self._backend.scale_by_squares(x_NW, squares_N, count, tensors[name], eps))


def _write_output(
    program: Program,
    backend: ComputeBackend,
    out_NO: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    stream: ResidualStream,
) -> None:
    partial_NH, bias = stream.partial_NH, tensors.get("out_bias")
    target_NH = stream.residual_NH if partial_NH is None else partial_NH.device
    program.compute(backend.linear(out_NO, tensors["out"], target_NH, bias_W=bias, accumulate=partial_NH is None))
    if partial_NH is not None:
        program.meet(lambda exchange, n: exchange.reduce(partial_NH, None, partial_NH, n))
