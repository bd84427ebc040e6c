"""The kernels of NPUs: torch_npu's fused operators, and torch's own operations where none fits.

Products are of the weights' dtype: activations are rounded to it, and so are the products, which torch and the vendor
add up in float32. No page of the vendor's promises that a row among others has the bits of the row alone, so these
kernels do not (ADR 38).

The router is torch's: of equals `npu_moe_gating_top_k` takes which it likes, and what it makes of NaN nobody says,
where ids have to be distinct.

Shape suffixes: as in kernels.py; E experts, R rows of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch.nn.functional import linear

from elasticmoe.common.model_spec import AttentionSpec, ModelSpec
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.worker.backends.accelerator.batch import AcceleratorBatch
from elasticmoe.services.worker.backends.accelerator.kernels import (
    Kernels,
    Norm,
    PagedAttention,
    Product,
    RopeTable,
    Rotation,
    Route,
    RowGroups,
)
from elasticmoe.services.worker.backends.accelerator.npu_kernels.attention import LATENT_HEADS, FusedAttention
from elasticmoe.services.worker.backends.accelerator.npu_kernels.cache import flat, stored_pieces
from elasticmoe.services.worker.backends.accelerator.npu_kernels.routing import route_rows
from elasticmoe.services.worker.backends.sent_fields import Int32s

OPERATORS: Final = (
    "npu_fused_infer_attention_score",
    "npu_grouped_matmul",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_scatter_nd_update_",
    "npu_swiglu",
)
GROUPS_MAX: Final = 128  # weights of one call of npu_grouped_matmul
HEADS_PER_KV_MAX: Final = 64
LATENT_RANK, LATENT_ROPE = 512, 64
LATENT_BLOCKS: Final = (16, 128)  # tokens
BLOCK_MAX: Final = 512  # tokens
ALIGNED: Final = 16


def check_operators() -> None:
    """Raises ConfigError no_compute where torch does not have all of them."""
    missing = [name for name in OPERATORS if not hasattr(torch.ops.npu, name)]
    if missing:
        text = f"--compute torch_npu needs {', '.join(missing)}, which torch has not: install elasticmoe[npu]"
        raise ConfigError(text, code="no_compute")


class NpuKernels(Kernels):
    """See Kernels."""

    name = "torch_npu"

    def __init__(self, device: torch.device) -> None:
        """Raises ConfigError no_compute where torch_npu is missing, or is one without an operator."""
        check_operators()
        self._attention = FusedAttention(device)
        self.num_moves = 0

    def check_model(self, spec: ModelSpec, block_size: int) -> None:
        """See Kernels. The limits are those of npu_fused_infer_attention_score."""
        for is_wrong, what in _limits(spec, block_size):
            if is_wrong:
                text = f"--compute torch_npu does not compute {what}: use --compute torch"
                raise ConfigError(text, code="no_compute")

    def prepare(self, step: AcceleratorBatch) -> None:
        """See Kernels. No step has a form: fused attention takes lengths from the host, which a graph would keep."""

    def product(self, product: Product, n: int) -> None:
        """See Kernels."""
        x, w, out = product.x[:n], product.w, product.out[:n]
        if not n:
            return
        if len(w) == 1:
            result = linear(x[:, 0].to(w.dtype), w[0])[:, None]
        else:
            result = torch.bmm(x.transpose(0, 1).to(w.dtype), w.transpose(1, 2)).transpose(0, 1)
        if product.is_gated:
            result = torch.ops.npu.npu_swiglu(result, dim=-1)
        result = result.float()
        if product.bias is not None:
            result = result + product.bias
        if product.row_gate is not None:
            result = result * product.row_gate[:n, :, None].sigmoid()
        if product.accumulate:
            out += result
        else:
            out.copy_(result)

    def group_fields(self, counts: Int32s) -> Mapping[str, Int32s]:
        """See Kernels. The operator takes addresses and numbers of rows from the host."""
        del counts
        return {}

    def expert_products(
        self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, groups: RowGroups, *, is_gated: bool
    ) -> None:
        """See Kernels."""
        experts = np.flatnonzero(groups.counts)
        ends = np.cumsum(groups.counts)
        x = x.to(w.dtype)
        for at in range(0, len(experts), GROUPS_MAX):
            some = experts[at : at + GROUPS_MAX]
            first, end = int(ends[some[0]] - groups.counts[some[0]]), int(ends[some[-1]])
            result = _grouped(x[first:end], [w[expert] for expert in some.tolist()], (ends[some] - first).tolist())
            out[first:end] = torch.ops.npu.npu_swiglu(result, dim=-1) if is_gated else result

    def norm(self, norm: Norm, n: int, rows: torch.Tensor | None = None) -> None:
        """See Kernels."""
        if not n:
            return
        x = norm.x[:n] if rows is None else norm.x.index_select(0, rows)
        if norm.delta is not None:
            delta = norm.delta[:n] if rows is None else norm.delta.index_select(0, rows)
            x = x.add_(delta) if norm.keeps_sum else x + delta
        out, _ = torch.ops.npu.npu_rms_norm(x.contiguous(), norm.weight, epsilon=norm.eps)
        norm.out[:n] = out

    def rope_table(self, table: RopeTable, step: AcceleratorBatch) -> None:
        """See Kernels. Without the amplitude: the operator asks for cosines and sines up to 1."""
        if step.num_rows:
            angles = step.positions.float()[:, None] * table.frequencies
            table.out[: step.num_rows] = torch.cat([angles.cos(), angles.sin()], 1)

    def rotate(self, rotation: Rotation, n: int) -> None:
        """See Kernels."""
        if not n:
            return
        x = rotation.x[:n]
        both = rotation.table[:n].view(n, 1, 1, 2, -1)
        cosines, sines = (
            part.repeat_interleave(2, -1) if rotation.is_interleaved else torch.cat([part, part], -1)
            for part in both.unbind(3)
        )
        mode = "interleave" if rotation.is_interleaved else "half"
        # Rows are the operator's S, of one sequence: B is 1.
        turned = torch.ops.npu.npu_rotary_mul(x[:, None].contiguous(), cosines, sines, rotary_mode=mode)[:, 0]
        x.copy_(turned if rotation.amplitude == 1 else turned * rotation.amplitude)

    def store(self, x: torch.Tensor, layer: int, step: AcceleratorBatch) -> None:
        """See Kernels."""
        if not step.num_rows:
            return
        pieces = stored_pieces(step)
        values = x[: step.num_rows].to(step.kv.dtype).reshape(-1, pieces.elements)
        cache = flat(step.kv, layer, pieces.elements)
        torch.ops.npu.npu_scatter_nd_update_(cache, pieces.numbers[:, None], values)

    def attend(self, attention: PagedAttention, step: AcceleratorBatch) -> None:
        """See Kernels."""
        self._attention.attend(attention, step)

    def route(self, route: Route, n: int) -> None:
        """See Kernels."""
        if n:
            ids_NK, weights_NK = route_rows(route.logits[:n], route.bias, route.moe)
            route.ids[:n], route.weights[:n] = ids_NK, weights_NK


def _grouped(x: torch.Tensor, weights: list[torch.Tensor], ends: list[int]) -> torch.Tensor:
    """Products of rows with the weights [W, H] of their groups, which end at `ends`: the operator takes two or more."""
    if len(weights) == 1:
        return linear(x, weights[0])
    (result,) = torch.ops.npu.npu_grouped_matmul.List([x], [w.t() for w in weights], group_list=ends, split_item=3)
    product: torch.Tensor = result
    return product


def _limits(spec: ModelSpec, block_size: int) -> list[tuple[bool, str]]:
    """What would be wrong with a model, and whether it is."""
    attention = spec.attention
    limits = [
        (spec.dtype != "bfloat16", f"{spec.dtype}, but bfloat16"),
        (
            block_size % ALIGNED != 0 or block_size > BLOCK_MAX,
            f"KV blocks of {block_size} tokens, but of multiples of {ALIGNED} up to {BLOCK_MAX}",
        ),
    ]
    if isinstance(attention, AttentionSpec):
        per_kv = attention.num_heads // attention.num_kv_heads
        return [
            *limits,
            (attention.head_dim % ALIGNED != 0, f"heads of {attention.head_dim}, but of multiples of {ALIGNED}"),
            (per_kv > HEADS_PER_KV_MAX, f"{per_kv} heads for one of the cache, but up to {HEADS_PER_KV_MAX}"),
        ]
    sizes = attention.kv_rank, attention.rope.dims
    return [
        *limits,
        (block_size not in LATENT_BLOCKS, f"latents in blocks of {block_size} tokens, but of 16 or 128"),
        (sizes != (LATENT_RANK, LATENT_ROPE), f"latents of {sizes[0]} + {sizes[1]}, but of 512 + 64"),
        (attention.num_heads > LATENT_HEADS[-1], f"{attention.num_heads} heads over latents, but up to 128"),
    ]
