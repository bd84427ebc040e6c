"""The engine while its KV grows and shrinks: same tokens, a ledger that a kill may interrupt, nothing hangs."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Delta, Failed
from elasticmoe.native.ledger import Ledger
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.outcome import Outcome
from tests.oracle import next_tokens
from tests.unit.migration_world import make_engine, run_step
from tests.unit.ranks import Ranks

PEER = b"router:1"


class Listener:
    """What the router hears."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.failed: dict[str, Failed] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self.engine.add(Submit(name, tuple(prompt), max_tokens, Sampling(seed=1, temperature=0.0)), PEER, 0.0)
        self.tokens[name] = []

    def step(self) -> None:
        plan = self.engine.plan()
        if plan.num_tokens:
            self.take(run_step(self.engine, plan))
        assert self.engine.check_integrity() == []

    def take(self, outcome: Outcome) -> None:
        for delta in outcome.deltas.get(PEER, []):
            assert isinstance(delta, Delta)
            assert delta.index == len(self.tokens[delta.request_id])
            self.tokens[delta.request_id] += delta.ids
            if delta.finish:
                self.finish[delta.request_id] = delta.finish
        for _, failed in outcome.failures:
            self.failed[failed.request_id] = failed


@pytest.mark.parametrize("seed", range(4))
def test_tokens_stay_the_same_while_the_kv_is_resized(directory: Path, ranks: Ranks, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(ranks)
    listener = Listener(engine)
    prompts = {f"r{n}": ([7] * rng.randrange(20) + [rng.randrange(260) for _ in range(9)]) for n in range(8)}
    for name, prompt in prompts.items():
        listener.add(name, prompt, 40)
    size, num_moved = 64, 0
    for _ in range(2_000):
        if not engine.scheduler.sequences():
            break
        if rng.random() < 0.1:
            size = rng.choice((42, 48, 56, 64))
        before = {b for s in engine.scheduler.running for b in s.blocks}
        is_done = engine.resize_kv(size, 3)
        num_moved += len(before - {b for s in engine.scheduler.running for b in s.blocks})
        assert not is_done or engine.kv.num_blocks == size
        assert engine.scheduler.blocks.num_blocks == size
        listener.step()
    assert num_moved > 0
    for name, prompt in prompts.items():
        assert listener.tokens[name] == next_tokens(directory, prompt, 40)


class Watched:
    """A ledger that is looked at after each call, as a successor would after a kill."""

    def __init__(self, ledger: Ledger, look: object) -> None:
        self._ledger = ledger
        self._look = look

    def __getattr__(self, name: str) -> object:
        method = getattr(self._ledger, name)
        if name not in ("rewind", "append_blocks", "commit"):
            return method

        def call(*arguments: object) -> None:
            method(*arguments)
            self._look()  # type: ignore[operator]

        return call


def test_a_kill_while_blocks_move_leaves_rows_that_are_true(ranks: Ranks) -> None:
    engine = make_engine(ranks)
    listener = Listener(engine)
    for number in range(3):
        listener.add(f"r{number}", [number] * 30, 60)
    for _ in range(12):
        listener.step()
    engine.cancel(PEER, "r0")
    size, stride = engine.kv.geometry.block_bytes, engine.kv.geometry.block_stride

    def bytes_of(row: int) -> list[bytes]:
        read = ledger.read_row(row)
        assert read is not None
        full = read.kv_len // 4
        assert len(read.blocks) >= -(-read.kv_len // 4)
        return [ctypes.string_at(engine.kv.base_addr + block * stride, size) for block in read.blocks[:full]]

    ledger = engine.ledger
    truth = {row: bytes_of(row) for row in ledger.rows()}
    looks = []

    def look() -> None:
        for row, wanted in truth.items():
            got = bytes_of(row)
            assert got == wanted[: len(got)]
            looks.append(len(got))

    engine._room._ledger = Watched(ledger, look)  # type: ignore[assignment]
    used = sorted(block for s in engine.scheduler.running for block in s.blocks)
    assert used[-1] > len(used) + 4
    assert not engine.resize_kv(len(used), 2)
    assert engine.resize_kv(len(used), 64)
    engine._room._ledger = ledger
    assert len(looks) >= 9
    assert {row: bytes_of(row) for row in ledger.rows()} == truth


def test_what_no_longer_fits_ends_and_the_rest_goes_on(directory: Path, ranks: Ranks) -> None:
    engine = make_engine(ranks)
    listener = Listener(engine)
    listener.add("long", list(range(60)), 90)
    for _ in range(10):
        listener.step()
    listener.add("unborn", list(range(100, 190)), 5)
    listener.add("short", [5, 6, 7], 12)
    engine.resize_kv(12)
    assert engine.scheduler.capacity_tokens == 48
    for _ in range(60):
        listener.take(engine.end_overlong())
        engine.resize_kv(12)
        listener.step()
    assert listener.finish == {"long": "length", "short": "length"}
    assert listener.failed["unborn"].code == "context_length_exceeded"
    assert listener.tokens["short"] == next_tokens(directory, [5, 6, 7], 12)
    assert engine.kv.num_blocks == 12
    assert engine.scheduler.sequences() == []


def test_places_kept_for_others_are_not_moved(ranks: Ranks) -> None:
    engine = make_engine(ranks)
    filler = engine.scheduler.hold((1, 2, 3), 30)
    hold = engine.scheduler.hold((1, 2, 3), 10)
    engine.scheduler.release_hold(filler)
    blocks = list(hold.blocks)
    assert not engine.resize_kv(35)
    assert hold.blocks == blocks
    assert engine.kv.num_blocks == 64
    engine.scheduler.release_hold(hold)
    assert engine.resize_kv(35)
    assert engine.check_integrity() == []
    assert engine.resize_kv(64)
    assert engine.scheduler.blocks.num_free == 64


def test_log_probabilities_that_no_message_holds_are_refused(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(ranks)
    monkeypatch.setattr("elasticmoe.services.worker.engine.engine.PROMPT_LOGPROBS_BYTES_MAX", 3_130)
    sampling = Sampling(seed=1, logprobs=20)
    engine.add(Submit("a", (1,) * 10, 4, sampling, prompt_logprobs=True), PEER, 0.0)
    engine.add(Submit("b", (1,) * 11, 4, sampling), PEER, 0.0)
    with pytest.raises(InvalidRequest, match="log probabilities of the prompt of 3443 bytes exceed the limit of 3130"):
        engine.add(Submit("c", (1,) * 11, 4, sampling, prompt_logprobs=True), PEER, 0.0)
    assert [s.request.request_id for s in engine.scheduler.sequences()] == ["a", "b"]
