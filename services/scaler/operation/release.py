"""After the migration: the HMM gives back what only the old layout used, and ranks that left end. Pure."""

from __future__ import annotations

from elasticmoe.common.protocol.hmm import ReleaseLayout
from elasticmoe.services.scaler.actions import StopSeat
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.migrate import keep_leaving
from elasticmoe.services.scaler.operation.operation import LegProgress, Operation
from elasticmoe.services.scaler.operation.steps import enter, gone, names, ours, stay

LEAVE_S = 10.0  # a rank that left and still runs after this time is ended


def release(operation: Operation, seen: Observation) -> Step[Operation]:
    """Wait until the HMM has released and who left has ended; then the next leg, or done."""
    leg, transition = operation.current_leg(), ours(operation, seen.cluster)
    actions = keep_leaving(operation, seen)
    flipped_s = operation.progress.flipped_s
    since_s = operation.elapsed_s - flipped_s if flipped_s is not None else 0.0
    ranks = seen.cluster.ranks
    left = [seat for seat in leg.leaving if seat.slot in ranks]
    if since_s > LEAVE_S:
        lost = operation.lost
        actions += [StopSeat(seat.rank, ranks[seat.slot].incarnation, seat in lost) for seat in left]
    if transition is None:
        if seen.cluster.in_force.layout.epoch >= leg.layout.epoch and not left:
            return _finish_leg(operation, "the HMM keeps the new layout and no transition")
        return stay(operation, "the HMM has no transition of this leg", *actions)
    if transition.phase == "released":
        return _finish_leg(operation, "released") if not left else stay(operation, "ranks end", *actions)
    if transition.phase == "flipped" or operation.lost:
        actions.append(ReleaseLayout(operation.transition_id, gone(operation, seen)))
    ending = f"; ranks {names(left)} end" if left else ""
    return stay(operation, f"the HMM gives back what only the old layout used{ending}", *actions)


def _finish_leg(operation: Operation, why: str) -> Step[Operation]:
    following = operation.leg + 1
    if following >= operation.num_legs:
        return enter(operation, "done", why)
    why = f"leg {following + 1} of {operation.num_legs}"
    return enter(operation, "prepare", why, leg=following, progress=LegProgress())
