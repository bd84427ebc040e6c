"""Latent attention of elasticmoe.native.kernels against attention over keys and values that are really made.

Shape suffixes: N rows, X heads, L positions, U elements of a latent, D elements that rotate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from elasticmoe.native import kernels
from tests.unit.kernel_memory import BY_DTYPE, DTYPES, Guarded, Paged, assert_close, random

pytestmark = pytest.mark.usefixtures("instruction_set")

LAYER = 1


class Form(NamedTuple):
    """Widths of a latent attention, and tokens of a block."""

    heads: int
    nope: int
    v: int
    rank: int
    turned: int
    size: int

    @property
    def query(self) -> int:
        return self.heads * (self.nope + self.turned)

    def cache(self, dtype: torch.dtype, num_blocks: int = 40) -> Paged:
        return Paged(dtype, 1, self.rank + self.turned, self.size, num_blocks=num_blocks, planes=1)

    def kv_b(self, dtype: torch.dtype) -> torch.Tensor:
        return (random(self.heads * (self.nope + self.v), self.rank, seed=3) * self.rank**-0.5).to(dtype)


FORMS = [
    Form(4, 6, 5, 24, 4, 4),
    Form(16, 32, 32, 128, 16, 16),  # DeepSeek's, with nothing left over
    Form(20, 10, 12, 50, 6, 3),
    Form(60, 4, 4, 33, 2, 256),
    Form(1, 3, 2, 7, 2, 1),
]
BY_FORM = pytest.mark.parametrize("form", FORMS, ids=str)


def store(form: Form, parts: kernels.Parts, q: torch.Tensor, kv: torch.Tensor, *, interleaved: bool = True) -> None:
    """Rotates by an angle of the position; all norms' weights are between 0.5 and 1.5."""
    table, norm = torch.empty(len(q), form.turned), norm_weights(form)
    inv_freq = 1.0 / (1e4 ** (torch.arange(0, form.turned, 2).float() / form.turned))
    kernels.rope_table(parts, inv_freq.data_ptr(), form.turned, 1.0, table.data_ptr())
    kernels.store_latent(
        parts,
        LAYER,
        q.data_ptr(),
        form.heads,
        form.nope,
        kv.data_ptr(),
        table.data_ptr(),
        form.turned,
        interleaved,
        norm.data_ptr(),
        1e-6,
    )


def norm_weights(form: Form) -> torch.Tensor:
    return torch.rand(form.rank, generator=torch.Generator().manual_seed(9)) + 0.5


def attend(form: Form, parts: kernels.Parts, q: torch.Tensor, kv_b: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(q), form.heads * form.v), float("nan"))
    shape = (form.heads, form.nope, form.v, form.turned)
    code = DTYPES[kv_b.dtype]
    kernels.latent_attention(parts, LAYER, q.data_ptr(), *shape, kv_b.data_ptr(), code, 0.3, out.data_ptr())
    return out


def run(form: Form, cache: Paged, chunks: Sequence[tuple[int, int, list[int]]], rows: torch.Tensor) -> torch.Tensor:
    """Store and attend; `rows`: queries and kv side by side."""
    parts = cache.parts(chunks)
    q, kv = (
        part.clone(memory_format=torch.contiguous_format)
        for part in rows.split([form.query, form.rank + form.turned], dim=1)
    )
    store(form, parts, q, kv)
    return attend(form, parts, q, form.kv_b(cache.memory.dtype))


def rows_of(form: Form, count: int, seed: int = 0) -> torch.Tensor:
    return random(count, form.query + form.rank + form.turned, seed=seed)


