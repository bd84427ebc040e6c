"""The kernels in Triton, launched over tensors (see Kernels).

Tiles are constants: a number that would be chosen by how many rows there are would change rows' last bits.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from elasticmoe.common.model_spec import MoeSpec
from elasticmoe.services.worker.backends.accelerator.kernels import Queries
from elasticmoe.services.worker.backends.accelerator.triton_kernels.attention import attention_kernel, join_kernel
from elasticmoe.services.worker.backends.accelerator.triton_kernels.products import product_kernel
from elasticmoe.services.worker.backends.accelerator.triton_kernels.routing import route_kernel
from elasticmoe.services.worker.backends.accelerator.triton_kernels.rows import (
    norm_kernel,
    rope_table_kernel,
    rotate_kernel,
    store_kernel,
)

ROWS: Final = 16
WIDTH: Final = 64
DEPTH: Final = 64
HEADS: Final = 16  # that one program rotates or joins
SPLIT: Final = 512  # positions
SUMS_MAX: Final = 1 << 24  # elements of what queries have taken from splits, before they are joined: 64 MiB
BLOCK_MAX: Final = 1024
SMALLEST: Final = 16  # that tensor cores multiply


class AttentionTile(NamedTuple):
    """`queries`: positions x heads. What an SM holds bounds it: a latent of 512 in float32 has 2 KiB."""

    queries: int
    keys: int
    warps: int


TILES: Final = {1: AttentionTile(16, 16, 8), 2: AttentionTile(32, 32, 4)}  # by the planes of the cache


def power_of_two(least: int) -> int:
    """The smallest one that is not less."""
    return 1 << max(0, least - 1).bit_length()


def blocks_of(total: int, block: int) -> int:
    """How many blocks hold `total`."""
    return -(-total // block)


class TritonKernels:
    """See Kernels. Owns the memory that attention keeps its splits in."""

    name = "triton"
    rows_per_tile = ROWS

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.empty(0, dtype=torch.float32, device=device)

    def queries_per_tile(self, heads_per_kv: int, planes: int) -> int:
        """See Kernels."""
        return TILES[planes].queries // min(power_of_two(heads_per_kv), TILES[planes].queries)

    def product(
        self,
        x_NH: torch.Tensor,
        w_WH: torch.Tensor,
        out_NW: torch.Tensor,
        n: int,
        *,
        bias_W: torch.Tensor | None = None,
        row_gate_N: torch.Tensor | None = None,
        accumulate: bool = False,
    ) -> None:
        """See Kernels."""
        _launch_product(
            x_NH[:, None], w_WH[None], out_NW[:, None], n, bias=bias_W, row_gate=row_gate_N, accumulate=accumulate
        )

    def gated_product(self, x_NH: torch.Tensor, w13: torch.Tensor, out_NI: torch.Tensor, n: int) -> None:
        """See Kernels."""
        _launch_product(x_NH[:, None], w13[None], out_NI[:, None], n, gated=True)

    def head_products(self, x_NXY: torch.Tensor, w_XWY: torch.Tensor, out_NXW: torch.Tensor, n: int) -> None:
        """See Kernels."""
        _launch_product(x_NXY, w_XWY, out_NXW, n)

    def expert_products(
        self, x_RH: torch.Tensor, w_EWH: torch.Tensor, out_RW: torch.Tensor, tiles_T3: torch.Tensor, *, gated: bool
    ) -> None:
        """See Kernels."""
        _launch_product(x_RH[:, None], w_EWH, out_RW[:, None], 0, tiles=tiles_T3, gated=gated)

    def norm(
        self,
        x_NXY: torch.Tensor,
        delta_NXY: torch.Tensor | None,
        weight_Y: torch.Tensor,
        eps: float,
        out_NXY: torch.Tensor,
        n: int,
        *,
        rows_N: torch.Tensor | None = None,
        keeps_sum: bool = False,
    ) -> None:
        """See Kernels."""
        if not n:
            return
        _, groups, width = x_NXY.shape
        norm_kernel[(n, groups)](
            x_NXY,
            x_NXY if delta_NXY is None else delta_NXY,
            weight_Y,
            out_NXY,
            x_NXY if rows_N is None else rows_N,
            eps,
            width,
            *x_NXY.stride()[:2],
            *out_NXY.stride()[:2],
            HAS_DELTA=delta_NXY is not None,
            HAS_ROWS=rows_N is not None,
            KEEPS_SUM=keeps_sum,
            BLOCK=min(power_of_two(width), BLOCK_MAX),
        )

    def rope_table(
        self, positions_N: torch.Tensor, frequencies: torch.Tensor, amplitude: float, out_ND: torch.Tensor, n: int
    ) -> None:
        """See Kernels."""
        if n:
            half = len(frequencies)
            rope_table_kernel[(n,)](positions_N, frequencies, out_ND, half, amplitude, BLOCK=power_of_two(half))

    def rotate(self, x_NXD: torch.Tensor, table_ND: torch.Tensor, n: int, *, interleaved: bool) -> None:
        """See Kernels."""
        _, heads, dims = x_NXD.shape
        if n:
            block_heads = min(power_of_two(heads), HEADS)
            rotate_kernel[(n, blocks_of(heads, block_heads))](
                x_NXD,
                table_ND,
                dims // 2,
                heads,
                *x_NXD.stride()[:2],
                INTERLEAVED=interleaved,
                BLOCK_HEADS=block_heads,
                BLOCK=power_of_two(dims // 2),
            )

    def store(
        self, x_NPW: torch.Tensor, cache: torch.Tensor, blocks_N: torch.Tensor, places_N: torch.Tensor, n: int
    ) -> None:
        """See Kernels."""
        _, planes, width = x_NPW.shape
        if n:
            store_kernel[(n,)](
                x_NPW,
                cache,
                blocks_N,
                places_N,
                planes,
                width,
                x_NPW.stride(0),
                cache.stride(0),
                cache.stride(2),
                BLOCK_PLANES=power_of_two(planes),
                BLOCK=min(power_of_two(width), BLOCK_MAX),
            )

    def attend(
        self,
        q_NXY: torch.Tensor,
        cache: torch.Tensor,
        value_width: int,
        scale: float,
        queries: Queries,
        out: torch.Tensor,
    ) -> None:
        """See Kernels."""
        heads, key_width = q_NXY.shape[1:]
        _, planes, kv_heads, block_size, _ = cache.shape
        heads_per_kv = heads // kv_heads
        tile = TILES[planes]
        block_heads = min(power_of_two(heads_per_kv), tile.queries)
        head_tiles = blocks_of(heads_per_kv, block_heads)
        splits = blocks_of(queries.longest, SPLIT)
        block_dim, join_heads = max(SMALLEST, power_of_two(value_width)), min(power_of_two(heads), HEADS)
        # Many long sequences at once would need more memory than there is.
        tiles_max = max(1, SUMS_MAX // (tile.queries // block_heads * heads * splits * value_width))
        for first in range(0, len(queries.first_rows) - 1, tiles_max):
            last = min(first + tiles_max, len(queries.first_rows) - 1)
            row, end = queries.first_rows[first], queries.first_rows[last]
            sums, maxima, totals = self._split_memory(end - row, heads * splits, value_width)
            attention_kernel[(last - first, kv_heads * head_tiles, splits)](
                q_NXY,
                cache,
                queries.tiles,
                queries.block_ids,
                sums,
                maxima,
                totals,
                scale,
                first,
                row,
                *q_NXY.stride()[:2],
                cache.stride(0),
                cache.stride(2),
                cache.stride(1),
                block_size,
                splits,
                heads,
                heads_per_kv,
                value_width,
                key_width - value_width,
                IS_LATENT=planes == 1,
                SPLIT=SPLIT,
                BLOCK_QUERIES=tile.queries // block_heads,
                BLOCK_HEADS=block_heads,
                BLOCK_KEYS=tile.keys,
                BLOCK_DIM=block_dim,
                BLOCK_TAIL=max(SMALLEST, power_of_two(key_width - value_width)),
                num_warps=tile.warps,
            )
            join_kernel[(end - row, blocks_of(heads, join_heads))](
                sums,
                maxima,
                totals,
                queries.positions,
                out,
                row,
                splits,
                heads,
                value_width,
                *out.stride()[:2],
                SPLIT=SPLIT,
                BLOCK_HEADS=join_heads,
                BLOCK_DIM=block_dim,
            )

    def route(
        self,
        logits_NE: torch.Tensor,
        bias_E: torch.Tensor | None,
        moe: MoeSpec,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        n: int,
    ) -> None:
        """See Kernels."""
        if n:
            route_kernel[(n,)](
                logits_NE,
                logits_NE if bias_E is None else bias_E,
                ids_NK,
                weights_NK,
                moe.scaling,
                NUM_EXPERTS=moe.num_experts,
                NUM_GROUPS=moe.num_groups,
                TOP_GROUPS=moe.top_groups,
                TOP_K=moe.top_k,
                IS_SOFTMAX=moe.scoring == "softmax",
                HAS_BIAS=bias_E is not None,
                NORMALIZES=moe.norm_topk,
                BLOCK_GROUPS=power_of_two(moe.num_groups),
                BLOCK_SIZE=power_of_two(moe.num_experts // moe.num_groups),
                BLOCK_K=power_of_two(moe.top_k),
            )

    def _split_memory(self, rows: int, parts: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row, head and split: what was taken, the greatest score and the weights' total."""
        count = rows * parts
        if len(self._sums) < count * (width + 2):
            self._sums = torch.empty(count * (width + 2), dtype=torch.float32, device=self._sums.device)
        sums, maxima, totals, _ = self._sums.split_with_sizes(
            [count * width, count, count, len(self._sums) - count * (width + 2)]
        )
        return sums, maxima, totals


