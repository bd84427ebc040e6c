"""elasticmoe.native.kernels against torch, on every instruction set that this machine has.

Shape suffixes: N rows, H hidden, W width, D head_dim, E experts, V vocabulary.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence

import pytest
import torch

from elasticmoe.native import kernels
from elasticmoe.native.host import Reservation
from tests.unit.kernel_memory import BY_DTYPE, DTYPES, PAGE, Guarded, Paged, assert_close, exact, random, rotate

pytestmark = pytest.mark.usefixtures("instruction_set")


def linear(
    x_NH: torch.Tensor, w_WH: torch.Tensor, add: torch.Tensor | None = None, dtype: int | None = None
) -> torch.Tensor:
    (rows, depth), width = x_NH.shape, w_WH.shape[0]
    out = torch.full((rows, width), float("nan")) if add is None else add.clone()
    code = DTYPES[w_WH.dtype] if dtype is None else dtype
    kernels.linear(x_NH.data_ptr(), rows, w_WH.data_ptr(), code, width, depth, out.data_ptr(), add is not None, 0)
    return out


def test_best_set_is_first_and_unknown_ones_are_refused() -> None:
    assert kernels.instruction_sets()[-1] == "baseline"
    with pytest.raises(ValueError, match="mmx"):
        kernels.use_instruction_set("mmx")


@BY_DTYPE
@pytest.mark.parametrize(("width", "depth"), [(1, 1), (5, 7), (64, 96), (33, 100), (130, 257), (260, 1024)])
def test_linear(dtype: torch.dtype, width: int, depth: int) -> None:
    w_WH = random(width, depth, seed=1).to(dtype)
    for rows in (0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 40):
        x_NH = random(rows, depth)
        want = exact(x_NH, w_WH)
        if rows:
            assert_close(linear(x_NH, w_WH), want)
            assert_close(linear(x_NH, w_WH, torch.ones(rows, width)), want + 1)


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (5, 7), (64, 96), (33, 100), (130, 257), (260, 1024)])
def test_rounded_rows_are_multiplied_as_they_are_rounded(width: int, depth: int) -> None:
    """To nearest, ties to even, whatever the instruction set; sums are of float32."""
    w_WH = random(width, depth, seed=1).bfloat16()
    x_NH = random(40, depth)
    x_NH[0, 0] = 1 + 2**-8  # in the middle of two, of which the even one is below
    x_NH[1, 0] = 1 + 3 * 2**-8
    want = exact(x_NH.bfloat16().float(), w_WH)
    alone = torch.cat([linear(x_NH[row : row + 1], w_WH, dtype=kernels.ROUNDED) for row in range(40)])
    assert_close(alone, want)
    for rows in (0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 25, 40):
        assert torch.equal(linear(x_NH[:rows], w_WH, dtype=kernels.ROUNDED), alone[:rows]), rows
    assert_close(linear(x_NH, w_WH, torch.ones(40, width), dtype=kernels.ROUNDED), want + 1)


def test_only_products_round() -> None:
    table, out, ids = random(3, 8).bfloat16(), torch.empty(1, 8), array("i", [1])
    with pytest.raises(ValueError, match="dtype must be FLOAT32 or BFLOAT16"):
        kernels.embed(ids.buffer_info()[0], 1, table.data_ptr(), kernels.ROUNDED, 3, 8, 1.0, out.data_ptr())


@BY_DTYPE
@pytest.mark.parametrize(("width", "depth"), [(1, 7), (70, 96), (200, 500)])
def test_company_does_not_change_a_bit_of_a_product(dtype: torch.dtype, width: int, depth: int) -> None:
    """Whatever tile its rows and the columns fall into."""
    w_WH, x_NH = random(width, depth, seed=1).to(dtype), random(40, depth)
    alone = torch.cat([linear(x_NH[row : row + 1], w_WH) for row in range(40)])
    for rows in (2, 6, 7, 8, 9, 12, 15, 16, 17, 25, 40):
        assert torch.equal(linear(x_NH[:rows], w_WH), alone[:rows]), rows


@BY_DTYPE
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 9, 33), (7, 12, 96), (13, 5, 31), (4, 8, 64)])
def test_nothing_beyond_the_tensors_is_touched(dtype: torch.dtype, rows: int, width: int, depth: int) -> None:
    x_NH, w_WH = random(rows, depth), random(width, depth, seed=1).to(dtype)
    x, w, out = Guarded(x_NH), Guarded(w_WH), Guarded(torch.zeros(rows, width))
    kernels.linear(x.addr, rows, w.addr, DTYPES[dtype], width, depth, out.addr, False, 0)
    assert_close(out.floats().view(rows, width), exact(x_NH, w_WH))
    if dtype == torch.bfloat16:
        kernels.linear(x.addr, rows, w.addr, kernels.ROUNDED, width, depth, out.addr, False, 0)
        assert_close(out.floats().view(rows, width), exact(x_NH.bfloat16().float(), w_WH))
    last = array("i", [width - 1])
    kernels.embed(last.buffer_info()[0], 1, w.addr, DTYPES[dtype], width, depth, 1.0, x.addr)
    assert kernels.greatest(out.addr, rows, width) == out.floats().view(rows, width).argmax(1).tolist()
    for memory in (x, w, out):
        memory.close()


@BY_DTYPE
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    w_WH, x_NH = random(70, 144, seed=1).to(dtype), random(50, 144)
    together = linear(x_NH, w_WH)
    for start, count in ((0, 1), (17, 2), (3, 9), (20, 23)):
        alone = linear(x_NH[start : start + count].contiguous(), w_WH)
        assert torch.equal(alone, together[start : start + count])


def test_nan_stays_in_its_row() -> None:
    w_WH, x_NH = random(20, 64), random(9, 64)
    want = linear(x_NH, w_WH)
    x_NH[4, 10] = float("nan")
    got = linear(x_NH, w_WH)
    assert got[4].isnan().all()
    assert torch.equal(got[[0, 1, 2, 3, 5, 6, 7, 8]], want[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("hidden", [3, 96, 1000])
def test_rms_norm(hidden: int) -> None:
    x, delta, weight = random(5, hidden), random(5, hidden, seed=1), random(hidden, seed=2)

    def reference(rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    out = torch.empty_like(x)
    kernels.rms_norm(x.data_ptr(), 0, 0, 5, hidden, weight.data_ptr(), 1e-6, out.data_ptr())
    assert_close(out, reference(x))
    # Some rows only: x stays.
    before, rows = x.clone(), array("i", [4, 1])
    kernels.rms_norm(
        x.data_ptr(), delta.data_ptr(), rows.buffer_info()[0], 2, hidden, weight.data_ptr(), 1e-6, out.data_ptr()
    )
    assert_close(out[:2], reference(x + delta)[[4, 1]])
    assert torch.equal(x, before)
    # All rows: x becomes the sum.
    kernels.rms_norm(x.data_ptr(), delta.data_ptr(), 0, 5, hidden, weight.data_ptr(), 1e-6, out.data_ptr())
    assert torch.equal(x, before + delta)
    assert_close(out, reference(x))


@BY_DTYPE
def test_embed(dtype: torch.dtype) -> None:
    table, out = random(11, 30).to(dtype), torch.empty(3, 30)
    ids = array("i", [10, 0, 10])
    kernels.embed(ids.buffer_info()[0], 3, table.data_ptr(), DTYPES[dtype], 11, 30, 1.0, out.data_ptr())
    assert torch.equal(out, table[[10, 0, 10]].float())
    ids[1] = 11
    with pytest.raises(ValueError, match="token 11"):
        kernels.embed(ids.buffer_info()[0], 3, table.data_ptr(), DTYPES[dtype], 11, 30, 1.0, out.data_ptr())


@BY_DTYPE
def test_embed_of_a_part_of_the_vocabulary(dtype: torch.dtype) -> None:
    """Tokens that the table does not have are zeros."""
    table, out = random(11, 30).to(dtype), torch.full((4, 30), float("nan"))
    ids, part = array("i", [10, 0, 4, 5]), table[5:9].contiguous()
    place = (ids.buffer_info()[0], 4, part.data_ptr(), DTYPES[dtype], 11, 30, 1.0, out.data_ptr())
    kernels.embed(*place, 5, 4)
    assert torch.equal(out, torch.stack([torch.zeros(30)] * 3 + [table[5].float()]))
    for first, held in ((-1, 4), (8, 4), (12, -1)):
        with pytest.raises(ValueError, match=r"first|vocabulary|num_held"):
            kernels.embed(*place, first, held)


def run_attention(
    cache: Paged, chunks: Sequence[tuple[int, int, list[int]]], qkv: torch.Tensor, q_heads: int, layer: int = 1
) -> torch.Tensor:
    parts = cache.parts(chunks)
    rope = torch.empty(qkv.shape[0], cache.dim)
    inv_freq = 1.0 / (1e4 ** (torch.arange(0, cache.dim, 2).float() / cache.dim))
    kernels.rope_table(parts, inv_freq.data_ptr(), cache.dim, 1.0, rope.data_ptr())
    work = qkv.clone()
    kernels.store_kv(parts, layer, work.data_ptr(), q_heads, rope.data_ptr(), cache.dim, False, 0, 0, False, 1e-6, 0.0)
    out = torch.full((qkv.shape[0], q_heads * cache.dim), float("nan"))
    kernels.attention(parts, layer, work.data_ptr(), q_heads, cache.dim**-0.5, out.data_ptr())
    return out


GEOMETRIES = pytest.mark.parametrize(
    ("q_heads", "heads", "dim", "size"),
    [(4, 2, 24, 4), (6, 1, 16, 3), (3, 3, 66, 16), (8, 2, 128, 16), (60, 1, 8, 256)],
)


@BY_DTYPE
@GEOMETRIES
def test_attention_over_pages(dtype: torch.dtype, q_heads: int, heads: int, dim: int, size: int) -> None:
    cache = Paged(dtype, heads, dim, size)
    lengths = (1, 7, 30)
    width = (q_heads + 2 * heads) * dim
    qkv = [random(n, width, seed=n) for n in lengths]
    tables = [cache.take(n) for n in lengths]
    chunks = [(0, n, table) for n, table in zip(lengths, tables, strict=True)]
    got = run_attention(cache, chunks, torch.cat(qkv), q_heads).split(lengths)
    for rows, out, table in zip(qkv, got, tables, strict=True):
        n = len(rows)
        q, k, v = rows.view(n, -1, dim).split([q_heads, heads, heads], dim=1)
        q, k = rotate(q, torch.arange(n)), rotate(k, torch.arange(n))
        keys, values = (cache.stored(1, which, table, n) for which in (0, 1))
        bound = 2e-6 if dtype == torch.float32 else 2.0**-8
        assert_close(keys, k, bound)
        assert torch.equal(values, v.to(dtype).float())
        expanded = [t.repeat_interleave(q_heads // heads, dim=1).transpose(0, 1) for t in (keys, values)]
        want = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), *expanded, is_causal=True)
        assert_close(out, want.transpose(0, 1).reshape(n, -1), 5e-6)


@BY_DTYPE
def test_chunks_do_not_change_a_bit(dtype: torch.dtype) -> None:
    q_heads, heads, dim, size, length = 6, 2, 40, 4, 150
    rows = random(length, (q_heads + 2 * heads) * dim)
    cache = Paged(dtype, heads, dim, size, num_blocks=160)
    whole = run_attention(cache, [(0, length, cache.take(length))], rows, q_heads)
    for sizes in ((1,) * 20 + (130,), (61, 7, 80, 1, 1), (149, 1)):
        table, other = cache.take(length), cache.take(9)
        at, out = 0, []
        for count in sizes:
            # Another sequence is computed in the same step.
            chunk = torch.cat([random(9, rows.shape[1], seed=7), rows[at : at + count]])
            out.append(run_attention(cache, [(0, 9, other), (at, count, table)], chunk, q_heads)[9:])
            at += count
        assert torch.equal(torch.cat(out), whole)
        cache.free += table + other


def test_q_and_k_are_normed_before_rotation() -> None:
    cache = Paged(torch.float32, 1, 16, 4)
    parts = cache.parts([(0, 1, cache.take(1))])
    qkv, q_norm, k_norm = random(1, 4 * 16), random(16, seed=1), random(16, seed=2)
    rope = torch.cat([torch.ones(1, 8), torch.zeros(1, 8)], dim=1)  # no rotation
    want = qkv.view(4, 16).clone()
    for row, weight in ((0, q_norm), (1, q_norm), (2, k_norm)):
        want[row] = want[row] * torch.rsqrt(want[row].pow(2).mean() + 1e-5) * weight
    norms = (q_norm.data_ptr(), k_norm.data_ptr(), False)
    kernels.store_kv(parts, 0, qkv.data_ptr(), 2, rope.data_ptr(), 16, False, *norms, 1e-5, 0.0)
    assert_close(qkv.view(4, 16), want)


def test_parts_are_checked() -> None:
    cache = Paged(torch.float32, 1, 16, 4, num_blocks=8)
    for chunks, text in (
        ([(0, 5, [0])], "too few blocks"),
        ([(0, 4, [8])], "block 8"),
        ([(0, 4, [-1])], "block -1"),
        ([(0, 2, [1]), (0, 0, [1])], "grow"),
        ([(-1, 2, [1])], "kv_lens"),
    ):
        with pytest.raises(ValueError, match=text):
            cache.parts(chunks)
    parts = cache.parts([(0, 4, [7])])
    qkv, out = random(4, 48), torch.empty(4, 16)
    with pytest.raises(ValueError, match="layer"):
        kernels.attention(parts, 2, qkv.data_ptr(), 1, 1.0, out.data_ptr())
    with pytest.raises(ValueError, match="null"):
        kernels.attention(parts, 1, 0, 1, 1.0, out.data_ptr())


def route(x: torch.Tensor, gate: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((x.shape[0], top_k), -9, dtype=torch.int32)
    weights = torch.empty(x.shape[0], top_k)
    kernels.route(
        x.data_ptr(),
        x.shape[0],
        x.shape[1],
        gate.data_ptr(),
        0,
        gate.shape[0],
        top_k,
        kernels.SOFTMAX,
        1,
        1,
        renormalize,
        1.0,
        ids.data_ptr(),
        weights.data_ptr(),
    )
    return ids, weights


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (7, 3), (64, 8), (130, 130)])
def test_route(num_experts: int, top_k: int) -> None:
    x, gate = random(9, 50), random(num_experts, 50, seed=1, scale=0.2)
    probabilities = torch.softmax(exact(x, gate), dim=-1)
    top = probabilities.topk(top_k)
    for renormalize in (False, True):
        ids, weights = route(x, gate, top_k, renormalize)
        assert torch.equal(ids.long(), top.indices)
        want = top.values / top.values.sum(-1, keepdim=True) if renormalize else top.values
        assert_close(weights, want)


def test_route_takes_the_lower_of_equals_and_bears_nan() -> None:
    x, gate = random(3, 8), torch.ones(6, 8)
    x[1, 0] = float("nan")
    ids, weights = route(x, gate, 4, True)
    assert ids[0].tolist() == ids[2].tolist() == [0, 1, 2, 3]
    assert sorted(set(ids[1].tolist())) == sorted(ids[1].tolist())
    assert torch.equal(weights[0], torch.full((4,), 0.25))


@BY_DTYPE
@pytest.mark.parametrize(("hidden", "width"), [(24, 20), (96, 33), (130, 64)])
def test_experts_touch_only_slots_with_rows(dtype: torch.dtype, hidden: int, width: int) -> None:
    held, num_experts, counts = (1, 4), 6, torch.tensor([0, 3, 0, 0, 8, 0], dtype=torch.int32)
    item = dtype.itemsize
    w2_offset = 2 * width * hidden * item
    slot = -(-(3 * width * hidden * item) // PAGE) * PAGE
    weights = {
        e: (random(2 * width, hidden, seed=e).to(dtype), random(hidden, width, seed=9 + e).to(dtype)) for e in held
    }
    fd = os.memfd_create("experts")
    os.ftruncate(fd, num_experts * slot)
    for e, (w13, w2) in weights.items():
        for tensor, offset in ((w13, 0), (w2, w2_offset)):
            os.pwrite(fd, bytes(tensor.view(torch.uint8).flatten().tolist()), e * slot + offset)
    range_ = Reservation(num_experts * slot)
    for e in held:
        range_.map(e * slot, fd, e * slot, slot, False)
    rows = random(11, hidden)
    want = []
    for e, part in zip(held, rows.split([3, 8]), strict=True):
        gate, up = exact(part, weights[e][0]).split(width, dim=1)
        want.append(exact(torch.nn.functional.silu(gate) * up, weights[e][1]))
    shape = (range_.base, slot, range_.base + w2_offset, slot, DTYPES[dtype], hidden, width)
    kernels.experts(rows.data_ptr(), 11, counts.data_ptr(), num_experts, *shape, rows.data_ptr())
    assert_close(rows, torch.cat(want), 3e-6)
    with pytest.raises(ValueError, match="counts"):
        kernels.experts(rows.data_ptr(), 10, counts.data_ptr(), num_experts, *shape, rows.data_ptr())
    range_.close()
    os.close(fd)


def test_many_rows_of_one_expert_are_as_few() -> None:
    hidden, width, count = 32, 24, 900  # beyond what is computed at once
    w13, w2, rows = random(2 * width, hidden, seed=1), random(hidden, width, seed=2), random(count, hidden)
    outs = []
    for part in (rows, rows[397:400].contiguous()):
        counts, out = torch.tensor([len(part)], dtype=torch.int32), torch.empty_like(part)
        shape = (w13.data_ptr(), 0, w2.data_ptr(), 0, kernels.FLOAT32, hidden, width)
        kernels.experts(part.data_ptr(), len(part), counts.data_ptr(), 1, *shape, out.data_ptr())
        outs.append(out)
    assert torch.equal(outs[0][397:400], outs[1])


@pytest.mark.parametrize("vocab", [1, 15, 16, 260, 4099])
def test_greatest_and_log_total(vocab: int) -> None:
    logits = random(5, vocab, scale=4.0)
    logits[1] = 2.5  # all equal
    assert kernels.greatest(logits.data_ptr(), 5, vocab) == [
        int(row.argmax()) if i != 1 else 0 for i, row in enumerate(logits)
    ]
    for row in logits:
        assert kernels.log_total(row.data_ptr(), vocab) == pytest.approx(float(row.double().logsumexp(0)), abs=1e-6)
        top = kernels.top_tokens(row.data_ptr(), vocab, 7)
        assert top == sorted(range(vocab), key=lambda i, row=row: (-float(row[i]), i))[:7]
    for value in ("nan", "inf", "-inf"):
        logits[3, vocab - 1] = float(value)
        assert kernels.greatest(logits.data_ptr(), 5, vocab)[3] == -1
        assert kernels.log_total(logits[3].data_ptr(), vocab) != kernels.log_total(logits[3].data_ptr(), vocab)
