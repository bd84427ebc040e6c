"""A request that makes steps fail ends alone, whatever it does and wherever; deaths for other reasons end nobody.

Longer than other files because one crew of ranks and one poison serve every place and rhythm of failures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.protocol.rank import Sampling
from elasticmoe.common.protocol.router import Suspicion
from elasticmoe.services.worker.engine import sampler
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.plan import StepPlan
from elasticmoe.services.worker.engine.sequence import Sequence
from elasticmoe.services.worker.engine.trial import (
    COMPUTED,
    COMPUTED_ALONE,
    CONTROL_STEPS,
    GUILTY_FAILURES,
    INNOCENT,
    LEFT_OUT,
    SUSPECT_FAILURES,
    Trial,
    after_death,
)
from elasticmoe.services.worker.rank.steps import FAILED_MAX
from tests.oracle import next_tokens
from tests.unit.crew import Crew, Killed
from tests.unit.ranks import Ranks

GREEDY = Sampling(seed=1, temperature=0.0)
NUM_TOKENS = 14
POISON = "poison"


@pytest.fixture(scope="module")
def all_ranks(directory: Path) -> dict[int, Ranks]:
    return {size: Ranks(directory, size, max_tokens=16) for size in (1, 2)}


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def ranks(all_ranks: dict[int, Ranks], request: pytest.FixtureRequest) -> Iterator[Ranks]:
    yield all_ranks[request.param]
    all_ranks[request.param].new_generation()


class Poison:
    """Does `action` in the step that computes position `position` of a request whose name begins with POISON."""

    def __init__(self, patch: pytest.MonkeyPatch, crew: Crew, action: Callable[[], None], position: int) -> None:
        self._crew = crew
        self._action = action
        self._position = position
        self._plans: dict[int, StepPlan] = {}
        self._patch = patch
        self.struck_at: list[int] = []  # steps
        compute = Engine.compute

        def noted(engine: Engine, plan: StepPlan, total: int, deadline_ms: float) -> Any:
            self._plans[id(engine)] = plan
            return compute(engine, plan, total, deadline_ms)

        patch.setattr(Engine, "compute", noted)

    def is_hit(self, sequence: Sequence) -> bool:
        return sequence.request.request_id.startswith(POISON) and len(sequence.tokens) > self._position

    @property
    def num_struck(self) -> int:
        return len(self.struck_at)

    def strike(self) -> None:
        self.struck_at.append(self._crew.num_steps)
        self._action()

    def _strike_if_computed(self, number: int) -> None:
        plan = self._plans.get(id(self._crew.members[number].engine))
        for chunk in plan.chunks if plan else ():
            if self.is_hit(chunk.sequence) and chunk.start + chunk.num_tokens > self._position:
                self.strike()

    def in_forward(self, by: int = 0) -> None:
        model: Any = self._crew.ranks.models[by]
        forward = model.forward

        def struck(*args: Any) -> Any:
            self._strike_if_computed(by)
            return forward(*args)

        self._patch.setattr(model, "forward", struck)

    def in_exchange(self, by: int, of: int) -> None:
        """Rank `by` fails when it has been given the rows of rank `of`, in the last layer that is exchanged."""
        exchange: Any = self._crew.ranks.exchanges[by]
        combine = exchange.combine

        def struck(*args: Any, **named: Any) -> Any:
            if exchange._num_left == 1:
                self._strike_if_computed(of)
            return combine(*args, **named)

        self._patch.setattr(exchange, "combine", struck)

    def in_part_of_engine(self, name: str) -> None:
        real = getattr(Engine, name)

        def struck(engine: Engine, subject: Any, *args: Any) -> Any:
            chunks = subject if isinstance(subject, list) else [subject]
            if any(self.is_hit(getattr(chunk, "sequence", chunk)) for chunk in chunks):
                self.strike()
            return real(engine, subject, *args)

        self._patch.setattr(Engine, name, struck)

    def in_choice(self) -> None:
        choice_of = sampler._choice_of

        def struck(state: Any) -> Any:
            if state.request.request_id.startswith(POISON) and len(state.tokens) > self._position:
                self.strike()
            return choice_of(state)

        self._patch.setattr(sampler, "_choice_of", struck)

    def in_telling(self) -> None:
        member: Any = self._crew.members[0]
        hear = member.hear

        def struck(outcome: Any) -> None:
            deltas = [delta for of_router in outcome.deltas.values() for delta in of_router]
            if any(delta.request_id.startswith(POISON) and delta.index > self._position - 9 for delta in deltas):
                self.strike()
            hear(outcome)

        member.hear = struck
        member.steps._tell = struck


def raises() -> None:
    raise IndexError("index 7 is out of bounds for axis 0 with size 5")


def kills() -> None:
    raise Killed


def fill(crew: Crew, directory: Path, *, poison: Sampling | None = GREEDY, num: int = 3) -> dict[str, list[int]]:
    """Requests for each rank, beside a bad one on the first. What the good ones must get."""
    wanted = {}
    for number, member in enumerate(crew.members):
        for each in range(num):
            prompt, count = [number, each, *range(4 * each)], NUM_TOKENS + 5 * (num - 3)
            member.submit(f"good{each}", prompt, count, GREEDY)
            wanted[f"{number} good{each}"] = next_tokens(directory, prompt, count)
    if poison is not None:
        fields = {"prompt_logprobs": True} if poison.logprobs >= 0 else {}
        crew.members[0].submit(POISON, [9, 8, 7, 6, 5, 4, 3, 2, 1], NUM_TOKENS, poison, **fields)
    return wanted


def check_good(crew: Crew, wanted: dict[str, list[int]]) -> None:
    """They have got all, and nothing is left behind."""
    got = {f"{n} {name}": ids for n, m in enumerate(crew.members) for name, ids in m.tokens.items() if "good" in name}
    assert got == wanted
    for member in crew.members:
        assert not [name for name in member.failed if "good" in name]
        assert member.engine.ledger.rows() == []
        assert member.engine.scheduler.struck == []
        blocks = member.engine.scheduler.blocks
        assert blocks.num_free == blocks.num_blocks


def check_ended_alone(crew: Crew, wanted: dict[str, list[int]], code: str = "request_failed") -> None:
    check_good(crew, wanted)
    failed = crew.members[0].failed[POISON]
    assert (failed.code, failed.retryable) == (code, False)
    assert "other requests are not affected" in failed.message
    assert "out of bounds" not in failed.message


IN_PROMPT, IN_DECODING = 0, 11
WHEN = pytest.mark.parametrize("position", [IN_PROMPT, IN_DECODING], ids=["in its prompt", "while it decodes"])


@WHEN
@pytest.mark.parametrize("action", [raises, kills])
@pytest.mark.parametrize("where", ["forward", "exchange"])
def test_what_fails_for_all_ends_its_cause(
    directory: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    action: Callable[[], None],
    position: int,
) -> None:
    crew = Crew(ranks, sequences_max=8)
    poison = Poison(monkeypatch, crew, action, position)
    poison.in_forward() if where == "forward" else poison.in_exchange(0, 0)
    wanted = fill(crew, directory)
    crew.run()
    check_ended_alone(crew, wanted)
    failures = (1 if position == IN_PROMPT else SUSPECT_FAILURES) + GUILTY_FAILURES
    assert poison.num_struck == failures
    assert poison.struck_at[-1] - poison.struck_at[-2] > CONTROL_STEPS
    assert [member.num_deaths for member in crew.members] == [failures if action is kills else 0, 0][
        : len(ranks.models)
    ]
    if position == IN_DECODING:
        assert crew.members[0].tokens[POISON] == next_tokens(directory, [9, 8, 7, 6, 5, 4, 3, 2, 1], 3)


@WHEN
@pytest.mark.parametrize("action", [raises, kills])
def test_rows_that_end_the_rank_of_their_experts(
    directory: Path,
    all_ranks: dict[int, Ranks],
    monkeypatch: pytest.MonkeyPatch,
    action: Callable[[], None],
    position: int,
) -> None:
    """Neither rank can see that the other's row is to blame, but that all is well without it."""
    crew = Crew(all_ranks[2], sequences_max=8)
    poison = Poison(monkeypatch, crew, action, position)
    poison.in_exchange(1, 0)
    wanted = fill(crew, directory)
    crew.run()
    check_ended_alone(crew, wanted)
    assert poison.num_struck <= SUSPECT_FAILURES + GUILTY_FAILURES
    assert [member.num_deaths for member in crew.members] == [0, poison.num_struck if action is kills else 0]


