"""What a killed rank left in its ledger, and the rank that goes on with it: real engines, ledgers and KV."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Delta, Failed, Logprob, Suspected, Suspicion
from elasticmoe.native.ledger import Ledger
from elasticmoe.services.worker.engine import adoption
from elasticmoe.services.worker.engine.adoption import adopt_rows
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.rows import encode_entry, entry_bytes_max
from elasticmoe.services.worker.engine.trial import INNOCENT
from tests.oracle import next_tokens
from tests.unit.migration_world import make_engine, run_step
from tests.unit.ranks import Ranks

PEER = b"router:1"
VOCAB = 260
DEADLINE_MS = 20_000.0


class Seat:
    """A seat whose ranks die; the router hears what they say, but for what is lost with them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.engine = make_engine(ranks)
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.failed: dict[str, Failed] = {}
        self.prompt_logprobs: dict[str, tuple[Logprob, ...]] = {}

    @property
    def ledger(self) -> Ledger:
        return self.engine.ledger

    def add(self, name: str, prompt: list[int], max_tokens: int, **fields: object) -> None:
        sampling = fields.pop("sampling", Sampling(seed=1, temperature=0.0))
        request = Submit(name, tuple(prompt), max_tokens, sampling, **fields)  # type: ignore[arg-type]
        self.engine.add(request, PEER, 0.0)
        self.tokens.setdefault(name, [])

    def step(self, *, is_heard: bool = True) -> None:
        plan = self.engine.plan()
        if plan.num_tokens:
            outcome = run_step(self.engine, plan)
            if is_heard:
                self.hear(outcome)
        assert self.engine.check_integrity() == []

    def run(self) -> None:
        for _ in range(600):
            if not self.engine.scheduler.sequences():
                return
            self.step()
        raise AssertionError("sequences do not end")

    def die(self) -> Outcome:
        """The rank is killed; another takes the seat."""
        old = self.engine
        self.engine = Engine(
            self.ranks.models[0],
            self.ranks.exchanges[0],
            old.kv,
            old.ledger,
            max_tokens=16,
            max_sequences=old.scheduler.max_sequences,
            max_model_len=old.scheduler.max_model_len,
        )
        self.engine.memory_kept_by_the_test = old.memory_kept_by_the_test  # type: ignore[attr-defined]
        outcome = adopt_rows(self.engine, VOCAB)
        assert self.engine.check_integrity() == []
        self.hear(outcome)
        return outcome

    def hear(self, outcome: Outcome) -> None:
        for delta in outcome.deltas.get(PEER, []):
            assert isinstance(delta, Delta)
            tokens = self.tokens[delta.request_id]
            assert delta.index <= len(tokens)
            known = tokens[delta.index :]
            assert list(delta.ids[: len(known)]) == known
            tokens += delta.ids[len(known) :]
            if delta.prompt_logprobs is not None:
                self.prompt_logprobs[delta.request_id] = delta.prompt_logprobs
            if delta.finish:
                self.finish[delta.request_id] = delta.finish
        for _, failed in outcome.failures:
            self.failed[failed.request_id] = failed


@pytest.mark.parametrize("seed", range(4))
def test_sequences_go_on_at_their_committed_position(directory: Path, ranks: Ranks, seed: int) -> None:
    rng = random.Random(seed)
    seat = Seat(ranks)
    prompts = {f"r{n}": [7] * rng.randrange(24) + [rng.randrange(250) for _ in range(9)] for n in range(4)}
    for name, prompt in prompts.items():
        seat.add(name, prompt, 40)
    while seat.engine.scheduler.sequences():
        for left in range(rng.randrange(1, 12), 0, -1):
            seat.step(is_heard=left > 1 or rng.random() < 0.5)  # the last report may be lost with the rank
        if rng.random() < 0.5:
            seat.engine.plan()  # it dies in a step
        before = {s.request.request_id: s.kv_len for s in seat.engine.scheduler.running}
        seat.die()
        assert {s.request.request_id: s.kv_len for s in seat.engine.scheduler.running} == before
        for name in prompts:  # those that waited, or whose end was lost: the router submits them anew
            if name not in seat.finish and seat.engine.scheduler.get(PEER, name) is None:
                seat.add(name, prompts[name], 40, output=tuple(seat.tokens[name]))
    assert seat.ledger.rows() == []
    for name, prompt in prompts.items():
        assert (seat.finish[name], seat.tokens[name]) == ("length", next_tokens(directory, prompt, 40))


