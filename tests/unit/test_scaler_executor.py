"""The executor and the journal: what is written before what is sent, and what happens when the store or an answer is
missing. The HMM, the pool and the ranks are values (transitions.World); the store fails on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.layout import Seat, Served
from elasticmoe.common.protocol import hmm as to_hmm
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import DoesNotFit, Fenced, Unavailable
from elasticmoe.common.protocol.hmm import AbortLayout, CommitLayout, ReleaseLayout
from elasticmoe.common.protocol.pool import StopRank
from elasticmoe.common.protocol.rank import RankCommand
from elasticmoe.common.protocol.scaler import RankExited
from elasticmoe.common.store import Event, Writer
from elasticmoe.services.scaler.actions import Stage, StartSeat, StopSeat, TellRank
from elasticmoe.services.scaler.control.executor import Executor
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.observation import Observation
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.record import PolicyRecord, changed
from elasticmoe.services.scaler.store import journal as journal_module
from elasticmoe.services.scaler.store.journal import Journal
from tests.clocks import PlayedClock
from tests.procs.waiting import wait_until
from tests.unit.reserves import NO_RESERVE
from tests.unit.transitions import DOWN, SEATS, UP, World, operation_of


class FakeStore:
    """Keeps what a store would; raises `failure` instead while it is set."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.operation: Operation | None = None
        self.ended: list[Operation] = []
        self.layout: Any = None
        self.policy: Any = None
        self.instance = ""
        self.served: Any = None
        self.events: list[Event] = []
        self.mark = ""
        self.num_writes = 0
        self.changed = threading.Condition()

    def _write(self, name: str, value: Any) -> None:
        with self.changed:
            if self.failure is not None:
                raise self.failure
            setattr(self, name, value)
            self.changed.notify_all()

    def put_operation(self, by: Writer, operation: Operation | None) -> str:
        self._write("operation", operation)
        return self._marked()

    def end_operation(self, by: Writer, operation: Operation) -> str:
        self._write("ended", [operation, *self.ended])
        self.operation = None
        return self._marked()

    def _marked(self) -> str:
        self.num_writes += 1
        self.mark = str(self.num_writes)
        return self.mark

    def journal_mark(self) -> str:
        return self.mark

    def put_layout(self, by: Writer, layout: Any) -> None:
        self._write("layout", layout)

    def put_policy(self, by: Writer, policy: Any) -> None:
        self._write("policy", policy)

    def put_instance(self, by: Writer, instance: str) -> None:
        self._write("instance", instance)

    def put_served(self, by: Writer, served: Any) -> None:
        self._write("served", served)

    def get_epoch(self) -> int:
        return self.layout.epoch if self.layout else 0

    def append_decision(self, by: Writer, decision: Any) -> None: ...

    def append_event(self, by: Writer, event: Event) -> None:
        self._write("events", [*self.events, event])

    def wait(self, condition: Callable[[], bool]) -> None:
        wait_until(condition, "what the journal writes", 60.0)


class FakePeers:
    def __init__(self, world: World) -> None:
        self._world = world

    def keep(self, seats: Any) -> None: ...

    def ask(self, seats: Any, interval_s: float) -> None: ...

    def receive(self) -> None: ...

    def loads(self, ranks: Any, age_s_max: float) -> Any:
        loads = self._world.seen().loads
        return {slot: loads[slot] for slot in ranks if slot in loads}

    def tell(self, rank: Any, command: Message) -> None:
        assert isinstance(command, RankCommand)
        self._world.obey(TellRank(next(seat for seat in SEATS if seat.rank == rank), command))