def turned(x_NXD: torch.Tensor, positions: torch.Tensor, *, interleaved: bool = True) -> torch.Tensor:
    """As complex numbers, in double precision."""
    dims = x_NXD.shape[-1]
    angles = positions[:, None].double() / (1e4 ** (torch.arange(0, dims, 2).double() / dims))
    x = x_NXD.double()
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else torch.stack(x.chunk(2, -1), -1)
    moved = torch.view_as_complex(pairs.clone()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    back = torch.view_as_real(moved)
    return back.flatten(-2) if interleaved else torch.cat([back[..., 0], back[..., 1]], -1)


@BY_DTYPE
@BY_FORM
def test_latent_attention_over_pages(dtype: torch.dtype, form: Form) -> None:
    cache, lengths = form.cache(dtype), (1, 7, 30)
    rows = [rows_of(form, n, seed=n) for n in lengths]
    tables = [cache.take(n) for n in lengths]
    got = run(form, cache, [(0, n, table) for n, table in zip(lengths, tables, strict=True)], torch.cat(rows))
    to_keys, to_values = form.kv_b(dtype).double().view(form.heads, -1, form.rank).split([form.nope, form.v], 1)
    for row, out, table in zip(rows, got.split(lengths), tables, strict=True):
        n = len(row)
        stored_L = cache.stored(LAYER, 0, table, n)[:, 0].double()
        latents, shared = stored_L.split([form.rank, form.turned], 1)
        kv = row[:, form.query :].double()
        bound = 2e-6 if dtype == torch.float32 else 2.0**-8
        normed = kv[:, : form.rank] * torch.rsqrt(kv[:, : form.rank].square().mean(1, keepdim=True) + 1e-6)
        assert_close(latents, normed * norm_weights(form), bound)
        assert_close(shared, turned(kv[:, None, form.rank :], torch.arange(n))[:, 0], bound)
        q = row[:, : form.query].view(n, form.heads, -1)
        q_nope, q_turned = q[..., : form.nope].double(), turned(q[..., form.nope :], torch.arange(n))
        keys = torch.einsum("xnu,lu->lxn", to_keys, latents)
        values = torch.einsum("xvu,lu->lxv", to_values, latents)
        scores = torch.einsum("nxk,lxk->xnl", q_nope, keys) + torch.einsum("nxd,ld->xnl", q_turned, shared)
        scores = (0.3 * scores).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        want = torch.einsum("xnl,lxv->nxv", scores.softmax(-1), values).reshape(n, -1)
        assert_close(out, want.float(), 5e-6)


@BY_DTYPE
@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_chunks_and_company_do_not_change_a_bit(dtype: torch.dtype, form: Form) -> None:
    length = 150
    rows, cache = rows_of(form, length), form.cache(dtype, num_blocks=160)
    whole = run(form, cache, [(0, length, cache.take(length))], rows)
    for sizes in ((1,) * 20 + (130,), (61, 7, 80, 1, 1), (149, 1)):
        table, other = cache.take(length), cache.take(9)
        at, out = 0, []
        for count in sizes:
            chunk = torch.cat([rows_of(form, 9, seed=7), rows[at : at + count]])
            out.append(run(form, cache, [(0, 9, other), (at, count, table)], chunk)[9:])
            at += count
        assert torch.equal(torch.cat(out), whole)
        cache.free += table + other


def test_many_sequences_of_one_token_are_as_one() -> None:
    """More than what kv_b is read once for."""
    form = FORMS[0]
    cache = form.cache(torch.bfloat16, num_blocks=120)
    rows = rows_of(form, 100)
    together = run(form, cache, [(0, 1, cache.take(1)) for _ in range(100)], rows)
    for at in (0, 47, 48, 99):
        assert torch.equal(run(form, cache, [(0, 1, cache.take(1))], rows[at : at + 1]), together[at : at + 1])


def test_halves_rotate_where_pairs_do_not() -> None:
    form = FORMS[0]
    cache = form.cache(torch.float32)
    q, kv = rows_of(form, 5).split([form.query, form.rank + form.turned], dim=1)
    q, kv = (part.clone(memory_format=torch.contiguous_format) for part in (q, kv))
    q_before, kv_before = q.clone().view(5, form.heads, -1), kv.clone()
    store(form, cache.parts([(0, 5, cache.take(5))]), q, kv, interleaved=False)
    want = turned(q_before[..., form.nope :], torch.arange(5), interleaved=False)
    assert_close(q.view(5, form.heads, -1)[..., form.nope :], want.float())
    assert torch.equal(q.view(5, form.heads, -1)[..., : form.nope], q_before[..., : form.nope])
    want = turned(kv_before[:, None, form.rank :], torch.arange(5), interleaved=False)[:, 0]
    assert_close(kv[:, form.rank :], want.float())


@BY_DTYPE
@BY_FORM
def test_nothing_beyond_the_tensors_is_touched(dtype: torch.dtype, form: Form) -> None:
    cache, table = form.cache(dtype), [0]
    cache.free = []
    count = min(3, form.size)
    rows = rows_of(form, count)
    want = run(form, cache, [(0, count, table)], rows)
    q = rows[:, : form.query].clone()
    store(form, cache.parts([(0, count, table)]), q, rows[:, form.query :].clone())
    width = form.rank + form.turned
    block = cache.memory[: 2 * form.size * width]  # of block 0: both layers
    guards = {
        "q": Guarded(q),
        "kv_b": Guarded(form.kv_b(dtype)),
        "out": Guarded(torch.zeros(count, form.heads * form.v)),
    }
    pages = Guarded(block)
    stride = -(-pages.nbytes // 4) * 4
    view = kernels.KvView(pages.addr, 1, stride, 2, 1, 1, form.size, width, DTYPES[dtype])
    cache.view = view
    kernels.latent_attention(
        cache.parts([(0, count, table)]),
        LAYER,
        guards["q"].addr,
        form.heads,
        form.nope,
        form.v,
        form.turned,
        guards["kv_b"].addr,
        DTYPES[dtype],
        0.3,
        guards["out"].addr,
    )
    assert torch.equal(guards["out"].floats().view_as(want), want)
    for memory in (*guards.values(), pages):
        memory.close()


def test_bad_arguments_are_refused_before_anything_is_written() -> None:
    form = FORMS[0]
    cache, pair = form.cache(torch.float32), Paged(torch.float32, 1, 28, 4)
    q, kv_b, out = random(2, form.query), form.kv_b(torch.float32), torch.zeros(2, form.heads * form.v)
    parts, of_pair = cache.parts([(0, 2, [0])]), pair.parts([(0, 2, [0])])

    def attempt(text: str, *, parts: kernels.Parts = parts, **changes: int) -> None:
        given = {"layer": 1, "q_heads": 4, "nope_dim": 6, "v_dim": 5, "rope_dims": 4, "dtype": kernels.FLOAT32}
        given |= {"q_addr": q.data_ptr(), "kv_b_addr": kv_b.data_ptr(), "out_addr": out.data_ptr()} | changes
        with pytest.raises(ValueError, match=text):
            kernels.latent_attention(parts, scale=1.0, **given)

    attempt("one plane", parts=of_pair)
    attempt("layer", layer=2)
    attempt("rope_dims", rope_dims=28)
    attempt("rope_dims", rope_dims=0)
    attempt("dtype of the cache", dtype=kernels.BFLOAT16)
    attempt("dtype", dtype=7)
    attempt("q_heads", q_heads=0)
    attempt("nope_dim", nope_dim=0)
    attempt("v_dim", v_dim=-1)
    attempt("overflows", q_heads=1 << 31, nope_dim=1 << 31, v_dim=1 << 31)
    attempt("null", kv_b_addr=0)
    attempt("aligned", out_addr=out.data_ptr() + 2)
    assert not out.any()
    kv, table, norm = random(2, 28), random(2, 4), random(24)
    before = q.clone(), kv.clone(), cache.memory.clone()
    for text, changes in (
        ("one plane", {"parts": of_pair}),
        ("even", {"rope_dims": 5}),
        ("layer", {"layer": -1}),
        ("null", {"norm_addr": 0}),
        ("q_heads", {"q_heads": 0}),
    ):
        given = {"parts": parts, "layer": 0, "q_addr": q.data_ptr(), "q_heads": 4, "nope_dim": 6, "rope_dims": 4}
        given |= {"kv_addr": kv.data_ptr(), "rope_addr": table.data_ptr(), "norm_addr": norm.data_ptr()} | changes
        with pytest.raises(ValueError, match=text):
            kernels.store_latent(interleaved=True, eps=1e-6, **given)
    assert torch.equal(q, before[0])
    assert torch.equal(kv, before[1])
    assert torch.equal(cache.memory.nan_to_num(7.0), before[2].nan_to_num(7.0))
