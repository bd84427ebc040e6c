"""A step that finds no memory costs no request that can be served and no rank: every allocation of a scenario is failed
once, whatever is left of it, and some for good (promise P11)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cli.models import make_model
from common.protocol.rank import Sampling, Submit
from native.bus import BusAborted
from services.worker.engine import engine as engine_module
from services.worker.engine.engine import Engine, Outcome
from services.worker.engine.scheduler import Chunk, Plan
from services.worker.shortage import GIVEN_UP_MAX, Shortage, is_shortage
from tests.unit.migration_world import make_engine, make_ledger
from tests.unit.ranks import Ranks
from tests.unit.test_engine import PEER, Listener

pytestmark = pytest.mark.slow

DEADLINE_MS = 20_000.0
PAIR_MS = 5_000.0
MODELS = ("oracle", "tiny-mixtral")
TORCH_SAYS = "[enforce fail at alloc_cpu.cpp:120] err == 0. DefaultCPUAllocator: can't allocate memory: error code 12"


class Failing(TorchDispatchMode):
    """Fails allocations by their number: of tensors as PyTorch's allocator does, of all else as Python does."""

    def __init__(self, fails: Callable[[int, tuple[int, ...]], bool]) -> None:
        super().__init__()
        self.num_calls = 0
        self.num_failed = 0
        self._fails = fails

    def _must_fail(self, shape: tuple[int, ...]) -> bool:
        self.num_calls += 1
        is_failed = self._fails(self.num_calls, shape)
        self.num_failed += is_failed
        return is_failed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_new = all(returned.alias_info is None for returned in func._schema.returns)
        if is_new and isinstance(made, torch.Tensor) and self._must_fail(tuple(made.shape)):
            raise RuntimeError(TORCH_SAYS)
        return made

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which allocates before it does anything."""

        def failing(*args: Any, **kwargs: Any) -> Any:
            if self._must_fail(()):
                raise MemoryError
            return call(*args, **kwargs)

        return failing


@pytest.fixture(scope="module", params=MODELS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(make_model(request.param, tmp_path_factory.mktemp("m") / "model"), 1, max_tokens=16)


@contextmanager
def failing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, tuple[int, ...]], bool]
) -> Iterator[Failing]:
    """Every allocation within is asked for."""
    exchange = engine._exchange
    exchange.rows_RH = torch.empty((0, exchange.rows_RH.shape[1]))  # type: ignore[attr-defined]
    with monkeypatch.context() as patch, Failing(fails) as mode:
        patch.setattr(engine_module, "Batch", mode.wrap(engine_module.Batch))
        patch.setattr(engine_module, "sample", mode.wrap(engine_module.sample))
        for name in ("dispatch", "combine"):
            patch.setattr(exchange, name, mode.wrap(getattr(exchange, name)))
        yield mode


class Rank(Listener):
    """An engine that steps as a rank lets it, with what a router submits."""

    def __init__(self, engine: Engine, hmm: Any = None) -> None:
        super().__init__(engine)
        self.aborts = 0
        self.num_noted: dict[str, int] = {}  # log probabilities of prompts
        lockstep: Any = SimpleNamespace(abort=self._abort)
        exchange: Any = engine._exchange
        self.shortage = Shortage(engine, exchange, lockstep, hmm or SimpleNamespace(is_connected=False))

    def _abort(self) -> None:
        self.aborts += 1

    def take(self, outcome: Outcome) -> None:
        super().take(outcome)
        for delta in outcome.deltas.get(PEER, []):
            if delta.prompt_logprobs is not None:
                self.num_noted[delta.request_id] = len(delta.prompt_logprobs)

    def submit(self) -> None:
        """A greedy request, one with all that a sampler may have to copy, one whose prompt's logits are all wanted."""
        plain = Sampling(seed=1, temperature=0.0)
        rich = Sampling(seed=2, temperature=0.9, top_p=0.8, repetition_penalty=1.2, logit_bias=((5, 2.0),), logprobs=3)
        for name, prompt, sampling, wants_prompt in (
            ("greedy", [3, 4, 5], plain, False),
            ("rich", [9, 8, 7, 6], rich, False),
            ("prompt", list(range(20, 45)), rich, True),
        ):
            self.engine.add(Submit(name, tuple(prompt), 4, sampling, prompt_logprobs=wants_prompt), PEER, 0.0)
            self.tokens[name] = []

    def run(self) -> None:
        """Until all requests have ended."""
        for _ in range(200):
            plan = self.engine.plan()
            if not plan.num_tokens:
                break
            self.take(self.shortage.compute(plan, plan.num_tokens, DEADLINE_MS))
            assert self.engine.check_integrity() == []
        assert self.engine.scheduler.sequences() == []
        assert self.engine.scheduler.blocks.num_free == self.engine.scheduler.blocks.num_blocks
        assert self.engine.ledger.rows() == []