@pytest.mark.parametrize("where", ["_part", "_report", "choice", "note"])
def test_what_fails_in_ones_own_part_ends_at_once(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    crew = Crew(ranks, sequences_max=8)
    sampling = Sampling(seed=1, temperature=0.9, logprobs=2 if where == "note" else -1)
    poison = Poison(monkeypatch, crew, raises, IN_PROMPT if where == "note" else IN_DECODING)
    if where == "choice":
        poison.in_choice()
    else:
        poison.in_part_of_engine({"note": "_note_prompt"}.get(where, where))
    wanted = fill(crew, directory, poison=sampling)
    crew.run()
    check_ended_alone(crew, wanted)
    is_tried = where in ("_part", "note")  # before anything tells whose fault it is
    assert poison.num_struck <= (4 if is_tried else 1)
    assert all(member.num_deaths == 0 for member in crew.members)


@pytest.mark.parametrize("action", [raises, kills])
@pytest.mark.parametrize("where", ["commit", "telling"])
def test_what_fails_when_it_counts_already(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, where: str, action: Callable[[], None]
) -> None:
    """A process that fails there cannot go on: the seat's next one sees how far it came."""
    crew = Crew(ranks, sequences_max=8, are_mortal=True)
    poison = Poison(monkeypatch, crew, action, IN_DECODING)
    poison.in_part_of_engine("_commit_ledger") if where == "commit" else poison.in_telling()
    wanted = fill(crew, directory)
    crew.run()
    check_ended_alone(crew, wanted)
    assert crew.members[0].num_deaths == poison.num_struck <= SUSPECT_FAILURES + GUILTY_FAILURES


@pytest.mark.parametrize("action", [raises, kills])
def test_several_at_once(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]
) -> None:
    crew = Crew(ranks, sequences_max=8)
    poison = Poison(monkeypatch, crew, action, IN_DECODING)
    for number in range(len(crew.members)):
        poison.in_forward(number)
    wanted = fill(crew, directory)
    for member in crew.members:
        for each in range(2):
            member.submit(f"{POISON}{each}", [each, 1, 2], NUM_TOKENS, GREEDY)
    crew.run()
    check_ended_alone(crew, wanted)
    for member in crew.members:
        assert {f"{POISON}{each}" for each in range(2)} <= set(member.failed)
        assert {failed.code for failed in member.failed.values()} == {"request_failed"}
    # One that strikes for the first time, in a step that others were left out of, voids what was known of those.
    assert poison.num_struck <= 8 * (2 * len(crew.members) + 1)


