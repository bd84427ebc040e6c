"""What the journal keeps of each decision suffices to make it again, and the present code decides as it did (promise
P20). Here one operation at a time, by way of a real store; all faults together: the end of each seed of tests/sim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import elasticmoe.common.store
from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.protocol.errors import PayloadTooLarge, Unavailable
from elasticmoe.common.store import Store, Writer
from elasticmoe.services.scaler.actions import Stage
from elasticmoe.services.scaler.control import members, reconciler
from elasticmoe.services.scaler.control.audit_log import AuditRecord, PlanMade, TurnTaken, digest, turn_taken
from elasticmoe.services.scaler.control.executor import Executor
from elasticmoe.services.scaler.control.reconciler import reconcile
from elasticmoe.services.scaler.control.replay import DECISIONS, plan_again, replay
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.observation import Observation
from elasticmoe.services.scaler.operation import prepare
from elasticmoe.services.scaler.operation.operation import Operation, cancel
from elasticmoe.services.scaler.operation.steps import enter
from elasticmoe.services.scaler.planning.plan import Rates, Target
from elasticmoe.services.scaler.store import journal
from elasticmoe.services.scaler.store.journal import Journal
from tests.clocks import PlayedClock
from tests.procs.waiting import wait_until
from tests.unit.reserves import NO_RESERVE
from tests.unit.test_scaler_executor import FakeLinks, turn
from tests.unit.transitions import DEVICES, DOWN, UP, World, answered, operation_of

A = Writer("a", 1)
HANDLES = dict.fromkeys(DEVICES, 4)
SIZES = Sizes(10, (5,), (8,))
MEMORY = MemoryForecast(dict.fromkeys(DEVICES, 1_000), 200, 7, 16, 2, HANDLES, 4)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that stands still for some seconds, on a busy machine, loses nothing here."""
    monkeypatch.setattr(elasticmoe.common.store, "CALL_SECONDS_MAX", 60.0)
    monkeypatch.setattr(journal, "CLOSE_S_MAX", 60.0)


class Run:
    """One operation, from its plan to its end, as a scaler with a real journal and a real store carries it out."""

    def __init__(self, store: Store, folder: Path, target: Target, before: Any) -> None:
        made = PlanMade("op", before, target, SIZES, MEMORY, DEVICES, Rates(), "")
        plan = plan_again(made)
        made = msgspec.structs.replace(made, plan=digest(plan))
        self.store, self.world = store, World(before)
        self.journal = Journal(store, "a", lambda _: None, lambda: None, lambda: None, NO_RESERVE, SYSTEM_CLOCK)
        self.journal.start()
        self.journal.act_under(1)
        config = ScalerConfig(run_dir=str(folder))
        state = State(ever_served=True, stall_s=99.0)
        links: Any = Links(self.world, plan)
        clock = PlayedClock(lambda: self.world.now)
        self.executor = Executor(config, links, self.journal, Meters(), _tell, state, clock)
        self.executor.begin(operation_of(plan), made)

    def turn(self) -> None:
        operation = self.executor.operation
        if operation is not None:
            wait_until(lambda: self.journal.is_durable(operation), "the operation is in the store")
        seen = self.world.seen()
        turn(self.executor, seen)
        self.world.progress()

    def finish(self) -> Operation:
        for _ in range(100):
            if self.executor.operation is None:
                break
            self.turn()
        self.journal.close()
        return self.executor.ended[0]


class Links(FakeLinks):
    """Obeys the commands of one plan."""

    def __init__(self, world: World, plan: Any) -> None:
        super().__init__(world)
        self._plan = plan

    def tell_hmm(self, command: Any) -> None:
        if hasattr(command, "layout"):
            leg = next(leg for leg in self._plan.legs if leg.layout == command.layout)
            self.world.obey(Stage(command.id, leg, not leg.joining))
        else:
            super().tell_hmm(command)


def _tell(kind: str, reason: str, /, **facts: str) -> None: ...


def differences(decisions: list[AuditRecord]) -> list[str]:
    """What comes out otherwise than it did."""
    return [f"{one.name}: {one.difference}" for one in replay(decisions) if one.difference]


def journaled(store: Store) -> list[AuditRecord]:
    """What the store has, oldest first."""
    return store.decisions(DECISIONS)


@pytest.mark.parametrize(
    ("target", "before"), [(Target(replicas=3), UP.before), (Target(remove=(1,)), DOWN.before), (Target(2), UP.before)]
)
def test_an_operation_is_decided_again_as_it_was(store: Store, tmp_path: Path, target: Target, before: Any) -> None:
    ended = Run(store, tmp_path, target, before).finish()
    decisions = journaled(store)
    assert isinstance(decisions[0], PlanMade)
    steps = [at for at in turns(decisions) if at.before.operation]
    last = steps[-1].after.operation
    assert last is not None
    assert [ended.phase, ended.op_id] == ["done", "op"] == [last.phase, last.op_id]
    assert len(steps) >= (1 if ended.kind == "none" else 5)
    assert differences(decisions) == []