def test_shared_blocks_keep_their_owners_and_are_matched_again(directory: Path, ranks: Ranks) -> None:
    seat = Seat(ranks)
    prompt = list(range(20))
    seat.add("a", prompt, 30)
    for _ in range(3):
        seat.step()
    seat.add("b", [*prompt, 99], 30)
    seat.step()
    tables = {s.request.request_id: list(s.blocks) for s in seat.engine.scheduler.running}
    assert tables["a"][:5] == tables["b"][:5]
    seat.die()
    assert {s.request.request_id: s.blocks for s in seat.engine.scheduler.running} == tables
    seat.add("c", [*prompt, 1, 2], 5)
    seat.step()
    (late,) = [s for s in seat.engine.scheduler.running if s.request.request_id == "c"]
    assert late.blocks[:5] == tables["a"][:5]
    seat.engine.cancel(PEER, "a")
    seat.die()
    seat.run()
    assert seat.tokens["b"] == next_tokens(directory, [*prompt, 99], 30)
    assert seat.tokens["c"] == next_tokens(directory, [*prompt, 1, 2], 5)
    assert seat.engine.scheduler.blocks.num_free == 64


def test_the_last_report_was_lost(directory: Path, ranks: Ranks) -> None:
    seat = Seat(ranks)
    seat.add("a", [1, 2, 3], 4)
    for _ in range(3):
        seat.step()
    plan = seat.engine.plan()
    seat.engine.ledger = _Keeping(seat.ledger)  # type: ignore[assignment]
    seat.engine.commit(plan, seat.engine.compute(plan, 1, DEADLINE_MS))  # neither told nor closed
    seat.engine.ledger = seat.engine.ledger._ledger  # type: ignore[attr-defined]
    seat.die()
    assert (seat.finish["a"], seat.tokens["a"]) == ("length", next_tokens(directory, [1, 2, 3], 4))
    assert seat.ledger.rows() == []
    assert seat.engine.scheduler.sequences() == []


