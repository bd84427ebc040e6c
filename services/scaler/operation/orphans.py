"""What is done about transitions and ranks that no operation answers for. Pure."""

from __future__ import annotations

from collections.abc import Collection

from elasticmoe.common.protocol.hmm import AbortLayout, ReleaseLayout
from elasticmoe.common.protocol.ids import CommandId
from elasticmoe.services.scaler.actions import Action, StopSeat
from elasticmoe.services.scaler.observation import Observation
from elasticmoe.services.scaler.operation.migrate import take_back
from elasticmoe.services.scaler.operation.release import LEAVE_S
from elasticmoe.services.scaler.operation.steps import BEFORE_COMMIT, OVER

ORPHAN_CANCEL = CommandId("", 0, 0, "cancel")  # of no operation


def collect_orphans(seen: Observation, since_s: float, lost: Collection[int]) -> tuple[tuple[Action, ...], str]:
    """Undo or finish what no operation answers for: a transition that no journal knows, ranks without a seat, ranks
    that were told to leave. `since_s`: for how long that has been seen. `lost`: slots whose devices are lost."""
    cluster, committed = seen.cluster, seen.cluster.in_force.committed
    if not cluster.pools_answer or cluster.phase != "ready" or committed is None:
        return (), ""
    transition, seats, ranks = cluster.transition, committed.seats, cluster.ranks
    active = transition is not None and transition.phase not in OVER
    strays = tuple(
        StopSeat(rank.rank, rank.incarnation)
        for rank in ranks.values()
        if rank.slot not in {seat.slot for seat in seats}
    )
    if transition is None or not active:
        back = take_back(ORPHAN_CANCEL, seats, seen)
        return (*strays, *back), "ranks without an operation" if strays or back else ""
    absent = tuple(sorted(slot for slot in lost if slot not in ranks))  # an HMM that restarted may wait for them
    if transition.phase in BEFORE_COMMIT or (transition.phase == "aborting" and absent):
        return (*strays, AbortLayout(transition.id, absent)), f"transition {transition.id} is in no journal: given up"
    # Ranks that left by a committed layout end by themselves once no router needs them.
    late = strays if since_s > LEAVE_S and transition.phase != "committed" else ()
    is_releasable = transition.phase == "flipped" or (transition.phase == "releasing" and absent)
    release = (ReleaseLayout(transition.id, absent),) if is_releasable else ()
    return (*late, *release), f"transition {transition.id} is in no journal: finished"