class FakeLinks:
    """Turns messages back into the actions that the world obeys."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.starting: frozenset[int] = frozenset()
        self.peers = FakePeers(world)
        self.refusal: Exception | None = None

    def tell_hmm(self, command: Message) -> None:
        if self.refusal is not None:
            raise self.refusal
        if isinstance(command, to_hmm.StageLayout):
            leg = next(leg for plan in (UP, DOWN) for leg in plan.legs if leg.layout == command.layout)
            assert (command.bytes_per_s_max == 0) == bool(leg.joining)
            self.world.obey(Stage(command.id, leg, not leg.joining))
        elif isinstance(command, to_hmm.CommitLayout):
            self.world.obey(CommitLayout(command.id))
        elif isinstance(command, to_hmm.ReleaseLayout):
            self.world.obey(ReleaseLayout(command.id))
        elif isinstance(command, to_hmm.AbortLayout):
            self.world.obey(AbortLayout(command.id))

    def tell_pool(self, command: Message) -> None:
        assert isinstance(command, StopRank)
        self.world.obey(StopSeat(command.rank, command.incarnation))

    def start(self, seat: Seat, epoch: int) -> None:
        self.world.obey(StartSeat(seat, epoch))


def turn(executor: Executor, seen: Observation) -> None:
    """What the scaler's loop does, where only HMM and pool were asked."""
    executor.execute(executor.decide(executor.observe(seen.cluster)))


class Scene:
    def __init__(self, world: World, tmp_path: Path) -> None:
        self.world, self.store, self.told = world, FakeStore(), []
        self.fenced, self.woken = threading.Event(), threading.Event()
        store: Any = self.store
        ends = (lambda _: None, self.fenced.set, self.woken.set)
        self.journal = Journal(store, "scaler:a", *ends, NO_RESERVE, SYSTEM_CLOCK)
        self.journal.start()
        self.journal.act_under(1)
        self.links = FakeLinks(world)
        config = ScalerConfig(run_dir=str(tmp_path))
        state = State(ever_served=True, stall_s=99.0)
        clock, links = PlayedClock(lambda: world.now), self.links
        self.executor = Executor(config, links, self.journal, Meters(), self._tell, state, clock)  # type: ignore[arg-type]

    def _tell(self, kind: str, reason: str, /, **facts: str) -> None:
        self.told.append((kind, facts.get("phase") or facts.get("outcome")))

    def turn(self) -> None:
        """One turn, with the journal caught up first if it can."""
        operation = self.executor.operation
        if operation is not None and self.store.failure is None:
            self.store.wait(lambda: self.journal.is_durable(operation))
        self.world.is_durable = operation is not None and self.journal.is_durable(operation)
        seen = self.world.seen()
        turn(self.executor, seen)
        self.world.progress()

    def run(self, turns: int = 100) -> None:
        for _ in range(turns):
            if self.executor.operation is None:
                return
            self.turn()
        raise AssertionError(f"still in progress: {self.executor.operation}")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[World], Scene]]:
    scenes: list[Scene] = []

    def make(world: World) -> Scene:
        scenes.append(Scene(world, tmp_path))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.journal.close()


@pytest.mark.parametrize("plan", [UP, DOWN])
def test_an_operation_runs_to_its_end_and_is_kept(make: Callable[[World], Scene], plan: Any) -> None:
    scene = make(World(plan.before))
    scene.executor.begin(operation_of(plan))
    scene.run()
    assert scene.world.layout == plan.after
    ended = scene.executor.ended[0]
    assert (ended.phase, ended.plan, ended.op_id) == ("done", None, "op")
    scene.store.wait(lambda: scene.store.ended == [ended] and scene.store.operation is None)
    assert scene.told[0][0] == "operation_accepted"
    assert scene.told[-1] == ("operation_ended", "done")


def test_another_scaler_resumes_from_the_store(make: Callable[[World], Scene]) -> None:
    first = make(World(UP.before))
    first.executor.begin(operation_of(UP))
    while first.world.layout == UP.before:
        first.turn()
    record = first.store.operation
    assert record is not None
    second = make(first.world)
    second.executor.resume(record, [])
    second.run()
    assert second.world.layout == UP.after


def test_nothing_is_staged_before_the_store_has_the_record(make: Callable[[World], Scene]) -> None:
    scene = make(World(UP.before))
    scene.store.failure = Unavailable("store does not answer")
    scene.executor.begin(operation_of(UP))
    for _ in range(5):
        scene.turn()
    assert scene.world.log == []
    assert scene.executor.operation is not None
    assert scene.executor.operation.phase == "prepare"
    scene.store.failure = None
    scene.run()
    assert scene.world.layout == UP.after


