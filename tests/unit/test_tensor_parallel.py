"""Replicas of several ranks: transformers' tokens, one rank's logits nearly, and their own bit by bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.backends.factory import BackendOptions
from elasticmoe.services.worker.backends.host import HostBackend
from elasticmoe.services.worker.backends.torch import TorchBackend
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.model.batch import BatchPart
from tests.unit.backends import ON_CPU, QueuedBackend
from tests.unit.exchanges import KINDS
from tests.unit.ranks import Ranks, generate
from tests.unit.test_model_parity import (
    CONFIGS,
    FAMILIES,
    FLOAT32_BOUND,
    NUM_TOKENS,
    Backend,
    compare,
    make_streams,
    reference_of,
)

pytest.importorskip("transformers")

TP1_BOUND = 1e-5  # of logits with a standard deviation of 1, between one rank and several
# Where a family as it is made has heads that cannot be split over two ranks.
HEADS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2},
    "qwen3-biases-yarn": {"num_key_value_heads": 2},
    "qwen2-no-biases": {"num_key_value_heads": 2},
    "glm4-lite": {"num_attention_heads": 4, "num_key_value_heads": 4},
}
FEW = ("mixtral", "olmoe", "deepseek3")  # an attention each, one with norms over all heads


class Checkpoints:
    """With heads that can be split, and transformers' models of them, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, tuple[Path, Any]] = {}

    def __getitem__(self, name: str) -> tuple[Path, Any]:
        if name not in self._made:
            config = CONFIGS[name] | HEADS.get(name, {})
            directory = random_checkpoint(self._folder / name, config, seed=3, dtype="float32")
            self._made[name] = directory, reference_of(directory)
        return self._made[name]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(params=ON_CPU)
def backend(request: pytest.FixtureRequest) -> Backend:
    """What the ranks compute with."""
    return ON_CPU[request.param]


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in CONFIGS for size in ((1, 2) if name in FAMILIES else (1,))]
)
def test_greedy_tokens_are_those_of_transformers(
    name: str, size: int, checkpoints: Checkpoints, backend: Backend
) -> None:
    directory, reference = checkpoints[name]
    streams = make_streams(size, (5, 33, 1)[: 4 - size])
    logits = generate(Ranks(directory, size, backend=backend, tp=2), streams, NUM_TOKENS)
    worst, is_greedy = compare(reference, streams, logits)
    assert worst < FLOAT32_BOUND
    assert is_greedy


@pytest.mark.parametrize(("name", "tp"), [("mixtral", 6), ("olmoe", 6), ("deepseek3", 4), ("granite-biases", 2)])
def test_more_ranks_than_kv_heads(name: str, tp: int, checkpoints: Checkpoints) -> None:
    """Three of six ranks have the same kv head."""
    directory, reference = checkpoints[name]
    streams = make_streams(1, (5, 17))
    logits = generate(Ranks(directory, 1, tp=tp), streams, NUM_TOKENS)
    assert compare(reference, streams, logits)[0] < FLOAT32_BOUND


