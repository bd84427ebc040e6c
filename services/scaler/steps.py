"""What the phases of an operation share. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from common.layout import Seat
from common.protocol.ids import CommandId
from common.protocol.rank import CancelMigration, Drain, MoveTarget
from common.protocol.scaler import HmmStatus, RankLoad, TransitionStatus
from services.scaler.actions import Action, StopSeat, TellRank
from services.scaler.observation import Observation, Step
from services.scaler.operation import TIMINGS_MAX, Operation, OperationPhase, PhaseTime

MIGRATE_S_MAX = 5.0  # leveling is best effort
ROUND_S = 0.25  # between two looks at what leveling has done
LEAVE_S = 10.0  # a rank that left and still runs after this time is ended
TAKE_BACK_S = 10.0  # an abort waits this long for ranks to say that they leave no more
BACKOFF_S = 0.5
BACKOFF_S_MAX = 10.0

STORAGE_FULL = "storage_full"
LAYOUT_CHANGED = "layout_changed"
DEVICE_LOST = "device_lost"
BEFORE_COMMIT = frozenset({"vacating", "copying", "staged", "failed"})
OVER = frozenset({"released", "aborted"})
PAST_FLIP = frozenset({"flipped", "releasing", "released"})


def ours(operation: Operation, hmm: HmmStatus) -> TransitionStatus | None:
    """The HMM's transition where it is this leg's present attempt."""
    transition = hmm.transition
    return transition if transition is not None and transition.id == operation.transition_id else None


def is_empty(load: RankLoad) -> bool:
    """Whether the rank has no sequence left, nor one on its way."""
    return load.running + load.waiting + load.moving == 0


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


def empty_leavers(operation: Operation, seen: Observation) -> tuple[list[Action], list[Seat]]:
    """Tell leaving ranks to hand over what they have, unless their own word is that they do; who is not empty yet. Who
    has lost its memory has nothing to hand over."""
    leg = operation.current_leg()
    drain = operation.command_id("drain")
    # Members of both layouts take over: a joining rank computes only after the flip.
    joining = {seat.slot for seat in leg.joining}
    stayers = [seat for seat in leg.layout.seats if seat.slot not in joining]
    actions: list[Action] = []
    busy = []
    for seat in leg.leaving if not operation.request.is_lost else ():
        load = seen.loads.get(seat.slot)
        if load is None or not is_empty(load) or load.command != drain or not load.is_leaving:
            busy.append(seat)
        if load is not None and (load.command != drain or not load.is_leaving):
            targets = tuple(MoveTarget(to.rank, to.slot) for to in stayers if to.rank.tp == seat.rank.tp)
            actions.append(TellRank(seat, Drain(drain, targets)))
    return actions, busy


def end_lost(operation: Operation, seen: Observation) -> list[Action]:
    """End the ranks of seats whose devices are lost."""
    ranks = seen.ranks
    seats = [seat for seat in operation.lost if seat.slot in ranks]
    return [StopSeat(seat.rank, ranks[seat.slot].incarnation, is_lost=True) for seat in seats]


def gone(operation: Operation, seen: Observation) -> tuple[int, ...]:
    """Slots of lost devices in which no rank lives."""
    return tuple(seat.slot for seat in operation.lost if seen.pool is not None and seat.slot not in seen.ranks)


def take_back(cancel: CommandId, seats: Iterable[Seat], seen: Observation) -> tuple[Action, ...]:
    """Tell the ranks of these seats that say that they leave to stay."""
    leaving = [seat for seat in seats if seat.slot in seen.loads and seen.loads[seat.slot].is_leaving]
    return tuple(TellRank(seat, CancelMigration(cancel)) for seat in leaving)
