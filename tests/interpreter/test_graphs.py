"""Captured graphs: what was recorded of one step computes others, bit by bit."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.services.worker.backends.accelerator import graphs
from elasticmoe.services.worker.backends.accelerator.backend import BLOCK_IDS, AcceleratorBackend
from elasticmoe.services.worker.backends.accelerator.triton_kernels import kernel_set
from elasticmoe.services.worker.backends.accelerator.triton_kernels.kernel_set import TritonKernels
from elasticmoe.services.worker.model.batch import BatchPart
from elasticmoe.services.worker.rank.warm_up import warm_up
from tests.interpreter.recorder import CallRecorder, install
from tests.unit.ranks import Ranks, Stream
from tests.unit.test_model_parity import CONFIGS

CPU = torch.device("cpu")
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 256}


@pytest.fixture(scope="module", autouse=True)
def recording() -> None:
    """Launches can be recorded."""
    install()


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step captures all that it may: steps are slow here."""
    monkeypatch.setattr(graphs, "CAPTURES_PER_STEP", 100)


def ranks_of(directory: Path, recorder: CallRecorder | None, **options: Any) -> Ranks:
    return Ranks(
        directory,
        1,
        backend=lambda: AcceleratorBackend(TritonKernels(CPU), None, CPU, recorder),
        max_tokens=options.pop("max_tokens", 16),
        **options,
    )


def checkpoint(folder: Path, name: str) -> Path:
    config = CONFIGS[name] | SMALL
    if "first_k_dense_replace" in config:
        config |= {"first_k_dense_replace": 1}
    return random_checkpoint(folder / name, config, seed=3, dtype="float32")


class Pair:
    """The same streams over ranks that capture and ranks that do not."""

    def __init__(self, directory: Path, recorder: CallRecorder, **options: Any) -> None:
        self.captured, self.plain = ranks_of(directory, recorder, **options), ranks_of(directory, None, **options)
        self._rng = random.Random(5)
        self._blocks = list(range(self.captured.weights[0].kv.num_blocks))
        self._rng.shuffle(self._blocks)

    def block(self) -> int:
        """One that nobody has."""
        return self._blocks.pop()

    def stream(self, length: int) -> Stream:
        """A new one, with blocks from anywhere."""
        return Stream([self._rng.randrange(200) for _ in range(length)], [self._blocks.pop() for _ in range(4)])

    def step(self, *streams: Stream) -> None:
        """Compute what each stream has not yet, choose tokens, and compare logits and the whole cache."""
        parts = [one.part(len(one.tokens) - one.kv_len, 1) for one in streams]
        (got,), (want,) = self.captured.step([parts]), self.plain.step([parts])
        assert torch.equal(got, want)
        for one, row in zip(streams, want, strict=True):
            one.kv_len = len(one.tokens)
            one.tokens.append(int(row.argmax()))
        cache = [ranks.weights[0].kv.blocks.view(torch.int32) for ranks in (self.captured, self.plain)]
        assert torch.equal(*cache), "padding has written to the cache, or a row was left out"


@pytest.mark.parametrize(
    "name", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "deepseek3"))]
)
def test_what_was_recorded_computes_other_steps(name: str, tmp_path: Path) -> None:
    """Other tokens, positions, blocks and companies, with padding and without."""
    recorder = CallRecorder()
    pair = Pair(checkpoint(tmp_path, name), recorder)
    a, b, c, d = (pair.stream(length) for length in (2, 1, 1, 1))
    pair.step(a, b, c)  # with a prompt: as it is
    assert recorder.num_records == 0
    pair.step(a, b, c)  # seen
    pair.step(a, b, c)  # recorded, and replayed
    sections = 3 if name == "mixtral" else 2  # others have a layer without experts: nobody is met there
    assert recorder.num_records == recorder.num_replays == sections
    pair.step(c, d, b)  # others in other rows
    pair.step(c, d, b, a)  # the same form without padding
    assert (recorder.num_records, recorder.num_replays) == (sections, 3 * sections)


