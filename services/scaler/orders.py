"""What operators ask for: bodies of requests, checked, and what becomes of them. Pure.

An order becomes an operation, a plan (dry run), the operation that it already is (the same op_id again), or a refusal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from common.described import says
from common.http.decode import decode
from common.protocol.errors import Conflict, InvalidRequest, NotFound, Unready
from common.protocol.limits import DEVICES_MAX, NAME_CHARS_MAX, RANKS_MAX
from common.protocol.scaler import HmmStatus
from services.scaler.operation import Accounting, DeviceChange, Figures, Kind, Operation, Planned, Request
from services.scaler.plan import Memory, Plan, Sizes, Target
from services.scaler.transition import can_cancel, cancel

OpId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]
DeadlineS = Annotated[float, Meta(gt=0, le=86_400)]
# What all orders may have.
GivenOpId = Annotated[
    OpId | None, says("A name for the operation: the same order with the same name starts no second", "grow-monday")
]
GivenDeadlineS = Annotated[
    DeadlineS | None, says("Seconds by which it has to be committed, else it is undone; null: `operation_deadline_s`")
]
Reason = Annotated[str, Meta(max_length=500), says("Kept with the operation and its events", "more traffic")]
_REPLICA = re.compile(r"r?([0-9]{1,4})(?:t[0-9]{1,4})?")


class UnprocessableTarget(InvalidRequest):
    """A well-formed order whose target cannot be reached; the text gives the bound."""

    code = "invalid_target"
    http_status = 422


class ScaleBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/scale: exactly one of `replicas`, `devices` and `remove`."""

    replicas: Annotated[Annotated[int, Meta(ge=1, le=RANKS_MAX)] | None, says("How many replicas to have", 3)] = None
    devices: Annotated[
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]],
            Meta(min_length=1, max_length=DEVICES_MAX),
        ]
        | None,
        says("Exactly the devices to use afterwards", ["host:0", "host:2"]),
    ] = None
    remove: Annotated[
        Annotated[
            list[Annotated[int, Meta(ge=0, le=9_999)] | Annotated[str, Meta(max_length=16)]],
            Meta(min_length=1, max_length=RANKS_MAX),
        ]
        | None,
        says("Replicas that leave, by number or name", ["r1"]),
    ] = None
    lost: Annotated[
        bool,
        says(
            "The devices of `remove` have lost their memory: nothing is read from them, and their requests are "
            "computed anew elsewhere"
        ),
    ] = False
    op_id: GivenOpId = None
    dry_run: Annotated[bool, says("Only plan: answer 200 with what it would move and cost")] = False
    deadline_s: GivenDeadlineS = None
    reason: Reason = ""


class RebalanceBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/rebalance; it may be empty."""

    op_id: GivenOpId = None
    deadline_s: GivenDeadlineS = None
    reason: Reason = ""


_scale = msgspec.json.Decoder(ScaleBody, strict=True)
_rebalance = msgspec.json.Decoder(RebalanceBody, strict=True)


class Order(msgspec.Struct, frozen=True):
    """A checked order. `target` is None for a rebalance; `op_id` is empty where the client gave none."""

    op_id: str
    request: Request
    target: Target | None
    is_dry_run: bool = False


def parse_scale(raw: bytes, deadline_s: float) -> Order:
    """The order in the body of POST /v1/scale; `deadline_s` where it names none. Raises InvalidRequest."""
    body = decode(_scale, raw)
    given = [name for name in ("replicas", "devices", "remove") if getattr(body, name) is not None]
    if len(given) != 1:
        text = f"exactly one of replicas, devices and remove is needed; given: {', '.join(given) or 'none'}"
        raise InvalidRequest(text, code="invalid_target")
    devices = tuple(body.devices) if body.devices is not None else None
    remove = tuple(sorted({_replica(name) for name in body.remove})) if body.remove is not None else None
    if body.lost and remove is None:
        raise InvalidRequest("lost says something of the replicas in remove; there is no remove", code="invalid_target")
    request = Request(body.replicas, devices, remove, body.reason, body.deadline_s or deadline_s, body.lost)
    return Order(body.op_id or "", request, Target(body.replicas, devices, remove, body.lost), body.dry_run)


def parse_rebalance(raw: bytes, deadline_s: float) -> Order:
    """The order in the body of POST /v1/rebalance. Raises InvalidRequest."""
    body = decode(_rebalance, raw or b"{}")
    return Order(body.op_id or "", Request(reason=body.reason, deadline_s=body.deadline_s or deadline_s), None)


def _replica(name: int | str) -> int:
    if isinstance(name, int):
        return name
    match = _REPLICA.fullmatch(name)
    if match is None:
        raise InvalidRequest(f"{name!r} names no replica: use a number, r1 or r1t0", code="invalid_target")
    return int(match.group(1))


class Running(Conflict):
    """Another operation is in progress: the same order may be accepted when that has ended."""

    code = "operation_running"
    retryable = True


def repeated(order: Order, current: Operation | None, ended: Sequence[Operation]) -> Operation | None:
    """The operation that this order already is. Raises Conflict `op_id_reused` for another request of the same op_id,
    Running when another operation is in progress."""
    known: list[Operation] = [*([current] if current else ()), *ended]
    for operation in known if order.op_id else ():
        if operation.op_id == order.op_id:
            is_same_kind = (operation.kind == "rebalance") == (order.target is None)
            if operation.request != order.request or not is_same_kind:
                raise Conflict(f"operation {order.op_id} exists with another request", code="op_id_reused")
            return operation
    if current is not None:
        raise Running(
            f"operation {current.op_id} is in progress ({current.phase}): wait for it, or cancel it "
            f"(`elasticmoe scale --cancel {current.op_id}`)"
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
    kind: Kind = plan.kind if plan else "rebalance"
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


def lost_devices(current: Operation | None, ended: Sequence[Operation]) -> set[str]:
    """Devices that have been lost and to which no replica has come since. Each operation keeps what was lost before it,
    so the newest one tells, however many have been forgotten."""
    newest = current or (ended[0] if ended else None)
    if newest is None:
        return set()
    changes = newest.planned.devices if newest.planned is not None and newest.phase != "aborted" else {}
    taken = {device for device, change in changes.items() if change.kv_handles_after}
    return (set(newest.lost_before) - taken) | newest.lost_devices


def memory_of(hmm: HmmStatus | None) -> Memory:
    """What bounds a plan now. Raises Unready while the HMM is away, and while nothing is loaded."""
    if hmm is None:
        raise Unready("the HMM does not answer")
    if hmm.phase != "ready" or hmm.memory is None or hmm.layout is None:
        raise Unready("the HMM has loaded no model yet")
    facts, used = hmm.memory, {seat.device for seat in hmm.layout.seats}
    return Memory(
        budgets={device.device: device.budget for device in hmm.devices},
        footprint=facts.footprint,
        ledger=facts.ledger,
        kv_handle_bytes=facts.kv.handle_bytes,
        kv_handles_min=facts.kv_handles_min,
        kv_handles={
            device.device: device.kv // facts.kv.handle_bytes for device in hmm.devices if device.device in used
        },
        kv_handles_load=facts.kv_handles_load,
    )


def planned_of(plan: Plan, sizes: Sizes) -> Planned:
    """The plan in short."""
    before, after = plan.before, plan.after
    names = dict.fromkeys(
        seat.device for layout in (before, *(leg.layout for leg in plan.legs)) for seat in layout.seats
    )
    devices = {}
    for name in names:
        arrivals = [copy.key for leg in plan.legs for copy in leg.copies if copy.target == name]
        was, will = before.seat_on(name), after.seat_on(name)
        devices[name] = DeviceChange(
            experts_in=sum(key.kind == "expert" for key in arrivals),
            bytes_in=sum(sizes.of(key) for key in arrivals),
            experts_before=before.num_experts_on(was.slot) if was else 0,
            experts_after=after.num_experts_on(will.slot) if will else 0,
            kv_handles_after=plan.legs[-1].kv_handles_after.get(name, 0) if plan.legs else 0,
            peak_bytes=max((leg.peak_bytes.get(name, 0) for leg in plan.legs), default=0),
        )
    return Planned(
        epoch_before=before.epoch,
        epoch_after=after.epoch,
        replicas_before=before.dp,
        replicas_after=after.dp,
        joining=tuple(str(seat.rank) for leg in plan.legs for seat in leg.joining),
        leaving=tuple(str(seat.rank) for leg in plan.legs for seat in leg.leaving),
        experts_moved=plan.experts_moved,
        bytes_copied=plan.bytes_copied,
        peak_bytes=plan.peak_bytes,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        seconds=plan.seconds,
        pause_ms=plan.pause_ms,
        devices=devices,
    )