@pytest.mark.parametrize(("num_prompt", "position"), [(9, IN_PROMPT), (50, 40)])
def test_what_is_known_is_told_to_the_router(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, num_prompt: int, position: int
) -> None:
    """The router submits a request anew whose log probabilities were lost with a rank: it is no new one."""
    crew = Crew(ranks, sequences_max=8)
    poison = Poison(monkeypatch, crew, kills, position)
    poison.in_forward()
    member = crew.members[0]
    prompt = list(range(num_prompt))
    wanted = fill(crew, directory, poison=None)
    suspicion: Suspicion | None = None
    name = POISON
    for turn in range(10):
        name = f"{POISON}~{turn}"
        member.submit(name, prompt, 9, Sampling(seed=1), suspicion=suspicion)
        deaths = member.num_deaths
        while member.num_deaths == deaths and name not in member.failed:
            crew.step()
        if name in member.failed:
            break
        (told,) = [news for news in member.suspected if news.request_id == name]
        assert told.suspicion.failures == turn + 1
        assert position < told.suspicion.reach <= num_prompt
        suspicion = told.suspicion
        member.engine.cancel(b"router:1", name)
        member.given_up.add(name)
    assert member.failed[name].code == "request_failed"
    assert member.num_deaths == 1 + GUILTY_FAILURES
    crew.run()
    check_good(crew, wanted)