def test_a_rank_that_has_warmed_up_captures_nothing_while_streams_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was given before, in the steps that a rank may capture little in; and the cache is as it was."""
    recorder = CallRecorder()
    monkeypatch.setattr(graphs, "ROWS_MAX", 4)
    for name, value in (("DEPTH", 16), ("PART_DEPTH", 32), ("PART_ROWS", 8)):  # products in three parts, too
        monkeypatch.setattr(kernel_set, name, value)
    pair = Pair(checkpoint(tmp_path, "mixtral"), recorder, max_tokens=20)
    monkeypatch.setattr(graphs, "CAPTURES_PER_STEP", 0)
    model, weights = pair.captured.models[0], pair.captured.weights[0]
    memory: Any = SimpleNamespace(
        kv=weights.kv,
        spec=weights.spec,
        weights=weights,
        held=[list(range(count)) for count in weights.spec.num_experts_by_layer],
        ledger=SimpleNamespace(rows=list),
    )
    warm_up(model, memory, CPU, 4)
    captured = recorder.num_records
    assert captured == 3 * len((4, 2, 1))
    a, b, c = (pair.stream(length) for length in (19, 1, 1))
    a.blocks += [pair.block() for _ in range(4)]
    pair.step(a)
    for streams in ((a, b, c), (a, b), (c,)):
        pair.step(*streams)
    assert (recorder.num_records, recorder.num_replays) == (captured, captured + 9)


@pytest.mark.slow
def test_short_and_long_sequences_have_one_form(tmp_path: Path) -> None:
    """The numbers of splits differ by step: what was captured of a short sequence computes a long one."""
    recorder = CallRecorder()
    pair = Pair(checkpoint(tmp_path, "mixtral"), recorder, num_blocks=300)
    cache = torch.randn(pair.plain.weights[0].kv.blocks.shape, generator=torch.Generator().manual_seed(1))
    for ranks in (pair.captured, pair.plain):
        ranks.weights[0].kv.blocks.copy_(cache)  # as if long prompts had been computed
    short, long = pair.stream(1), pair.stream(1_100)
    long.blocks += [pair.block() for _ in range(275)]
    long.kv_len = 1_099
    pair.step(long)
    pair.step(short)
    assert recorder.num_records == recorder.num_replays == 3
    pair.step(long)
    assert (recorder.num_records, recorder.num_replays) == (3, 6)


@pytest.mark.slow
def test_memory_that_moves_is_captured_again(tmp_path: Path) -> None:
    recorder = CallRecorder()
    pair = Pair(checkpoint(tmp_path, "mixtral"), recorder)
    a = pair.stream(1)
    for _ in range(2):
        pair.step(a)
    sections = recorder.num_records
    assert sections == recorder.num_replays > 0
    backend: Any = pair.captured.models[0].backend
    fields = backend._transfers["batch"]
    fields.send({"block_ids": torch.zeros(2 * BLOCK_IDS, dtype=torch.int32).numpy()})  # as a step with many blocks does
    pair.step(a)  # seen anew
    assert recorder.num_replays == sections
    pair.step(a)
    assert recorder.num_records == recorder.num_replays == 2 * sections


class TwoRanks:
    """Two replicas, of which each has half the experts, and a stream on each."""

    def __init__(self, directory: Path, recorders: list[CallRecorder | None]) -> None:
        given = iter(recorders)
        self.ranks = Ranks(
            directory, 2, backend=lambda: AcceleratorBackend(TritonKernels(CPU), None, CPU, next(given)), max_tokens=16
        )
        self._streams = [Stream([3 + rank], [2, 9, 4]) for rank in range(2)]

    def step(self) -> list[torch.Tensor]:
        """Logits of each stream's next token, and what each rank has in its cache."""
        logits = self.ranks.step([[one.part(1, 1)] for one in self._streams])
        for one, row in zip(self._streams, logits, strict=True):
            one.kv_len += 1
            one.tokens.append(int(row.argmax()))
        return [*logits, *(weights.kv.blocks.view(torch.int32).clone() for weights in self.ranks.weights)]

    def change(self) -> None:
        """To a layout of a new generation, in which every expert is the other rank's, and no longer where it was, and
        which has less room for KV."""
        ranks, generation = self.ranks, self.ranks._generation + 1
        ranks.new_generation(routing=False)
        owners = [list(ranks.layout.owners(layer)) for layer in range(ranks.spec.num_layers)]
        for layer, owner_of in enumerate(owners):
            for expert, old in enumerate(owner_of):
                left, reached = (ranks.weights[rank].experts[layer] for rank in (old, 1 - old))
                for name, slots in left.items():
                    reached[name][expert] = slots[expert]
                    slots[expert] = float("nan")
        for exchange, weights in zip(ranks.exchanges, ranks.weights, strict=True):
            exchange.set_routing(generation, [[1 - owner for owner in layer] for layer in owners])
            weights.kv.num_blocks //= 2


