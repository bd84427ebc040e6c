"""Decoder families against transformers, on random checkpoints of odd sizes, over one to four ranks, on every compute
backend."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from elasticmoe.cli.models import configs, random_checkpoint
from elasticmoe.common.layout import ExchangeKind
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.torch import TorchBackend
from elasticmoe.services.worker.model.batch import Batch, BatchPart
from tests.unit.backends import ON_CPU, QueuedBackend
from tests.unit.exchanges import KINDS
from tests.unit.ranks import BLOCK_SIZE, NUM_BLOCKS, Ranks, Stream, generate

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
# Each family as `model make` makes it, and with what it has besides.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": configs.TINY_MIXTRAL,
    "qwen3": configs.TINY_QWEN3_MOE | {"mlp_only_layers": [1], "norm_topk_prob": False, "tie_word_embeddings": True},
    "deepseek3": configs.TINY_DEEPSEEK_V3,
    "qwen2": configs.TINY_QWEN2_MOE,
    "olmoe": configs.TINY_OLMOE,
    "granite": configs.TINY_GRANITEMOE,
    "glm4": configs.TINY_GLM4_MOE,
    "glm4-lite": configs.TINY_GLM4_MOE_LITE,
    "deepseek2": configs.TINY_DEEPSEEK_V2,
    "qwen3-biases-yarn": configs.TINY_QWEN3_MOE | {"attention_bias": True, "rope_scaling": YARN},
    "qwen2-no-biases": configs.TINY_QWEN2_MOE | {"qkv_bias": False, "norm_topk_prob": True, "rope_scaling": LLAMA3},
    "olmoe-biases": configs.TINY_OLMOE | {"attention_bias": True, "clip_qkv": None, "norm_topk_prob": True},
    "granite-biases": configs.TINY_GRANITEMOE | {"attention_bias": True, "tie_word_embeddings": False},
    "glm4-plain": configs.TINY_GLM4_MOE
    | {"attention_bias": False, "use_qk_norm": False, "norm_topk_prob": False, "tie_word_embeddings": True}
    | {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "partial_rotary_factor": 0.75},
    "deepseek2-greedy": configs.TINY_DEEPSEEK_V2
    | {"topk_method": "greedy", "q_lora_rank": 28, "attention_bias": True, "tie_word_embeddings": True},
    "deepseek3-neox": configs.TINY_DEEPSEEK_V3
    | {"rope_interleave": False, "q_lora_rank": None, "attention_bias": True, "norm_topk_prob": False},
}
FAMILIES = tuple(CONFIGS)[:9]
FEW = ("mixtral", "qwen3", "deepseek3")  # where the family is of no account, but the kind of attention may be
Backend = Callable[[], ComputeBackend]
NUM_TOKENS = 8
BACKENDS_BOUND = 2e-5  # between two backends
FLOAT32_BOUND = 1e-4  # of logits with a standard deviation of 1
# Weights and KV are rounded to bfloat16, activations are not: closer to float32 than transformers' own bfloat16 (0.1).
BFLOAT16_BOUND = 0.06
BFLOAT16_BOUNDS = {"deepseek2": 0.08, "deepseek3": 0.08}  # which multiply what experts give by 2 and 2.5


class Models:
    """Checkpoints and transformers' models of them, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, tuple[Path, Any]] = {}

    def __getitem__(self, name: str) -> tuple[Path, Any]:
        if name not in self._made:
            directory = random_checkpoint(self._folder / name, CONFIGS[name], seed=3, dtype="float32", shards=2)
            self._made[name] = directory, reference_of(directory)
        return self._made[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Of all families."""
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(params=FEW)
def model(request: pytest.FixtureRequest, models: Models) -> tuple[Path, Any]:
    """A checkpoint and transformers' model of it."""
    return models[request.param]


@pytest.fixture(params=ON_CPU)
def backend(request: pytest.FixtureRequest) -> Backend:
    """What the ranks compute with."""
    return ON_CPU[request.param]


def reference_of(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def make_streams(
    size: int, lengths: tuple[int, ...], seed: int = 1, num_tokens: int = NUM_TOKENS
) -> list[list[Stream]]:
    """Streams of these prompt lengths on each of `size` ranks, with room for the tokens that come; no two ranks have
    the same prompts."""
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        counts = [-(-(n + num_tokens) // BLOCK_SIZE) for n in lengths]
        blocks = rng.sample(range(max(NUM_BLOCKS, sum(counts))), sum(counts))
        prompts = ([rng.randrange(256) for _ in range(n)] for n in lengths)
        rows.append(
            [Stream(prompt, [blocks.pop() for _ in range(n)]) for prompt, n in zip(prompts, counts, strict=True)]
        )
    return rows


def compare(
    reference: Any, streams: list[list[Stream]], logits: dict[int, torch.Tensor], num_tokens: int = NUM_TOKENS
) -> tuple[float, bool]:
    """(greatest difference of any logit, whether all tokens are the reference's greedy choice)."""
    worst, is_greedy = 0.0, True
    for stream in (stream for row in streams for stream in row):
        with torch.no_grad():
            want = reference(torch.tensor([stream.tokens[:-1]])).logits[0]
        worst = max(worst, float((want - logits[id(stream)]).abs().max()))
        is_greedy &= stream.tokens[-num_tokens:] == want.argmax(-1)[-num_tokens:].tolist()
    return worst, is_greedy


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in CONFIGS for size in ((1, 2, 3, 4) if name in FAMILIES else (2,))],
)
def test_logits_and_greedy_tokens(name: str, size: int, models: Models, backend: Backend) -> None:
    """At positions 0 to 112, in chunks of 7 tokens."""
    directory, reference = models[name]
    streams = make_streams(size, (5, 17, 105, 1)[: 5 - size] if size < 3 else (5, 17)[: 5 - size])
    logits = generate(Ranks(directory, size, backend=backend), streams, NUM_TOKENS)
    worst, is_greedy = compare(reference, streams, logits)
    assert worst < FLOAT32_BOUND
    assert is_greedy


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_an_output_of_500_tokens(name: str, models: Models, backend: Backend) -> None:
    """Some errors show only there: they add up, or a wrong token changes all that follow."""
    directory, reference = models[name]
    streams = make_streams(1, (20,), num_tokens=500)
    logits = generate(Ranks(directory, 1, backend=backend, num_blocks=200), streams, 500)
    worst, is_greedy = compare(reference, streams, logits, 500)
    assert worst < FLOAT32_BOUND
    assert is_greedy


@pytest.mark.slow
@pytest.mark.timeout(300)  # with torch, which computes row by row, a minute of an idle core
@pytest.mark.parametrize(
    ("name", "compute"),
    [
        *((name, "host") for name in (*FAMILIES, "qwen3-biases-yarn")),
        ("deepseek2", "torch"),
        *(pytest.param(name, "torch", marks=pytest.mark.soak) for name in FAMILIES if name != "deepseek2"),
    ],
)
def test_position_5000(name: str, compute: Literal["host", "torch"], models: Models) -> None:
    """Under yarn, whose factor of the scores cannot be seen at position 0, and where part of a head rotates."""
    directory, reference = models[name]
    streams = make_streams(1, (5_000,))
    ranks = Ranks(directory, 1, backend=ON_CPU[compute], num_blocks=1_300)
    logits = generate(ranks, streams, NUM_TOKENS, lambda _: 64)
    worst, is_greedy = compare(reference, streams, logits)
    assert worst < FLOAT32_BOUND
    assert is_greedy


def test_results_are_waited_for(model: tuple[Path, Any]) -> None:
    """On a device that computes only when it is waited for, in memory of its own."""
    directory, _ = model
    runs = []
    for backend in (TorchBackend, QueuedBackend):
        streams = make_streams(2, (9, 4))
        logits = generate(Ranks(directory, 2, backend=backend), streams, 4)
        runs.append([(stream.tokens, logits[id(stream)]) for row in streams for stream in row])
    for (tokens, logits_NV), (want, want_NV) in zip(*runs, strict=True):
        assert tokens == want
        assert torch.equal(logits_NV, want_NV)


def test_backends_agree(model: tuple[Path, Any]) -> None:
    """The same greedy tokens, from nearly the same logits."""
    directory, _ = model
    runs = []
    for backend in ON_CPU.values():
        streams = make_streams(2, (33, 9))
        logits = generate(Ranks(directory, 2, backend=backend), streams, NUM_TOKENS)
        runs.append([(stream.tokens, logits[id(stream)]) for row in streams for stream in row])
    first, *others = runs
    for run in others:
        for (tokens, logits_NV), (want, want_NV) in zip(run, first, strict=True):
            assert tokens == want
            assert float((logits_NV - want_NV).abs().max()) < BACKENDS_BOUND


def test_placement_and_company_change_no_bit(model: tuple[Path, Any], backend: Backend) -> None:
    """A sequence's logits are the same on any number of ranks, in any chunks, with whatever runs beside it."""
    directory, _ = model
    runs = []
    for size, chunk, others in ((1, 40, False), (3, 5, True), (4, 11, True)):
        streams = make_streams(size, (33, 9))
        if not others:
            del streams[0][1:], streams[1:]
        logits = generate(Ranks(directory, size, backend=backend), streams, NUM_TOKENS, lambda _, chunk=chunk: chunk)
        runs.append((streams[0][0].tokens, logits[id(streams[0][0])]))
    for tokens, logits in runs[1:]:
        assert tokens == runs[0][0]
        assert torch.equal(logits, runs[0][1])


@pytest.mark.parametrize("queues", [False, True])
def test_rows_that_travel_between_devices_change_no_bit(queues: bool, models: Models) -> None:
    """Nor does a rank wait for less than its device's end."""
    runs = []
    for kind in KINDS:
        backend = QueuedBackend if queues else ON_CPU["host"]
        streams = make_streams(3, (33, 9))
        ranks = Ranks(models["deepseek3"][0], 3, backend=backend, exchange_kind=kind)
        logits = generate(ranks, streams, 4, lambda _: 11)
        runs.append(torch.cat([logits[id(stream)] for row in streams for stream in row]))
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize(("kind", "waits"), [("shm", 1), ("mailbox", 2), ("torch_dist", 2)])
def test_a_step_waits_for_its_device_where_its_exchange_has_to_and_once_at_its_end(
    kind: ExchangeKind, waits: int, models: Models
) -> None:
    """Before ids and rows are announced, before answers are, and for the logits."""
    ranks = Ranks(models["deepseek3"][0], 2, backend=QueuedBackend, exchange_kind=kind)
    num_layers = sum(count > 0 for count in ranks.spec.num_experts_by_layer)
    backends: list[Any] = [model.backend for model in ranks.models]
    for row in ([9, 3], [1, 1]):
        before = [backend.num_fences for backend in backends]
        streams = make_streams(2, tuple(row))
        ranks.step([[stream.part(len(stream.tokens), 1) for stream in of_rank] for of_rank in streams])
        assert [backend.num_fences for backend in backends] == [count + waits * num_layers + 1 for count in before]


def test_rank_without_tokens_takes_part(model: tuple[Path, Any], backend: Backend) -> None:
    directory, reference = model
    streams = make_streams(3, (12,))
    del streams[0][:], streams[2][:]
    logits = generate(Ranks(directory, 3, backend=backend), streams, NUM_TOKENS)
    assert compare(reference, streams, logits)[0] < FLOAT32_BOUND


def test_repeated_step_gives_the_same_bits(model: tuple[Path, Any], backend: Backend) -> None:
    directory, _ = model
    ranks = Ranks(directory, 2, backend=backend)
    work = [[stream.part(len(stream.tokens), 2) for stream in row] for row in make_streams(2, (7, 13))]
    first = ranks.step(work)
    again = ranks.step(work)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [len(rows) for rows in first] == [4, 4]


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_within_its_bound(name: str, backend: Backend, tmp_path: Path) -> None:
    # All experts are chosen: with fewer, rounding can swap two that are nearly equal, which no bound covers.
    config = CONFIGS[name]
    count = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
    config = config | {"num_experts_per_tok": count} | ({"n_group": 1, "topk_group": 1} if "n_group" in config else {})
    random_checkpoint(tmp_path / "model", config, seed=4, dtype="bfloat16")
    streams = make_streams(2, (5, 40))
    logits = generate(Ranks(tmp_path / "model", 2, dtype="bfloat16", backend=backend), streams, NUM_TOKENS)
    assert compare(reference_of(tmp_path / "model"), streams, logits)[0] < BFLOAT16_BOUNDS.get(name, BFLOAT16_BOUND)


def test_bad_batches_are_refused(model: tuple[Path, Any], backend: Backend) -> None:
    ranks = Ranks(model[0], 1, max_tokens=8, backend=backend)
    for part, text in (
        (BatchPart([1] * 9, 0, [0, 1, 2], 1), "limit is 8"),
        (BatchPart([260], 0, [0], 1), "token 260"),
        (BatchPart([1], 0, [64], 1), "block 64"),
    ):
        with pytest.raises(ValueError, match=text):
            ranks.step([[part]])
    for ids, start, blocks, num_logits in (([], 0, [1], 0), ([1], 4, [1], 1), ([1], -1, [1], 1), ([1], 0, [1], 2)):
        with pytest.raises(ValueError, match="part of"):
            Batch([BatchPart(ids, start, blocks, num_logits)], block_size=4)


def test_times_add_up(model: tuple[Path, Any], backend: Backend) -> None:
    ranks = Ranks(model[0], 2, backend=backend)
    ranks.step([[BatchPart([1, 2, 3], 0, [0], 1)], []])
    for rank in ranks.models:
        total_ns, exchange_ns, wait_ns = rank.times
        assert 0 <= wait_ns <= exchange_ns < total_ns


def test_an_aborted_step_can_be_repeated(model: tuple[Path, Any], backend: Backend) -> None:
    """What breaks off in mid-step leaves nothing behind that changes the step's repetition."""

    class Broken(RuntimeError):
        pass

    ranks, fresh = Ranks(model[0], 1, backend=backend), Ranks(model[0], 1, backend=backend)
    exchange = ranks.exchanges[0]
    work = [[BatchPart([5, 6, 7], 0, [3], 3)]]

    def fail(*_: object) -> None:
        raise Broken

    exchange.combine = fail  # type: ignore[method-assign]
    with pytest.raises(Broken):
        ranks.step(work)
    del exchange.combine
    # The bus is in mid-step: only a new generation begins afresh.
    ranks.new_generation()
    assert torch.equal(ranks.step(work)[0], fresh.step(work)[0])


def test_exchange_wants_the_models_routing(model: tuple[Path, Any], backend: Backend) -> None:
    ranks = Ranks(model[0], 1, backend=backend)
    owners = [list(ranks.layout.owners(layer)) for layer in range(ranks.spec.num_layers)]
    for wrong in (owners[:-1], [*owners[:-1], owners[-1][:-1]], [*owners, []]):
        with pytest.raises(ValueError, match="routing"):
            ranks.exchanges[0].set_routing(1, wrong)
