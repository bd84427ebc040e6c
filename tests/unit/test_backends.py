"""Compute backends beside one another: a row's bits, the same choices, and what each refuses.

Shape suffixes: N rows, H hidden, W width, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from elasticmoe.common.layout import Compute as ComputeName
from elasticmoe.common.model_spec import MoeSpec
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.protocol.rank import Sampling
from elasticmoe.services.worker.backends.answers import WeightedSum
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.choice import TokenChoice
from elasticmoe.services.worker.backends.factory import BackendOptions, open_backend
from tests.hardware.mirrored import MADE, MirroredBackend
from tests.unit.backends import ON_CPU, draw
from tests.unit.npu_sampling import SAMPLERS

ROWS, HIDDEN, WIDTH = 40, 512, 256
ROUNDING = BackendOptions(activations="bfloat16")
BY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
Compute = Callable[[ComputeBackend, torch.Tensor], torch.Tensor]


@pytest.fixture(params=ON_CPU)
def backend(request: pytest.FixtureRequest) -> ComputeBackend:
    """Each of them."""
    return open_backend(request.param)


def random_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(dtype: torch.dtype) -> Compute:
    w_WH = (random_of(WIDTH, HIDDEN, seed=1) / 20).to(dtype)

    def compute(backend: ComputeBackend, x_NH: torch.Tensor) -> torch.Tensor:
        out_NW = backend.empty(len(x_NH), WIDTH)
        backend.linear(x_NH, w_WH, out_NW)(len(x_NH))
        return out_NW

    return compute


def feed_forward(dtype: torch.dtype) -> Compute:
    w13, w2 = ((random_of(*shape, seed=2) / 20).to(dtype) for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))

    def compute(backend: ComputeBackend, x_NH: torch.Tensor) -> torch.Tensor:
        out_NH = backend.empty(*x_NH.shape)
        backend.feed_forward(x_NH, w13, w2, WIDTH, out_NH)(len(x_NH))
        return out_NH

    return compute


def experts(dtype: torch.dtype) -> Compute:
    """All rows are expert 1's; expert 0 has none and is full of NaN."""
    moe = MoeSpec(2, 1, WIDTH, False)
    w13, w2 = (
        torch.stack([torch.full(shape, float("nan")), random_of(*shape, seed=3) / 20]).to(dtype)
        for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))
    )

    def compute(backend: ComputeBackend, x_NH: torch.Tensor) -> torch.Tensor:
        rows_NH = x_NH.clone()
        backend.experts(w13, w2, moe, HIDDEN)(rows_NH, torch.tensor([0, len(x_NH)], dtype=torch.int32), len(x_NH))
        return rows_NH

    return compute


def rms_norm(_: torch.dtype) -> Compute:
    def compute(backend: ComputeBackend, x_NH: torch.Tensor) -> torch.Tensor:
        out_NH, sum_NH, weight_H = backend.empty(*x_NH.shape), x_NH.clone(), random_of(HIDDEN)
        backend.rms_norm(sum_NH, x_NH, weight_H, 1e-6, out_NH)(len(x_NH))
        return out_NH

    return compute


def linear_with_bias(dtype: torch.dtype) -> Compute:
    w_WH, bias_W = (random_of(WIDTH, HIDDEN, seed=1) / 20).to(dtype), random_of(WIDTH, seed=6)

    def compute(backend: ComputeBackend, x_NH: torch.Tensor) -> torch.Tensor:
        out_NW = x_NH[:, :WIDTH].clone()
        backend.linear(x_NH, w_WH, out_NW, bias_W=bias_W, accumulate=True)(len(x_NH))
        return out_NW

    return compute