def test_what_was_recorded_in_one_layout_computes_in_the_next(tmp_path: Path) -> None:
    """Other owners, other experts, less KV, another generation: nothing is captured anew, and no bit differs from ranks
    that capture nothing and stay as they are."""
    directory = checkpoint(tmp_path, "mixtral")
    recorders = [CallRecorder() for _ in range(2)]
    captured, plain = TwoRanks(directory, [*recorders]), TwoRanks(directory, [None] * 2)

    def step() -> list[int]:
        """How many sections each rank has replayed."""
        for got, want in zip(captured.step(), plain.step(), strict=True):
            assert torch.equal(got, want)
        return [recorder.num_replays for recorder in recorders]

    assert [step(), step()] == [[0, 0], [3, 3]]
    captured.change()
    assert [step(), step()] == [[6, 6], [9, 9]]
    assert [recorder.num_records for recorder in recorders] == [3, 3]


def test_a_step_is_computed_where_nothing_can_be_captured(tmp_path: Path) -> None:
    recorder = CallRecorder()
    pair = Pair(checkpoint(tmp_path, "mixtral"), recorder)
    a = pair.stream(1)
    pair.step(a)
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    pair.step(a)
    recorder.error = None
    pair.step(a)  # given up for good
    assert recorder.num_records == recorder.num_replays == 0


@pytest.mark.slow
def test_a_form_has_no_more_rows_than_there_is_room_for(tmp_path: Path) -> None:
    recorder = CallRecorder()
    pair = Pair(checkpoint(tmp_path, "mixtral"), recorder, max_tokens=3)
    streams = [pair.stream(1) for _ in range(3)]
    for _ in range(2):
        pair.step(*streams)
    assert recorder.num_replays == recorder.num_records > 0


def test_a_bad_token_is_refused_also_where_the_step_is_replayed(tmp_path: Path) -> None:
    recorder = CallRecorder()
    ranks = ranks_of(checkpoint(tmp_path, "mixtral"), recorder)
    for position in range(3):
        ranks.step([[BatchPart([7], position, [1], 1)]])
    assert recorder.num_replays > 0
    with pytest.raises(ValueError, match="vocabulary"):
        ranks.step([[BatchPart([ranks.spec.vocab], 3, [1], 1)]])
    with pytest.raises(ValueError, match="block 64 is not one"):
        ranks.step([[BatchPart([7], 3, [64], 1)]])


@pytest.mark.slow
def test_a_step_captures_a_few_sections_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CAPTURES_PER_STEP", 2)
    recorder = CallRecorder()
    pair = Pair(checkpoint(tmp_path, "mixtral"), recorder)
    a = pair.stream(1)
    counts = []
    for _ in range(4):
        pair.step(a)
        counts.append(recorder.num_records)
    assert counts == [0, 2, 3, 3]
