"""The lifecycle contract that orchestrators of elastic expert parallelism ask of an engine, as answers of the admin
surface: absolute targets under an operation's id, an identity of the deployment, what of it may be taken away. Pure.

Sources: sgl-project/sglang#35376, vllm-project/vllm#42515, ai-dynamo/dynamo#13121. An operator of Kubernetes that loses
its connection or restarts finds the operation that it has begun, or learns that there is none.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from elasticmoe.common.described import says
from elasticmoe.common.protocol.errors import Conflict
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot, unready
from elasticmoe.services.scaler.operation.operation import Operation, OperationPhase

WRONG_INSTANCE = "wrong_instance"


class ScaleStatus(msgspec.Struct, frozen=True):
    """How large the deployment is, what it is about to be, and by which operation."""

    instance_id: Annotated[str, says("Names the deployment; another one where its state was dropped", "i-9f2c61d04b7e")]
    operation_id: Annotated[str | None, says("`op_id` of the operation in progress, else of the last one", "grow")]
    effective_size: Annotated[int, says("Replicas of the layout in force")]
    pending_target: Annotated[int | None, says("Replicas that there will be; null while no operation is in progress")]
    phase: Annotated[
        OperationPhase | Literal["idle"], says("Of that operation: `done` and `aborted` have ended; `idle`: of none")
    ]
    participating_ranks: Annotated[tuple[str, ...], says("Ranks of the layout in force", ["r0t0", "r1t0"])]
    joining_ranks: Annotated[tuple[str, ...], says("Ranks that this operation adds; they carry its generation")]
    safe_to_terminate_ranks: Annotated[
        tuple[str, ...],
        says(
            "Ranks that this operation took out: the layout without them is committed and their processes have ended. "
            "Their devices are nobody's"
        ),
    ]
    topology_generation: Annotated[int, says("Epoch of the layout in force")]
    last_error: Annotated[Refused | None, says("Why that operation was undone; null unless it was")]


def scale_status(snapshot: StatusSnapshot) -> ScaleStatus:
    """GET /v1/scale. Raises Unready before the first layout is known."""
    layout = snapshot.layout
    if layout is None or not snapshot.instance:
        raise unready(snapshot, "no layout has been made yet")
    current = snapshot.operation
    operation = current or (snapshot.ended[0] if snapshot.ended else None)
    return ScaleStatus(
        instance_id=snapshot.instance,
        operation_id=operation.op_id if operation is not None else None,
        effective_size=layout.dp,
        pending_target=_pending(current, layout.dp) if current is not None else None,
        phase=operation.phase if operation is not None else "idle",
        participating_ranks=tuple(str(seat.rank) for seat in layout.seats),
        joining_ranks=current.planned.joining if current is not None and current.planned is not None else (),
        safe_to_terminate_ranks=_safe_ranks(snapshot, operation),
        topology_generation=layout.epoch,
        last_error=operation.error if operation is not None else None,
    )


def _pending(operation: Operation, replicas: int) -> int | None:
    """Replicas that it leads to: those that there are, once it is given up."""
    if operation.planned is None:
        return None
    return replicas if operation.phase == "abort" else operation.planned.replicas_after


def _safe_ranks(snapshot: StatusSnapshot, operation: Operation | None) -> tuple[str, ...]:
    """None while it is not known which processes live."""
    cluster = snapshot.cluster
    if operation is None or operation.planned is None or snapshot.layout is None:
        return ()
    if cluster is None or not cluster.pools_answer:
        return ()
    members = {str(seat.rank) for seat in snapshot.layout.seats}
    living = {str(rank.rank) for rank in cluster.ranks.values()}
    return tuple(rank for rank in operation.planned.leaving if rank not in members | living)


def check_instance(expected: str, snapshot: StatusSnapshot) -> None:
    """Refuse an order for another deployment than this one. Raises Conflict `wrong_instance`, Unready before it is
    known which one this is."""
    if not snapshot.instance:
        raise unready(snapshot, "the journal has not been read yet")
    if expected != snapshot.instance:
        text = f"the order is for {expected}; this deployment is {snapshot.instance}: look at its status again"
        raise Conflict(text, code=WRONG_INSTANCE)