def shared_experts(dtype: torch.dtype) -> Compute:
    w13, w2 = ((random_of(*shape, seed=2) / 20).to(dtype) for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    gate_1H = random_of(1, HIDDEN, seed=7) / 20

    def compute(backend: ComputeBackend, x_NH: torch.Tensor) -> torch.Tensor:
        out_NH = x_NH.clone()
        backend.shared_experts(x_NH, w13, w2, None, WIDTH, out_NH)(len(x_NH))
        backend.shared_experts(x_NH, w13, w2, gate_1H, WIDTH, out_NH)(len(x_NH))
        return out_NH

    return compute


def routes(moe: MoeSpec) -> Callable[[torch.dtype], Compute]:
    experts, top_k = moe.num_experts, moe.top_k
    gate_EH, bias_E = random_of(experts, HIDDEN, seed=4) / 20, random_of(experts, seed=5) / 10

    def make(_: torch.dtype) -> Compute:
        def compute(backend: ComputeBackend, x_NH: torch.Tensor) -> torch.Tensor:
            ids_NK, weights_NK = backend.empty(len(x_NH), top_k, dtype=torch.int32), backend.empty(len(x_NH), top_k)
            bias = bias_E if moe.has_bias else None
            backend.route(x_NH, gate_EH, bias, moe, ids_NK, weights_NK)(len(x_NH))
            return torch.cat([ids_NK.float(), weights_NK], 1)

        return compute

    return make


ROUTERS = [
    MoeSpec(60, 4, WIDTH, True),
    MoeSpec(60, 4, WIDTH, False, num_groups=6, top_groups=2, scaling=16.0),
    MoeSpec(64, 8, WIDTH, True, "sigmoid", has_bias=True, num_groups=8, top_groups=4, scaling=2.5),
    MoeSpec(64, 6, WIDTH, False, "sigmoid", has_bias=True),
    MoeSpec(33, 5, WIDTH, True, has_bias=True),
]
MAKERS = [
    *(linear, linear_with_bias, feed_forward, shared_experts, experts, rms_norm),
    *(routes(moe) for moe in ROUTERS),
]


@BY_DTYPE
@pytest.mark.parametrize("make", MAKERS)
def test_a_rows_bits_do_not_depend_on_its_company(
    make: Callable[[torch.dtype], Compute], dtype: torch.dtype, backend: ComputeBackend
) -> None:
    """torch's own products do depend on it: on the number of rows, and on a row's place among them."""
    compute, x_NH = make(dtype), random_of(ROWS, HIDDEN)
    together = compute(backend, x_NH)
    assert torch.isfinite(together).all()
    for begin, end in ((0, 1), (7, 9), (0, 17), (3, 40)):
        assert torch.equal(compute(backend, x_NH[begin:end].clone()), together[begin:end])


@BY_DTYPE
@pytest.mark.parametrize("make", MAKERS)
def test_operations_nearly_agree(make: Callable[[torch.dtype], Compute], dtype: torch.dtype) -> None:
    compute, x_NH = make(dtype), random_of(ROWS, HIDDEN, seed=5)
    first, *others = (compute(open_backend(name), x_NH) for name in ON_CPU)
    for other in others:
        assert float((first - other).abs().max()) < 1e-5 * float(first.abs().max())


NEVER_ROUND: tuple[ComputeName, ...] = ("triton", "torch_npu")


@pytest.mark.parametrize("make", [linear, linear_with_bias, feed_forward, shared_experts, experts])
def test_backends_that_round_activations_nearly_agree(make: Callable[[torch.dtype], Compute]) -> None:
    """What lies between two numbers of bfloat16 may become one here and the other there, but a row's bits stay its own.
    Weights of float32 are multiplied as ever."""
    compute, x_NH = make(torch.bfloat16), random_of(ROWS, HIDDEN, seed=5)
    plain = compute(open_backend("host"), x_NH)
    size = float(plain.abs().max())
    names = [name for name in ON_CPU if name not in NEVER_ROUND]
    all_rounded = [compute(open_backend(name, options=ROUNDING), x_NH) for name in names]
    for name, rounded in zip(names, all_rounded, strict=True):
        backend = open_backend(name, options=ROUNDING)
        assert 1e-4 * size < float((rounded - plain).abs().max()) < 2e-2 * size
        assert float((rounded - all_rounded[0]).abs().max()) < 2e-3 * size
        for begin, end in ((0, 1), (7, 9), (0, 17), (3, 40)):
            assert torch.equal(compute(backend, x_NH[begin:end].clone()), rounded[begin:end])
        assert torch.equal(make(torch.float32)(backend, x_NH), make(torch.float32)(open_backend(name), x_NH))


@pytest.mark.parametrize("name", NEVER_ROUND)
def test_a_backend_that_cannot_round_says_so(name: ComputeName) -> None:
    with pytest.raises(ConfigError, match=f"--compute {name} does not follow --activations bfloat16"):
        open_backend(name, options=ROUNDING)


def test_answers_are_summed_with_the_same_bits(backend: ComputeBackend) -> None:
    """Products are rounded, and added to 0 in the order of the choices; what nobody answered may be anything."""
    top_k, width = 3, 1_100
    answers_RH, weights_NK = random_of(9, width) * 1e3, random_of(4, top_k, seed=1)
    at_P = torch.tensor([8, 0, 3, -1, 2, -1, -1, -1, -1, 5, 5, 1], dtype=torch.int32)
    answers_RH[4] = float("nan")
    out_NH = backend.empty(4, width).fill_(float("nan"))
    backend.weighted_sum(WeightedSum(answers_RH, at_P, weights_NK, out_NH, False), 4)
    want_NH = torch.zeros(4, width)
    for row, places in enumerate(at_P.view(4, top_k).tolist()):
        for k, place in enumerate(places):
            if place >= 0:
                product_H = answers_RH[place] * weights_NK[row, k]
                want_NH[row] += product_H
    assert torch.equal(out_NH, want_NH)
    backend.weighted_sum(WeightedSum(answers_RH, at_P[:3], weights_NK, out_NH.fill_(0.0), True), 1)
    assert torch.equal(out_NH[0], want_NH[0])
    backend.weighted_sum(WeightedSum(answers_RH, at_P, weights_NK, out_NH, True), 0)
    assert torch.equal(out_NH[0], want_NH[0])


@pytest.mark.parametrize("make", [linear_with_bias, experts, rms_norm])
def test_a_mirrored_backend_computes_what_its_own_does(make: Callable[[torch.dtype], Compute]) -> None:
    """Which runs these tests on other devices (tests/hardware): no operation is left to the host. Nor is anything
    captured: that is seen in deployments."""
    inner = {name for name in vars(ComputeBackend) if not name.startswith("_")}
    left = inner - {*MADE, *vars(MirroredBackend)}
    assert left == {"computes_by", "use_threads", "empty", "mirror", "fence", "section", "warming_up"}
    compute, x_NH = make(torch.bfloat16), random_of(3, HIDDEN)
    mirrored = MirroredBackend(open_backend("torch"))
    assert torch.equal(compute(mirrored, x_NH), compute(open_backend("torch"), x_NH))


def test_equals_are_taken_by_their_ids(backend: ComputeBackend) -> None:
    moe = MoeSpec(8, 3, 4, True)
    ids_NK, weights_NK = backend.empty(1, 3, dtype=torch.int32), backend.empty(1, 3)
    gate_EH = torch.zeros(8, 4)
    for x in (torch.zeros(1, 4), torch.full((1, 4), float("nan"))):
        backend.route(x, gate_EH, None, moe, ids_NK, weights_NK)(1)
        assert len(set(ids_NK[0].tolist())) == 3
        if not x.isnan().any():
            assert ids_NK[0].tolist() == [0, 1, 2]
    logits_BV = torch.tensor([[1.0, 3.0, 3.0], [float("nan"), 1.0, 2.0], [0.0, -0.0, 0.0]])
    greatest = TokenChoice(Sampling(seed=1), None, None, -1)
    assert [chosen.token for chosen in backend.choose(logits_BV, [greatest] * 3)] == [1, -1, 0]
    (judged,) = backend.judge(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), [0], 3)
    assert judged.top == [(1, 3.0), (2, 3.0), (3, 2.0)]
    assert judged.token == 1.0


