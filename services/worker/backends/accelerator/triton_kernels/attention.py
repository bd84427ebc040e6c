"""Causal attention to a paged cache, of grouped queries and of latents, of prompts' chunks and of single tokens.

The positions of a sequence are cut into splits of SPLIT, from its first position on. A program takes a tile of queries
over one split, in steps of BLOCK_KEYS positions; then the splits of each query are joined in their order. What a query
adds up in which order depends on its own position alone: later positions of its tile count exactly nothing (ADR 33).

`tiles` says of each tile its first row, the number of rows, the first one's position, and where in `block_ids` its
sequence's blocks begin. IS_LATENT: keys are `width` elements, which are the values too, and `tail_width` behind
them; else `width` elements, and values lie `value_offset` further on. Written are the weighted sums [N, heads,
splits, width], their greatest scores and the weights' totals [N, heads, splits], from `first_row` on, which is that
of `first_tile`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _divided(number: tl.tensor, by: tl.tensor) -> tl.tensor:
    """How often, and what is left."""
    return number // by, number % by


@triton.jit
def _numbers_of(tile: tl.tensor) -> tl.tensor:
    """The four of a tile."""
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def _base_of(greatest: tl.tensor) -> tl.tensor:
    """What exponents are counted from: not minus infinity, which nothing seen yet has, and scores that overflow: its
    difference to itself is NaN."""
    return tl.where(greatest == float("-inf"), 0.0, greatest)


@triton.jit
def _take(scores: tl.tensor, values: tl.tensor, greatest: tl.tensor, total: tl.tensor, taken: tl.tensor) -> tl.tensor:
    """The greatest score, the weights' total and their sum of values, after these keys too."""
    larger = tl.maximum(greatest, tl.max(scores, 1))
    base = _base_of(larger)
    weights = tl.exp(scores - base[:, None])
    factor = tl.exp(greatest - base)
    taken = tl.dot(weights, values, acc=taken * factor[:, None], input_precision="tf32x3")
    return larger, total * factor + tl.sum(weights, 1), taken


@triton.jit(do_not_specialize=["first_tile", "first_row", "num_splits"])
def attention_kernel(
    q: tl.tensor,
    cache: tl.tensor,
    tiles: tl.tensor,
    block_ids: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    first_tile: tl.tensor,
    first_row: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    block_stride: tl.tensor,
    head_stride: tl.tensor,
    value_offset: tl.tensor,
    block_size: tl.tensor,
    num_splits: tl.tensor,
    num_heads: tl.tensor,
    heads_per_kv: tl.tensor,
    width: tl.tensor,
    tail_width: tl.tensor,
    IS_LATENT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
) -> None:
    """What the queries of one tile take from one split. Grid: tiles of queries, kv heads x tiles of heads, splits."""
    tile, split = first_tile + tl.program_id(0), tl.program_id(2)
    kv_head, head_tile = _divided(tl.program_id(1), tl.cdiv(heads_per_kv, BLOCK_HEADS))
    tile_row, num_rows, first_position, table = _numbers_of(tiles + 4 * tile)
    end = first_position + num_rows
    if split * SPLIT >= end:
        return
    member = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    query, head = member // BLOCK_HEADS, head_tile * BLOCK_HEADS + member % BLOCK_HEADS
    is_query = (query < num_rows) & (head < heads_per_kv)
    row, head, position = (tile_row + query).to(tl.int64), kv_head * heads_per_kv + head, first_position + query
    dim = tl.arange(0, BLOCK_DIM)
    q_Q = q + row * q_row + head * q_head
    q_QD = tl.load(q_Q[:, None] + dim[None, :], mask=is_query[:, None] & (dim < width)[None, :], other=0.0)
    if IS_LATENT:
        tail = tl.arange(0, BLOCK_TAIL)
        tail_mask = tail < tail_width
        t_QT = tl.load(q_Q[:, None] + width + tail[None, :], mask=is_query[:, None] & tail_mask[None, :], other=0.0)
    greatest, total = tl.full(member.shape, float("-inf"), tl.float32), tl.zeros(member.shape, tl.float32)
    taken = tl.zeros((BLOCK_QUERIES * BLOCK_HEADS, BLOCK_DIM), dtype=tl.float32)
    for first in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, end), BLOCK_KEYS):
        at = first + tl.arange(0, BLOCK_KEYS)
        is_key = at < end
        block = tl.load(block_ids + table + at // block_size, mask=is_key, other=0).to(tl.int64)
        key = cache + block * block_stride + kv_head * head_stride + (at % block_size) * (width + tail_width)
        k_mask = is_key[:, None] & (dim < width)[None, :]
        k_KD = tl.load(key[:, None] + dim[None, :], mask=k_mask, other=0.0).to(tl.float32)
        scores = tl.dot(q_QD, tl.trans(k_KD), input_precision="tf32x3")
        if IS_LATENT:
            t_mask = is_key[:, None] & tail_mask[None, :]
            t_KT = tl.load(key[:, None] + width + tail[None, :], mask=t_mask, other=0.0).to(tl.float32)
            scores = tl.dot(t_QT, tl.trans(t_KT), acc=scores, input_precision="tf32x3")
            v_KD = k_KD
        else:
            v_KD = tl.load(key[:, None] + value_offset + dim[None, :], mask=k_mask, other=0.0).to(tl.float32)
        scores = tl.where(at[None, :] <= position[:, None], scores * scale, float("-inf"))
        greatest, total, taken = _take(scores, v_KD, greatest, total, taken)
    at_split = ((row - first_row) * num_heads + head) * num_splits + split
    tl.store(maxima + at_split, greatest, mask=is_query)
    tl.store(totals + at_split, total, mask=is_query)
    tl.store(sums + at_split[:, None] * width + dim[None, :], taken, mask=is_query[:, None] & (dim < width)[None, :])


@triton.jit(do_not_specialize=["first_row", "num_splits"])
def join_kernel(
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    first_row: tl.tensor,
    num_splits: tl.tensor,
    num_heads: tl.tensor,
    width: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    SPLIT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """out [N, heads, width] = what each query from `first_row` on has taken from its splits, joined in their order.
    Nothing for position -1. Grid: rows, tiles of heads."""
    row, dim = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_DIM)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_head = head < num_heads
    mask = is_head[:, None] & (dim < width)[None, :]
    at = (row * num_heads + head) * num_splits
    row += first_row
    position = tl.load(positions + row)
    if position < 0:
        return
    greatest = tl.load(maxima + at, mask=is_head, other=0.0)
    total = tl.load(totals + at, mask=is_head, other=1.0)
    taken = tl.load(sums + at[:, None] * width + dim[None, :], mask=mask, other=0.0)
    for split in range(1, position // SPLIT + 1):
        next_greatest = tl.load(maxima + at + split, mask=is_head, other=0.0)
        larger = tl.maximum(greatest, next_greatest)
        base = _base_of(larger)
        factor, next_factor = tl.exp(greatest - base), tl.exp(next_greatest - base)
        total = total * factor + tl.load(totals + at + split, mask=is_head, other=0.0) * next_factor
        next_taken = tl.load(sums + (at + split)[:, None] * width + dim[None, :], mask=mask, other=0.0)
        taken = taken * factor[:, None] + next_taken * next_factor[:, None]
        greatest = larger
    to = out + row * out_row + head[:, None] * out_head + dim[None, :]
    tl.store(to, taken / total[:, None], mask=mask)
