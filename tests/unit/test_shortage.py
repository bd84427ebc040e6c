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

from elasticmoe.cli.models import make_model
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.services.worker.backends.base import Mirror
from elasticmoe.services.worker.engine import engine as engine_module
from elasticmoe.services.worker.engine.budget import FIRST_TOKENS, StepBudget
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.plan import Chunk, StepPlan
from elasticmoe.services.worker.rank.steps import GIVEN_UP_MAX, Steps
from tests.unit.crew import Crew, PlayedLockstep
from tests.unit.migration_world import make_engine
from tests.unit.ranks import Ranks
from tests.unit.test_engine import PEER, Listener

pytestmark = pytest.mark.slow

DEADLINE_MS = 20_000.0
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


def submit_all(submit: Callable[..., None]) -> None:
    """A greedy request, one with all that a sampler may have to copy, one whose prompt's logits are all wanted."""
    plain = Sampling(seed=1, temperature=0.0)
    rich = Sampling(seed=2, temperature=0.9, top_p=0.8, repetition_penalty=1.2, logit_bias=((5, 2.0),), logprobs=3)
    submit("greedy", [3, 4, 5], 4, plain)
    submit("rich", [9, 8, 7, 6], 4, rich)
    submit("prompt", list(range(20, 45)), 4, rich, prompt_logprobs=True)


