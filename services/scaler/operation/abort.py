"""Back to the old layout, before the HMM has committed the first leg. Pure."""

from __future__ import annotations

from elasticmoe.common.protocol.hmm import AbortLayout
from elasticmoe.services.scaler.actions import StopSeat
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.operation.migrate import end_ahead, take_back
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.operation.steps import OVER, PAST_FLIP, enter, gone, names, ours, stay

TAKE_BACK_S = 10.0  # an abort waits this long for ranks to say that they leave no more


def abort(operation: Operation, seen: Observation) -> Step[Operation]:
    """End who has joined, let the HMM give up what it staged, and ranks stay that were told to leave."""
    leg, cluster = operation.current_leg(), seen.cluster
    transition = ours(operation, cluster)
    is_committed = transition is not None and (transition.phase in PAST_FLIP or transition.phase == "committed")
    if is_committed or cluster.in_force.committed == leg.layout:
        # A commit that had been sent was carried out: from here there is only forward.
        return enter(operation, "commit", "the HMM has committed", error=None, is_cancelled=False)
    ranks = cluster.ranks
    joiners = [seat for seat in leg.joining if seat.slot in ranks or seat.slot in seen.starting]
    lost = operation.lost
    stops = [StopSeat(seat.rank, ranks[seat.slot].incarnation, seat in lost) for seat in joiners if seat.slot in ranks]
    if joiners and cluster.pools_answer:
        return stay(operation, f"ranks {names(joiners)} end", *stops)
    if transition and transition.phase not in OVER:
        is_told = transition.phase == "aborting" and not operation.lost
        abort = () if is_told else (AbortLayout(operation.transition_id, gone(operation, seen)),)
        return stay(operation, "the HMM gives the staged layout up", *abort)
    ends, is_ahead = end_ahead(operation, seen.loads)
    back = take_back(operation.command_id("cancel"), leg.leaving, seen)
    is_blind = not cluster.pools_answer  # who lives is not known
    silent = [seat for seat in leg.leaving if (is_blind or seat.slot in ranks) and seat.slot not in seen.loads]
    if (back or silent or is_ahead) and operation.phase_s < TAKE_BACK_S:
        return stay(operation, "ranks leave no more", *back, *ends)
    step = enter(operation, "aborted", operation.error.message if operation.error else "")
    return Step(step.state, (*back, *ends), step.reason)
