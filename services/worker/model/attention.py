"""Attention of the decoder: what a layer keeps in the KV cache, and how it is read.

Another kind (such as latent attention) is another class with the same methods; the decoder takes the class.
Shape suffixes: N rows, H hidden, Q width of the queries, C width of qkv, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.services.worker.backends.base import BatchOperation, ComputeBackend, StepBatch


@dataclass(frozen=True, slots=True)
class AttentionBuffers:
    """Memory that the attention layers of one model share. All float32 with room for a step's rows."""

    qkv_NC: torch.Tensor
    attended_NQ: torch.Tensor
    rope_ND: torch.Tensor


class GroupedQueryAttention:
    """One layer: x is read, its attention is added to `residual`."""

    @staticmethod
    def make_buffers(backend: ComputeBackend, spec: ModelSpec, max_tokens: int) -> AttentionBuffers:
        """The memory for steps of at most `max_tokens` rows."""
        dim, heads, kv_heads = spec.attention.head_dim, spec.attention.num_heads, spec.attention.num_kv_heads
        widths = ((heads + 2 * kv_heads) * dim, heads * dim, dim)
        return AttentionBuffers(*(backend.empty(max_tokens, width) for width in widths))

    @staticmethod
    def make_prepare(backend: ComputeBackend, spec: ModelSpec, buffers: AttentionBuffers) -> BatchOperation:
        """What is computed once for all layers of a step."""
        return backend.rope_table(spec.attention, buffers.rope_ND)

    def __init__(
        self,
        backend: ComputeBackend,
        spec: ModelSpec,
        layer: int,
        tensors: dict[str, torch.Tensor],
        buffers: AttentionBuffers,
        x_NH: torch.Tensor,
        residual_NH: torch.Tensor,
    ) -> None:
        norms = (tensors["q_norm"], tensors["k_norm"]) if spec.attention.qk_norm else None
        self._project = backend.linear(x_NH, tensors["qkv"], buffers.qkv_NC)
        self._store = backend.store_kv(spec.attention, layer, buffers.qkv_NC, buffers.rope_ND, norms, spec.norm_eps)
        self._attend = backend.attention(spec.attention, layer, buffers.qkv_NC, buffers.attended_NQ)
        self._output = backend.linear(buffers.attended_NQ, tensors["out"], residual_NH, accumulate=True)

    def __call__(self, step: StepBatch, n: int) -> None:
        """Compute the layer for the step's `n` rows."""
        self._project(n)
        self._store(step)
        self._attend(step)
        self._output(n)
