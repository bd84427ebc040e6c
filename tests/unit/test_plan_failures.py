"""A plan that fails ends the request that it was looking at, alone: no rank dies of it, nobody else loses a token, and
what had been decided by then is on record. What steps fail of: test_quarantine.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.services.worker.engine import planning
from elasticmoe.services.worker.engine.plan import Draft, PlanFailed, StepPlan
from elasticmoe.services.worker.engine.scheduler import Scheduler
from elasticmoe.services.worker.engine.sequence import Sequence
from elasticmoe.services.worker.rank.steps import FAILED_MAX
from tests.unit.crew import PEER, Crew
from tests.unit.ranks import Ranks
from tests.unit.test_quarantine import POISON, check_good, fill

LATER = 14  # tokens of the bad request


@pytest.fixture(scope="module", params=[1, 2])
def ranks(directory: Path, request: pytest.FixtureRequest) -> Ranks:
    return Ranks(directory, request.param)


def raise_for(
    patch: pytest.MonkeyPatch, where: Any, name: str, num_tokens: int, *, is_after: bool = False
) -> list[str]:
    """Let `where.name` raise for the bad request once it has so many tokens; what it raised for."""
    real, struck = getattr(where, name), list[str]()

    def replaced(*args: Any, **named: Any) -> Any:
        found = [arg for arg in args if isinstance(arg, Sequence) and arg.request.request_id.startswith(POISON)]
        result = real(*args, **named) if is_after else None
        if any(len(sequence.tokens) >= num_tokens for sequence in found):
            struck.append(found[0].request.request_id)
            raise IndexError("index 7 is out of bounds")
        return result if is_after else real(*args, **named)

    patch.setattr(where, name, replaced)
    return struck


@pytest.mark.parametrize(
    ("where", "name", "num_tokens", "is_after"),
    [
        (Scheduler, "_admit", 0, False),
        (Scheduler, "_admit", 0, True),  # it has a row and blocks by then, and no row in the ledger
        (Scheduler, "_draft_one", LATER, False),
        (Scheduler, "_grow", LATER, True),  # with a block more
        (Draft, "add", 0, True),
        (Draft, "add", LATER, False),
        (planning, "encode_entry", 0, False),
        (planning.Planning, "open_row", 0, True),
        (planning.Planning, "_log_blocks", LATER, False),
        (planning.Planning, "_log_blocks", LATER, True),
    ],
)
def test_it_ends_alone(
    directory: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    num_tokens: int,
    is_after: bool,
) -> None:
    crew = Crew(ranks)
    wanted = fill(crew, directory)
    struck = raise_for(monkeypatch, where, name, num_tokens, is_after=is_after)
    crew.run()
    check_good(crew, wanted)
    failed = crew.members[0].failed[POISON]
    assert (failed.code, failed.retryable) == ("request_failed", False)
    assert "other requests are not affected" in failed.message
    assert "out of bounds" not in failed.message
    assert struck == [POISON]
    assert [member.num_deaths for member in crew.members] == [0] * len(crew.members)
    assert crew.num_ended == 0


def test_who_was_stopped_or_admitted_before_it_goes_on(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same plan: the bad one is looked at last."""
    crew = Crew(ranks)
    wanted = fill(crew, directory)
    decided: list[tuple[int, int]] = []
    real = Scheduler._draft_waiting

    def struck(self: Scheduler, draft: Draft, suspects: list[Sequence]) -> None:
        real(self, draft, suspects)
        bad = self.get(PEER, POISON)
        if bad is not None:
            decided.append((len(draft.admitted), len(draft.freed_rows)))
            draft.subject = bad
            raise IndexError

    monkeypatch.setattr(Scheduler, "_draft_waiting", struck)
    crew.run()
    check_good(crew, wanted)
    assert crew.members[0].failed[POISON].code == "request_failed"
    assert decided[0][0] > 1


@pytest.mark.parametrize("times", [1, FAILED_MAX, FAILED_MAX + 1])
def test_what_is_nobodys_costs_steps_and_at_last_the_process(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    crew = Crew(ranks)
    wanted = fill(crew, directory, poison=None)
    for _ in range(3):
        crew.step()
    real, first, left = Scheduler._plan, crew.members[0].engine.scheduler, [times]

    def struck(self: Scheduler, draft: Draft, **named: Any) -> StepPlan:
        if self is first and left[0]:
            left[0] -= 1
            raise IndexError("index 7 is out of bounds")
        return real(self, draft, **named)

    monkeypatch.setattr(Scheduler, "_plan", struck)
    if times > FAILED_MAX:
        for _ in range(FAILED_MAX):
            assert crew.members[0].steps.plan().num_said == 0
        with pytest.raises(PlanFailed) as ended:
            crew.members[0].steps.plan()
        assert isinstance(ended.value.__cause__, IndexError)
        crew.members[0].die()  # and the seat's next process goes on
    else:
        for _ in range(times):
            assert crew.members[0].steps.plan().num_said == 0
    crew.run()
    check_good(crew, wanted)


def test_books_that_do_not_add_up_end_the_process(
    directory: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Crew(ranks)
    wanted = fill(crew, directory)
    real: Callable[..., Any] = Scheduler._admit

    def struck(self: Scheduler, sequence: Sequence, budget: int) -> bool:
        if sequence.request.request_id == POISON:
            self._free_rows.pop()
            raise IndexError
        return bool(real(self, sequence, budget))

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "_admit", struck)
        with pytest.raises(PlanFailed):
            crew.run()
    assert crew.members[0].failed == {}, "who is to blame is not known to the client before it is to the ledger"
    crew.members[0].die()
    crew.run()
    check_good(crew, wanted)
    assert crew.members[0].finish[POISON] == "length"