def test_a_cancelled_operation_too_and_what_is_tidied_up(store: Store, tmp_path: Path) -> None:
    run = Run(store, tmp_path, Target(replicas=3), UP.before)
    for _ in range(3):
        run.turn()
    assert run.executor.operation is not None
    run.executor.replace(cancel(run.executor.operation))
    for _ in range(20):
        if run.executor.operation is not None:
            run.turn()
    run.world.ranks[3] = "rank-r3t0:9"  # a stray
    run.turn()
    assert run.finish().phase == "aborted"
    decisions = journaled(store)
    assert any(isinstance(decision, PlanMade) for decision in decisions)
    assert [at.after.orphans for at in turns(decisions) if at.after.orphans and not at.before.orphans]
    assert [at.after.operation.phase for at in turns(decisions) if at.after.operation][-1] == "aborted"
    assert differences(decisions) == []


def turns(decisions: list[AuditRecord]) -> list[TurnTaken]:
    return [decision for decision in decisions if isinstance(decision, TurnTaken)]


def taken(seen: Observation) -> TurnTaken:
    """A turn without an operation."""
    state = State(ever_served=True, stall_s=99.0)
    return turn_taken(state, seen, 7.0, reconcile(state, seen, 7.0))


def phase_chosen() -> TurnTaken:
    return taken(World(UP.before).seen())


def test_another_code_is_told_apart(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(store, tmp_path, Target(replicas=3), UP.before).finish()
    decisions = [*journaled(store), phase_chosen()]
    assert differences(decisions) == []
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "empty_leavers", lambda *_: ([], []))
        patch.setattr(reconciler, "migrate", lambda operation, *_: enter(operation, "done", "over"))
        assert [text for text in differences(decisions) if "done, over and not release" in text]
    blind = taken(answered(World(UP.before).seen(), pool=None))
    stray = World(UP.before)
    stray.ranks[3] = "rank-r3t0:9"
    for decision, module, name, instead, said in (
        (blind, members, "_waiting", lambda _: "loading", "loading, the worker pool"),
        (taken(stray.seen()), reconciler, "collect_orphans", lambda *_: ((), ""), "serving, layout 1 serves"),
        (
            taken(stray.seen()),
            reconciler,
            "collect_orphans",
            lambda *_: ((), "ranks without an operation"),
            "other commands",
        ),
    ):
        assert differences([decision]) == []
        with monkeypatch.context() as patch:
            patch.setattr(module, name, instead)
            assert [text for text in differences([decision]) if said in text], name


def test_an_input_that_is_missing_or_another_one_is_told_apart(store: Store, tmp_path: Path) -> None:
    Run(store, tmp_path, Target(replicas=3), UP.before).finish()
    decisions = journaled(store)
    made = decisions[0]
    assert isinstance(made, PlanMade)
    for changed in (
        msgspec.structs.replace(made, memory=msgspec.structs.replace(MEMORY, footprint=180)),
        msgspec.structs.replace(made, sizes=Sizes(11, (5,), (8,))),
        msgspec.structs.replace(made, rates=Rates(step_s=1.0)),
    ):
        assert differences([changed]) == ["op: another plan"]
    assert differences([at for at in turns(decisions) if at.before.operation][:1]) == [
        "op: the journal has a turn and no plan"
    ]
    for number, step in enumerate(decisions):
        if isinstance(step, TurnTaken) and step.before.operation and step.before.operation.phase == "prepare":
            blind = msgspec.structs.replace(step, seen=answered(step.seen, hmm=None))
            assert len(differences([made, blind])) == 1, number


def test_decisions_are_few_and_small_in_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elasticmoe.common.store, "DECISIONS_MAX", 3)
    for _ in range(5):
        store.append_decision(A, phase_chosen())
    assert journaled(store) == [phase_chosen()] * 3
    monkeypatch.setattr(elasticmoe.common.store, "DECISION_BYTES_MAX", 100)
    with pytest.raises(PayloadTooLarge, match="exceeds the limit of 100"):
        store.append_decision(A, phase_chosen())
    monkeypatch.setattr(
        elasticmoe.common.store, "VALUE_BYTES_MAX", 100
    )  # of what is read, when it is no longer compressed
    with pytest.raises(Unavailable) as caught:
        journaled(store)
    assert caught.value.code == "store_corrupt"


def test_a_decision_that_is_too_large_holds_up_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elasticmoe.common.store, "DECISION_BYTES_MAX", 100)
    assert Run(store, tmp_path, Target(replicas=3), UP.before).finish().phase == "done"
    assert journaled(store) == []
