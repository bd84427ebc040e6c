"""The oracle model against plain Python, and that it notices every kind of loss."""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from elasticmoe.cli.models import make_model
from elasticmoe.cli.models.oracle import ORACLE_CONFIG, PACED_CONFIG
from elasticmoe.common.families import load_spec
from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.model import oracle
from elasticmoe.services.worker.model.batch import BatchPart
from tests.oracle import next_tokens
from tests.unit.backends import ON_CPU, QueuedBackend
from tests.unit.ranks import Ranks, Stream, generate

COUNT = 24


def make_streams(size: int, lengths: tuple[int, ...]) -> list[list[Stream]]:
    rng = random.Random(size)
    rows = []
    for _ in range(size):
        blocks = rng.sample(range(64), 64)
        rows.append(
            [Stream([rng.randrange(260) for _ in range(n)], [blocks.pop() for _ in range(16)]) for n in lengths]
        )
    return rows


@pytest.mark.parametrize("backend", ON_CPU.values(), ids=ON_CPU)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_tokens_equal_those_of_plain_python(directory: Path, size: int, backend: Callable[[], ComputeBackend]) -> None:
    streams = make_streams(size, (1, 8, 39))
    prompts = {id(stream): list(stream.tokens) for row in streams for stream in row}
    generate(Ranks(directory, size, backend=backend), streams, COUNT)
    for stream in (stream for row in streams for stream in row):
        assert stream.tokens[-COUNT:] == next_tokens(directory, prompts[id(stream)], COUNT)