class Kills:
    """Kills rank `number` in steps, at their beginning, as often as `shall` says so."""

    def __init__(self, patch: pytest.MonkeyPatch, crew: Crew, number: int, shall: Callable[[int], bool]) -> None:
        self.num_steps = self.num_killed = 0
        model: Any = crew.ranks.models[number]
        forward = model.forward

        def struck(*args: Any) -> Any:
            self.num_steps += 1
            if shall(self.num_steps):
                self.num_killed += 1
                raise Killed
            return forward(*args)

        patch.setattr(model, "forward", struck)


@pytest.mark.parametrize("first", [1, 2, 3, 6], ids=lambda first: f"from step {first}")
@pytest.mark.parametrize("num", [1, 2, 3, 4, 10])
def test_deaths_in_a_row_end_nobody(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, num: int, first: int
) -> None:
    """Each rank of the seat dies in its first step, so that no step is ever completed in between."""
    crew = Crew(ranks, sequences_max=8)
    kill = Kills(monkeypatch, crew, 0, lambda step: first <= step < first + num)
    wanted = fill(crew, directory, poison=None)
    crew.run()
    check_good(crew, wanted)
    assert kill.num_killed == crew.members[0].num_deaths == num


@pytest.mark.parametrize("period", [2, 3, 4, 5, 7])
def test_deaths_again_and_again_end_nobody(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, period: int
) -> None:
    crew = Crew(ranks, sequences_max=8)
    kill = Kills(monkeypatch, crew, len(ranks.models) - 1, lambda step: step % period == 0 and step < 16 * period)
    wanted = fill(crew, directory, poison=None, num=6)
    crew.run()
    check_good(crew, wanted)
    assert kill.num_killed > 3