class _Keeping:
    """A ledger whose writer dies before it closes a row."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> object:
        return (lambda _: None) if name == "close_row" else getattr(self._ledger, name)


def test_requests_come_back_whole(ranks: Ranks) -> None:
    seat = Seat(ranks)
    sampling = Sampling(seed=77, temperature=0.7, top_p=0.9, logit_bias=((5, 1.5),), frequency_penalty=0.5)
    seat.add("a", [1, 2, 3], 40, sampling=sampling, min_tokens=3, stop_token_ids=(9,), priority=-4, deadline_s=12.5)
    for _ in range(5):
        seat.step()
    (before,) = seat.engine.scheduler.running
    seat.die()
    (after,) = seat.engine.scheduler.running
    assert (after.request, after.peer, after.deadline, after.tokens) == (
        before.request,
        before.peer,
        12.5,
        before.tokens,
    )
    assert after.num_sent == after.num_output == 5
    (failure,) = seat.engine.expire(12.6)
    assert failure[1].code == "deadline_exceeded"
    assert seat.ledger.rows() == []


def test_prompt_logprobs_are_computed_anew(ranks: Ranks) -> None:
    def expected() -> tuple[Logprob, ...]:
        seat = Seat(ranks)
        seat.add("a", list(range(40)), 3, prompt_logprobs=True)
        seat.run()
        return seat.prompt_logprobs["a"]

    wanted = expected()
    seat = Seat(ranks)
    seat.add("a", list(range(40)), 3, prompt_logprobs=True)
    seat.step()
    seat.die()
    (sequence,) = seat.engine.scheduler.waiting
    assert (sequence.kv_len, sequence.row, seat.ledger.rows()) == (0, -1, [])
    seat.run()
    assert seat.prompt_logprobs["a"] == wanted
    assert seat.engine.scheduler.recomputed == 16


def corrupt_blob(ledger: Ledger, row: int) -> None:
    read = ledger.read_row(row)
    assert read
    ledger.close_row(row)
    ledger.open_row(row, b"\xc1", read.tokens, read.blocks)


def corrupt_block(ledger: Ledger, row: int) -> None:
    ledger.append_blocks(row, [64])


def corrupt_twice(ledger: Ledger, row: int) -> None:
    read = ledger.read_row(row)
    assert read
    ledger.append_blocks(row, read.blocks[:1])


def corrupt_token(ledger: Ledger, row: int) -> None:
    read = ledger.read_row(row)
    assert read
    ledger.commit(row, read.kv_len, [VOCAB])


def corrupt_length(ledger: Ledger, row: int) -> None:
    read = ledger.read_row(row)
    assert read
    ledger.commit(row, len(read.tokens), [])


def steal_block(ledger: Ledger, row: int) -> None:
    other = ledger.read_row(next(other for other in ledger.rows() if other != row))
    assert other
    ledger.rewind(row, 0, 0)
    ledger.append_blocks(row, other.blocks)


@pytest.mark.parametrize(
    "corrupt", [corrupt_blob, corrupt_block, corrupt_twice, corrupt_token, corrupt_length, steal_block]
)
def test_a_row_that_cannot_be_true_costs_only_itself(
    directory: Path, ranks: Ranks, corrupt: Callable[[Ledger, int], None]
) -> None:
    seat = Seat(ranks)
    seat.add("good", [4, 5, 6, 4, 5, 6], 20, deadline_s=10.0)
    seat.add("bad", [1, 2, 3, 1, 2, 3], 20, deadline_s=20.0)
    for _ in range(8):
        seat.step()
    corrupt(seat.ledger, next(s.row for s in seat.engine.scheduler.running if s.request.request_id == "bad"))
    seat.die()
    assert [s.request.request_id for s in seat.engine.scheduler.sequences()] == ["good"]
    seat.engine.add(
        Submit("bad~1", (1, 2, 3, 1, 2, 3), 20, Sampling(seed=1, temperature=0.0), output=tuple(seat.tokens["bad"])),
        PEER,
        0.0,
    )
    seat.tokens["bad~1"] = seat.tokens["bad"]
    seat.run()
    assert seat.tokens["good"] == next_tokens(directory, [4, 5, 6, 4, 5, 6], 20)
    assert seat.tokens["bad"] == next_tokens(directory, [1, 2, 3, 1, 2, 3], 20)


@pytest.mark.parametrize("sampling", [Sampling(seed=3, temperature=0.8), Sampling(seed=3, frequency_penalty=1.0)])
def test_an_output_so_far_goes_on_as_it_would_have(ranks: Ranks, sampling: Sampling) -> None:
    whole = Seat(ranks)
    whole.add("a", [8, 9, 10], 24, sampling=sampling, min_tokens=20, stop_token_ids=(0, 1, 2))
    whole.run()
    for cut in (1, 7, len(whole.tokens["a"]) - 1):
        seat = Seat(ranks)
        seat.tokens["b"] = whole.tokens["a"][:cut]
        fields = {"sampling": sampling, "min_tokens": 20, "stop_token_ids": (0, 1, 2)}
        seat.add("b", [8, 9, 10], 24, output=tuple(seat.tokens["b"]), **fields)
        seat.run()
        assert (seat.tokens["b"], seat.finish["b"]) == (whole.tokens["a"], whole.finish["a"])
        assert seat.engine.scheduler.recomputed == 3 + cut - 1


def test_blobs_never_exceed_what_was_checked(ranks: Ranks) -> None:
    seat = Seat(ranks)
    seat.add("a", [1] * 30, 9, output=(1, 2, 3))
    seat.step()
    (sequence,) = seat.engine.scheduler.running
    assert len(encode_entry(sequence)) <= entry_bytes_max(sequence.request, PEER)


def test_a_row_that_nobody_can_read_costs_only_itself(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever reading one raises: else no rank could ever take the seat again."""
    seat = Seat(ranks)
    seat.add("good", [4, 5, 6], 20)
    seat.add("bad", [1, 2, 3], 20)
    seat.step()
    row = next(s.row for s in seat.engine.scheduler.running if s.request.request_id == "bad")
    read = adoption.read_sequence

    def broken(ledger: Ledger, number: int, **facts: int) -> object:
        if number == row:
            raise KeyError("deadline")
        return read(ledger, number, **facts)

    monkeypatch.setattr(adoption, "read_sequence", broken)
    seat.die()
    assert [s.request.request_id for s in seat.engine.scheduler.sequences()] == ["good"]
    seat.run()
    assert seat.tokens["good"] == next_tokens(directory, [4, 5, 6], 20)


def test_who_is_suspected_is_told_of_and_goes_on_in_its_row(ranks: Ranks) -> None:
    seat = Seat(ranks)
    seat.add("a", [1, 2, 3], 40)
    for _ in range(4):
        seat.step()
    for failures in (1, 2, 2):  # the third step is not its own
        seat.engine.trials.begin(seat.engine.scheduler.plan())
        assert seat.die().suspected == [(PEER, Suspected("a", Suspicion(failures, 0, 7)))]
    (sequence,) = seat.engine.scheduler.running
    row = seat.ledger.read_row(sequence.row)
    assert row is not None
    assert row.mark == sequence.trial.mark()
    assert row.kv_len == sequence.kv_len == 6
    plan = seat.engine.plan()
    assert (plan.chunks, plan.num_said, plan.is_whole) == ([], 1, False)
    plan = seat.engine.plan(num_clean=1)
    assert (plan.is_alone, plan.num_said, [chunk.sequence for chunk in plan.chunks]) == (True, 1, [sequence])
    seat.hear(run_step(seat.engine, plan))
    assert (sequence.trial, seat.engine.scheduler.struck) == (INNOCENT, [])
    row = seat.ledger.read_row(sequence.row)
    assert row is not None
    assert row.mark == 0
    assert seat.die().suspected == []