def run_once(directory: Path, size: int, chunk: int, others: bool, **options: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens and logits of one stream, alone or among others."""
    streams = make_streams(size, (33, 9))
    if not others:
        del streams[0][1:], streams[1:]
        streams += [[] for _ in range(size - 1)]
    logits = generate(Ranks(directory, size, **options), streams, NUM_TOKENS, lambda _: chunk)
    return streams[0][0].tokens, logits[id(streams[0][0])]


def check_bits(directory: Path, cases: tuple[tuple[int, int, bool], ...], **options: Any) -> torch.Tensor:
    """Tokens and logits of a stream are the same in all cases of (replicas, chunk, others); the logits."""
    runs = [run_once(directory, size, chunk, others, tp=2, **options) for size, chunk, others in cases]
    for tokens, logits in runs[1:]:
        assert tokens == runs[0][0]
        assert torch.equal(logits, runs[0][1])
    return runs[0][1]


@pytest.mark.parametrize("name", FEW)
def test_placement_and_company_change_no_bit(name: str, checkpoints: Checkpoints, backend: Backend) -> None:
    """Nor do chunks: rows are split over a replica's ranks in other ways then."""
    check_bits(checkpoints[name][0], ((1, 40, False), (2, 5, True), (3, 11, True), (2, 1, False)), backend=backend)


@pytest.mark.parametrize("name", FEW)
def test_nor_do_they_with_weights_and_kv_of_bfloat16(
    name: str, checkpoints: Checkpoints, backend: Callable[..., ComputeBackend]
) -> None:
    """As deployments have them where nobody says otherwise; also where activations are rounded."""
    directory, cases = checkpoints[name][0], ((1, 40, False), (2, 5, True))
    rounding = partial(backend, options=BackendOptions(activations="bfloat16"))
    plain, rounded = (check_bits(directory, cases, backend=made, dtype="bfloat16") for made in (backend, rounding))
    assert not torch.equal(plain, rounded)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("size", [1, 2])
def test_no_token_is_sent_twice(name: str, size: int, checkpoints: Checkpoints) -> None:
    """The experts of a layer get each token as often as it has chosen some, of all ranks of a replica together."""
    ranks = Ranks(checkpoints[name][0], size, tp=2)
    arrived = [count_arrivals(exchange) for exchange in ranks.exchanges]
    streams = make_streams(size, (33, 9, 1))
    ranks.step([[stream.part(len(stream.tokens), 1) for stream in row] for row in streams])
    num_tokens = sum(len(stream.tokens) for row in streams for stream in row)
    moe_layers = [layer for layer, count in enumerate(ranks.spec.num_experts_by_layer) if count]
    assert sum(arrived, Counter()) == dict.fromkeys(moe_layers, num_tokens * ranks.spec.moe.top_k)


def count_arrivals(exchange: Exchange) -> Counter[int]:
    """Count from now on the rows that a rank's experts get, by layer."""
    dispatch, arrived = exchange.dispatch, Counter[int]()

    def counting(layer: int, *given: Any, **options: Any) -> int:
        num_rows = dispatch(layer, *given, **options)
        arrived[layer] += num_rows
        return num_rows

    exchange.dispatch = counting  # type: ignore[method-assign]
    return arrived


@pytest.mark.parametrize("name", FAMILIES)
def test_several_ranks_compute_nearly_what_one_does(name: str, checkpoints: Checkpoints) -> None:
    directory, _ = checkpoints[name]
    (tokens, logits), (want, want_logits) = (run_once(directory, 1, 7, True, tp=tp) for tp in (2, 1))
    assert tokens == want
    assert float((logits - want_logits).abs().max()) < TP1_BOUND * max(1.0, float(want_logits.abs().max()))


@pytest.mark.parametrize("name", FEW)
def test_results_are_waited_for_whatever_the_exchange(name: str, checkpoints: Checkpoints) -> None:
    """On devices that compute only when they are waited for, in memory of their own, and rows that travel between them
    or through the host's memory."""
    directory, _ = checkpoints[name]

    def run(kind: Any, made: Backend) -> torch.Tensor:
        return run_once(directory, 2, 11, True, backend=made, exchange_kind=kind, tp=2)[1]

    want = run("shm", TorchBackend)
    for kind in KINDS:
        assert torch.equal(run(kind, QueuedBackend), want)


def test_logits_in_pieces_are_the_same(checkpoints: Checkpoints) -> None:
    """Of as many rows as the bus has room for: here one, there five."""
    directory, _ = checkpoints["mixtral"]
    runs = [run_once(directory, 1, 8, True, tp=2, half_elements=room, max_tokens=16) for room in (2 * 16 * 96, 1 << 20)]
    assert torch.equal(runs[0][1], runs[1][1])


def test_a_step_that_was_given_up_is_repeated(checkpoints: Checkpoints, backend: Backend) -> None:
    """Also where one rank of a replica fails in mid-step, between two sums: the others find the generation over."""
    directory, _ = checkpoints["olmoe"]
    ranks, fresh = (Ranks(directory, 2, backend=backend, tp=2) for _ in range(2))
    work = [[stream.part(9, 9) for stream in row] for row in make_streams(2, (9, 9))]
    exchange = ranks.exchanges[1]
    real, left = exchange.reduce, [5]

    def fail(*args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            ranks.new_generation(routing=False)  # as the HMM does when its connection ends
            raise ConnectionError
        real(*args)

    exchange.reduce = fail  # type: ignore[method-assign]
    with pytest.raises(Exception, match="generation"):
        ranks.step(work)
    del exchange.reduce
    ranks.new_generation()
    for rows, want in zip(ranks.step(work), fresh.step(work), strict=True):
        assert torch.equal(rows, want)


def test_what_layers_pass_on_has_the_same_room_for_all_of_them(checkpoints: Checkpoints) -> None:
    """Also parts of shared experts: a buffer in each layer would be in no budget."""
    made: list[tuple[int, ...]] = []

    class Counting(HostBackend):
        def mirror(self, *shape: int, dtype: torch.dtype = torch.float32) -> Mirror:
            made.append(shape)
            return super().mirror(*shape, dtype=dtype)

    directory, _ = checkpoints["deepseek3"]
    ranks = Ranks(directory, 1, tp=2, max_tokens=48, backend=Counting)
    assert ranks.spec.moe.shared_width > 0
    assert sum(count > 0 for count in ranks.spec.num_experts_by_layer) > 1
    rows = (48, ranks.spec.hidden)
    assert made.count(rows) == 2 * 4, "a rank's residual, x, delta and part"


def test_bad_batches_are_refused_by_all(checkpoints: Checkpoints) -> None:
    ranks = Ranks(checkpoints["mixtral"][0], 1, tp=2, max_tokens=8)
    with pytest.raises(ValueError, match="token 999 "):
        ranks.step([[BatchPart([1, 999], 0, [0], 1)]])
    with pytest.raises(ValueError, match="limit is 8"):
        ranks.step([[BatchPart([1] * 9, 0, [0, 1, 2], 1)]])


def test_a_backend_is_of_every_rank(backend: Backend) -> None:
    """What is computed for replicas alone, against torch."""
    made: ComputeBackend = backend()
    x_NC, out_NC = torch.randn(5, 12), torch.full((5, 12), 7.0)
    made.square(x_NC, out_NC)(4)
    assert torch.equal(out_NC[:4], x_NC[:4] ** 2)
    assert bool((out_NC[4] == 7).all())
    weight, sums = torch.randn(6), torch.rand(5, 2) + 1
    want = x_NC[:3, 2:8] * (1 / torch.sqrt(sums[:3, 1:] / 24 + 1e-5)) * weight
    made.scale_by_squares(x_NC[:, 2:8], sums[:, 1], 24, weight, 1e-5)(3)
    assert torch.equal(x_NC[:3, 2:8], want)
    made.clear(out_NC)(5)
    assert not out_NC.any()
