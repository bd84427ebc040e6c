"""What the ranks of the layout need to serve: the model in memory, a rank in each seat, their membership. Pure.

It is level-triggered: what is, is compared with the layout that should be. So a restart of any part needs no memory of
what was in flight: the next observation says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from elasticmoe.common.layout import Seat
from elasticmoe.common.protocol.errors import DoesNotFit
from elasticmoe.common.protocol.hmm import SetMembership
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.wording import counted
from elasticmoe.services.scaler.actions import Action, AnnounceLayout, LoadLayout, StartSeat, StopSeat
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control.state import DeploymentPhase, State, Status
from elasticmoe.services.scaler.observation import Observation, Step

FLIP_SECONDS_MAX = 5.0
RELOAD_S = 60.0  # a driver may give memory back a while after its process has ended
RELOAD_PAUSE_S = 0.5


def begun(now: float, *, is_resumed: bool) -> Status:
    """The first status of a scaler. One that goes on with a layout may come after one that has ended ranks for a load
    (`_make_room`), of which nothing else tells: so it has as long for the load."""
    return Status("starting", "", reload=(now + RELOAD_S, now) if is_resumed else (0.0, 0.0))


def serve(state: State, seen: Observation, now: float) -> Step[Status]:
    """The next steps toward the layout in force."""
    cluster, waiting = seen.cluster, _waiting(state)
    if cluster.phase is None:
        return _step(waiting, "the HMM does not answer", reload=state.status.reload)
    if cluster.phase == "failed":
        text = "the HMM could not load the model"
        return _make_room(state, cluster, now) or _step("failed", text, error=cluster.error, reload=state.status.reload)
    if cluster.phase == "empty" and seen.load_refused is not None:
        return _step("failed", "what an earlier run has left is of other settings", error=seen.load_refused)
    if cluster.phase == "empty":
        load = LoadLayout(cluster.in_force.layout)
        return _step("loading", "the HMM holds nothing", load, reload=state.status.reload)
    if cluster.phase == "loading":
        return _step("loading", "the HMM loads the model", reload=state.status.reload)
    if not cluster.pools_answer:
        return _step(waiting, "the worker pool does not answer")
    return _fill(state, seen) or _join(state, seen, now)


def _step(
    phase: DeploymentPhase,
    reason: str,
    *actions: Action,
    error: Refused | None = None,
    reload: tuple[float, float] = (0.0, 0.0),
) -> Step[Status]:
    return Step(Status(phase, reason, error, reload), actions, reason)


def _make_room(state: State, cluster: Cluster, now: float) -> Step[Status] | None:
    """What the HMM had no room to load may fit once the ranks have ended, where these hold memory that a predecessor
    of the HMM has made and nobody can take over (ADR 32). None where that is no help."""
    if cluster.error is None or cluster.error.code != DoesNotFit.code:
        return None
    if not cluster.pools_answer:
        return _step(_waiting(state), "the worker pool does not answer", reload=state.status.reload)
    if ranks := cluster.ranks.values():
        stops = [StopSeat(rank.rank, rank.incarnation, is_lost=True) for rank in ranks]
        return _step(
            "loading",
            "ranks hold memory that the HMM has lost and the load needs",
            *stops,
            reload=(now + RELOAD_S, now),
        )
    until, at = state.status.reload
    if now >= until:
        return None
    if now < at:
        return _step("loading", "the ranks' memory is not free yet", reload=(until, at))
    load = LoadLayout(cluster.in_force.layout)
    return _step("loading", "the ranks' memory is free", load, reload=(until, now + RELOAD_PAUSE_S))


def _fill(state: State, seen: Observation) -> Step[Status] | None:
    """Until each seat whose device is not lost has a rank that is ready; None when that is so."""
    cluster, layout, waiting = seen.cluster, seen.cluster.in_force.layout, _waiting(state)
    ranks, lost = cluster.ranks, state.lost_slots(cluster.in_force.committed)
    without = [seat for seat in layout.seats if seat.slot in lost]
    empty = [seat for seat in layout.seats if seat.slot not in ranks and seat.slot not in seen.starting | lost]
    if empty:
        if seen.restarts_left <= 0:
            text = f"ranks {_names(empty)} died too often, last of: {seen.last_exit}"
            return _step("failed", text, error=Refused("rank_crash_loop", text, False))
        if seen.is_backing_off:
            return _step(waiting, f"ranks {_names(empty)} died again; the next start waits")
        starts = [StartSeat(seat, layout.epoch) for seat in cluster.startable(empty)]
        return _step(waiting, f"seats {_names(empty)} have no rank; {counted(cluster.standby, 'standby')}", *starts)
    if without and _has_to_park(cluster, without):
        park = SetMembership(layout.slots, False)
        return _step(waiting, f"nobody steps by layout {layout.epoch} for now", park)
    if without:
        return _step(waiting, f"the devices of {_names(without)} are lost; the layout goes on without them")
    if not all(seat.slot in ranks and ranks[seat.slot].ready for seat in layout.seats):
        return _step(waiting, "ranks attach")
    return None


def _join(state: State, seen: Observation, now: float) -> Step[Status]:
    """Let ranks that are all ready step together, and the routers know."""
    cluster, layout = seen.cluster, seen.cluster.in_force.layout
    if not cluster.is_running or cluster.members != layout.slots:
        if cluster.is_running and state.committed_at is not None and now - state.committed_at < FLIP_SECONDS_MAX:
            # The ranks are about to take the new membership themselves, at a step that they agree on.
            return _step("serving", "the ranks flip to the new layout")
        return _step(_waiting(state), "all ranks are ready", SetMembership(layout.slots, True))
    if seen.announced_epoch != layout.epoch:
        return _step("serving", f"layout {layout.epoch} serves", AnnounceLayout(layout))
    return _step("serving", "nothing to do")


def _has_to_park(cluster: Cluster, lost: Sequence[Seat]) -> bool:
    """Whether the step barrier is blocked on a lost seat that nobody will fill."""
    if not cluster.is_running:
        return is_flipping(cluster)  # who does not step cannot flip; parked anew, what was committed is in force
    # A member ended while no HMM looked: the others wait for it.
    ranks, attached = cluster.ranks, cluster.attached
    return any(seat.slot in cluster.members and seat.slot not in ranks and seat.device not in attached for seat in lost)


def is_flipping(cluster: Cluster) -> bool:
    """Whether a layout is committed that the ranks have not flipped to."""
    return cluster.transition is not None and cluster.transition.phase == "committed"


def _waiting(state: State) -> DeploymentPhase:
    return "degraded" if state.ever_served else "attaching"


def _names(seats: Sequence[Seat]) -> str:
    return ", ".join(str(seat.rank) for seat in seats)
