"""Carries an operation out: shows the state machine what is seen, journals its states, sends what it commands."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from common.config import ScalerConfig
from common.failpoint import failpoint
from common.protocol import hmm as to_hmm
from common.protocol.errors import ElasticMoEError, Fenced
from common.protocol.pool import StopRank
from common.protocol.replies import Refused, refusal
from common.protocol.scaler import HmmStatus, PoolStatus, RankExited
from common.telemetry import get_logger
from services.scaler.decisions import PlanMade, Tidied, digests, step_taken
from services.scaler.journal import Journal
from services.scaler.links import Links
from services.scaler.meters import Meters
from services.scaler.operation import (
    Abort,
    Action,
    ActionKey,
    Commit,
    Operation,
    Release,
    Stage,
    StartSeat,
    StopSeat,
    TellRank,
    key_of,
)
from services.scaler.settle import tidy
from services.scaler.steps import Seen
from services.scaler.transition import advance, outcome

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
    Commit: "send_commit",
    Release: "send_release",
    Abort: "send_abort",
    StartSeat: "start_joiner",
    StopSeat: "stop_rank",
    TellRank: "move",
}


class Driver:
    """The loop's thread only. `operation`: the one in progress; `ended`: the last ones, newest first.

    `tell(kind, reason, **facts)` journals an event and shows it to listeners.
    """

    def __init__(
        self,
        config: ScalerConfig,
        links: Links,
        journal: Journal,
        meters: Meters,
        tell: Tell,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._links = links
        self._journal = journal
        self._meters = meters
        self._tell = tell
        self._clock = clock
        self.operation: Operation | None = None
        self.ended: list[Operation] = []
        self._exits: dict[int, str] = {}
        self._refused: Refused | None = None
        self._sent: dict[ActionKey, float] = {}
        self._untidy_since: float | None = None

    def resume(self, operation: Operation | None, ended: list[Operation]) -> None:
        """Take over what the journal of an earlier scaler says."""
        self.ended = ended
        if operation is None:
            self._journal.adopt(None)
            return
        self.operation = msgspec.structs.replace(operation, clock=None)
        self._journal.adopt(self.operation)
        log.info("operation resumed", op_id=operation.op_id, phase=operation.phase, leg=operation.leg + 1)
        self._tell("operation_resumed", operation.why, op_id=operation.op_id, phase=operation.phase)

    def begin(self, operation: Operation, made: PlanMade | None = None) -> None:
        """Take on an operation, with what its plan was made from. Only while none is in progress. Raises Unavailable
        `storage_full` where its records would find no room."""
        assert self.operation is None
        self._journal.reserve(operation)
        self.operation = operation
        if made is not None:
            self._journal.decision(made)
        self._journal.put(operation)
        self._forget()
        facts = {"op_id": operation.op_id, "kind": operation.kind}
        self._tell("operation_accepted", operation.request.reason or "asked for by the operator", **facts)

    def replace(self, operation: Operation) -> None:
        """Go on with a changed state of the operation in progress."""
        self.operation = operation
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

    def turn(self, hmm: HmmStatus | None, pool: PoolStatus | None, *, is_quiet: bool = False) -> None:
        """Bring the operation on by what is seen now, or tidy up where there is none. `is_quiet`: nobody computes.
        Raises Fenced."""
        seen = self._see(hmm, pool, LOADS_S if self.operation else LOADS_QUIET_S if is_quiet else LOADS_IDLE_S)
        if self.operation is None:
            self._tidy(seen)
            return
        before, now = self.operation, self._clock()
        step = advance(before, seen, now)
        self.operation = step.operation
        if step.operation.is_late and not before.is_late:
            log.warning("operation is past its deadline", op_id=before.op_id, phase=before.phase)
            self._tell("operation_late", step.operation.why, op_id=before.op_id, phase=before.phase)
        if step.operation.mark != before.mark:
            self._journal.decision(step_taken(before, seen, now, step))
            self._changed(before, step.operation)
        self._act(step.actions)

    def _see(self, hmm: HmmStatus | None, pool: PoolStatus | None, loads_s: float) -> Seen:
        seats = list(hmm.layout.seats) if hmm and hmm.layout else []
        operation = self.operation
        if operation is not None and operation.num_legs:
            known = {seat.slot for seat in seats}
            seats += [seat for seat in operation.current_leg().leaving if seat.slot not in known]
        ranks = {rank.slot: rank for rank in pool.ranks if rank.ready} if pool else {}
        if pool is not None:
            living = [seat for seat in seats if seat.slot in ranks]
            if hmm is not None:  # else it is not known which seats there are
                self._links.peers.keep(seats)
            self._links.peers.ask(living, loads_s)
        self._links.peers.receive()
        return Seen(
            hmm=hmm,
            pool=pool,
            loads=self._links.peers.loads(ranks, FRESH_S),
            starting=frozenset(self._links.starting),
            exits=dict(self._exits),
            refused=self._refused,
            is_durable=self.is_durable,
            no_room=self._journal.no_room(),
        )

    @property
    def is_durable(self) -> bool:
        """Whether the store holds the present state of the operation in progress."""
        return self.operation is None or self._journal.is_durable(self.operation)

    def loads_of(self, pool: PoolStatus | None) -> dict[int, tuple[int, int]]:
        """(free, all) KV blocks by slot, of the ranks that told their load lately."""
        ranks = {rank.slot: rank for rank in pool.ranks} if pool else {}
        loads = self._links.peers.loads(ranks, FRESH_IDLE_S)
        return {slot: (load.blocks_free, load.blocks_total) for slot, load in loads.items()}

    def _tidy(self, seen: Seen) -> None:
        now = self._clock()
        since = now if self._untidy_since is None else self._untidy_since
        actions, reason = tidy(seen, now - since)
        if not reason:
            self._untidy_since = None
        elif self._untidy_since is None:
            self._untidy_since = now
            log.warning(reason)
            self._tell("tidy", reason)
            self._journal.decision(Tidied(seen, now - since, reason, digests(actions)))
        self._act(actions)

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
        log.info(f"operation: {after.phase}", because=after.why, **facts)
        self._tell("operation_phase", after.why, **facts)
        if after.phase != before.phase:
            self._meters.phase(before.phase, before.phase_s)
        if not after.is_finished:
            self._journal.put(after)
            return
        over = msgspec.structs.replace(after, plan=None)
        self.ended = [over, *self.ended][:ENDED_MAX]
        self.operation = None
        self._journal.end(over)
        self._meters.operation(over, outcome(over))
        self._tell("operation_ended", after.why, op_id=after.op_id, outcome=outcome(over))

    def _forget(self) -> None:
        self._exits.clear()
        self._sent.clear()
        self._refused = None

    def _act(self, actions: tuple[Action, ...]) -> None:
        now = self._clock()
        self._sent = {key: at for key, at in self._sent.items() if now - at < REPEAT_S}
        for action in actions:
            if key_of(action) in self._sent:
                continue
            self._sent[key_of(action)] = now
            try:
                place = f"scaler.{_PLACES[type(action)]}"
                failpoint(f"{place}.before")
                self._send(action)
                failpoint(f"{place}.after")
                if isinstance(action, Stage):
                    self._refused = None
            except ElasticMoEError as error:
                if error.code == Fenced.code:
                    raise
                log.warning("action failed", action=type(action).__name__, code=error.code, because=error.message)
                if isinstance(action, Stage):
                    self._refused = refusal(error)

    def _send(self, action: Action) -> None:
        if isinstance(action, Stage):
            rate = self._config.copy_bytes_per_s if action.is_throttled else 0
            leg = action.leg
            kv, kv_after = leg.kv_handles, leg.kv_handles_after
            self._links.tell_hmm(to_hmm.StageLayout(action.id, leg.layout, leg.copies, kv, kv_after, rate))
        elif isinstance(action, Commit):
            self._links.tell_hmm(to_hmm.CommitLayout(action.id))
        elif isinstance(action, Release):
            self._links.tell_hmm(to_hmm.ReleaseLayout(action.id, action.gone))
        elif isinstance(action, Abort):
            self._links.tell_hmm(to_hmm.AbortLayout(action.id, action.gone))
        elif isinstance(action, StartSeat):
            self._links.start(action.seat, action.epoch)
        elif isinstance(action, StopSeat):
            lost = self.operation.lost if self.operation is not None else ()
            is_lost = any(seat.rank == action.rank for seat in lost)
            self._links.tell_pool(StopRank(action.rank, action.incarnation, 0 if is_lost else STOP_GRACE_MS))
        elif isinstance(action, TellRank):
            self._links.peers.tell(action.seat.rank, action.command)
