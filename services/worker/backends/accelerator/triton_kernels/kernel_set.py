"""The kernels in Triton, launched over tensors (see Kernels): a row's result depends, bit by bit, on that row, its KV
and the weights alone (ADR 33).

Tiles are constants: a number that would be chosen by how many rows there are would change rows' last bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import torch
import triton.language as tl

from elasticmoe.common.model_spec import ModelSpec
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
from elasticmoe.services.worker.backends.accelerator.triton_kernels.attention import attention_kernel, join_kernel
from elasticmoe.services.worker.backends.accelerator.triton_kernels.products import (
    ALIGNED_BYTES,
    join_parts_kernel,
    product_kernel,
)
from elasticmoe.services.worker.backends.accelerator.triton_kernels.routing import route_kernel
from elasticmoe.services.worker.backends.accelerator.triton_kernels.rows import (
    norm_kernel,
    rope_table_kernel,
    rotate_kernel,
    store_kernel,
    weighted_sum_kernel,
)
from elasticmoe.services.worker.backends.accelerator.triton_kernels.tiles import expert_tiles, query_tiles
from elasticmoe.services.worker.backends.answers import WeightedSum
from elasticmoe.services.worker.backends.sent_fields import Int32s, SentFields

PROGRAMS: Final = 256  # of one tile of rows that a product should have: an H200 has 132 multiprocessors
PART_DEPTH: Final = 256  # at the least
PART_ROWS: Final = 128  # whose parts are kept at once
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


TYPES: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
TILES: Final = {1: AttentionTile(16, 16, 8), 2: AttentionTile(32, 32, 4)}  # by the planes of the cache


def power_of_two(least: int) -> int:
    """The smallest one that is not less."""
    return 1 << max(0, least - 1).bit_length()


def blocks_of(total: int, block: int) -> int:
    """How many blocks hold `total`."""
    return -(-total // block)


def parts_of(width: int, depth: int) -> int:
    """Into how many parts the depth of a product is cut, so that there are programs for all of a device: by the shape
    alone, and all parts are equal and whole steps of DEPTH. 1: it is not cut."""
    wanted = min(depth // PART_DEPTH, blocks_of(PROGRAMS, blocks_of(width, WIDTH)))
    return next((parts for parts in range(wanted, 1, -1) if depth % (parts * DEPTH) == 0), 1)


class TritonKernels(Kernels):
    """See Kernels. Owns the memory that attention keeps its splits in, and products the parts of theirs."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.empty(0, dtype=torch.float32, device=device)
        self._parts = torch.empty(0, dtype=torch.float32, device=device)
        self.num_moves = 0

    def check_model(self, spec: ModelSpec, block_size: int) -> None:
        """See Kernels. All are computed."""

    def prepare(self, step: AcceleratorBatch) -> None:
        """See Kernels. Each row of a form is a tile."""
        _tiles_of(step, 1)

    def product(self, product: Product, n: int) -> None:
        """See Kernels."""
        num_parts = 1 if product.is_gated or product.out.shape[1] > 1 else parts_of(*product.w.shape[1:])
        if num_parts == 1:
            _launch_product(product, n)
        elif n:
            self._product_in_parts(product, n, num_parts)

    def _product_in_parts(self, product: Product, n: int, num_parts: int) -> None:
        """Parts of the depth are computed as heads are, some rows after the others, into memory of these kernels."""
        x, w, out = product.x, product.w, product.out
        width, depth = out.shape[2], x.shape[2] // num_parts
        if len(self._parts) < num_parts * PART_ROWS * width:
            self._parts = torch.empty(num_parts * PART_ROWS * width, dtype=torch.float32, device=self._parts.device)
            self.num_moves += 1
        parts = self._parts[: num_parts * PART_ROWS * width].view(num_parts, PART_ROWS, width).transpose(0, 1)
        x_of = x.as_strided((len(x), num_parts, depth), (x.stride(0), depth, 1))
        w_of = w.as_strided((num_parts, width, depth), (depth * w.stride(2), *w.stride()[1:]))
        block = min(power_of_two(width), BLOCK_MAX)
        for first in range(0, n, PART_ROWS):
            count = min(PART_ROWS, n - first)
            _launch_product(Product(x_of[first:], w_of, parts), count)
            join_parts_kernel[(count, blocks_of(width, block))](
                self._parts,
                self._parts if product.bias is None else product.bias,
                self._parts if product.row_gate is None else product.row_gate[first:],
                out[first:],
                width,
                PART_ROWS * width,
                out.stride(0),
                NUM_PARTS=num_parts,
                ACCUMULATE=product.accumulate,
                HAS_BIAS=product.bias is not None,
                HAS_ROW_GATE=product.row_gate is not None,
                BLOCK=block,
            )

    def group_fields(self, counts: Int32s) -> Mapping[str, Int32s]:
        """See Kernels."""
        return {"tiles": expert_tiles(counts, ROWS).reshape(-1)}

    def expert_products(
        self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, groups: RowGroups, *, is_gated: bool
    ) -> None:
        """See Kernels."""
        if w.data_ptr() % ALIGNED_BYTES.value:
            raise ValueError(f"weights of experts at {w.data_ptr():#x}: they have to begin at multiples of 16 bytes")
        product = Product(x[:, None], w, out[:, None], is_gated=is_gated)
        _launch_product(product, len(x), groups.sent["tiles"].view(-1, 3))

    def norm(self, norm: Norm, n: int, rows: torch.Tensor | None = None) -> None:
        """See Kernels."""
        if not n:
            return
        x = norm.x
        _, groups, width = x.shape
        norm_kernel[(n, groups)](
            x,
            x if norm.delta is None else norm.delta,
            norm.weight,
            norm.out,
            x if rows is None else rows,
            norm.eps,
            width,
            *x.stride()[:2],
            *norm.out.stride()[:2],
            HAS_DELTA=norm.delta is not None,
            HAS_ROWS=rows is not None,
            KEEPS_SUM=norm.keeps_sum,
            BLOCK=min(power_of_two(width), BLOCK_MAX),
        )

    def rope_table(self, table: RopeTable, step: AcceleratorBatch) -> None:
        """See Kernels."""
        if step.num_rows:
            half = len(table.frequencies)
            rope_table_kernel[(step.num_rows,)](
                step.positions, table.frequencies, table.out, half, table.amplitude, BLOCK=power_of_two(half)
            )

    def rotate(self, rotation: Rotation, n: int) -> None:
        """See Kernels."""
        _, heads, dims = rotation.x.shape
        if n:
            block_heads = min(power_of_two(heads), HEADS)
            rotate_kernel[(n, blocks_of(heads, block_heads))](
                rotation.x,
                rotation.table,
                dims // 2,
                heads,
                *rotation.x.stride()[:2],
                INTERLEAVED=rotation.is_interleaved,
                BLOCK_HEADS=block_heads,
                BLOCK=power_of_two(dims // 2),
            )

    def store(self, x: torch.Tensor, layer: int, step: AcceleratorBatch) -> None:
        """See Kernels."""
        _, planes, width = x.shape
        cache = step.kv[:, layer]
        if step.num_rows:
            store_kernel[(step.num_rows,)](
                x,
                cache,
                step.blocks,
                step.places,
                planes,
                width,
                x.stride(0),
                cache.stride(0),
                cache.stride(2),
                BLOCK_PLANES=power_of_two(planes),
                BLOCK=min(power_of_two(width), BLOCK_MAX),
            )

    def attend(self, attention: PagedAttention, step: AcceleratorBatch) -> None:
        """See Kernels."""
        if not step.num_rows:
            return
        cache, heads, value_width = step.kv[:, attention.layer], attention.q.shape[1], attention.value_width
        _, planes, kv_heads, block_size, key_width = cache.shape
        heads_per_kv, tile = heads // kv_heads, TILES[planes]
        block_heads = min(power_of_two(heads_per_kv), tile.queries)
        head_tiles = blocks_of(heads_per_kv, block_heads)
        rows_max = 1 if step.form else tile.queries // block_heads  # of a tile
        tiles, first_rows = _tiles_of(step, rows_max)
        splits = blocks_of(step.positions_max, SPLIT)
        block_dim, join_heads = max(SMALLEST, power_of_two(value_width)), min(power_of_two(heads), HEADS)
        # Many long sequences at once would need more memory than there is.
        tiles_max = max(1, SUMS_MAX // (rows_max * heads * splits * value_width))
        for first in range(0, len(first_rows) - 1, tiles_max):
            last = min(first + tiles_max, len(first_rows) - 1)
            row, end = first_rows[first], first_rows[last]
            sums, maxima, totals = self._split_memory(end - row, heads * splits, value_width)
            attention_kernel[(last - first, kv_heads * head_tiles, splits)](
                attention.q,
                cache,
                tiles,
                step.block_ids,
                sums,
                maxima,
                totals,
                attention.scale,
                first,
                row,
                *attention.q.stride()[:2],
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
                step.positions,
                attention.out,
                row,
                splits,
                heads,
                value_width,
                *attention.out.stride()[:2],
                SPLIT=SPLIT,
                BLOCK_HEADS=join_heads,
                BLOCK_DIM=block_dim,
            )

    def route(self, route: Route, n: int) -> None:
        """See Kernels."""
        moe = route.moe
        if n:
            route_kernel[(n,)](
                route.logits,
                route.logits if route.bias is None else route.bias,
                route.ids,
                route.weights,
                moe.scaling,
                NUM_EXPERTS=moe.num_experts,
                NUM_GROUPS=moe.num_groups,
                TOP_GROUPS=moe.top_groups,
                TOP_K=moe.top_k,
                IS_SOFTMAX=moe.scoring == "softmax",
                HAS_BIAS=route.bias is not None,
                NORMALIZES=moe.norm_topk,
                BLOCK_GROUPS=power_of_two(moe.num_groups),
                BLOCK_SIZE=power_of_two(moe.num_experts // moe.num_groups),
                BLOCK_K=power_of_two(moe.top_k),
            )

    def weighted_sum(self, total: WeightedSum, n: int) -> None:
        """See Kernels. Without the fusion of products and sums, which would round once where the rule rounds twice."""
        if not n:
            return
        top_k, hidden = total.weights_NK.shape[1], total.answers_RH.shape[1]
        block = min(power_of_two(hidden), BLOCK_MAX)
        weighted_sum_kernel[(n, blocks_of(hidden, block))](
            total.answers_RH,
            total.at_P,
            total.weights_NK,
            total.out_NH,
            hidden,
            TOP_K=top_k,
            BLOCK=block,
            enable_fp_fusion=False,
        )

    def _split_memory(self, rows: int, parts: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row, head and split: what was taken, the greatest score and the weights' total."""
        count = rows * parts
        if len(self._sums) < count * (width + 2):
            # All that a launch may need, so that it moves once: what was captured is captured anew then.
            room = max(count, SUMS_MAX // width) * (width + 2)
            self._sums = torch.empty(room, dtype=torch.float32, device=self._sums.device)
            self.num_moves += 1
        sums, maxima, totals, _ = self._sums.split_with_sizes(
            [count * width, count, count, len(self._sums) - count * (width + 2)]
        )
        return sums, maxima, totals


def _tiles_of(step: AcceleratorBatch, each: int) -> tuple[torch.Tensor, list[int]]:
    """The rows in tiles of up to `each` positions of a sequence, those of padding without a row; on the host the tiles'
    first rows, and N."""

    def make(fields: SentFields) -> tuple[torch.Tensor, list[int]]:
        tiles_T4 = query_tiles(step.row_starts, step.firsts, step.block_starts, each)
        if step.form:
            tiles_T4 = np.pad(tiles_T4, ((0, step.num_rows - len(tiles_T4)), (0, 0)))
            tiles_T4[:, 0] = np.arange(step.num_rows)
        return fields.send({"tiles": tiles_T4.reshape(-1)})["tiles"], [*tiles_T4[:, 0].tolist(), step.num_rows]

    return step.once("attention", each, make)


def _launch_product(product: Product, n: int, tiles: torch.Tensor | None = None) -> None:
    """With `tiles`, the first dimension of w is the experts'."""
    x, w, out = product.x, product.w, product.out
    width, depth = out.shape[2], x.shape[2]
    num_tiles = blocks_of(n, ROWS) if tiles is None else len(tiles)
    if not num_tiles:
        return
    of_expert, of_head = (0, w.stride(0)) if tiles is None else (w.stride(0), 0)
    product_kernel[(num_tiles, blocks_of(width, WIDTH), out.shape[1])](
        x,
        w if tiles is None else w.data_ptr(),
        x if product.bias is None else product.bias,
        x if product.row_gate is None else product.row_gate,
        out,
        x if tiles is None else tiles,
        n,
        width,
        depth,
        *x.stride()[:2],
        of_expert,
        of_head,
        *w.stride()[1:],
        width * w.stride(1),
        *out.stride()[:2],
        GROUPED=tiles is not None,
        STORED=TYPES[w.dtype],
        GATED=product.is_gated,
        ACCUMULATE=product.accumulate,
        HAS_BIAS=product.bias is not None,
        HAS_ROW_GATE=product.row_gate is not None,
        BLOCK_ROWS=ROWS,
        BLOCK_WIDTH=WIDTH,
        BLOCK_DEPTH=DEPTH,
    )
