"""What the phases of an operation share. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from elasticmoe.common.layout import Seat
from elasticmoe.common.protocol.scaler import TransitionStatus
from elasticmoe.services.scaler.actions import Action, StopSeat
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.operation import TIMINGS_MAX, Operation, OperationPhase, PhaseTime

BEFORE_COMMIT = frozenset({"vacating", "copying", "staged", "failed"})  # phases of the HMM's transition
OVER = frozenset({"released", "aborted"})
PAST_FLIP = frozenset({"flipped", "releasing", "released"})


def ours(operation: Operation, cluster: Cluster) -> TransitionStatus | None:
    """The HMM's transition where it is this leg's present attempt."""
    transition = cluster.transition
    return transition if transition is not None and transition.id == operation.transition_id else None


def stay(operation: Operation, why: str, *actions: Action) -> Step[Operation]:
    """Stay in the phase, with commands."""
    return Step(msgspec.structs.replace(operation, why=why), actions, why)


def enter(operation: Operation, phase: OperationPhase, why: str, **changes: object) -> Step[Operation]:
    """Go to `phase`, with changed fields."""
    if phase != operation.phase:
        accounting = operation.accounting
        timings = (*accounting.timings, PhaseTime(operation.leg, operation.phase, round(operation.phase_s, 4)))
        changes["accounting"] = msgspec.structs.replace(accounting, timings=timings[-TIMINGS_MAX:])
        changes["phase_s"] = 0.0
    return Step(msgspec.structs.replace(operation, phase=phase, why=why, **changes), (), why)


def progressed(operation: Operation, **changes: object) -> Operation:
    """The operation, its present leg with changed fields."""
    return msgspec.structs.replace(operation, progress=msgspec.structs.replace(operation.progress, **changes))


def names(seats: Iterable[Seat]) -> str:
    """The seats' ranks, for texts."""
    return ", ".join(str(seat.rank) for seat in seats)


def end_lost(operation: Operation, seen: Observation) -> list[Action]:
    """End the ranks of seats whose devices are lost."""
    ranks = seen.cluster.ranks
    seats = [seat for seat in operation.lost if seat.slot in ranks]
    return [StopSeat(seat.rank, ranks[seat.slot].incarnation, is_lost=True) for seat in seats]


def gone(operation: Operation, seen: Observation) -> tuple[int, ...]:
    """Slots of lost devices in which no rank lives."""
    cluster = seen.cluster
    return tuple(seat.slot for seat in operation.lost if cluster.pools_answer and seat.slot not in cluster.ranks)
