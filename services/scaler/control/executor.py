"""Carries out what the reconciler decides: shows it what is seen, journals the new state, sends what it asks for."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from elasticmoe.common.clock import Clock
from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.errors import ElasticMoEError, Fenced
from elasticmoe.common.protocol.hmm import AbortLayout, CommitLayout, ReleaseLayout, SetMembership, StageLayout
from elasticmoe.common.protocol.pool import StopRank
from elasticmoe.common.protocol.replies import Refused, refusal
from elasticmoe.common.protocol.scaler import RankExited, RankLoad
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.actions import (
    Action,
    ActionKey,
    AnnounceLayout,
    CancelStuck,
    EjectRank,
    LeaveOut,
    LoadLayout,
    ScaleTo,
    Stage,
    StartSeat,
    StopSeat,
    TellRank,
    key_of,
)
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.control.audit_log import Advice, PlanMade, is_notable, turn_taken
from elasticmoe.services.scaler.control.links import Links
from elasticmoe.services.scaler.control.operation_spans import OperationSpans
from elasticmoe.services.scaler.control.reconciler import reconcile
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.observation import Observation
from elasticmoe.services.scaler.operation.operation import Operation, outcome
from elasticmoe.services.scaler.store.journal import Journal

log = get_logger("scaler")

REPEAT_S = 0.5  # an action that did not show an effect is repeated after this time
STOP_GRACE_MS = 2_000
LOADS_S = 0.02  # between two questions for a rank's load while an operation needs it
LOADS_IDLE_S = 1.0
LOADS_QUIET_S = 5.0  # while nobody computes
FRESH_S = 1.0  # an operation acts on nothing that is older
FRESH_IDLE_S = 12.0
ENDED_MAX = 100

Tell = Callable[..., None]

_PLACES: dict[type[Action], str] = {  # of failpoints
    Stage: "stage",
    CommitLayout: "send_commit",
    ReleaseLayout: "send_release",
    AbortLayout: "send_abort",
    StartSeat: "start_joiner",
    StopSeat: "stop_rank",
    TellRank: "move",
}
_STEADY = (LoadLayout, StartSeat, SetMembership, AnnounceLayout)


class Executor:
    """The loop's thread only. `ended`: the last operations, newest first.

    `tell(kind, reason, **facts)` journals an event and shows it to listeners; `leave_out`, `scale` and `cancel` take
    LeaveOut, ScaleTo and CancelStuck.
    """

    def __init__(
        self,
        config: ScalerConfig,
        links: Links,
        journal: Journal,
        meters: Meters,
        tell: Tell,
        state: State,
        clock: Clock,
    ) -> None:
        self._config = config
        self._links = links
        self._journal = journal
        self._meters = meters
        self._tell = tell
        self._clock = clock
        self.state = state
        self.leave_out: Callable[[LeaveOut], None] = lambda _: None
        self.scale: Callable[[ScaleTo], None] = lambda _: None
        self.cancel: Callable[[CancelStuck], None] = lambda _: None
        self.spans: OperationSpans | None = None  # where operations are traced
        self.ended: list[Operation] = []
        self._exits: dict[int, str] = {}
        self._refused: Refused | None = None
        self._sent: dict[ActionKey, float] = {}
        self._layout: Layout | None = None  # the one in force
        self._failed: frozenset[str] = frozenset()  # devices of which that was told
        self._reduced: Layout | None = None  # the last one of which it was told that it has less than was in force
        self._advice = Advice()

    @property
    def operation(self) -> Operation | None:
        """The one in progress."""
        return self.state.operation

    def resume(self, operation: Operation | None, ended: list[Operation]) -> None:
        """Take over what the journal of an earlier scaler says."""
        self.ended = ended
        self._set(last=ended[0] if ended else None)
        if operation is None:
            self._journal.adopt(None)
            return
        operation = msgspec.structs.replace(operation, clock=None)
        self._set(operation=operation)
        self._journal.adopt(operation)
        log.info("operation resumed", operation_id=operation.op_id, phase=operation.phase, leg=operation.leg + 1)
        self._tell("operation_resumed", operation.why, op_id=operation.op_id, phase=operation.phase)

    def begin(self, operation: Operation, made: PlanMade | None = None) -> None:
        """Take on an operation, with what its plan was made from. Only while none is in progress. Raises Unavailable
        `storage_full` where its records would find no room."""
        assert self.operation is None
        self._journal.reserve(operation)
        self._set(operation=operation)
        if made is not None:
            self._journal.decision(made)
        self._journal.put(operation)
        self._forget()
        facts = {"op_id": operation.op_id, "kind": operation.kind}
        self._tell("operation_accepted", operation.request.reason or "asked for by the operator", **facts)

    def replace(self, operation: Operation) -> None:
        """Go on with a changed state of the operation in progress."""
        self._set(operation=operation)
        self._journal.put(operation)

    def on_exit(self, event: RankExited) -> bool:
        """Note a rank's end; True when that was no crash of a member: it was joining or leaving."""
        operation = self.operation
        if operation is None or not operation.num_legs:
            return False
        if event.slot in {seat.slot for seat in operation.lost}:
            return True
        leg = operation.current_leg()
        if event.slot in {seat.slot for seat in leg.joining} and operation.phase in ("prepare", "commit", "abort"):
            self._exits[event.slot] = event.reason
            return operation.phase != "commit"
        is_expected = operation.phase not in ("prepare", "abort")
        return event.slot in {seat.slot for seat in leg.leaving} and is_expected

    def observe(self, cluster: Cluster, *, is_quiet: bool = False) -> Observation:
        """What is seen of ranks and journal beside what the hosts have answered. `is_quiet`: nobody computes."""
        return Observation(
            cluster=cluster,
            loads=self._ask_loads(cluster, is_quiet) if self.state.ever_served or self.operation else {},
            starting=self._links.starting,
            announced_epoch=self._journal.announced_epoch,
            exits=dict(self._exits),
            stage_refused=self._refused,
            is_durable=self.is_durable,
            no_room=self._journal.no_room(),
        )

    def decide(self, seen: Observation) -> tuple[Action, ...]:
        """Go on to the reconciler's next state, and journal it; what it asks for."""
        before, now = self.state, self._clock.monotonic()
        self._layout = seen.cluster.in_force.layout
        self._tell_failures(seen.cluster)
        step = reconcile(before, seen, now)
        self.state = step.state
        if is_notable(before, step) or self._advice.is_notable(step.state, seen, now):
            self._journal.decision(turn_taken(before, seen, now, step))
        if step.reason != before.status.reason:
            log.info(step.reason, phase=step.state.status.phase)
            self._tell("decision", step.reason, phase=step.state.status.phase)
        if step.state.orphans is not None and before.orphans is None:
            log.warning(step.state.orphans.reason)
            self._tell("orphans_found", step.state.orphans.reason)
        if before.operation is not None and step.state.operation is not None:
            if self.spans is not None:
                self.spans.look(before.operation, seen.cluster.transition)
            self._note(before.operation, step.state.operation)
        return step.actions

    def _set(self, **changes: object) -> None:
        self.state = msgspec.structs.replace(self.state, **changes)

    def _note(self, before: Operation, after: Operation) -> None:
        if after.is_late and not before.is_late:
            log.warning("operation is past its deadline", operation_id=before.op_id, phase=before.phase)
            self._tell("operation_late", after.why, op_id=before.op_id, phase=before.phase)
        if after.mark != before.mark:
            self._changed(before, after)

    def _tell_failures(self, cluster: Cluster) -> None:
        """Once of each device: again where it has failed after an HMM could use it."""
        failed = cluster.failed
        for name in sorted(failed.keys() - self._failed):
            log.error("device cannot be used", device=name, because=failed[name])
            self._tell("device_failed", failed[name], device=name)
        if cluster.phase is not None:
            self._failed = frozenset(failed)

    def _tell_left_out(self, loaded: Layout) -> None:
        """Where less is loaded than was in force, once of each such layout."""
        gone = [seat for seat in self._layout.seats if seat not in loaded.seats] if self._layout is not None else []
        if gone and loaded != self._reduced:
            self._reduced = loaded
            replicas = ", ".join(sorted({f"r{seat.rank.replica}" for seat in gone}))
            reason = f"its devices cannot be used, and layout {loaded.epoch} is loaded without it"
            log.warning(reason, replicas=replicas)
            self._tell("loaded_without", reason, replicas=replicas)

    def _ask_loads(self, cluster: Cluster, is_quiet: bool) -> dict[int, RankLoad]:
        committed = cluster.in_force.committed
        seats = list(committed.seats) if committed is not None else []
        operation = self.operation
        if operation is not None and operation.num_legs:
            known = {seat.slot for seat in seats}
            seats += [seat for seat in operation.current_leg().leaving if seat.slot not in known]
        ranks = {slot: rank for slot, rank in cluster.ranks.items() if rank.ready}
        if cluster.pools_answer:
            living = [seat for seat in seats if seat.slot in ranks]
            if cluster.phase is not None:  # else it is not known which seats there are
                self._links.peers.keep(seats)
            self._links.peers.ask(living, LOADS_S if operation else LOADS_QUIET_S if is_quiet else LOADS_IDLE_S)
        self._links.peers.receive()
        return self._links.peers.loads(ranks, FRESH_S)

    @property
    def is_durable(self) -> bool:
        """Whether the store holds the present state of the operation in progress."""
        return self.operation is None or self._journal.is_durable(self.operation)

    def loads_of(self, cluster: Cluster) -> dict[int, RankLoad]:
        """By slot, of ranks that told their load lately. Of a replica its first one tells."""
        loads, layout = self._links.peers.loads(cluster.ranks, FRESH_IDLE_S), cluster.in_force.layout
        leaders = {seat.slot: layout.replica_of(seat)[0] for seat in layout.seats}
        told = {slot: loads.get(leaders.get(slot, slot)) for slot in loads}
        return {slot: load for slot, load in told.items() if load is not None}

    def _changed(self, before: Operation, after: Operation) -> None:
        """Journal a new state before its commands are sent."""
        self._forget()
        facts = {
            "op_id": after.op_id,
            "phase": after.phase,
            "leg": str(after.leg + 1),
            "before": before.phase,
            "before_s": f"{before.phase_s:.3f}",
        }
        log.info(
            f"operation: {after.phase}",
            because=after.why,
            operation_id=after.op_id,
            leg=after.leg + 1,
            before=before.phase,
            before_s=round(before.phase_s, 3),
        )
        self._tell("operation_phase", after.why, **facts)
        if self.spans is not None:
            self.spans.changed(before, after)
        if after.phase != before.phase:
            self._meters.phase(before.phase, before.phase_s)
        if not after.is_finished:
            self._journal.put(after)
            return
        over = msgspec.structs.replace(after, plan=None)
        self.ended = [over, *self.ended][:ENDED_MAX]
        self._set(operation=None, last=over)
        self._journal.end(over)
        self._meters.operation(over, outcome(over))
        self._tell("operation_ended", after.why, op_id=after.op_id, outcome=outcome(over))

    def _forget(self) -> None:
        self._exits.clear()
        self._sent.clear()
        self._refused = None

    def execute(self, actions: tuple[Action, ...]) -> bool:
        """Send what was asked for, but what was sent just now; False where a part of the steady state was refused: it
        is asked for again. Raises Fenced."""
        now, is_done = self._clock.monotonic(), True
        self._sent = {key: at for key, at in self._sent.items() if now - at < REPEAT_S}
        for action in actions:
            if (key := key_of(action)) is not None:
                if key in self._sent:
                    continue
                self._sent[key] = now
            try:
                self._send_between_failpoints(action)
                if isinstance(action, Stage):
                    self._refused = None
            except ElasticMoEError as error:
                if error.code == Fenced.code:
                    raise
                log.warning("action failed", action=type(action).__name__, code=error.code, because=error.message)
                is_done &= not isinstance(action, _STEADY)
                if isinstance(action, Stage):
                    self._refused = refusal(error)
        return is_done

    def _send_between_failpoints(self, action: Action) -> None:
        place = _PLACES.get(type(action))
        slots = self._layout.slots if self._layout is not None else ()
        if place is None or (isinstance(action, StartSeat) and action.seat.slot in slots):
            self._send(action)
            return
        failpoint(f"scaler.{place}.before")
        self._send(action)
        failpoint(f"scaler.{place}.after")

    def _send(self, action: Action) -> None:
        links = self._links
        match action:
            case LoadLayout():
                links.load(action.layout)
                self._tell_left_out(action.layout)
            case StartSeat():
                links.start(action.seat, action.epoch)
            case SetMembership() | CommitLayout() | ReleaseLayout() | AbortLayout():
                links.tell_hmm(action)
            case AnnounceLayout():
                self._journal.announce(action.layout)
            case EjectRank():
                self._eject(action)
            case LeaveOut():
                self.leave_out(action)
            case ScaleTo():
                self.scale(action)
            case CancelStuck():
                self.cancel(action)
            case Stage(leg=leg):
                rate = self._config.copy_limit if action.is_throttled else 0
                kv, kv_after = leg.kv_handles, leg.kv_handles_after
                links.tell_hmm(StageLayout(action.id, leg.layout, leg.copies, kv, kv_after, rate))
            case StopSeat():
                links.tell_pool(StopRank(action.rank, action.incarnation, 0 if action.is_lost else STOP_GRACE_MS))
            case TellRank():
                links.peers.tell(action.seat.rank, action.command)

    def _eject(self, action: EjectRank) -> None:
        """What follows is what follows any rank's death."""
        reason = f"no progress for {action.still_s:.1f} s; the limit is {action.limit_s:g} s"
        log.warning("rank ejected", rank=action.rank, rank_id=action.incarnation, because=reason)
        self._tell("rank_ejected", reason, rank=str(action.rank), incarnation=action.incarnation)
        self._links.tell_pool(StopRank(action.rank, action.incarnation, 0))
