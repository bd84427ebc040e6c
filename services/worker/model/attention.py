"""Attention of the decoder: what a layer keeps in the KV cache, and how it is read.

Another kind is another class with the same methods; `attention_of` chooses by the spec.
Shape suffixes: N rows, H hidden, Q width of the queries, C width of qkv or of latent and shared key, D elements that
rotate, O width of what attention gives, A rank of the queries' projection.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, ModelSpec
from elasticmoe.services.worker.backends.base import BatchOperation, ComputeBackend, Operation, StepBatch


class ResidualStream(NamedTuple):
    """What a layer reads and writes, float32 with room for a step's rows: the normed `x_NH`, and the residual, to which
    the layer's output is added."""

    x_NH: torch.Tensor
    residual_NH: torch.Tensor


class Attention(Protocol):
    """The attention layers of one model: what they share, and what a step does in each."""

    prepare: BatchOperation
    """What is computed once for all layers of a step."""

    def layer(self, layer: int, tensors: dict[str, torch.Tensor], stream: ResidualStream, eps: float) -> AttentionLayer:
        """One layer, over its record's tensors."""


class AttentionLayer(Protocol):
    """One layer: x is read, its attention is added to the residual."""

    def __call__(self, step: StepBatch, n: int) -> None:
        """Compute the layer for the step's `n` rows."""


def attention_of(backend: ComputeBackend, spec: ModelSpec, max_tokens: int) -> Attention:
    """The attention of `spec`, with buffers for steps of at most `max_tokens` rows."""
    if isinstance(spec.attention, LatentAttentionSpec):
        return LatentAttention(backend, spec.attention, max_tokens)
    return GroupedQueryAttention(backend, spec.attention, max_tokens)


class GroupedQueryAttention:
    """See Attention. Owns the buffers of all its layers."""

    def __init__(self, backend: ComputeBackend, spec: AttentionSpec, max_tokens: int) -> None:
        self._backend, self._spec = backend, spec
        self._qkv_NC = backend.empty(max_tokens, spec.query_width + 2 * spec.num_kv_heads * spec.head_dim)
        self._out_NO = backend.empty(max_tokens, spec.out_width)
        self._rope_ND = backend.empty(max_tokens, spec.rope.dims)
        self.prepare = backend.rope_table(spec.rope, self._rope_ND)

    def layer(self, layer: int, tensors: dict[str, torch.Tensor], stream: ResidualStream, eps: float) -> AttentionLayer:
        """See Attention."""
        backend, spec, qkv_NC = self._backend, self._spec, self._qkv_NC
        norms = None if spec.qk_norm == "none" else (tensors["q_norm"], tensors["k_norm"])
        project = backend.linear(stream.x_NH, tensors["qkv"], qkv_NC, bias_W=tensors.get("qkv_bias"))
        store = backend.store_kv(spec, layer, qkv_NC, self._rope_ND, norms, eps)
        attend = backend.attention(spec, layer, qkv_NC, self._out_NO)
        output = _output(backend, self._out_NO, tensors, stream)

        def run(step: StepBatch, n: int) -> None:
            project(n)
            store(step)
            attend(step)
            output(n)

        return run


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

    def layer(self, layer: int, tensors: dict[str, torch.Tensor], stream: ResidualStream, eps: float) -> AttentionLayer:
        """See Attention. The norms of the two ranks have an epsilon of their own, whatever the model's is."""
        del eps
        backend, spec = self._backend, self._spec
        queries = self._queries(tensors, stream)
        compress = backend.linear(stream.x_NH, tensors["kv_a"], self._kv_NC, bias_W=tensors.get("kv_a_bias"))
        store = backend.store_latent(
            spec, layer, self._q_NQ, self._kv_NC, self._rope_ND, tensors["kv_a_norm"], spec.norm_eps
        )
        attend = backend.latent_attention(spec, layer, self._q_NQ, tensors["kv_b"], self._out_NO)
        output = _output(backend, self._out_NO, tensors, stream)

        def run(step: StepBatch, n: int) -> None:
            for operation in queries:
                operation(n)
            compress(n)
            store(step)
            attend(step)
            output(n)

        return run

    def _queries(self, tensors: dict[str, torch.Tensor], stream: ResidualStream) -> tuple[Operation, ...]:
        backend, spec = self._backend, self._spec
        if not spec.q_rank:
            return (backend.linear(stream.x_NH, tensors["q"], self._q_NQ),)
        return (
            backend.linear(stream.x_NH, tensors["q_a"], self._low_NA, bias_W=tensors.get("q_a_bias")),
            backend.rms_norm(self._low_NA, None, tensors["q_a_norm"], spec.norm_eps, self._normed_NA),
            backend.linear(self._normed_NA, tensors["q"], self._q_NQ),
        )


def _output(
    backend: ComputeBackend, out_NO: torch.Tensor, tensors: dict[str, torch.Tensor], stream: ResidualStream
) -> Operation:
    return backend.linear(out_NO, tensors["out"], stream.residual_NH, bias_W=tensors.get("out_bias"), accumulate=True)
