"""Products of rows and weights: linears, the gated halves of a feed-forward, and experts by their slots.

One kernel for all. A tile has BLOCK_ROWS rows whatever the number of rows is, and its sums run over the depth in steps
of BLOCK_DEPTH, from the first to the last: a row's result depends on the row and the weights alone (ADR 33). The number
of rows is not specialized on, since a kernel for 1 row or for multiples of 16 would be another kernel. Where the width
makes few tiles the depth is computed in parts, as if these were heads, and joined: how many there are is decided by
width and depth.

`tf32x3`: float32 operands are taken apart into two numbers that the tensor cores multiply exactly; a weight in bfloat16
is one such number.
"""

from __future__ import annotations

import triton
import triton.language as tl

ALIGNED_BYTES: tl.constexpr = tl.constexpr(16)  # where the first slot's weights have to begin


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Of either sign, without an exponential that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _tile(
    x: tl.tensor,
    x_mask: tl.tensor,
    w: tl.tensor,
    w_mask: tl.tensor,
    w_depth: tl.tensor,
    depth: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
) -> tl.tensor:
    """x · w of one tile: `x` and `w` point to the first element of each row and of each column."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for first in range(0, depth, BLOCK_DEPTH):
        at = first + tl.arange(0, BLOCK_DEPTH)
        inside = at < depth
        x_RD = tl.load(x[:, None] + at[None, :], mask=x_mask[:, None] & inside[None, :], other=0.0)
        w_DW = tl.load(w[None, :] + at[:, None] * w_depth, mask=w_mask[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x_RD, w_DW.to(tl.float32), acc=total, input_precision="tf32x3")
    return total


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x: tl.tensor,
    w: tl.tensor,
    bias: tl.tensor,
    row_gate: tl.tensor,
    out: tl.tensor,
    tiles: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    w_expert: tl.tensor,
    w_head: tl.tensor,
    w_width: tl.tensor,
    w_depth: tl.tensor,
    w_up: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    GROUPED: tl.constexpr,
    STORED: tl.constexpr,
    GATED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
) -> None:
    """One tile [BLOCK_ROWS, BLOCK_WIDTH] of out. Grid: tiles of rows, tiles of the width, heads.

    GROUPED: `tiles` says of each tile its expert, first row and end, and `w` is the address of the first slot, of
    numbers of the type STORED: Triton looks up where a tensor lies before it launches, and there may be no memory in
    that slot. GATED: out is silu of the
    product times the product with the weights `w_up` elements further on. HAS_ROW_GATE: rows are multiplied by the
    sigmoid of `row_gate` [N].
    """
    tile = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    if GROUPED:
        expert = tl.load(tiles + 3 * tile)
        first, end = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
        # The compiler forgets what it knows of the number when that becomes a pointer, and reads number by number then.
        w = tl.multiple_of(w.to(tl.pointer_type(STORED)), ALIGNED_BYTES) + expert.to(tl.int64) * w_expert
    else:
        first, end = tile * BLOCK_ROWS, num_rows
    rows = first + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    x_mask, w_mask = rows < end, columns < width
    x_R = x + rows.to(tl.int64) * x_row + head * x_head
    w_W = w + head * w_head + columns.to(tl.int64) * w_width
    total = _tile(x_R, x_mask, w_W, w_mask, w_depth, depth, BLOCK_ROWS, BLOCK_WIDTH, BLOCK_DEPTH)
    if GATED:
        up = _tile(x_R, x_mask, w_W + w_up, w_mask, w_depth, depth, BLOCK_ROWS, BLOCK_WIDTH, BLOCK_DEPTH)
        total = total * sigmoid(total) * up
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=w_mask, other=0.0)[None, :]
    if HAS_ROW_GATE:
        total *= sigmoid(tl.load(row_gate + rows, mask=x_mask, other=0.0))[:, None]
    out_RW = out + rows.to(tl.int64)[:, None] * out_row + head * out_head + columns[None, :]
    mask = x_mask[:, None] & w_mask[None, :]
    if ACCUMULATE:
        total += tl.load(out_RW, mask=mask, other=0.0)
    tl.store(out_RW, total, mask=mask)


@triton.jit
def join_parts_kernel(
    parts: tl.tensor,
    bias: tl.tensor,
    row_gate: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    part_stride: tl.tensor,
    out_row: tl.tensor,
    NUM_PARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A product whose depth was computed in parts [NUM_PARTS, N, width]: they are added in their order, and out is made
    of the sum as `product_kernel` makes it. Grid: rows, blocks of the width."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(NUM_PARTS):
        total += tl.load(parts + part * part_stride + row * width + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=mask, other=0.0)
    if HAS_ROW_GATE:
        total *= sigmoid(tl.load(row_gate + row))
    out += row * out_row + columns
    if ACCUMULATE:
        total += tl.load(out, mask=mask, other=0.0)
    tl.store(out, total, mask=mask)
