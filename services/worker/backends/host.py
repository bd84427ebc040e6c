"""The compute backend of host devices: the native kernels, which take addresses (native/kernels.pyi).

Addresses are taken when an operation is made; a step passes them on. Token and block ids are checked in the kernels.
Shape suffixes: as in base.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import NamedTuple

import torch

from elasticmoe.common.model_spec import AttentionSpec, MoeSpec
from elasticmoe.common.protocol.rank import Sampling
from elasticmoe.native import kernels
from elasticmoe.services.worker.backends.base import BatchOperation, ComputeBackend, Operation, inverse_frequencies
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache

_CODES = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16}
_FLOAT_BYTES = 4


class _HostBatch(NamedTuple):
    """A batch over the mapped blocks, and the addresses of what kernels read of it. Keeps both alive."""

    parts: kernels.Parts
    num_rows: int
    num_logits: int
    token_ids_addr: int
    logit_rows_addr: int
    batch: Batch


class HostBackend(ComputeBackend):
    """See ComputeBackend. Everything is computed at once, in the thread that calls."""

    name = "host"
    device = torch.device("cpu")
    is_synchronous = True
    _seen: tuple[torch.Tensor, int, kernels.KvView] | None = None  # blocks, number of those that are mapped, their view

    def _synchronize(self) -> None:
        """See ComputeBackend. Nothing is ever in flight."""

    def check_batch(self, batch: Batch, cache: KvCache) -> _HostBatch:
        """See ComputeBackend."""
        parts = kernels.Parts(
            self._view_of(cache),
            batch.num_rows,
            batch.num_parts,
            batch.row_starts.buffer_info()[0],
            batch.kv_lens.buffer_info()[0],
            batch.block_starts.buffer_info()[0],
            batch.blocks.buffer_info()[0],
        )
        token_ids_addr, logit_rows_addr = batch.token_ids.buffer_info()[0], batch.logit_rows.buffer_info()[0]
        return _HostBatch(parts, batch.num_rows, batch.num_logits, token_ids_addr, logit_rows_addr, batch)

    def _view_of(self, cache: KvCache) -> kernels.KvView:
        """The cache as kernels see it. Made where blocks came or went, and kept: asking a tensor takes microseconds."""
        seen = self._seen
        if seen is None or seen[0] is not cache.blocks or seen[1] != cache.num_blocks:
            _, layers, _, heads, block_size, dim = cache.blocks.shape
            stride, code = cache.geometry.block_stride, _CODES[cache.blocks.dtype]
            view = kernels.KvView(cache.base_addr, cache.num_blocks, stride, layers, heads, block_size, dim, code)
            seen = self._seen = (cache.blocks, cache.num_blocks, view)
        return seen[2]

    # ---- a decoder's

    def embed(self, table_VH: torch.Tensor, out_NH: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        vocab, hidden = table_VH.shape
        table, code = _stored(table_VH, vocab, hidden)
        out = _activations(out_NH, hidden)

        def run(step: _HostBatch) -> None:
            kernels.embed(step.token_ids_addr, step.num_rows, table, code, vocab, hidden, out)

        return run

    def linear(
        self, x_NH: torch.Tensor, w_WH: torch.Tensor, out_NW: torch.Tensor, *, accumulate: bool = False
    ) -> Operation:
        """See ComputeBackend."""
        width, depth = w_WH.shape
        x, out = _activations(x_NH, depth), _activations(out_NW, width)
        w, code = _stored(w_WH, width, depth)

        def run(n: int) -> None:
            kernels.linear(x, n, w, code, width, depth, out, accumulate)

        return run

    def rms_norm(
        self,
        x_NH: torch.Tensor,
        delta_NH: torch.Tensor | None,
        weight_H: torch.Tensor,
        eps: float,
        out_NH: torch.Tensor,
    ) -> Operation:
        """See ComputeBackend."""
        hidden = x_NH.shape[1]
        x, out, weight = _activations(x_NH, hidden), _activations(out_NH, hidden), _float32(weight_H, hidden)
        delta = 0 if delta_NH is None else _activations(delta_NH, hidden)

        def run(n: int) -> None:
            kernels.rms_norm(x, delta, 0, n, hidden, weight, eps, out)

        return run

    def final_norm(
        self, x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
    ) -> BatchOperation:
        """See ComputeBackend."""
        hidden = x_NH.shape[1]
        x, delta, out = (_activations(tensor, hidden) for tensor in (x_NH, delta_NH, out_MH))
        weight = _float32(weight_H, hidden)

        def run(step: _HostBatch) -> None:
            if step.num_logits:
                kernels.rms_norm(x, delta, step.logit_rows_addr, step.num_logits, hidden, weight, eps, out)

        return run

    def rope_table(self, spec: AttentionSpec, out_ND: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        inv_freq, out = inverse_frequencies(spec), _activations(out_ND, spec.head_dim)

        def run(step: _HostBatch) -> None:
            kernels.rope_table(step.parts, inv_freq.data_ptr(), out)

        return run

    def store_kv(
        self,
        spec: AttentionSpec,
        layer: int,
        qkv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norms_D: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> BatchOperation:
        """See ComputeBackend."""
        dim, heads = spec.head_dim, spec.num_heads
        qkv, rope = _activations(qkv_NC, (heads + 2 * spec.num_kv_heads) * dim), _activations(rope_ND, dim)
        q_norm, k_norm = (0, 0) if norms_D is None else (_float32(norm, dim) for norm in norms_D)

        def run(step: _HostBatch) -> None:
            kernels.store_kv(step.parts, layer, qkv, heads, rope, q_norm, k_norm, eps)

        return run

    def attention(self, spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NQ: torch.Tensor) -> BatchOperation:
        """See ComputeBackend."""
        dim, heads, scale = spec.head_dim, spec.num_heads, spec.scale
        qkv = _activations(qkv_NC, (heads + 2 * spec.num_kv_heads) * dim)
        out = _activations(out_NQ, heads * dim)

        def run(step: _HostBatch) -> None:
            kernels.attention(step.parts, layer, qkv, heads, scale, out)

        return run

    def route(
        self, x_NH: torch.Tensor, gate_EH: torch.Tensor, moe: MoeSpec, ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> Operation:
        """See ComputeBackend."""
        hidden, num_experts, top_k, renormalize = x_NH.shape[1], moe.num_experts, moe.top_k, moe.norm_topk
        x, gate = _activations(x_NH, hidden), _float32(gate_EH, num_experts, hidden)
        weights = _activations(weights_NK, top_k)
        ids = _checked(ids_NK, (ids_NK.shape[0], top_k), torch.int32)

        def run(n: int) -> None:
            kernels.route(x, n, hidden, gate, num_experts, top_k, renormalize, ids, weights)

        return run

    def experts(
        self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
    ) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
        """See ComputeBackend."""
        width, num_experts = moe.expert_width, moe.num_experts
        w13, w13_stride, code = _slots(w13_E, num_experts, 2 * width, hidden)
        w2, w2_stride, w2_code = _slots(w2_E, num_experts, hidden, width)
        if code != w2_code:
            raise ValueError(f"w13 is {w13_E.dtype} and w2 is {w2_E.dtype}")

        def run(rows_RH: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> None:
            rows, counts = rows_RH.data_ptr(), counts_E.data_ptr()
            kernels.experts(
                rows, num_rows, counts, num_experts, w13, w13_stride, w2, w2_stride, code, hidden, width, rows
            )

        return run

    def feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> Operation:
        """See ComputeBackend."""
        hidden = x_NH.shape[1]
        x, out = _activations(x_NH, hidden), _activations(out_NH, hidden)
        w13_addr, code = _stored(w13, 2 * width, hidden)
        w2_addr, w2_code = _stored(w2, hidden, width)
        if code != w2_code:
            raise ValueError(f"w13 is {w13.dtype} and w2 is {w2.dtype}")
        counts = array("i", [0])
        counts_addr = counts.buffer_info()[0]

        def run(n: int) -> None:
            counts[0] = n
            kernels.experts(x, n, counts_addr, 1, w13_addr, 0, w2_addr, 0, code, hidden, width, out)

        return run

    # ---- other models'

    def whole_number_attention(
        self, layer: int, modulus: int, base: int, kv_NE: torch.Tensor, out_NE: torch.Tensor
    ) -> BatchOperation:
        """See ComputeBackend."""
        kv, out = _activations(kv_NE, kv_NE.shape[1]), _activations(out_NE, kv_NE.shape[1])

        def run(step: _HostBatch) -> None:
            kernels.oracle_mix(step.parts, layer, kv, modulus, base, out)

        return run

    # ---- the choice of tokens

    def greatest(self, logits_BV: torch.Tensor) -> list[int]:
        """See ComputeBackend."""
        return kernels.greatest(logits_BV.data_ptr(), *logits_BV.shape)

    def draw(self, logits_BV: torch.Tensor, row: int, sampling: Sampling, uniform: float) -> int:
        """See ComputeBackend."""
        vocab = logits_BV.shape[1]
        address = logits_BV.data_ptr() + row * vocab * _FLOAT_BYTES
        return kernels.draw(
            address, vocab, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, uniform
        )

    def log_total(self, row_V: torch.Tensor) -> float:
        """See ComputeBackend."""
        return kernels.log_total(row_V.data_ptr(), row_V.shape[0])

    def top_tokens(self, row_V: torch.Tensor, count: int) -> list[int]:
        """See ComputeBackend."""
        return kernels.top_tokens(row_V.data_ptr(), row_V.shape[0], count)


def _checked(tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> int:
    """Address of a host tensor. Raises ValueError for another shape, dtype or device, or for gaps."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device.type != "cpu":
        raise ValueError(
            f"tensor is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; must be {shape} of {dtypes} on cpu"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"tensor of {shape} has strides {tensor.stride()}; must be contiguous")
    return tensor.data_ptr()


def _activations(tensor_NX: torch.Tensor, width: int) -> int:
    return _checked(tensor_NX, (tensor_NX.shape[0], width), torch.float32)


def _float32(tensor: torch.Tensor, *shape: int) -> int:
    return _checked(tensor, shape, torch.float32)


def _stored(tensor: torch.Tensor, *shape: int) -> tuple[int, int]:
    return _checked(tensor, shape, *_CODES), _CODES[tensor.dtype]


def _slots(tensor_E: torch.Tensor, num_experts: int, *shape: int) -> tuple[int, int, int]:
    """Address of slot 0, bytes from slot to slot, dtype. Touches no memory: slot 0 may be unmapped."""
    if tensor_E.shape[0] != num_experts:
        raise ValueError(f"tensor has slots for {tensor_E.shape[0]} experts; must have {num_experts}")
    first = tensor_E[0]
    return _checked(first, shape, *_CODES), tensor_E.stride(0) * tensor_E.element_size(), _CODES[tensor_E.dtype]