def test_seeded_draws_are_the_same() -> None:
    """Of the same logits, whatever the options, but where a random number falls onto the very edge of a token."""
    rng, num_same, num_all = random.Random(11), 0, 0
    backends = [make() for make in SAMPLERS.values()]
    for number in range(600):
        vocab = rng.choice((3, 50, 259, 2_000))
        logits_BV = random_of(1, vocab, seed=number) * rng.choice((0.1, 2.0, 8.0))
        if rng.random() < 0.3:
            logits_BV = logits_BV.round()  # equals
        sampling = Sampling(
            seed=1,
            temperature=rng.choice((0.05, 0.7, 1.0, 3.0)),
            top_k=rng.choice((0, 0, 1, 7, 40)),
            top_p=rng.choice((1.0, 1.0, 0.9, 0.3, 0.0)),
            min_p=rng.choice((0.0, 0.0, 0.05, 1.0)),
        )
        uniform = rng.random()
        tokens = {draw(backend, logits_BV[0], sampling, uniform) for backend in backends}
        num_same += len(tokens) == 1
        num_all += 1
    assert num_same >= num_all - 1


@pytest.mark.parametrize(
    ("x_NH", "w_WH", "out_NW"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 6), torch.zeros(2, 4)),
        (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(4, 8), torch.zeros(2, 4)),
        (torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.float16), torch.zeros(2, 4)),
        (torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(4, 2).T),
        (torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, 5)),
        (torch.zeros(2, 8, device="meta"), torch.zeros(4, 8), torch.zeros(2, 4)),
    ],
)
def test_tensors_are_checked_when_an_operation_is_made(
    x_NH: torch.Tensor, w_WH: torch.Tensor, out_NW: torch.Tensor, backend: ComputeBackend
) -> None:
    with pytest.raises(ValueError, match="must be"):
        backend.linear(x_NH, w_WH, out_NW)
