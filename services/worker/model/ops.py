"""The operations that models are made of, bound to their memory: the seam between models and the host kernels.

An operation is made once, from tensors whose shapes, dtypes and contiguity are checked then. A step calls it with the
number of rows and looks at no tensor again. The maker keeps the tensors alive for as long as it uses the operation.

Shape suffixes: N rows of a step, H hidden, W width of a linear's output, C width of qkv, Q width of the queries, D
head_dim, E experts, K experts per token, I expert width, V vocabulary, M rows whose logits are wanted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import torch

from common.model_spec import AttentionSpec, ModelSpec, MoeSpec
from native import kernels
from services.worker.model.batch import Batch
from services.worker.model.weights import KvCache

Operation = Callable[[int], None]
"""Called with the number of rows N; writes the output that it is bound to."""

_CODES = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16}
_SPEC_CODES = {"float32": kernels.FLOAT32, "bfloat16": kernels.BFLOAT16}


def linear(x_NH: torch.Tensor, w_WH: torch.Tensor, out_NW: torch.Tensor, *, accumulate: bool = False) -> Operation:
    """out = x · w, or out += x · w."""
    width, depth = w_WH.shape
    x, out = _activations(x_NH, depth), _activations(out_NW, width)
    w, code = _stored(w_WH, width, depth)

    def run(n: int) -> None:
        kernels.linear(x, n, w, code, width, depth, out, accumulate)

    return run


def rms_norm(
    x_NH: torch.Tensor, delta_NH: torch.Tensor | None, weight_H: torch.Tensor, eps: float, out_NH: torch.Tensor
) -> Operation:
    """x += delta (where there is one); out = x / rms(x) * weight."""
    hidden = x_NH.shape[1]
    x, out, weight = _activations(x_NH, hidden), _activations(out_NH, hidden), _float32(weight_H, hidden)
    delta = 0 if delta_NH is None else _activations(delta_NH, hidden)

    def run(n: int) -> None:
        kernels.rms_norm(x, delta, 0, n, hidden, weight, eps, out)

    return run


def final_norm(
    x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
) -> Callable[[Batch], None]:
    """out = the norm of x + delta, of the rows whose logits are wanted."""
    hidden = x_NH.shape[1]
    x, delta, out = (_activations(tensor, hidden) for tensor in (x_NH, delta_NH, out_MH))
    weight = _float32(weight_H, hidden)

    def run(batch: Batch) -> None:
        if batch.num_logits:
            kernels.rms_norm(x, delta, batch.logit_rows_addr, batch.num_logits, hidden, weight, eps, out)

    return run


def embed(table_VH: torch.Tensor, out_NH: torch.Tensor) -> Callable[[Batch], None]:
    """out = the rows of the table that the batch's tokens name. Raises ValueError for a token beyond the vocabulary."""
    vocab, hidden = table_VH.shape
    table, code = _stored(table_VH, vocab, hidden)
    out = _activations(out_NH, hidden)

    def run(batch: Batch) -> None:
        kernels.embed(batch.token_ids_addr, batch.num_rows, table, code, vocab, hidden, out)

    return run


def check_parts(batch: Batch, cache: KvCache, spec: ModelSpec) -> kernels.Parts:
    """The batch over the blocks that are mapped now; keep both as long as it is used. Raises ValueError for a block
    beyond them."""
    view = kernels.KvView(
        cache.base_addr,
        cache.num_blocks,
        cache.geometry.block_stride,
        spec.num_layers,
        spec.attention.num_kv_heads,
        cache.geometry.block_size,
        spec.attention.head_dim,
        _SPEC_CODES[spec.dtype],
    )
    return kernels.Parts(
        view,
        batch.num_rows,
        batch.num_parts,
        batch.row_starts_addr,
        batch.kv_lens_addr,
        batch.block_starts_addr,
        batch.blocks_addr,
    )


def rope_table(spec: AttentionSpec, out_ND: torch.Tensor) -> Callable[[kernels.Parts], None]:
    """out = cosines and sines of each row's position, for `store_kv`."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    inv_freq: torch.Tensor = 1.0 / (spec.rope.theta**exponents)
    out = _activations(out_ND, spec.head_dim)

    def run(parts: kernels.Parts) -> None:
        kernels.rope_table(parts, inv_freq.data_ptr(), out)

    return run


def store_kv(
    spec: AttentionSpec,
    layer: int,
    qkv_NC: torch.Tensor,
    rope_ND: torch.Tensor,
    norms_D: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> Callable[[kernels.Parts], None]:
    """Norm (q's and k's weights, where the model has them) and rotate q and k in place; write k and v to the cache."""
    dim, heads = spec.head_dim, spec.num_heads
    qkv, rope = _activations(qkv_NC, (heads + 2 * spec.num_kv_heads) * dim), _activations(rope_ND, dim)
    q_norm, k_norm = (0, 0) if norms_D is None else (_float32(norm, dim) for norm in norms_D)

    def run(parts: kernels.Parts) -> None:
        kernels.store_kv(parts, layer, qkv, heads, rope, q_norm, k_norm, eps)

    return run


def attention(
    spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NQ: torch.Tensor
) -> Callable[[kernels.Parts], None]:
    """out = causal attention of the queries in qkv to the cache."""
    dim, heads, scale = spec.head_dim, spec.num_heads, spec.scale
    qkv = _activations(qkv_NC, (heads + 2 * spec.num_kv_heads) * dim)
    out = _activations(out_NQ, heads * dim)

    def run(parts: kernels.Parts) -> None:
        kernels.attention(parts, layer, qkv, heads, scale, out)

    return run


def route(
    x_NH: torch.Tensor, gate_EH: torch.Tensor, moe: MoeSpec, ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> Operation:
    """Softmax over x · gate; ids and weights of the top k experts, best first, of equals the lower id first."""
    hidden, num_experts, top_k, renormalize = x_NH.shape[1], moe.num_experts, moe.top_k, moe.norm_topk
    x, gate, weights = (
        _activations(x_NH, hidden),
        _float32(gate_EH, num_experts, hidden),
        _activations(weights_NK, top_k),
    )
    ids = _checked(ids_NK, (ids_NK.shape[0], top_k), torch.int32)

    def run(n: int) -> None:
        kernels.route(x, n, hidden, gate, num_experts, top_k, renormalize, ids, weights)

    return run


def experts(
    w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
    """Called with rows [>= R, H], counts [E] and R: each row becomes its expert's output, in place.

    w13 [E, 2 I, H] and w2 [E, H, I] may have gaps between experts; those without rows are not touched.
    """
    width, num_experts = moe.expert_width, moe.num_experts
    w13, w13_stride, code = _slots(w13_E, num_experts, 2 * width, hidden)
    w2, w2_stride, w2_code = _slots(w2_E, num_experts, hidden, width)
    if code != w2_code:
        raise ValueError(f"w13 is {w13_E.dtype} and w2 is {w2_E.dtype}")

    def run(rows_RH: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> None:
        rows, counts = rows_RH.data_ptr(), counts_E.data_ptr()
        kernels.experts(rows, num_rows, counts, num_experts, w13, w13_stride, w2, w2_stride, code, hidden, width, rows)

    return run


def feed_forward(
    x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
) -> Operation:
    """out = w2 · (silu(gate) * up), gate and up the halves of w13 · x: one expert that takes every row."""
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
