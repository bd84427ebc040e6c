"""An order's way to what becomes of it: an operation, a plan (dry run), the operation that it already is (the same
op_id again), or a refusal. It comes from the admin listener's threads through a bounded queue, and is looked at beside
what is in force and in progress by the loop's thread. Longer than 400 lines, so that all of that way is in one file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from queue import Empty, Full, Queue

import msgspec

from elasticmoe.common.capacity import Sizes, sizes_of
from elasticmoe.common.clock import Clock
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.layout import Layout
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.errors import (
    Conflict,
    DeadlineExceeded,
    ElasticMoEError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unready,
)
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.actions import LeaveOut
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control.audit_log import PlanMade, digest
from elasticmoe.services.scaler.control.executor import Executor, Tell
from elasticmoe.services.scaler.control.losses import (
    failure_of,
    lost_devices,
    lost_with,
    needed_of,
    replicas_of,
    usable_devices,
)
from elasticmoe.services.scaler.operation.operation import (
    NO_CALLER,
    Accounting,
    CallerTrace,
    Figures,
    Operation,
    OperationKind,
    Planned,
    Request,
    can_cancel,
    cancel,
    planned_of,
    without_lost,
)
from elasticmoe.services.scaler.planning.plan import Plan, Rates, Target
from elasticmoe.services.scaler.planning.planner import plan_way, planned_from
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.record import PolicyRecord

log = get_logger("scaler")

ORDERS_MAX = 32
ANSWER_S_MAX = 15.0
_NAMED_MAX = 8
REFUSE_S = 1.0  # what waits is refused so long before its client gives up


class Order(msgspec.Struct, frozen=True):
    """A checked order. `target` is None for a rebalance; `op_id` is empty where the client gave none, `instance` where
    it is for whatever deployment takes it. `policy_order`: which of the policy's it is; None for somebody else's."""

    op_id: str
    request: Request
    target: Target | None
    is_dry_run: bool = False
    instance: str = ""
    caller: CallerTrace = NO_CALLER
    policy_order: int | None = None


class CancelOperation(msgspec.Struct, frozen=True):
    """An order to cancel the operation `op_id`. `by`: who asks."""

    op_id: str
    by: str = "operator"


class SetPolicy(msgspec.Struct, frozen=True):
    """An order to let `config` be the policy, in place of the one of `version`."""

    version: int
    config: PolicyConfig


Command = Order | CancelOperation | SetPolicy


class Accepted(msgspec.Struct, frozen=True):
    """What became of an order: an operation, or the plan of a dry run with the operation that it would be, and the
    sizes of the records that it moves."""

    operation: Operation
    plan: Plan | None = None
    sizes: Sizes | None = None


CommandAnswer = Accepted | PolicyRecord


class Later(Exception):
    """The order cannot be carried out yet: it is tried again in each turn, and refused with `error` at last."""

    def __init__(self, error: ElasticMoEError) -> None:
        super().__init__(error.message)
        self.error = error


class UnprocessableTarget(InvalidRequest):
    """A well-formed order whose target cannot be reached; the text gives the bound."""

    code = "invalid_target"
    http_status = 422


class Running(Conflict):
    """Another operation is in progress: the same order may be accepted when that has ended. `op_id`: which one."""

    code = "operation_running"
    retryable = True

    def __init__(self, message: str, op_id: str) -> None:
        super().__init__(message)
        self.op_id = op_id


class Admission:
    """Takes orders for the executor. `room`: each raises Unavailable while what an operation writes would find none."""

    def __init__(
        self,
        config: ScalerConfig,
        spec: ModelSpec,
        executor: Executor,
        room: Sequence[Callable[[], None]],
        tell: Tell,
        clock: Clock,
        new_identity: Callable[[str], str],
    ) -> None:
        self._config = config
        self._spec = spec
        self._executor = executor
        self._room = room
        self._tell = tell
        self._clock = clock
        self._new_identity = new_identity
        self._why_not = ""  # `leave_out` could not begin

    def take(self, order: Order | CancelOperation, cluster: Cluster, *, ever_served: bool) -> Accepted:
        """Carry an order out, with what the hosts said last. Raises its refusal, or Later."""
        executor = self._executor
        if isinstance(order, Order):
            order = with_neighbours(order, cluster.in_force.committed, cluster.failed)
        if isinstance(order, CancelOperation):
            operation = cancelled(order.op_id, executor.operation, executor.ended, is_durable=executor.is_durable)
            if operation is not executor.operation:
                executor.replace(operation)
                self._tell("operation_cancel", f"asked for by the {order.by}", op_id=order.op_id)
            return Accepted(operation)
        if not order.is_dry_run:
            try:
                known = repeated(order, executor.operation, executor.ended)
            except Running as running:
                self._check_room()
                self._give_way(order, cluster, running)
                raise
            if known is not None:
                return Accepted(known)
            self._check_lost(order, cluster.in_force.committed)
        is_lost = order.target is not None and order.target.is_lost
        if not ever_served and not is_lost:  # it may be the lost device for which nothing is served
            raise Unready("the deployment does not serve yet")
        if not order.is_dry_run:
            self._check_room()
        op_id = order.op_id or f"op-{self._new_identity('op')[-12:]}"
        if order.target is None:
            operation = accept(order, op_id, None, None, self._clock.time(), self._lost())
            executor.begin(operation)
            return Accepted(operation)
        operation, plan, made = self._plan(order, op_id, order.target, cluster)
        if order.is_dry_run:
            return Accepted(operation, plan, made.sizes)
        executor.begin(operation, made)
        return Accepted(operation)

    def leave_out(self, action: LeaveOut, cluster: Cluster) -> None:
        """Begin the operation that leaves out lost devices, in place of the order that nobody gave."""
        request = Request(remove=action.replicas, reason="a device was lost meanwhile", is_lost=True)
        order = Order("", request, Target(remove=action.replicas, is_lost=True))
        try:
            self.take(order, cluster, ever_served=True)
            self._why_not = ""
        except ElasticMoEError as error:
            if error.message != self._why_not:
                self._why_not = error.message
                log.error("a lost device cannot be left out", code=error.code, because=error.message)
                self._tell("loss_refused", error.message, code=error.code)

    def _check_lost(self, order: Order, committed: Layout | None) -> None:
        """Raises Conflict `device_lost` where the next operation has to leave out lost devices, and this order would
        not: it might read from them, and fill their seats."""
        if self._executor.operation is not None or committed is None:
            return
        slots = self._executor.state.lost_slots(committed)
        if not slots:
            return
        lost = {seat.rank.replica for seat in committed.seats if seat.slot in slots}
        if order.target is None or not order.target.is_lost or not lost <= set(order.target.remove or ()):
            why = f"; that is refused: {self._why_not}" if self._why_not else ""
            names = ", ".join(f"r{replica}" for replica in sorted(lost))
            text = f"the devices of {names} are lost, and are left out first{why}"
            raise Conflict(text, code="device_lost", retryable=True)

    def _check_room(self) -> None:
        for check in self._room:
            check()

    def _give_way(self, order: Order, cluster: Cluster, running: Running) -> None:
        """The loss of a device does not wait for the operation in progress, which may wait for that very device: let it
        end with a layout that is complete, and the order be tried again. Raises Later; returns for other orders."""
        current = self._executor.operation
        if order.target is None or not order.target.is_lost or current is None:
            return
        layout, _, _ = planned_from(cluster)
        remove = set(order.target.remove or ())
        devices = {seat.device for seat in layout.seats if seat.rank.replica in remove}
        if devices and devices <= set(current.lost_meanwhile):
            raise Later(running)
        if current.request.is_lost and remove <= replicas_of(current.lost):
            return  # it does that already
        self._plan(order, "", order.target, cluster)  # raises: an order that cannot be carried out ends no other
        missing = {seat.rank.replica for seat in current.lost if seat in layout.seats} - remove
        if missing:
            text = f"operation {current.op_id} leaves out r{min(missing)} as lost: name it too"
            raise Running(text, current.op_id)
        self._executor.replace(without_lost(current, devices))
        self._tell("operation_gives_way", "a device was lost meanwhile", op_id=current.op_id)
        raise Later(running)

    def _plan(self, order: Order, op_id: str, target: Target, cluster: Cluster) -> tuple[Operation, Plan, PlanMade]:
        """The operation of an order, its plan, and what that was made from. Raises UnprocessableTarget, DoesNotFit,
        Unavailable."""
        layout, facts, memory = planned_from(cluster)
        sizes = sizes_of(self._spec, facts.granularity)
        lost, failed = self._lost(), cluster.failed
        check_usable({name for name in target.devices or () if layout.seat_on(name) is None}, failed, layout)
        devices = usable_devices(cluster, lost, target.devices or ())
        rates = Rates(copy_bytes_per_s=float(self._config.copy_limit))
        given = (layout, target, sizes, memory, devices, rates)
        try:
            plan = plan_way(*given)
        except (InvalidRequest, NotFound) as error:
            unused = [name for name in failed if layout.seat_on(name) is None][:_NAMED_MAX]
            hint = f"; {', '.join(unused)} cannot be used" if unused and error.code == "too_few_devices" else ""
            raise UnprocessableTarget(error.message + hint, code=error.code) from None
        check_usable(needed_of(plan), failed, layout)
        planned, made = planned_of(plan, sizes), PlanMade(op_id, *given, digest(plan))
        return accept(order, op_id, plan, planned, self._clock.time(), lost), plan, made

    def _lost(self) -> set[str]:
        return lost_devices(self._executor.operation, self._executor.ended)


def repeated(order: Order, current: Operation | None, ended: Sequence[Operation]) -> Operation | None:
    """The operation that this order already is, whatever reason and deadline it comes with now. Raises Conflict
    `op_id_reused` for another target of the same op_id, Running when another operation is in progress."""
    known: list[Operation] = [*([current] if current else ()), *ended]
    for operation in known if order.op_id else ():
        if operation.op_id == order.op_id:
            is_same_kind = (operation.kind == "rebalance") == (order.target is None)
            if operation.request.aim != order.request.aim or not is_same_kind:
                raise Conflict(f"operation {order.op_id} exists with another target", code="op_id_reused")
            return operation
    if current is not None:
        raise Running(
            f"operation {current.op_id} is in progress ({current.phase}): wait for it, or cancel it "
            f"(`elasticmoe scale --cancel {current.op_id}`)",
            current.op_id,
        )
    return None


def accept(
    order: Order,
    op_id: str,
    plan: Plan | None,
    planned: Planned | None,
    now_unix: float,
    lost_before: Iterable[str] = (),
) -> Operation:
    """The operation that begins with this order; without a plan it is a rebalance."""
    kind: OperationKind = plan.kind if plan else "rebalance"
    figures = Figures()
    if plan is not None:
        figures = Figures(bytes_planned=plan.bytes_copied, peak_bytes_planned=plan.peak_bytes)
    return Operation(
        op_id=op_id,
        kind=kind,
        request=order.request,
        plan=plan,
        planned=planned,
        accepted_unix=now_unix,
        deadline_s=order.request.deadline_s,
        num_legs=len(plan.legs) if plan else 0,
        lost_before=tuple(sorted(lost_before)),
        caller=order.caller,
        policy_order=order.policy_order,
        accounting=Accounting(figures=figures),
    )


def cancelled(op_id: str, current: Operation | None, ended: Sequence[Operation], *, is_durable: bool) -> Operation:
    """The operation with its cancel noted. `is_durable`: the store has its present state. Raises NotFound, Conflict
    `committed` or `operation_ended`."""
    if current is not None and current.op_id == op_id:
        if current.is_cancelled:
            return current
        if not can_cancel(current, is_durable=is_durable):
            text = f"operation {op_id} is past the point of no return: leg {current.leg + 1}, phase {current.phase}"
            raise Conflict(text, code="committed")
        return cancel(current)
    for operation in ended:
        if operation.op_id == op_id:
            raise Conflict(f"operation {op_id} has ended: {operation.phase}", code="operation_ended")
    raise NotFound(f"no operation {op_id}", code="unknown_operation")


def check_usable(devices: Collection[str], failed: Mapping[str, str], layout: Layout) -> None:
    """Raises UnprocessableTarget `driver_failed` where one of `devices` has failed. `failed`: why, by name."""
    for name in sorted(failed.keys() & set(devices)):
        raise UnprocessableTarget(failure_of(name, failed[name], layout), code="driver_failed")


def with_neighbours(order: Order, layout: Layout | None, failed: Collection[str] = ()) -> Order:
    """An order to leave out lost devices, with the replicas whose devices are lost with them, and those whose devices
    have `failed`, from which nothing can be read either; other orders as they are.

    Raises UnprocessableTarget `last_replica` where no replica would be left of that.
    """
    target = order.target
    if layout is None or target is None or not target.is_lost or target.remove is None:
        return order
    broken = replicas_of(seat for seat in layout.seats if seat.device in failed).difference(target.remove)
    added = tuple(sorted({*broken, *lost_with({*target.remove, *broken}, layout)}))
    if not added:
        return order
    if replicas_of(layout.seats) <= {*target.remove, *added}:
        names = ", ".join(f"r{replica}" for replica in added)
        text = f"{names} would be lost, too: devices on the same hardware, or failed ones"
        text += ". At least 1 replica must stay, 0 would"
        raise UnprocessableTarget(text, code="last_replica")
    return msgspec.structs.replace(order, target=msgspec.structs.replace(target, remove=(*target.remove, *added)))


class CommandQueue:
    """Orders, from any thread to the loop's. `wake` lets the loop look. `_waiting` belongs to the loop's thread."""

    def __init__(self, wake: Callable[[], None], clock: Clock) -> None:
        self._wake = wake
        self._clock = clock
        self._queue: Queue[_Entry] = Queue(ORDERS_MAX)
        self._waiting: list[_Entry] = []

    async def ask(self, order: Order | CancelOperation) -> Accepted:
        """Hand an order in and wait for what becomes of it. Raises its refusal, Overloaded, or DeadlineExceeded."""
        accepted = await self._ask(order)
        assert isinstance(accepted, Accepted), "of an order for an operation"
        return accepted

    async def set_policy(self, order: SetPolicy) -> PolicyRecord:
        """The same for another policy: the one that is in force then."""
        policy = await self._ask(order)
        assert isinstance(policy, PolicyRecord), "of an order for a policy"
        return policy

    async def _ask(self, order: Command) -> CommandAnswer:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.put(order)), ANSWER_S_MAX)
        except TimeoutError:
            where = "GET /v1/policy tells what is in force"
            if not isinstance(order, SetPolicy):
                where = "GET /v1/operations tells what it does"
            text = f"the scaler did not answer within {ANSWER_S_MAX:g} s; {where}"
            raise DeadlineExceeded(text) from None

    def put(self, order: Command) -> Future[CommandAnswer]:
        """Hand an order in: what becomes of it, for at most ANSWER_S_MAX. One whose future is cancelled before it is
        carried out is not. Raises Overloaded."""
        future: Future[CommandAnswer] = Future()
        try:
            self._queue.put_nowait((order, self._clock.monotonic() + ANSWER_S_MAX, future))
        except Full:
            raise Overloaded(f"{ORDERS_MAX} orders wait already") from None
        self._wake()
        return future

    def serve(self, handle: Callable[[Command], CommandAnswer]) -> None:
        """Let `handle` answer all orders that wait. The loop's thread."""
        entries, self._waiting = self._waiting, []
        for entry in entries:
            self._serve(entry, handle)
        while True:
            try:
                entry = self._queue.get_nowait()
            except Empty:
                return
            self._serve(entry, handle)

    def _serve(self, entry: _Entry, handle: Callable[[Command], CommandAnswer]) -> None:
        order, deadline, future = entry
        # Nobody waits any more for an order that was cancelled meanwhile: it is not carried out.
        if self._clock.monotonic() > deadline or future.cancelled():
            return
        accepted: CommandAnswer | ElasticMoEError
        try:
            accepted = handle(order)
        except Later as later:
            if self._clock.monotonic() < deadline - REFUSE_S and len(self._waiting) < ORDERS_MAX:
                self._waiting.append(entry)
                return
            accepted = later.error
        except ElasticMoEError as error:
            accepted = error
        except Exception as error:  # no order may end the scaler
            log.exception("order failed")
            accepted = ElasticMoEError(f"the order could not be carried out: {type(error).__name__}")
        if not future.set_running_or_notify_cancel():
            return
        if isinstance(accepted, ElasticMoEError):
            future.set_exception(accepted)
        else:
            future.set_result(accepted)


_Entry = tuple[Command, float, Future[CommandAnswer]]  # when nobody waits any more, by the monotonic clock