def test_a_refused_staging_ends_the_operation(make: Callable[[World], Scene]) -> None:
    scene = make(World(UP.before))
    scene.links.refusal = DoesNotFit("needs 5 bytes, has 4")
    scene.executor.begin(operation_of(UP))
    scene.run()
    error = scene.executor.ended[0].error
    assert error is not None
    assert (error.code, scene.executor.ended[0].phase) == ("does_not_fit", "aborted")


def test_a_command_that_is_fenced_ends_the_scaler(make: Callable[[World], Scene]) -> None:
    scene = make(World(UP.before))
    scene.links.refusal = Fenced("epoch 2 has been seen")
    scene.executor.begin(operation_of(UP))
    with pytest.raises(Fenced):
        scene.run()


def test_the_end_of_a_rank_that_joins_or_leaves_is_no_crash(make: Callable[[World], Scene]) -> None:
    def end_of(slot: int) -> RankExited:
        return RankExited(SEATS[slot].rank, slot, "x", 1, "killed")

    up, down = make(World(UP.before)), make(World(DOWN.before))
    assert not up.executor.on_exit(end_of(2))
    up.executor.begin(operation_of(UP))
    up.turn()
    assert up.executor.on_exit(end_of(2))
    assert not up.executor.on_exit(end_of(0))
    down.executor.begin(operation_of(DOWN))
    down.turn()
    assert not down.executor.on_exit(end_of(1))  # before the commit it is a member
    while down.executor.operation is not None and down.executor.operation.phase != "release":
        down.turn()
    assert down.executor.on_exit(end_of(1))


def test_a_transition_without_an_operation_is_tidied(make: Callable[[World], Scene]) -> None:
    world = World(UP.before)
    lost = make(world)
    lost.executor.begin(operation_of(UP))
    for _ in range(4):
        lost.turn()
    assert world.transition is not None
    assert world.transition.phase in ("copying", "staged")
    scene = make(world)
    for _ in range(6):
        scene.turn()
    assert world.transition.phase == "aborted"
    assert set(world.ranks) == {0, 1}


# ---- the journal -----------------------------------------------------------------------------------------------------


def test_the_newest_state_is_written_and_nothing_is_lost_in_an_outage(make: Callable[[World], Scene]) -> None:
    scene = make(World(UP.before))
    scene.store.failure = Unavailable("store does not answer")
    operation = operation_of(UP)
    scene.journal.put(operation)
    scene.journal.announce(UP.before)
    for reason in ("one", "two"):
        scene.journal.event(Event("x", reason, 1, "scaler:a", 0.0))
    assert not scene.journal.is_durable(operation)
    assert scene.journal.announced_epoch == 0
    scene.store.failure = None
    scene.store.wait(lambda: [event.reason for event in scene.store.events] == ["one", "two"])
    assert scene.journal.is_durable(operation)
    assert scene.journal.announced_epoch == 1


