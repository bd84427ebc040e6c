"""What the ranks of the layout need to serve: the model in memory, a rank in each seat, their membership. Pure.

It is level-triggered: what is, is compared with the layout that should be. So a restart of any part needs no memory of
what was in flight: the next observation says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.protocol.errors import DoesNotFit
from elasticmoe.common.protocol.hmm import SetMembership
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.wording import counted
from elasticmoe.services.scaler.actions import Action, AnnounceLayout, LoadLayout, StartSeat, StopSeat
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control.state import DeploymentPhase, State, Status
from elasticmoe.services.scaler.observation import Observation, Step
from elasticmoe.services.scaler.planning.reduction import without_failed

FLIP_SECONDS_MAX = 5.0
RELOAD_S = 60.0  # a driver may give memory back a while after its process has ended
RELOAD_PAUSE_S = 0.5
DEVICE_FAILED = "driver_failed"
_Stepping = partial[Step[Status]]


def begun(now: float, *, is_resumed: bool) -> Status:
    """The first status of a scaler. One that goes on with a layout may come after one that has ended ranks for a load
    (`_make_room`), of which nothing else tells: so it has as long for the load."""
    return Status("starting", "", reload=(now + RELOAD_S, now) if is_resumed else (0.0, 0.0))


def serve(state: State, seen: Observation, now: float) -> Step[Status]:
    """The next steps toward the layout in force."""
    cluster, waiting, keep = seen.cluster, _waiting(state), _keep(state)
    if cluster.phase is None:
        return keep(waiting, "the HMM does not answer")
    if cluster.phase == "failed":
        helped = _make_room(state, seen, now) or _go_without(state, seen)
        return helped or keep("failed", "the HMM could not load the model", error=cluster.error)
    if cluster.phase == "empty" and seen.load_refused is not None:
        return _step("failed", "what an earlier run has left is of other settings", error=seen.load_refused)
    if cluster.phase == "empty":
        return _go_without(state, seen) or keep("loading", "the HMM holds nothing", LoadLayout(cluster.in_force.layout))
    if cluster.phase == "loading":
        return keep("loading", "the HMM loads the model")
    if not cluster.pools_answer:
        return _step(waiting, "the worker pool does not answer")
    return _fill(state, seen) or _join(state, seen, now)


def _step(
    phase: DeploymentPhase,
    reason: str,
    *actions: Action,
    error: Refused | None = None,
    reload: tuple[float, float] = (0.0, 0.0),
    without: tuple[str, ...] = (),
) -> Step[Status]:
    return Step(Status(phase, reason, error, reload, without), actions, reason)


def _keep(state: State) -> _Stepping:
    """What makes a step that forgets nothing of the loads before."""
    return partial(_step, reload=state.status.reload, without=state.status.without)


def _to_load(state: State, seen: Observation) -> tuple[Layout, tuple[str, ...]]:
    """The layout to load where the HMM holds nothing, and the failed devices that it leaves out. A deployment that
    begins leaves none out: it has never had what it was asked for, and whoever starts it is told."""
    cluster, operation = seen.cluster, state.operation
    layout, epoch = cluster.in_force.layout, cluster.in_force.layout.epoch
    if operation is not None and operation.plan is not None:
        epoch = max(epoch, operation.plan.after.epoch)  # it must not take this layout for one of its own
    if state.ever_served or seen.is_resumed:
        left = without_failed(layout, cluster.failed, epoch + 1)
        if left is not None:
            return left, tuple(seat.device for seat in layout.seats if seat.device in cluster.failed)
    return layout, ()


def _go_without(state: State, seen: Observation) -> Step[Status] | None:
    """Where the HMM holds nothing, and a device of the layout has failed, the others load what it had. None where none
    has, where that has been tried, and where a load has failed of something else."""
    error = seen.cluster.error
    if error is not None and error.code != DEVICE_FAILED:
        return None
    layout, without = _to_load(state, seen)
    if not without or (error is not None and set(without) <= set(state.status.without)):
        return None
    text = f"the HMM holds nothing, and {', '.join(without)} cannot be used: the rest of the layout is loaded"
    return _step("loading", text, LoadLayout(layout), reload=state.status.reload, without=without)


def _make_room(state: State, seen: Observation, now: float) -> Step[Status] | None:
    """What the HMM had no room to load may fit once the ranks have ended, where these hold memory that a predecessor
    of the HMM has made and nobody can take over (ADR 32). None where that is no help."""
    cluster = seen.cluster
    if cluster.error is None or cluster.error.code != DoesNotFit.code:
        return None
    if not cluster.pools_answer:
        return _keep(state)(_waiting(state), "the worker pool does not answer")
    if ranks := cluster.ranks.values():
        stops = [StopSeat(rank.rank, rank.incarnation, is_lost=True) for rank in ranks]
        return _step(
            "loading",
            "ranks hold memory that the HMM has lost and the load needs",
            *stops,
            reload=(now + RELOAD_S, now),
            without=state.status.without,
        )
    until, at = state.status.reload
    if now >= until:
        return None
    if now < at:
        return _keep(state)("loading", "the ranks' memory is not free yet")
    layout, without = _to_load(state, seen)
    reload = (until, now + RELOAD_PAUSE_S)
    return _step("loading", "the ranks' memory is free", LoadLayout(layout), reload=reload, without=without)


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