class Rank(Listener):
    """An engine that steps as a rank lets it, in the calling thread."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.num_noted: dict[str, int] = {}  # log probabilities of prompts
        self.lockstep: Any = PlayedLockstep()
        exchange: Any = engine._exchange
        hmm: Any = SimpleNamespace(is_connected=False)
        self.steps = Steps(engine, exchange, self.lockstep, hmm, self.take)

    def take(self, outcome: Outcome) -> None:
        super().take(outcome)
        for delta in outcome.deltas.get(PEER, []):
            if delta.prompt_logprobs is not None:
                self.num_noted[delta.request_id] = len(delta.prompt_logprobs)

    def submit(self) -> None:
        """See `submit_all`."""

        def one(name: str, prompt: list[int], max_tokens: int, sampling: Sampling, **fields: Any) -> None:
            self.engine.add(Submit(name, tuple(prompt), max_tokens, sampling, **fields), PEER, 0.0)
            self.tokens[name] = []

        submit_all(one)

    def run(self) -> None:
        """Until all requests have ended."""
        for _ in range(200):
            plan = self.engine.plan()
            if not plan.num_tokens:
                break
            self.steps.run(plan, plan.num_tokens, DEADLINE_MS)
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
        model._logits_MV = Mirror(*(side[:0] for side in model._logits_MV))  # as before any step
    rank.submit()
    vocab = ranks.spec.vocab
    with failing(rank.engine, monkeypatch, lambda _, shape: len(shape) == 2 and shape[0] > 4 and shape[1] == vocab):
        rank.run()
    assert {name: failed.code for name, failed in rank.failed.items()} == {"prompt": "out_of_memory"}
    assert {name: rank.tokens[name] for name in ("greedy", "rich")} == {
        name: wanted[name] for name in ("greedy", "rich")
    }


class Played:
    """Steps over an engine that has room for so many tokens."""

    def __init__(self, room: int, tokens_max: int) -> None:
        self.failed: list[Any] = []
        self.budget = StepBudget(tokens_max)

        def compute(_: Any, total: int, __: float) -> list[Any]:
            if total > room:
                raise MemoryError
            return []

        def fail(sequence: Any, _: Exception) -> Any:
            self.failed.append(sequence)
            return sequence

        def nothing(*_: object) -> None:
            pass

        engine: Any = SimpleNamespace(
            compute=compute,
            fail=fail,
            trials=SimpleNamespace(begin=nothing, end=nothing, drop=nothing),
            commit=nothing,
            scheduler=SimpleNamespace(budget=self.budget),
        )
        exchange: Any = SimpleNamespace(is_awaited=False)
        lockstep: Any = PlayedLockstep()
        hmm: Any = None
        self.steps = Steps(engine, exchange, lockstep, hmm, nothing)


def test_a_generation_that_ends_while_nobody_lacks_memory_says_nothing_of_any() -> None:
    """As where a layout has changed: a rank that leaves the last meeting late brings a plan of nothing."""
    played = Played(9, 16)
    lockstep: Any = played.steps._lockstep
    lockstep.note_done()
    played.steps.end_unmet(StepPlan([], [], []))
    assert (lockstep.num_aborts, lockstep.num_clean) == (1, 1)
    lockstep.short = {1: 12}
    played.steps.end_unmet(StepPlan([], [], []))
    assert (lockstep.num_aborts, lockstep.num_clean) == (2, 0)


def test_a_step_without_prompts_in_between_does_not_save_one_that_finds_no_room() -> None:
    played = Played(9, 16)
    steps, failed = played.steps, played.failed
    sequence: Any = SimpleNamespace(wants_prompt_logprobs=False, arrival=0)
    prompt = StepPlan([Chunk(sequence, 0, 10, True)], [], [])
    kinds = ("is_decode_only", "is_cut", "is_alone", "leaves_suspects")
    for left_out in ({kind: True} for kind in kinds):
        failed.clear()
        for plan in (prompt, StepPlan([], [], [], **left_out)):
            steps.run(plan, plan.num_tokens, 0.0)
        assert failed == []
        steps.run(prompt, 10, 0.0)
        assert failed == [sequence]
        steps.run(StepPlan([], [], []), 2, 0.0)  # with the rest of the work there is room
        steps.run(prompt, 10, 0.0)
        assert failed == [sequence]  # another one is tried again first
        steps.run(StepPlan([], [], []), 2, 0.0)


@pytest.mark.parametrize(("room", "ends"), [(300, False), (130, False), (100, True)])
def test_a_step_of_prompts_becomes_smaller_before_a_request_ends(room: int, ends: bool) -> None:
    played = Played(room, 4096)
    sequence: Any = SimpleNamespace(wants_prompt_logprobs=False, arrival=0)
    sizes: list[int] = []
    while not played.failed and (not sizes or sizes[-1] > room):
        sizes.append(played.budget.tokens([5000], 0))
        played.steps.run(StepPlan([Chunk(sequence, 0, sizes[-1], False)], [], []), sizes[-1], 0.0)
    assert sizes[:2] == [FIRST_TOKENS, FIRST_TOKENS]  # the same is tried once more first
    assert sizes[2:] == ([512, 256] if room == 300 else [512, 256, 128])
    assert bool(played.failed) == ends


def test_a_rank_that_cannot_go_on_ends(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(make_engine(ranks))
    rank.submit()

    def compute(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(rank.engine, "compute", compute)
    for _ in range(GIVEN_UP_MAX):
        rank.steps.run(StepPlan([], [], []), 1, DEADLINE_MS)
    assert rank.failed == {}
    with pytest.raises(MemoryError):
        rank.steps.run(StepPlan([], [], []), 1, DEADLINE_MS)


@pytest.mark.parametrize("where", ["dispatch", "combine", "sample"])
def test_others_are_let_go_and_nobody_loses_a_token(
    where: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory: Path = make_model("oracle", tmp_path_factory.mktemp("m") / "model")
    pair = Crew(Ranks(directory, 2, max_tokens=16))
    wanted = undisturbed(Ranks(directory, 1, max_tokens=16))
    first, _ = pair.members
    for rank in pair.members:
        submit_all(rank.submit)
    num_calls = 0
    owner = engine_module if where == "sample" else first.engine._exchange
    real = getattr(owner, where)

    def fail_thrice(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        if threading.current_thread() is not threading.main_thread():
            num_calls += 1
            if num_calls in (2, 9, 14):
                raise MemoryError
        return real(*args, **options)

    monkeypatch.setattr(owner, where, fail_thrice)
    pair.run()
    assert num_calls > 14
    # What fails after the last exchange is nobody else's business.
    assert (pair.num_ended, first.lockstep.num_aborts) == ((0, 0) if where == "sample" else (3, 3))
    for rank in pair.members:
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

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ranks.exchanges[0], "dispatch", fail)
    plan = rank.engine.plan()
    with pytest.raises(MemoryError):
        rank.steps.run(plan, plan.num_tokens, DEADLINE_MS)
