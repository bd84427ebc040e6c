"""Parts that some families take, in elasticmoe.native.kernels, against a few lines of torch or plain Python.

Shape suffixes: N rows, H hidden, W width, D head_dim, E experts, K experts per token.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest
import torch

from elasticmoe.native import kernels
from tests.unit.kernel_memory import BY_DTYPE, DTYPES, Paged, assert_close, exact, random, rotate

pytestmark = pytest.mark.usefixtures("instruction_set")


@BY_DTYPE
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_bias_is_added_once(dtype: torch.dtype, accumulate: bool) -> None:
    w_WH, bias_W = random(37, 70, seed=1).to(dtype), random(37, seed=2)
    for rows in (1, 2, 7, 40):
        x_NH, out = random(rows, 70), random(rows, 37, seed=3)
        want = exact(x_NH, w_WH) + bias_W + (out if accumulate else 0)
        addresses = x_NH.data_ptr(), rows, w_WH.data_ptr(), DTYPES[dtype], 37, 70, out.data_ptr()
        kernels.linear(*addresses, accumulate, bias_W.data_ptr())
        assert_close(out, want)


@BY_DTYPE
def test_embeddings_are_multiplied(dtype: torch.dtype) -> None:
    table, out, ids = random(11, 30).to(dtype), torch.empty(2, 30), array("i", [10, 3])
    kernels.embed(ids.buffer_info()[0], 2, table.data_ptr(), DTYPES[dtype], 11, 30, 12.5, out.data_ptr())
    assert torch.equal(out, table[[10, 3]].float() * 12.5)


def test_cosines_and_sines_are_multiplied() -> None:
    cache = Paged(torch.float32, 1, 16, 4)
    parts, inv_freq = cache.parts([(0, 6, cache.take(6))]), torch.tensor([1.0, 0.1, 0.01])
    plain, larger = torch.empty(6, 6), torch.empty(6, 6)
    kernels.rope_table(parts, inv_freq.data_ptr(), 6, 1.0, plain.data_ptr())
    kernels.rope_table(parts, inv_freq.data_ptr(), 6, 1.25, larger.data_ptr())
    assert torch.equal(larger, plain * 1.25)
    with pytest.raises(ValueError, match="even"):
        kernels.rope_table(parts, inv_freq.data_ptr(), 5, 1.0, plain.data_ptr())


class Stored:
    """Two query heads, two kv heads of 12, stored at positions 3 to 7: what is left in qkv, and in the cache."""

    heads, kv_heads, dim, count, start = 2, 2, 12, 5, 3

    def __init__(self, dims: int, **changes: Any) -> None:
        cache = Paged(torch.float32, self.kv_heads, self.dim, 4)
        blocks = cache.take(self.start + self.count)
        parts = cache.parts([(self.start, self.count, blocks)])
        inv_freq = 1.0 / (1e4 ** (torch.arange(0, dims, 2).float() / dims))
        table = torch.empty(self.count, dims)
        kernels.rope_table(parts, inv_freq.data_ptr(), dims, 1.0, table.data_ptr())
        self.before = random(self.count, self.heads + 2 * self.kv_heads, self.dim, scale=3.0)
        self.after = self.before.clone()
        given = {"interleaved": False, "q_norm_addr": 0, "k_norm_addr": 0, "norms_token": False, "eps": 1e-5}
        given |= {"clip": 0.0, "q_heads": self.heads} | changes
        kernels.store_kv(parts, 0, qkv_addr=self.after.data_ptr(), rope_addr=table.data_ptr(), rope_dims=dims, **given)
        self.positions = torch.arange(self.start, self.start + self.count)
        kept = [cache.stored(0, plane, blocks, self.start + self.count)[self.start :] for plane in (0, 1)]
        assert torch.equal(torch.cat(kept, 1), self.after[:, self.heads :])


@pytest.mark.parametrize("dims", [2, 6, 12])
def test_only_the_first_elements_rotate(dims: int) -> None:
    stored = Stored(dims)
    want = stored.before.clone()
    want[:, :4, :dims] = rotate(want[:, :4, :dims], stored.positions)
    assert_close(stored.after, want)
    assert torch.equal(stored.after[..., dims:], stored.before[..., dims:])


@pytest.mark.parametrize("dims", [4, 12])
def test_interleaved_pairs_rotate(dims: int) -> None:
    stored = Stored(dims, interleaved=True)
    want = stored.before.clone()
    halves = torch.cat([want[:, :4, 0:dims:2], want[:, :4, 1:dims:2]], -1)
    turned = rotate(halves, stored.positions)
    want[:, :4, 0:dims:2], want[:, :4, 1:dims:2] = turned.chunk(2, -1)
    assert_close(stored.after, want)


def test_all_heads_of_a_token_are_normed_together() -> None:
    q_norm, k_norm = random(24, seed=1), random(24, seed=2)
    stored = Stored(12, q_norm_addr=q_norm.data_ptr(), k_norm_addr=k_norm.data_ptr(), norms_token=True)
    want = stored.before.clone()
    for begin, weight in ((0, q_norm), (2, k_norm)):
        heads = want[:, begin : begin + 2].reshape(-1, 24)
        normed = heads * torch.rsqrt(heads.square().mean(1, keepdim=True) + 1e-5) * weight
        want[:, begin : begin + 2] = normed.view(-1, 2, 12)
    want[:, :4] = rotate(want[:, :4], stored.positions)
    assert_close(stored.after, want)


def test_queries_keys_and_values_are_cut_after_the_norm_and_before_they_rotate() -> None:
    q_norm, k_norm = (torch.full((12,), 3.0) for _ in range(2))
    stored = Stored(12, q_norm_addr=q_norm.data_ptr(), k_norm_addr=k_norm.data_ptr(), clip=1.5)
    want = stored.before.clone()
    want[:, :4] *= 3 * torch.rsqrt(want[:, :4].square().mean(-1, keepdim=True) + 1e-5)
    assert float(want.abs().max()) > 1.5
    want.clamp_(-1.5, 1.5)
    want[:, :4] = rotate(want[:, :4], stored.positions)
    assert_close(stored.after, want)


def test_a_store_with_bad_arguments_writes_nothing() -> None:
    cache, single = Paged(torch.float32, 1, 16, 4), Paged(torch.float32, 1, 16, 4, planes=1)
    qkv, table = random(2, 48), random(2, 16)
    before, memory = qkv.clone(), cache.memory.clone()
    parts, of_single = (each.parts([(0, 2, [1])]) for each in (cache, single))
    good = {"layer": 0, "q_heads": 1, "rope_dims": 16, "clip": 0.0, "q_norm_addr": 0}
    for text, bad in (
        ("rope_dims", {"rope_dims": 18}),
        ("even", {"rope_dims": 7}),
        ("clip", {"clip": -1.0}),
        ("clip", {"clip": float("nan")}),
        ("q_heads", {"q_heads": 0}),
        ("aligned", {"q_norm_addr": 6}),
    ):
        with pytest.raises(ValueError, match=text):
            kernels.store_kv(
                parts,
                qkv_addr=qkv.data_ptr(),
                rope_addr=table.data_ptr(),
                interleaved=False,
                k_norm_addr=0,
                norms_token=False,
                eps=1e-6,
                **{**good, **bad},
            )
    with pytest.raises(ValueError, match="two planes"):
        kernels.attention(of_single, 0, qkv.data_ptr(), 1, 1.0, table.data_ptr())
    assert torch.equal(qkv, before)
    assert torch.equal(cache.memory.nan_to_num(7.0), memory.nan_to_num(7.0))


class Router:
    """A router's numbers, with what the native one makes of them."""

    def __init__(self, num_experts: int, top_k: int, **changes: Any) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.how: dict[str, Any] = {"scoring": kernels.SOFTMAX, "num_groups": 1, "top_groups": 1, "renormalize": False}
        self.how |= {"scaling": 1.0} | changes

    def run(
        self, x_NH: torch.Tensor, gate_EH: torch.Tensor, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, hidden = x_NH.shape
        ids, weights = torch.full((n, self.top_k), -9, dtype=torch.int32), torch.full((n, self.top_k), -9.0)
        bias = 0 if bias_E is None else bias_E.data_ptr()
        kernels.route(
            x_NH.data_ptr(),
            n,
            hidden,
            gate_EH.data_ptr(),
            bias,
            self.num_experts,
            self.top_k,
            ids_addr=ids.data_ptr(),
            weights_addr=weights.data_ptr(),
            **self.how,
        )
        return ids, weights

    def plain(self, logits: list[float], bias: list[float]) -> tuple[list[int], list[float]]:
        """One row in plain Python."""
        is_softmax = self.how["scoring"] == kernels.SOFTMAX
        if is_softmax:
            total = math.fsum(math.exp(value - max(logits)) for value in logits)
            scores = [math.exp(value - max(logits)) / total for value in logits]
        else:
            scores = [1 / (1 + math.exp(-value)) for value in logits]
        choice = [score + extra for score, extra in zip(scores, bias, strict=True)]
        size = self.num_experts // self.how["num_groups"]
        groups = [choice[at : at + size] for at in range(0, self.num_experts, size)]
        worth = [sum(sorted(group)[-1 if is_softmax else -2 :]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: (-worth[g], g))[: self.how["top_groups"]]
        left = [e for e in range(self.num_experts) if e // size in best]
        ids = sorted(left, key=lambda e: (-choice[e], e))[: self.top_k]
        weights = [scores[e] for e in ids]
        if self.how["renormalize"]:
            weights = [weight / (sum(weights) + 1e-20) for weight in weights]
        return ids, [weight * self.how["scaling"] for weight in weights]


@pytest.mark.parametrize("scoring", [kernels.SOFTMAX, kernels.SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "groups", "top_groups", "top_k"), [(7, 1, 1, 3), (60, 6, 2, 8), (256, 8, 4, 8), (34, 17, 3, 6)]
)
def test_routers_of_every_kind(
    scoring: int, has_bias: bool, renormalize: bool, num_experts: int, groups: int, top_groups: int, top_k: int
) -> None:
    how = {"num_groups": groups, "top_groups": top_groups, "renormalize": renormalize, "scaling": 2.5}
    router = Router(num_experts, top_k, scoring=scoring, **how)
    x, gate = random(9, 50), random(num_experts, 50, seed=1, scale=0.2)
    bias = random(num_experts, seed=2, scale=0.1) if has_bias else None
    ids, weights = router.run(x, gate, bias)
    logits = x.double() @ gate.double().T
    for row in range(9):
        extra = [0.0] * num_experts if bias is None else bias.tolist()
        want_ids, want_weights = router.plain(logits[row].tolist(), extra)
        assert ids[row].tolist() == want_ids
        assert_close(weights[row], torch.tensor(want_weights))


def test_of_equal_groups_and_experts_the_lower_are_taken() -> None:
    how = {"scoring": kernels.SIGMOID, "num_groups": 4, "top_groups": 2, "renormalize": True}
    router = Router(12, 4, **how)
    x, gate, bias = torch.zeros(1, 4), torch.zeros(12, 4), torch.zeros(12)
    assert router.run(x, gate, bias)[0].tolist() == [[0, 1, 2, 3]]
    bias[7] = 0.5  # group 2 is the best, and 0 the lowest of the others
    bias[6], bias[8] = 0.0, -0.0  # equals
    ids, weights = router.run(x, gate, bias)
    assert ids.tolist() == [[7, 0, 1, 2]]
    assert torch.equal(weights, torch.full((1, 4), 0.25))  # the bias is no part of them


@pytest.mark.parametrize("scoring", [kernels.SOFTMAX, kernels.SIGMOID], ids=["softmax", "sigmoid"])
def test_a_row_with_nan_gets_distinct_experts_of_its_own_alone(scoring: int) -> None:
    router = Router(12, 5, scoring=scoring, num_groups=4, top_groups=2)
    x, gate, bias = random(3, 8), random(12, 8, seed=1), random(12, seed=2)
    want = router.run(x, gate, bias)
    x[1, 3] = float("nan")
    ids, weights = router.run(x, gate, bias)
    assert len(set(ids[1].tolist())) == 5
    assert all(0 <= e < 12 for e in ids[1].tolist())
    assert torch.equal(ids[[0, 2]], want[0][[0, 2]])
    assert torch.equal(weights[[0, 2]], want[1][[0, 2]])
    gate[2, 0] = float("nan")  # one expert is not to be judged; the others are
    x[1, 3] = 0.0
    for row in router.run(x, gate, bias)[0]:
        assert len(set(row.tolist())) == 5


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("scoring", {"scoring": 2}),
        ("num_groups", {"num_groups": 0}),
        ("multiple", {"num_groups": 5}),
        ("top_groups", {"num_groups": 4, "top_groups": 5}),
        ("top_k", {"num_groups": 4, "top_groups": 1}),
        ("two experts", {"num_groups": 12, "top_groups": 12, "scoring": kernels.SIGMOID}),
    ],
)
def test_routers_that_cannot_choose_are_refused(text: str, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=text):
        Router(12, 4, **changes).run(random(1, 8), random(12, 8), None)


@BY_DTYPE
@pytest.mark.parametrize("has_gate", [False, True])
def test_shared_experts_are_added(dtype: torch.dtype, has_gate: bool) -> None:
    hidden, width = 70, 33
    w13, w2 = random(2 * width, hidden, seed=1).to(dtype) / 8, random(hidden, width, seed=2).to(dtype) / 8
    gate = random(hidden, seed=3, scale=0.3)
    whole_x, whole_out = random(400, hidden), random(400, hidden, seed=4)
    outs = []
    for rows in (1, 5, 400):  # more than what is computed at once
        x, out = whole_x[:rows].contiguous(), whole_out[:rows].clone()
        left, right = exact(x, w13).split(width, dim=1)
        added = exact(torch.nn.functional.silu(left) * right, w2)
        want = out + (added * exact(x, gate[None]).sigmoid() if has_gate else added)
        addresses = x.data_ptr(), rows, w13.data_ptr(), w2.data_ptr(), DTYPES[dtype], hidden, width
        kernels.shared_experts(*addresses, gate.data_ptr() if has_gate else 0, out.data_ptr())
        assert_close(out, want, 3e-6)
        outs.append(out)
    assert torch.equal(outs[0], outs[2][:1])
    assert torch.equal(outs[1], outs[2][:5])


def test_the_oracle_reads_one_plane_as_two() -> None:
    outs = []
    for planes, width in ((2, 5), (1, 10)):
        cache = Paged(torch.float32, 1, width, 3, planes=planes)
        blocks = cache.take(11)
        for start, count in ((0, 7), (7, 4)):
            kv = torch.randint(0, 65_521, (11, 10), generator=torch.Generator().manual_seed(1)).float()
            rows, out = kv[start : start + count].contiguous(), torch.empty(count, 10)
            parts = cache.parts([(start, count, blocks)])
            kernels.oracle_mix(parts, 1, rows.data_ptr(), 65_521, 17, out.data_ptr())
        outs.append(out)
        held = [cache.stored(1, plane, blocks, 11)[:, 0] for plane in range(planes)]
        assert torch.equal(torch.cat(held, 1), kv)
    want = [sum(int(value) * 17 ** (10 - j) for j, value in enumerate(column)) % 65_521 for column in kv.T]
    assert outs[0][-1].tolist() == want
    assert torch.equal(outs[0], outs[1])