def undisturbed(ranks: Ranks) -> dict[str, list[int]]:
    rank = Rank(make_engine(ranks))
    rank.submit()
    rank.run()
    assert {name: len(ids) for name, ids in rank.tokens.items()} == {"greedy": 4, "rich": 4, "prompt": 4}
    return rank.tokens


def test_any_failing_allocation_costs_nobody_anything(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = undisturbed(ranks)
    for number in count(1):
        rank = Rank(make_engine(ranks))
        rank.submit()
        with failing(rank.engine, monkeypatch, lambda n, _, number=number: n == number) as mode:
            rank.run()
        if not mode.num_failed:
            break
        assert rank.failed == {}
        assert rank.tokens == wanted
        assert rank.num_noted == {"prompt": 24}  # of each token but the first, once
    assert number > 60


def test_from_any_allocation_on_none_succeeds_for_a_while(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = undisturbed(ranks)
    num_failed = 0
    for number in range(1, 120, 7):
        rank = Rank(make_engine(ranks))
        rank.submit()
        with failing(rank.engine, monkeypatch, lambda n, _, number=number: number <= n < number + 2):
            rank.run()
        for name, failed in rank.failed.items():
            assert (failed.code, failed.retryable) == ("out_of_memory", True)
            assert wanted[name][: len(rank.tokens[name])] == rank.tokens[name]
        num_failed += len(rank.failed)
        assert all(rank.tokens[name] == wanted[name] for name in set(wanted) - set(rank.failed))
    assert num_failed > 0


def test_a_request_that_never_finds_room_ends_alone(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = undisturbed(ranks)
    rank = Rank(make_engine(ranks))
    model: Any = ranks.models[0]
    if hasattr(model, "_logits_MV"):
        model._logits_MV = model._logits_MV[:0]  # as before any step
    rank.submit()
    vocab = ranks.spec.vocab
    with failing(rank.engine, monkeypatch, lambda _, shape: len(shape) == 2 and shape[0] > 4 and shape[1] == vocab):
        rank.run()
    assert {name: failed.code for name, failed in rank.failed.items()} == {"prompt": "out_of_memory"}
    assert {name: rank.tokens[name] for name in ("greedy", "rich")} == {
        name: wanted[name] for name in ("greedy", "rich")
    }


def test_a_step_without_prompts_in_between_does_not_save_one_that_finds_no_room() -> None:
    failed: list[Any] = []

    def compute(plan: Any, total: int, _: float) -> Outcome:
        if total >= 10:
            raise MemoryError
        return Outcome({}, [])

    def fail(sequence: Any, _: Exception) -> Any:
        failed.append(sequence)
        return sequence

    engine: Any = SimpleNamespace(compute=compute, fail=fail)
    exchange: Any = SimpleNamespace(is_awaited=False)
    unused: Any = None
    shortage = Shortage(engine, exchange, unused, unused)
    sequence: Any = SimpleNamespace(wants_prompt_logprobs=False, arrival=0)
    prompt = Plan([Chunk(sequence, 0, 10, True)], [], [])
    without = Plan([], [], [], is_decode_only=True)
    for plan in (prompt, without):
        shortage.compute(plan, plan.num_tokens, 0.0)
    assert failed == []
    shortage.compute(prompt, 10, 0.0)
    assert failed == [sequence]
    shortage.compute(Plan([], [], []), 2, 0.0)  # with the rest of the work there is room
    shortage.compute(prompt, 10, 0.0)
    assert failed == [sequence]  # another one is tried again first


def test_other_errors_and_a_rank_that_cannot_go_on_end_it(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(make_engine(ranks))
    rank.submit()
    plan = rank.engine.plan()

    def fail(error: Exception) -> None:
        def compute(*_: object) -> None:
            raise error

        monkeypatch.setattr(rank.engine, "compute", compute)

    for error in (RuntimeError("shape '[3]' is invalid"), BusAborted("generation 3 is over")):
        assert not is_shortage(error)
        fail(error)
        with pytest.raises(type(error)):
            rank.shortage.compute(plan, 1, DEADLINE_MS)
    fail(MemoryError())
    for _ in range(GIVEN_UP_MAX):
        assert rank.shortage.compute(Plan([], [], []), 1, DEADLINE_MS).failures == []
    with pytest.raises(MemoryError):
        rank.shortage.compute(Plan([], [], []), 1, DEADLINE_MS)


class Pair:
    """Two ranks that step together, and an HMM that does what it must when a connection ends."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.num_ended = 0
        self.ranks_of: list[Rank] = []
        for number in range(2):
            ledger, memory = make_ledger()
            engine = Engine(
                ranks.models[number],
                ranks.exchanges[number],
                ranks.weights[number].kv,
                ledger,
                max_tokens=16,
                max_sequences=4,
                max_model_len=160,
            )
            engine.memory_kept_by_the_test = memory  # type: ignore[attr-defined]
            hmm = SimpleNamespace(is_connected=True, close=self._end)
            self.ranks_of.append(Rank(engine, hmm))

    def _end(self) -> None:
        self.num_ended += 1
        self.ranks._generation += 1
        self.ranks._observer.set_membership(self.ranks._generation, 0b11, False)

    def run(self) -> int:
        """Until all requests have ended; how many steps somebody gave up."""
        num_given_up = 0
        errors: list[Exception] = []
        for _ in range(200):
            plans = [rank.engine.plan() for rank in self.ranks_of]
            total = sum(plan.num_tokens for plan in plans)
            if not total:
                return num_given_up

            def step(number: int, plan: Plan, total: int) -> None:
                rank = self.ranks_of[number]
                try:
                    rank.take(rank.shortage.compute(plan, total, PAIR_MS))
                except BusAborted:
                    pass  # the other one gave it up
                except Exception as error:
                    errors.append(error)

            threads = [threading.Thread(target=step, args=(number, plan, total)) for number, plan in enumerate(plans)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, f"a rank waited in vain, or worse: {errors}"
            if self.ranks._observer.membership()[2] is False:
                num_given_up += 1
                self.ranks.new_generation()
        raise AssertionError("the requests do not end")


@pytest.mark.parametrize("where", ["dispatch", "combine", "sample"])
def test_others_are_let_go_and_nobody_loses_a_token(
    where: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory: Path = make_model("oracle", tmp_path_factory.mktemp("m") / "model")
    pair = Pair(Ranks(directory, 2, max_tokens=16))
    wanted = undisturbed(Ranks(directory, 1, max_tokens=16))
    first, _ = pair.ranks_of
    for rank in pair.ranks_of:
        rank.submit()
    num_calls = 0
    owner = engine_module if where == "sample" else first.engine._exchange
    real = getattr(owner, where)

    def fail_thrice(*args: Any) -> Any:
        nonlocal num_calls
        if threading.current_thread() is not threading.main_thread():
            num_calls += 1
            if num_calls in (2, 9, 14):
                raise MemoryError
        return real(*args)

    monkeypatch.setattr(owner, where, fail_thrice)
    num_given_up = pair.run()
    assert num_calls > 14
    # What fails after the last exchange is nobody else's business.
    assert (num_given_up, pair.num_ended, first.aborts) == ((0, 0, 0) if where == "sample" else (3, 3, 3))
    for rank in pair.ranks_of:
        assert rank.failed == {}
        assert rank.tokens == wanted
        assert rank.engine.check_integrity() == []
        assert rank.engine.scheduler.sequences() == []


def test_without_an_hmm_the_rank_ends_rather_than_let_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(make_model("oracle", tmp_path / "model"), 2, max_tokens=16)
    rank = Rank(make_engine(ranks))
    rank.submit()

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ranks.exchanges[0], "dispatch", fail)
    plan = rank.engine.plan()
    with pytest.raises(MemoryError):
        rank.shortage.compute(plan, plan.num_tokens, DEADLINE_MS)
