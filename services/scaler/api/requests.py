"""What operators ask for: bodies of requests, checked. Pure."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.datastructures import Headers

from elasticmoe.common.described import says
from elasticmoe.common.http.decode import decode
from elasticmoe.common.protocol.errors import (
    InvalidRequest,
)
from elasticmoe.common.protocol.limits import (
    DEVICES_MAX,
    NAME_CHARS_MAX,
    RANKS_MAX,
    TRACEPARENT_CHARS_MAX,
    TRACESTATE_CHARS_MAX,
)
from elasticmoe.services.scaler.control.admission import Order
from elasticmoe.services.scaler.operation.operation import NO_CALLER, CallerTrace, Request
from elasticmoe.services.scaler.planning.plan import Target

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
    operation_id: Annotated[OpId | None, says("The same as `op_id`, by the name that orchestrators' contracts use")] = (
        None
    )
    expected_instance_id: Annotated[
        Annotated[str, Meta(min_length=1, max_length=64)] | None,
        says("`instance_id` of GET /v1/scale: refused with `wrong_instance` by any other deployment", "i-9f2c61d04b7e"),
    ] = None
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


def caller_of(headers: Headers) -> CallerTrace:
    """The trace of whoever sends them. What W3C does not let pass is none."""
    parents, states = headers.getlist("traceparent"), ",".join(headers.getlist("tracestate"))
    if len(parents) != 1 or len(parents[0]) > TRACEPARENT_CHARS_MAX:
        return NO_CALLER
    return CallerTrace(parents[0], states if len(states) <= TRACESTATE_CHARS_MAX else "")


def parse_scale(raw: bytes, deadline_s: float, caller: CallerTrace = NO_CALLER) -> Order:
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
    if body.op_id and body.operation_id and body.op_id != body.operation_id:
        text = f"op_id is {body.op_id} and operation_id, which says the same, is {body.operation_id}: give one"
        raise InvalidRequest(text, code="invalid_request")
    request = Request(body.replicas, devices, remove, body.reason, body.deadline_s or deadline_s, body.lost)
    target = Target(body.replicas, devices, remove, body.lost)
    op_id, instance = body.op_id or body.operation_id or "", body.expected_instance_id or ""
    return Order(op_id, request, target, body.dry_run, instance, caller)


def parse_rebalance(raw: bytes, deadline_s: float, caller: CallerTrace = NO_CALLER) -> Order:
    """The order in the body of POST /v1/rebalance. Raises InvalidRequest."""
    body = decode(_rebalance, raw or b"{}")
    request = Request(reason=body.reason, deadline_s=body.deadline_s or deadline_s)
    return Order(body.op_id or "", request, None, caller=caller)


def _replica(name: int | str) -> int:
    if isinstance(name, int):
        return name
    match = _REPLICA.fullmatch(name)
    if match is None:
        raise InvalidRequest(f"{name!r} names no replica: use a number, r1 or r1t0", code="invalid_target")
    return int(match.group(1))
