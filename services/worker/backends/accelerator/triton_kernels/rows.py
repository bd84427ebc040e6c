"""What is computed of one row by one program: norms, the rotary embedding, and what goes to the cache.

A row's sum runs over blocks of a size that its width alone decides, so that no other row changes a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    from_rows: tl.tensor,
    eps: tl.tensor,
    width: tl.tensor,
    x_row: tl.tensor,
    x_group: tl.tensor,
    out_row: tl.tensor,
    out_group: tl.tensor,
    HAS_DELTA: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    KEEPS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out = (x + delta) / rms(x + delta) * weight. Grid: rows, groups of elements that are normed by themselves.

    HAS_ROWS: row `r` of out is of row `from_rows[r]` of x. KEEPS_SUM: x becomes x + delta. `out` may be x.
    """
    row, group = tl.program_id(0), tl.program_id(1)
    source = tl.load(from_rows + row) if HAS_ROWS else row
    x += source.to(tl.int64) * x_row + group * x_group
    delta += source.to(tl.int64) * x_row + group * x_group
    out += row.to(tl.int64) * out_row + group * out_group
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < width, other=0.0)
        if HAS_DELTA:
            value += tl.load(delta + at, mask=at < width, other=0.0)
        squares += value * value
    factor = tl.rsqrt(tl.sum(squares) / width + eps)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < width, other=0.0)
        if HAS_DELTA:
            value += tl.load(delta + at, mask=at < width, other=0.0)
        if KEEPS_SUM:
            tl.store(x + at, value, mask=at < width)
        normed = value * factor * tl.load(weight + at, mask=at < width, other=0.0)
        tl.store(out + at, normed, mask=at < width)


@triton.jit
def rope_table_kernel(
    positions: tl.tensor,
    frequencies: tl.tensor,
    out: tl.tensor,
    half: tl.tensor,
    amplitude: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """out [N, 2, half] = cosines and sines of each row's position. Grid: rows."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    frequency = tl.load(frequencies + at, mask=at < half, other=0.0)
    angle = tl.load(positions + row).to(tl.float32) * frequency
    out += row.to(tl.int64) * 2 * half
    tl.store(out + at, tl.cos(angle) * amplitude, mask=at < half)
    tl.store(out + half + at, tl.sin(angle) * amplitude, mask=at < half)


@triton.jit
def rotate_kernel(
    x: tl.tensor,
    table: tl.tensor,
    half: tl.tensor,
    num_heads: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rotate the pairs of `2 half` elements in place. Grid: rows, tiles of heads."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    table += row.to(tl.int64) * 2 * half
    cosine = tl.load(table + at, mask=at < half, other=0.0)[None, :]
    sine = tl.load(table + half + at, mask=at < half, other=0.0)[None, :]
    x += row.to(tl.int64) * x_row
    mask = (head < num_heads)[:, None] & (at < half)[None, :]
    if INTERLEAVED:
        first, second = x + 2 * at, x + 2 * at + 1
    else:
        first, second = x + at, x + half + at
    first, second = head[:, None] * x_head + first[None, :], head[:, None] * x_head + second[None, :]
    a, b = tl.load(first, mask=mask, other=0.0), tl.load(second, mask=mask, other=0.0)
    tl.store(first, a * cosine - b * sine, mask=mask)
    tl.store(second, b * cosine + a * sine, mask=mask)


@triton.jit
def store_kernel(
    x: tl.tensor,
    cache: tl.tensor,
    blocks: tl.tensor,
    places: tl.tensor,
    num_planes: tl.tensor,
    width: tl.tensor,
    x_row: tl.tensor,
    block_stride: tl.tensor,
    plane_stride: tl.tensor,
    BLOCK_PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write `width` elements of each row and (plane, head) to the row's place in its block; nothing for block -1. Grid:
    rows; `cache` points to the layer in the first block, `plane_stride` leads from one (plane, head) to the next."""
    row = tl.program_id(0)
    block, place = tl.load(blocks + row).to(tl.int64), tl.load(places + row)
    if block < 0:
        return
    plane = tl.arange(0, BLOCK_PLANES)[:, None]
    x += row.to(tl.int64) * x_row + plane * width
    cache += block * block_stride + plane * plane_stride + place * width
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)[None, :]
        mask = (plane < num_planes) & (at < width)
        value = tl.load(x + at, mask=mask, other=0.0)
        tl.store(cache + at, value.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def weighted_sum_kernel(
    answers: tl.tensor,
    at: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out [N, width] = of each row the sum over k, in its order and from 0 on, of weights [N, TOP_K] times the row of
    `answers` that `at` [N, TOP_K] names; of none where it is below 0. Grid: rows, blocks of the width."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(TOP_K):
        source = tl.load(at + row * TOP_K + k)
        is_there = (columns < width) & (source >= 0)
        answer = tl.load(answers + source.to(tl.int64) * width + columns, mask=is_there, other=0.0)
        total += tl.where(source >= 0, answer * tl.load(weights + row * TOP_K + k), 0.0)
    tl.store(out + row.to(tl.int64) * width + columns, total, mask=columns < width)