def test_a_store_that_was_emptied_gets_everything_again(
    make: Callable[[World], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "VERIFY_S", 0.05)
    monkeypatch.setattr(journal_module, "RETRY_S", 0.05)
    scene = make(World(UP.before))
    operation = operation_of(UP)
    scene.journal.put(operation)
    scene.journal.announce(UP.before)
    scene.store.wait(lambda: scene.store.layout is not None and scene.store.operation is not None)
    scene.store.wait(lambda: scene.journal.is_durable(operation) and scene.journal.announced_epoch == 1)
    scene.store.layout, scene.store.operation, scene.store.mark = None, None, ""
    scene.store.wait(lambda: (scene.store.layout, scene.store.operation) == (UP.before, operation))
    # Rolled back to a time when the layout was the same and the operation had not begun, or was another one.
    for operation_then in (None, operation_of(DOWN)):
        scene.store.operation, scene.store.mark = operation_then, "earlier"
        scene.store.wait(lambda: scene.store.operation == operation)
    scene.journal.end(operation)
    scene.store.wait(lambda: scene.store.ended == [operation])
    scene.store.operation, scene.store.mark = operation_of(DOWN), "somebody else's"
    scene.store.wait(lambda: scene.store.operation is None)


def test_a_store_that_was_emptied_gets_the_policy_and_the_names_again(
    make: Callable[[World], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next scaler would begin with what the settings say: `act`, where somebody had set `off`; orchestrators
    would be refused as strangers; and another model could be put in this one's place."""
    monkeypatch.setattr(journal_module, "VERIFY_S", 0.05)
    scene = make(World(UP.before))
    first = PolicyRecord(1, PolicyConfig(), PolicyConfig())
    scene.journal.adopt_kept(first, "i-1", Served("/models/a", "float32"))
    scene.store.mark = "of an earlier scaler"
    scene.store.wait(lambda: scene.store.policy == first)
    then = (scene.store.policy, scene.store.mark)
    second = changed(first, 1, PolicyConfig(mode="off"))
    scene.journal.keep(second)
    scene.store.wait(lambda: scene.store.policy == second)
    for policy, mark in ((None, ""), then):  # emptied, and rolled back
        scene.store.policy, scene.store.mark = policy, mark
        scene.store.wait(lambda: scene.store.policy == second)
    scene.store.instance, scene.store.served, scene.store.mark = "", None, ""
    scene.store.wait(lambda: (scene.store.instance, scene.store.served) == ("i-1", Served("/models/a", "float32")))


def test_a_policy_is_refused_while_it_could_not_be_kept() -> None:
    store = FakeStore()
    journal = Journal(store, "scaler:a", lambda _: None, lambda: None, lambda: None, NO_RESERVE, SYSTEM_CLOCK)  # type: ignore[arg-type]
    journal.act_under(1)
    journal.check_takes()
    store.failure = Unavailable("store does not answer", code="store_unavailable")
    journal.event(Event("x", "one", 1, "scaler:a", 0.0))
    journal.turn(0.0)
    with pytest.raises(Unavailable, match="does not answer") as refused:
        journal.check_takes()
    assert refused.value.code == "store_unavailable"
    store.failure = None
    journal.turn(1.0)
    journal.check_takes()


def test_nothing_is_written_or_dropped_before_the_lease_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    store, woken = FakeStore(), threading.Event()
    store.operation = operation_of(DOWN)
    journal = Journal(store, "scaler:a", lambda _: None, lambda: None, woken.set, NO_RESERVE, SYSTEM_CLOCK)  # type: ignore[arg-type]
    journal.start()
    try:
        journal.event(Event("decision", "because", 1, "scaler:a", 0.0))
        journal.put(operation_of(UP))
        assert not woken.wait(0.1)
        assert (store.events, store.operation) == ([], operation_of(DOWN))
        journal.act_under(1)
        assert woken.wait(60)
        assert store.operation == operation_of(UP)
    finally:
        journal.close()


def test_a_journal_that_is_fenced_says_so(make: Callable[[World], Scene]) -> None:
    scene = make(World(UP.before))
    scene.store.failure = Fenced("another scaler holds the lease")
    scene.journal.put(operation_of(UP))
    assert scene.fenced.wait(60)


@pytest.mark.parametrize("is_fenced", [False, True])
def test_what_another_scaler_has_written_is_not_taken_for_a_loss(
    is_fenced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store, lost = FakeStore(), threading.Event()
    journal = Journal(store, "scaler:a", lambda _: None, lost.set, lambda: None, NO_RESERVE, SYSTEM_CLOCK)  # type: ignore[arg-type]
    journal.act_under(1)
    journal.put(operation_of(UP))
    now = SYSTEM_CLOCK.monotonic() + journal_module.VERIFY_S
    assert journal.turn(now) is not None
    assert journal.turn(now) is not None
    store.mark = "another"
    store.failure = Fenced("another scaler holds the lease") if is_fenced else None
    with caplog.at_level("WARNING"):
        journal.turn(now + 2 * journal_module.VERIFY_S)
    assert lost.is_set() == is_fenced
    assert ("lost the journal" in caplog.text) != is_fenced
