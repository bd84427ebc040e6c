"""What becomes of an order: looked at beside what is in force and in progress, planned, begun. The loop's thread."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from common.clock import SYSTEM_CLOCK, Clock
from common.config import ScalerConfig
from common.model_spec import ModelSpec
from common.protocol.errors import Conflict, ElasticMoEError, InvalidRequest, NotFound, Unready
from common.protocol.scaler import HmmStatus
from common.telemetry import get_logger
from services.scaler import orders
from services.scaler.actions import LeaveOut
from services.scaler.decisions import PlanMade
from services.scaler.desk import Accepted, Cancel, Later
from services.scaler.driver import Driver, Tell
from services.scaler.operation import Operation, Request
from services.scaler.plan import Plan, Rates, Target, sizes_of
from services.scaler.transition import without_lost

log = get_logger("scaler")


def new_op_id() -> str:
    """The id of an operation that nobody has named."""
    return f"op-{uuid.uuid4().hex[:12]}"


class Intake:
    """Takes orders for the driver. `room`: each raises Unavailable while what an operation writes would find none."""

    def __init__(
        self,
        config: ScalerConfig,
        spec: ModelSpec,
        driver: Driver,
        room: Sequence[Callable[[], None]],
        tell: Tell,
        *,
        clock: Clock = SYSTEM_CLOCK,
        new_id: Callable[[], str] = new_op_id,
    ) -> None:
        self._config = config
        self._spec = spec
        self._driver = driver
        self._room = room
        self._tell = tell
        self._clock = clock
        self._new_id = new_id
        self._why_not = ""  # `leave_out` could not begin

    def take(self, order: orders.Order | Cancel, hmm: HmmStatus | None, *, ever_served: bool) -> Accepted:
        """Carry an order out, with what the HMM said last. Raises its refusal, or Later."""
        driver = self._driver
        if isinstance(order, Cancel):
            operation = orders.cancelled(order.op_id, driver.operation, driver.ended, is_durable=driver.is_durable)
            if operation is not driver.operation:
                driver.replace(operation)
                self._tell("operation_cancel", "asked for by the operator", op_id=order.op_id)
            return Accepted(operation)
        if not order.is_dry_run:
            try:
                known = orders.repeated(order, driver.operation, driver.ended)
            except orders.Running as running:
                self._check_room()
                self._give_way(order, hmm, running)
                raise
            if known is not None:
                return Accepted(known)
            self._check_lost(order, hmm)
        is_lost = order.target is not None and order.target.is_lost
        if not ever_served and not is_lost:  # it may be the lost device for which nothing is served
            raise Unready("the deployment does not serve yet")
        if not order.is_dry_run:
            self._check_room()
        op_id = order.op_id or self._new_id()
        if order.target is None:
            operation = orders.accept(order, op_id, None, None, self._clock.time(), self._lost())
            driver.begin(operation)
            return Accepted(operation)
        operation, plan, made = self._plan(order, op_id, order.target, hmm)
        if order.is_dry_run:
            return Accepted(operation, plan)
        driver.begin(operation, made)
        return Accepted(operation)

    def leave_out(self, action: LeaveOut, hmm: HmmStatus | None) -> None:
        """Begin the operation that leaves out lost devices, in place of the order that nobody gave."""
        request = Request(remove=action.replicas, reason="a device was lost meanwhile", is_lost=True)
        order = orders.Order("", request, Target(remove=action.replicas, is_lost=True))
        try:
            self.take(order, hmm, ever_served=True)
            self._why_not = ""
        except ElasticMoEError as error:
            if error.message != self._why_not:
                self._why_not = error.message
                log.error("a lost device cannot be left out", code=error.code, because=error.message)
                self._tell("loss_refused", error.message, code=error.code)

    def _check_lost(self, order: orders.Order, hmm: HmmStatus | None) -> None:
        """Raises Conflict `device_lost` where the next operation has to leave out lost devices, and this order would
        not: it might read from them, and fill their seats."""
        slots = self._driver.state.lost_slots(hmm) if self._driver.operation is None else frozenset()
        if not slots:
            return
        assert hmm is not None, "its layout is known"
        assert hmm.layout is not None, "its layout is known"
        lost = {seat.rank.replica for seat in hmm.layout.seats if seat.slot in slots}
        if order.target is None or not order.target.is_lost or not lost <= set(order.target.remove or ()):
            why = f"; that is refused: {self._why_not}" if self._why_not else ""
            names = ", ".join(f"r{replica}" for replica in sorted(lost))
            text = f"the devices of {names} are lost, and are left out first{why}"
            raise Conflict(text, code="device_lost", retryable=True)

    def _check_room(self) -> None:
        for check in self._room:
            check()

    def _give_way(self, order: orders.Order, hmm: HmmStatus | None, running: orders.Running) -> None:
        """The loss of a device does not wait for the operation in progress, which may wait for that very device: let it
        end with a layout that is complete, and the order be tried again. Raises Later; returns for other orders."""
        current = self._driver.operation
        if order.target is None or not order.target.is_lost or current is None:
            return
        orders.memory_of(hmm)  # raises
        assert hmm is not None, "its memory is known"
        assert hmm.layout is not None, "its memory is known"
        remove = set(order.target.remove or ())
        devices = {seat.device for seat in hmm.layout.seats if seat.rank.replica in remove}
        if devices and devices <= set(current.lost_meanwhile):
            raise Later(running)
        if current.request.is_lost and remove <= set(current.request.remove or ()):
            return  # it does that already
        self._plan(order, "", order.target, hmm)  # raises: an order that cannot be carried out ends no other
        missing = {seat.rank.replica for seat in current.lost if seat in hmm.layout.seats} - remove
        if missing:
            text = f"operation {current.op_id} leaves out r{min(missing)} as lost: name it too"
            raise orders.Running(text)
        self._driver.replace(without_lost(current, devices))
        self._tell("operation_gives_way", "a device was lost meanwhile", op_id=current.op_id)
        raise Later(running)

    def _plan(
        self, order: orders.Order, op_id: str, target: Target, hmm: HmmStatus | None
    ) -> tuple[Operation, Plan, PlanMade]:
        """The operation of an order, its plan, and what that was made from. Raises UnprocessableTarget, DoesNotFit,
        Unavailable."""
        memory = orders.memory_of(hmm)
        assert hmm is not None, "its memory is known"
        assert hmm.layout is not None, "its memory is known"
        assert hmm.memory is not None, "its memory is known"
        sizes = sizes_of(self._spec, hmm.memory.granularity)
        lost = self._lost()
        unusable = lost - set(target.devices or ())  # new replicas take a lost device only where the order names it
        made = PlanMade(
            op_id=op_id,
            layout=hmm.layout,
            target=target,
            sizes=sizes,
            memory=memory,
            devices=tuple(device.device for device in hmm.devices if device.device not in unusable),
            rates=Rates(copy_bytes_per_s=float(self._config.copy_bytes_per_s)),
        )
        try:
            plan, made = made.make()
        except (InvalidRequest, NotFound) as error:
            raise orders.UnprocessableTarget(error.message, code=error.code) from None
        planned = orders.planned_of(plan, sizes)
        return orders.accept(order, op_id, plan, planned, self._clock.time(), lost), plan, made

    def _lost(self) -> set[str]:
        return orders.lost_devices(self._driver.operation, self._driver.ended)
