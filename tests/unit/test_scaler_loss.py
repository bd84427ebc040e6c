"""What the scaler makes of a device that has lost its memory: the operation that leaves it out, the one that gives way
to that, and which devices are not used again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.errors import Conflict, DoesNotFit, ElasticMoEError
from elasticmoe.common.transport import new_identity
from elasticmoe.services.scaler.actions import LeaveOut
from elasticmoe.services.scaler.api.requests import parse_scale
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control import admission
from elasticmoe.services.scaler.control.admission import Order, UnprocessableTarget, accept, with_neighbours
from elasticmoe.services.scaler.control.losses import lost_devices, lost_with
from elasticmoe.services.scaler.control.reconciler import reconcile
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.observation import Observation
from elasticmoe.services.scaler.operation.operation import (
    DeviceChange,
    Operation,
    Planned,
    Request,
    can_cancel,
    planned_of,
    without_lost,
)
from elasticmoe.services.scaler.planning.plan import Plan
from tests.unit.transcripts import play
from tests.unit.transitions import DEVICES, DOWN, SIZES, UP, World, cluster_of, operation_of

PHASES = ("prepare", "commit", "migrate", "release")


@pytest.mark.parametrize("lives", [True, False])
def test_a_replica_whose_device_is_lost_hands_nothing_over_and_ends_first(lives: bool) -> None:
    world = World(DOWN.before)
    operation = operation_of(DOWN)
    operation = msgspec.structs.replace(operation, request=Request(remove=(1,), is_lost=True))
    if not lives:
        world.end(1)
    world.running[1] = 0  # what the world asserts of ranks that leave: nothing of theirs goes on
    done = world.run(operation)
    assert (done.phase, world.layout, set(world.ranks)) == ("done", DOWN.after, {0, 2})
    assert world.log[:2] == (["StopSeat", "Stage"] if lives else ["Stage", "Commit"])
    assert not any(targets for targets in world.targets.values())
    assert done.lost == ()


def test_there_is_no_way_back_to_a_lost_device() -> None:
    world = World(DOWN.before)
    operation = msgspec.structs.replace(operation_of(DOWN), request=Request(remove=(1,), is_lost=True), deadline_s=0.5)
    world.running[1] = 0
    operation = world.run_to(operation, "prepare")
    assert not can_cancel(operation, is_durable=False)
    story = """
    no transition 0:2 1:0 2:2 -> StopSeat rank-r1t0:0 | 1 prepare: ranks r1t0 end: their devices are lost
    no transition 0:2 2:2     -> Stage                | 1 prepare: the layout is staged
    * staging fails: device_error
    failed 0:2 2:2            -> Abort                | 1 prepare: no memory; it is staged again
    aborted 0:2 2:2           -> nothing              | 1 prepare: the HMM has given the staged layout up
    aborted 0:2 2:2           -> nothing              | 1 prepare: the next attempt to stage waits
    * 100 s pass
    aborted 0:2 2:2           -> Stage                | 1 prepare: the layout is staged
    """
    done = world.run(play(world, operation, story))
    assert (done.phase, world.layout) == ("done", DOWN.after)


@pytest.mark.parametrize("is_dead", [True, False])
@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize(
    ("plan", "leg", "phase"),
    [(plan, leg, phase) for plan, legs in ((UP, 2), (DOWN, 1)) for leg in range(legs) for phase in PHASES],
)
def test_where_a_device_is_lost_it_ends_with_the_next_whole_layout(
    plan: Plan, leg: int, phase: str, victim: int, is_dead: bool
) -> None:
    world = World(plan.before)
    operation = world.run_to(operation_of(plan), phase, leg)
    whole = (operation.layout_before(), operation.current_leg().layout)
    starts = world.starts
    operation = without_lost(operation, (DEVICES[victim],))
    if is_dead:
        world.end(victim)
    world.running[victim] = 0  # what the world asserts of ranks that leave: nothing of theirs goes on
    done = world.run(operation)
    assert world.layout in whole
    assert victim not in world.ranks
    assert (world.starts, done.lost, can_cancel(done, is_durable=False)) == (starts, (), False)
    assert world.transition is None or world.transition.phase in ("released", "aborted")
    is_last = world.layout == plan.after
    assert (done.phase, done.error.code if done.error else "") == (
        ("done", "") if is_last else ("aborted", "device_lost")
    )


def test_a_rebalance_ends_where_a_device_is_lost() -> None:
    world = World(UP.before, {0: 9, 1: 0})
    done = world.run(without_lost(operation_of(None), (DEVICES[1],)))
    assert (done.phase, world.log) == ("done", [])


def test_lost_devices_are_known_however_many_operations_have_been_forgotten() -> None:
    def planned(after: dict[str, int]) -> Planned:
        devices = {name: DeviceChange(0, 0, 0, 0, handles, 0) for name, handles in after.items()}
        return msgspec.structs.replace(planned_of(UP, SIZES), devices=devices)

    def begun(operation: Operation, order: bytes, after: dict[str, int]) -> Operation:
        lost = lost_devices(None, [operation])
        return accept(parse_scale(order, 9.0), "op", UP, planned(after), 0.0, lost)

    first = accept(parse_scale(b'{"replicas": 3}', 9.0), "op", UP, planned({"host:1": 4}), 0.0)
    lost = begun(first, b'{"remove": ["r1"], "lost": true}', {"host:0": 4, "host:1": 0})
    assert lost_devices(lost, [first]) == {"host:1"}
    aborted = msgspec.structs.replace(lost, phase="aborted")
    assert lost_devices(None, [aborted, first]) == {"host:1"}, "it was told all the same"
    rebalance = accept(Order("", Request(), None), "op", None, None, 0.0, lost_devices(None, [lost]))
    assert lost_devices(None, [rebalance]) == {"host:1"}
    shrunk = begun(rebalance, b'{"remove": ["r2"]}', {"host:0": 4, "host:2": 0})
    assert lost_devices(None, [shrunk]) == {"host:1"}, "who leaves loses nothing"
    back = begun(shrunk, b'{"devices": ["host:0", "host:1"]}', {"host:0": 4, "host:1": 4})
    assert lost_devices(None, [back]) == set()
    late = msgspec.structs.replace(back, lost_meanwhile=("host:1",))
    assert lost_devices(None, [late]) == {"host:1"}, "also where the operation had come to its end by then"
    assert lost_devices(None, []) == set()


def divided(layout: Layout, *devices: str) -> Layout:
    """The layout on other devices."""
    seats = zip(layout.seats, devices, strict=True)
    return msgspec.structs.replace(
        layout, seats=tuple(msgspec.structs.replace(seat, device=device) for seat, device in seats)
    )


def test_replicas_on_the_same_hardware_are_lost_together() -> None:
    layout = divided(DOWN.before, "cuda:0.0", "cuda:1", "cuda:0.3")  # of replicas 0, 1, 2
    assert [lost_with(replicas, layout) for replicas in ((0,), (1,), (2,), (0, 2))] == [(2,), (), (0,), ()]

    def taken(body: bytes, among: Layout = layout) -> tuple[int, ...] | None:
        order = parse_scale(body, 9.0)
        found = with_neighbours(order, among)
        assert found.request == order.request, "as it was said: a repetition is known by it"
        assert found.target is not None
        return found.target.remove

    assert taken(b'{"remove": ["r2"], "lost": true}') == (2, 0)
    assert taken(b'{"remove": ["r1"], "lost": true}') == (1,)
    assert taken(b'{"remove": ["r2"]}') == (2,), "who leaves loses nothing"
    assert taken(b'{"remove": ["r2"], "lost": true}', DOWN.before) == (2,)
    with pytest.raises(UnprocessableTarget, match="r1, r2 would be lost, too: devices on the same hardware") as refused:
        taken(b'{"remove": ["r0"], "lost": true}', divided(DOWN.before, "cuda:0.0", "cuda:0.1", "cuda:0.2"))
    assert refused.value.code == "last_replica"


def test_a_device_is_lost_with_all_that_it_is_divided_into_and_comes_back_with_them() -> None:
    layout = divided(DOWN.before, "cuda:0.0", "cuda:1", "cuda:0.3")
    lost = msgspec.structs.replace(operation_of(DOWN), phase="aborted", lost_meanwhile=("cuda:0.3",))
    assert lost_devices(None, [lost]) == {"cuda:0"}
    assert State(last=lost, stall_s=9.0).lost_slots(layout) == {layout.seats[0].slot, layout.seats[2].slot}
    running = msgspec.structs.replace(operation_of(None), lost_meanwhile=("cuda:0.1",))
    assert State(operation=running, stall_s=9.0).lost_slots(layout) == {layout.seats[0].slot, layout.seats[2].slot}
    plan = msgspec.structs.replace(DOWN, before=layout)
    plan = msgspec.structs.replace(plan, legs=(msgspec.structs.replace(DOWN.legs[0], layout=layout, leaving=()),))
    leg = msgspec.structs.replace(operation_of(plan), lost_meanwhile=("cuda:0.1",))
    assert {seat.device for seat in leg.lost} == {"cuda:0.0", "cuda:0.3"}
    changes = {name: DeviceChange(0, 0, 0, 0, 4, 0) for name in ("cuda:0.2", "cuda:1")}
    planned = msgspec.structs.replace(planned_of(UP, SIZES), devices=changes)
    back = accept(parse_scale(b'{"devices": ["cuda:0.2"]}', 9.0), "op", UP, planned, 0.0, {"cuda:0", "cuda:3"})
    assert lost_devices(None, [back]) == {"cuda:3"}


class Executor:
    """What an Admission needs of a executor: what runs, what has ended, what was begun."""

    def __init__(self, ended: Operation) -> None:
        self.state = State(last=ended, stall_s=9.0)
        self.is_durable = True

    @property
    def operation(self) -> Operation | None:
        return self.state.operation

    @property
    def ended(self) -> list[Operation]:
        return [self.state.last] if self.state.last else []

    def begin(self, operation: Operation, made: object = None) -> None:
        self.state = msgspec.structs.replace(self.state, operation=operation)

    def leave_out(self, taking: Admission, cluster: Cluster, now: float) -> None:
        """One turn, as far as lost devices go."""
        self.state, actions, _ = reconcile(self.state, Observation(cluster=cluster), now)
        for action in actions:
            if isinstance(action, LeaveOut):
                taking.leave_out(action, cluster)


class Admission(admission.Admission):
    """Makes the same plan for every order, or refuses it."""

    refusal: ElasticMoEError | None = None
    num_plans = 0

    def _plan(self, order: Any, op_id: str, target: Any, cluster: Any) -> Any:
        self.num_plans += 1
        if self.refusal is not None:
            raise self.refusal
        return accept(order, op_id, DOWN, planned_of(DOWN, SIZES), 0.0), DOWN, None


@pytest.fixture
def pending() -> tuple[Admission, Executor, Cluster, list[str]]:
    """After an operation that gave way to the loss of host:1, of slot and replica 1."""
    gave_way = msgspec.structs.replace(operation_of(UP), phase="aborted", lost_meanwhile=("host:1",))
    executor, told, cluster = Executor(gave_way), [], World(DOWN.before).seen().cluster
    config = ScalerConfig(run_dir="/nowhere")
    made = Admission(config, None, executor, (), lambda kind, *_, **__: told.append(kind), SYSTEM_CLOCK, new_identity)  # type: ignore[arg-type]
    return made, executor, cluster, told


def test_what_a_pending_loss_leaves_out_is_left_out_first(
    pending: tuple[Admission, Executor, Cluster, list[str]],
) -> None:
    taking, executor, cluster, _ = pending
    assert executor.state.lost_slots(DOWN.before) == {1}
    for body in (b'{"replicas": 2}', b'{"remove": [1]}', b'{"remove": [2], "lost": true}'):
        with pytest.raises(Conflict, match="the devices of r1 are lost") as refused:
            taking.take(parse_scale(body, 9.0), cluster, ever_served=True)
        assert refused.value.code == "device_lost"
    with pytest.raises(Conflict, match="left out first"):
        taking.take(Order("", Request(), None), cluster, ever_served=True)
    taking.take(parse_scale(b'{"remove": [1, 2], "lost": true}', 9.0), cluster, ever_served=False)
    assert executor.operation is not None
    assert executor.operation.request.remove == (1, 2)


def test_the_scaler_leaves_a_lost_device_out_by_itself(
    pending: tuple[Admission, Executor, Cluster, list[str]],
) -> None:
    taking, executor, cluster, told = pending
    executor.leave_out(taking, cluster_of(None), 1.0)
    assert executor.operation is None
    taking.refusal = DoesNotFit("too many bytes")
    executor.leave_out(taking, cluster, 1.0)
    executor.leave_out(taking, cluster, 1.9)
    assert (executor.operation, taking.num_plans, told) == (None, 1, ["loss_refused"]), (
        "it tries again, but not at once"
    )
    with pytest.raises(Conflict, match="that is refused: too many bytes"):
        taking.take(parse_scale(b'{"replicas": 2}', 9.0), cluster, ever_served=True)
    assert executor.state.lost_slots(DOWN.before) == {1}, "nobody is seated there meanwhile"
    executor.leave_out(taking, cluster, 2.0)
    assert (executor.operation, taking.num_plans, told) == (None, 2, ["loss_refused"]), "the same is told once"
    taking.refusal = None
    executor.leave_out(taking, cluster, 3.0)
    assert executor.operation is not None
    assert (executor.operation.request.remove, executor.operation.request.is_lost) == ((1,), True)
    begun = executor.operation.op_id
    executor.leave_out(taking, cluster, 9.0)
    assert executor.operation.op_id == begun


def test_nobody_is_seated_on_a_lost_device_while_a_rebalance_ends(
    pending: tuple[Admission, Executor, Cluster, list[str]],
) -> None:
    """Found by the simulation (seed 835): a rebalance has no legs, and so no seats of its own."""
    _, executor, _, _ = pending
    executor.begin(operation_of(None))
    assert executor.operation is not None
    assert executor.state.lost_slots(DOWN.before) == set()
    marks = [executor.operation.mark]
    for device, slots in (("host:1", {1}), ("host:2", {1, 2})):
        executor.begin(without_lost(executor.operation, (device,)))
        assert executor.state.lost_slots(DOWN.before) == slots
        marks.append(executor.operation.mark)
    assert len(set(marks)) == 3, "each loss is journaled before anything is commanded"


def test_a_lost_operation_that_could_not_begin_is_not_forgotten(
    pending: tuple[Admission, Executor, Cluster, list[str]],
) -> None:
    _, executor, _, _ = pending
    devices = {f"host:{i}": DeviceChange(0, 0, 0, 0, 0 if i == 1 else 4, 0) for i in range(3)}
    planned = msgspec.structs.replace(planned_of(DOWN, SIZES), devices=devices)
    order = parse_scale(b'{"remove": [1], "lost": true}', 9.0)
    lost = accept(order, "op", DOWN, planned, 0.0)
    executor.state = msgspec.structs.replace(executor.state, last=msgspec.structs.replace(lost, phase="aborted"))
    assert executor.state.lost_slots(DOWN.before) == {1}