def test_an_ordinary_step_that_fails_in_between_voids_what_was_seen(
    directory: Path, all_ranks: dict[int, Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank dies in both of a request's own steps, by chance, and in one of everybody's in between."""
    crew = Crew(all_ranks[2], sequences_max=8)
    model: Any = all_ranks[2].models[1]
    forward, killed = model.forward, []

    def struck(*args: Any) -> Any:
        plan = crew.members[0].plan
        kind = "alone" if plan.is_alone and plan.chunks[0].sequence.request.request_id == "good1" else "ordinary"
        script = ["ordinary", "alone", "ordinary", "alone"]
        if len(killed) < len(script) and kind == script[len(killed)]:
            killed.append(kind)
            raise Killed
        return forward(*args)

    monkeypatch.setattr(model, "forward", struck)
    wanted = fill(crew, directory, poison=None)
    crew.run()
    check_good(crew, wanted)
    assert len(killed) == 4


@pytest.mark.parametrize("num_errors", [FAILED_MAX, 3 * FAILED_MAX])
def test_a_process_that_is_broken_ends_and_nobody_is_to_blame(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, num_errors: int
) -> None:
    crew = Crew(ranks, sequences_max=8, are_mortal=True)
    model: Any = ranks.models[0]
    forward, num_calls = model.forward, 0

    def broken(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return raises() if 5 <= num_calls < 5 + num_errors else forward(*args)

    monkeypatch.setattr(model, "forward", broken)
    wanted = fill(crew, directory, poison=None)
    crew.run()
    check_good(crew, wanted)
    assert crew.members[0].num_deaths == num_errors // (FAILED_MAX + 1)


def test_another_ranks_want_of_memory_is_nobodys_fault(
    directory: Path, all_ranks: dict[int, Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Crew(all_ranks[2], sequences_max=8)
    exchange: Any = all_ranks[2].exchanges[1]
    dispatch, num_calls = exchange.dispatch, 0

    def starved(*args: Any, **named: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if 20 <= num_calls < 27:
            raise MemoryError
        return dispatch(*args, **named)

    monkeypatch.setattr(exchange, "dispatch", starved)
    wanted = fill(crew, directory, poison=None)
    wanted = {name: ids for name, ids in wanted.items() if name.startswith("0")}
    crew.run()
    assert {f"0 {name}": ids for name, ids in crew.members[0].tokens.items()} == wanted
    assert crew.members[0].failed == {}
    assert {failed.code for failed in crew.members[1].failed.values()} <= {"out_of_memory"}


@pytest.mark.parametrize("action", [raises, kills])
def test_one_that_starts_over_each_time(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]
) -> None:
    """Its KV is lost with each rank, and its first steps after that are completed: they prove nothing."""
    crew = Crew(ranks, sequences_max=8)
    poison = Poison(monkeypatch, crew, action, 40)
    poison.in_forward()
    wanted = fill(crew, directory, poison=None)
    crew.members[0].submit(POISON, list(range(50)), 4, Sampling(seed=1, logprobs=2), prompt_logprobs=True)
    crew.run()
    check_ended_alone(crew, wanted)
    assert poison.num_struck == 1 + GUILTY_FAILURES
    assert crew.members[0].num_deaths == (poison.num_struck if action is kills else 0)


def test_output_that_is_computed_again_is_like_a_prompt(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Crew(ranks, sequences_max=8)
    poison = Poison(monkeypatch, crew, raises, 43)
    poison.in_forward()
    wanted = fill(crew, directory, poison=None)
    output, known = tuple(range(40)), Suspicion(1, 0, 45)
    crew.members[0].tokens[POISON] = list(output)
    crew.members[0].submit(POISON, [1, 2, 3, 4, 5], 60, GREEDY, output=output, suspicion=known)
    crew.run()
    check_ended_alone(crew, wanted)
    assert poison.num_struck == GUILTY_FAILURES


def test_an_innocent_prompt_is_cleared_by_what_was_to_be_computed(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of many chunks was in the step that failed: the others are computed with everybody's work."""
    crew = Crew(ranks, sequences_max=8)
    Kills(monkeypatch, crew, 0, lambda step: step == 3)
    member, prompt = crew.members[0], [5, *range(100)]
    member.submit("good0", prompt, 4, GREEDY)
    num_alone = 0
    while "good0" not in member.finish:
        crew.step()
        num_alone += member.plan.is_alone
    assert member.tokens["good0"] == next_tokens(directory, prompt, 4)
    assert (member.num_deaths, num_alone) == (1, 1)


def test_the_rules() -> None:
    assert Trial().failed(7, is_alone=False) == Trial(1, 0, 7)
    assert Trial(2, 1, 9).failed(7, is_alone=True) == Trial(3, 2, 9)
    assert Trial(2, 1, 7).failed(9, is_alone=False) == Trial(3, 0, 9)
    assert Trial(255, 255).failed(7, is_alone=True) == Trial(255, 255, 7)
    assert Trial(3, 1, 7).voided() == Trial(3, 0, 7)
    assert [Trial(3, 1, 7).computed(n) for n in (6, 7)] == [Trial(3, 1, 7), INNOCENT]
    assert [Trial(n).is_suspect(in_prompt=True) for n in (0, 1, 2)] == [False, True, True]
    assert [Trial(n).is_suspect(in_prompt=False) for n in (0, 1, 2)] == [False, False, True]
    assert [Trial(9, n).is_guilty for n in (0, 1, 2)] == [False, False, True]
    assert [Trial(2, 0).may_be_alone(n) for n in (0, 1)] == [False, True]
    assert [Trial(2, 1).may_be_alone(n) for n in (0, CONTROL_STEPS - 1, CONTROL_STEPS)] == [False, False, True]


@pytest.mark.parametrize("trial", [INNOCENT, Trial(1, 0, 4), Trial(2, 1, 40), Trial(255, 255, 2**22 - 1)])
def test_what_a_mark_tells(trial: Trial) -> None:
    num_tokens = 2**22
    assert after_death(trial.mark(), num_tokens) == trial
    assert after_death(trial.mark(LEFT_OUT), num_tokens) == trial.voided()
    for state, is_alone in ((COMPUTED, False), (COMPUTED_ALONE, True)):
        assert after_death(trial.mark(state, 50), num_tokens) == trial.failed(50, is_alone=is_alone)
    assert after_death(INNOCENT.mark(COMPUTED), 12) == Trial(1, 0, 12)
    assert 0 <= trial.mark(COMPUTED_ALONE, 2**22) < 2**63