def _launch_product(
    x_NXH: torch.Tensor,
    w_XWH: torch.Tensor,
    out_NXW: torch.Tensor,
    n: int,
    *,
    bias: torch.Tensor | None = None,
    row_gate: torch.Tensor | None = None,
    tiles: torch.Tensor | None = None,
    gated: bool = False,
    accumulate: bool = False,
) -> None:
    """Of each head by itself; with `tiles`, the first dimension of w is the experts'."""
    width, depth = out_NXW.shape[2], x_NXH.shape[2]
    num_tiles = blocks_of(n, ROWS) if tiles is None else len(tiles)
    if not num_tiles:
        return
    of_expert, of_head = (0, w_XWH.stride(0)) if tiles is None else (w_XWH.stride(0), 0)
    product_kernel[(num_tiles, blocks_of(width, WIDTH), out_NXW.shape[1])](
        x_NXH,
        w_XWH,
        x_NXH if bias is None else bias,
        x_NXH if row_gate is None else row_gate,
        out_NXW,
        x_NXH if tiles is None else tiles,
        n,
        width,
        depth,
        *x_NXH.stride()[:2],
        of_expert,
        of_head,
        *w_XWH.stride()[1:],
        width * w_XWH.stride(1),
        *out_NXW.stride()[:2],
        GROUPED=tiles is not None,
        GATED=gated,
        ACCUMULATE=accumulate,
        HAS_BIAS=bias is not None,
        HAS_ROW_GATE=row_gate is not None,
        BLOCK_ROWS=ROWS,
        BLOCK_WIDTH=WIDTH,
        BLOCK_DEPTH=DEPTH,
    )