@pytest.mark.parametrize("backend", ON_CPU.values(), ids=ON_CPU)
def test_one_plane_holds_what_two_do(tmp_path: Path, backend: Callable[[], ComputeBackend]) -> None:
    """The tokens of a cache that is shaped as latent attention's, and that each of its halves counts."""
    latent = make_model("oracle-latent", tmp_path / "latent", seed=7)
    ranks = Ranks(latent, 2, backend=backend)
    assert ranks.weights[0].kv.blocks.shape[2:] == (1, 1, ranks.block_size, 36)
    streams = make_streams(2, (1, 8, 39))
    prompts = {id(stream): list(stream.tokens) for row in streams for stream in row}
    generate(ranks, streams, COUNT)
    for stream in (stream for row in streams for stream in row):
        assert stream.tokens[-COUNT:] == next_tokens(latent, prompts[id(stream)], COUNT)
    stream, kv = streams[0][0], ranks.weights[0].kv
    for at in (0, 18, 35):  # of the first token of its first block
        prompt = list(stream.tokens)
        ctypes.c_float.from_address(kv.base_addr + stream.blocks[0] * kv.geometry.block_stride + 4 * at).value += 1
        generate(ranks, [[stream], []], COUNT // 2)
        assert stream.tokens[-COUNT // 2 :] != next_tokens(latent, prompt, COUNT // 2)


@pytest.mark.parametrize("backend", [*ON_CPU.values(), QueuedBackend], ids=[*ON_CPU, "queued"])
@pytest.mark.parametrize(
    ("name", "size", "tp"),
    [("oracle", 1, 2), ("oracle", 2, 2), ("oracle", 1, 4), ("oracle-latent", 1, 2), ("oracle-latent", 2, 3)],
)
def test_replicas_of_several_ranks_give_the_same_tokens(
    name: str, size: int, tp: int, tmp_path: Path, backend: Callable[[], ComputeBackend]
) -> None:
    model = make_model(name, tmp_path / "model", seed=7)
    streams = make_streams(size, (1, 8, 39))
    prompts = {id(stream): list(stream.tokens) for row in streams for stream in row}
    generate(Ranks(model, size, backend=backend, tp=tp), streams, COUNT)
    for stream in (stream for row in streams for stream in row):
        assert stream.tokens[-COUNT:] == next_tokens(model, prompts[id(stream)], COUNT)


@pytest.mark.parametrize("name", ["oracle", "oracle-latent"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_cache_of_each_rank_of_a_replica_counts(name: str, rank: int, tmp_path: Path) -> None:
    """Each gives half of a token's keys and values: one that is off is noticed, whosever it is."""
    model = make_model(name, tmp_path / "model", seed=7)
    ranks = Ranks(model, 1, tp=2)
    kv = ranks.weights[rank].kv
    dim = ranks.spec.attention.kv.elements // 2
    first, end = ranks.weights[rank].shard.span(dim)
    stream = make_streams(1, (8,))[0][0]
    generate(ranks, [[stream]], COUNT)
    for at in (first, end - 1):
        prompt = list(stream.tokens)
        ctypes.c_float.from_address(kv.base_addr + stream.blocks[0] * kv.geometry.block_stride + 4 * at).value += 1
        generate(ranks, [[stream]], COUNT // 2)
        assert stream.tokens[-COUNT // 2 :] != next_tokens(model, prompt, COUNT // 2)


@pytest.mark.parametrize("planes", [0, 3, 1.0])
def test_a_cache_of_other_planes_is_refused(planes: object, tmp_path: Path) -> None:
    directory = make_model("oracle", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"oracle_kv_planes": planes}))
    with pytest.raises(CheckpointError, match="oracle_kv_planes"):
        load_spec(directory, "float32")


def test_results_are_waited_for(directory: Path) -> None:
    """On a device that computes only when it is waited for, in memory of its own."""
    streams = make_streams(2, (8, 3))
    prompts = {id(stream): list(stream.tokens) for row in streams for stream in row}
    generate(Ranks(directory, 2, backend=QueuedBackend), streams, COUNT)
    for stream in (stream for row in streams for stream in row):
        assert stream.tokens[-COUNT:] == next_tokens(directory, prompts[id(stream)], COUNT)


def test_a_paced_step_takes_what_its_config_says_of_own_tokens_and_of_experts_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks: one has all the tokens, both compute rows, and the tokens are those of the oracle without a pace."""
    paced = make_model("oracle-paced", tmp_path / "paced", seed=7)
    plain = make_model("oracle", tmp_path / "plain", seed=7)
    slept: list[float] = []
    monkeypatch.setattr(oracle, "time", SimpleNamespace(sleep=slept.append, perf_counter_ns=lambda: 0))
    streams = [[Stream(list(range(20)), list(range(16)))], []]
    generate(Ranks(paced, 2), streams, 1)
    assert streams[0][0].tokens[-1:] == next_tokens(plain, range(20), 1)
    config = json.loads((paced / "config.json").read_text())
    rows = 20 * config["num_experts_per_tok"] * config["num_hidden_layers"]
    kv_lens = [7, 14, 20]  # of the steps that compute the prompt
    own_us = (
        20 * config["oracle_token_us"] + 3 * config["oracle_sequence_us"] + sum(kv_lens) * config["oracle_kv_ns"] / 1e3
    )
    assert len(slept) == 2 * len(kv_lens)
    steps_us = len(slept) * config["oracle_step_us"]
    assert sum(slept) * 1e6 == pytest.approx(steps_us + own_us + rows * config["oracle_row_us"])
    assert min(slept) * 1e6 > config["oracle_step_us"], "the other rank computes rows as well"


@pytest.mark.parametrize("name", [name for name in PACED_CONFIG if name not in ORACLE_CONFIG])
@pytest.mark.parametrize("value", [-1, 1_000_001, 0.5, None])
def test_a_pace_beyond_its_bounds_is_refused(name: str, value: object, tmp_path: Path) -> None:
    directory = make_model("oracle", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(CheckpointError, match=name):
        load_spec(directory, "float32")


def test_tokens_are_printable_and_varied(directory: Path) -> None:
    tokens = next_tokens(directory, [1, 2, 3], 400)
    assert all(32 <= token < 127 for token in tokens)
    assert len(set(tokens)) > 80


Change = Callable[[Ranks, Stream], None]


def zero_block(ranks: Ranks, stream: Stream) -> None:
    """A block was lost."""
    kv = ranks.weights[0].kv
    ctypes.memset(kv.base_addr + stream.blocks[1] * kv.geometry.block_stride, 0, kv.geometry.block_bytes)


def swap_blocks(ranks: Ranks, stream: Stream) -> None:
    """Two blocks changed places."""
    del ranks
    stream.blocks[0], stream.blocks[2] = stream.blocks[2], stream.blocks[0]


def double_block(ranks: Ranks, stream: Stream) -> None:
    """A block came twice, in the place of another."""
    del ranks
    stream.blocks[2] = stream.blocks[1]


def change_one_value(ranks: Ranks, stream: Stream) -> None:
    """A single number of the first layer's keys is off by one."""
    kv = ranks.weights[0].kv
    value = ctypes.c_float.from_address(kv.base_addr + stream.blocks[0] * kv.geometry.block_stride)
    value.value += 1


def skip_position(ranks: Ranks, stream: Stream) -> None:
    """A step was counted and not computed: what the block held before is read in its place."""
    del ranks
    stream.tokens.append(stream.tokens[-1])
    stream.kv_len += 1


def swap_experts(ranks: Ranks, stream: Stream) -> None:
    """Two experts of the first layer lie in each other's slot."""
    del stream
    for tensor in ranks.weights[0].experts[0].values():
        tensor[[0, 1]] = tensor[[1, 0]]


@pytest.mark.parametrize("backend", ON_CPU.values(), ids=ON_CPU)
@pytest.mark.parametrize(
    "change", [zero_block, swap_blocks, double_block, change_one_value, skip_position, swap_experts]
)
def test_loss_shows(directory: Path, change: Change, backend: Callable[[], ComputeBackend]) -> None:
    ranks = Ranks(directory, 1, backend=backend)
    kv = ranks.weights[0].kv
    ctypes.memset(kv.base_addr, 0, 64 * kv.geometry.block_stride)
    stream = Stream(list(range(40, 62)), range(20))
    generate(ranks, [[stream]], 3)
    prompt = list(stream.tokens)
    change(ranks, stream)
    changed = list(stream.tokens)
    generate(ranks, [[stream]], COUNT)
    got = stream.tokens[len(changed) :]
    assert got != next_tokens(directory, prompt, COUNT)[: len(got)]


def test_stale_block_shows(directory: Path) -> None:
    """A block that still holds another sequence's tokens."""
    ranks = Ranks(directory, 1)
    other, stream = Stream(range(12), range(10)), Stream(range(50, 62), range(10, 20))
    generate(ranks, [[other, stream]], 2)
    stream.blocks[1] = other.blocks[1]
    prompt = list(stream.tokens)
    generate(ranks, [[stream]], COUNT)
    assert stream.tokens[-COUNT:] != next_tokens(directory, prompt, COUNT)


def test_every_cached_value_counts(directory: Path) -> None:
    """Nearly every change of a single value changes even the very next token (by chance one in 95 does not)."""
    ranks = Ranks(directory, 1)
    kv, length, blocks = ranks.weights[0].kv, 9, [5, 2, 8]
    ranks.step([[BatchPart(range(30, 30 + length), 0, blocks, 0)]])

    def run() -> torch.Tensor:
        return ranks.step([[BatchPart([77], length, blocks, 1)]])[0]

    want = run()
    places = [(block, at) for block in blocks[:2] for at in range(0, kv.geometry.block_bytes, 4 * 7)]  # every seventh
    num_changed = 0
    for block, at in places:
        value = ctypes.c_float.from_address(kv.base_addr + block * kv.geometry.block_stride + at)
        before = value.value
        value.value = (before + 1) % dict(ranks.spec.constants)["modulus"]
        num_changed += not torch.equal(run(), want)
        value.value = before
    assert num_changed >= 0.9 * len(places) > 60
    assert torch.equal(run(), want)


def test_bad_tokens_are_refused(directory: Path) -> None:
    ranks = Ranks(directory, 1, max_tokens=4)
    with pytest.raises(ValueError, match="token"):
        ranks.step([[BatchPart([260], 0, [0], 1)]])
    with pytest.raises(ValueError, match="limit is 4"):
        ranks.step([[BatchPart([1] * 5, 0, [0, 1], 1)]])
