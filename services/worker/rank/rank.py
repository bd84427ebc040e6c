"""A rank: the engine's shell. It takes messages, meets the other ranks at each step, and sends what came of it.

One thread does everything, and between steps what cannot be done during one: messages, changes of its memory, moving
sequences to another rank. How ranks step together and change layouts: lockstep.py. What they have mapped: memory.py.
What a rank is made of: parts.py; who makes it of that: assembly.py, and the simulation of the tests.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.rank import (
    Cancel,
    DecodeOnly,
    GetRankIntegrity,
    GetRankLoad,
    HandOver,
    Precopy,
    RankCommand,
    Reserve,
    Submit,
    TellShares,
    ToRank,
    Unreserve,
    Unwatch,
    VocabularyPiece,
    Watch,
)
from elasticmoe.common.protocol.replies import Ack, refusal
from elasticmoe.common.protocol.router import Delta, Failed, RankStatus, StepShares, Tokens
from elasticmoe.common.protocol.scaler import Integrity, RankLoad, RankReady
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.engine.adoption import adopt_rows
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.failure import failure_of
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.plan import StepPlan
from elasticmoe.services.worker.exchange.base import StepAborted
from elasticmoe.services.worker.migration import Migration
from elasticmoe.services.worker.rank.intake import check_ids
from elasticmoe.services.worker.rank.lockstep import STEP_MS_MAX
from elasticmoe.services.worker.rank.loop import BUSY_MS, IDLE_MS, SeatLoop
from elasticmoe.services.worker.rank.parts import SeatParts
from elasticmoe.services.worker.rank.reports import Reports
from elasticmoe.services.worker.rank.request_times import RequestTimes
from elasticmoe.services.worker.rank.shares import Shares
from elasticmoe.services.worker.rank.steps import Steps
from elasticmoe.services.worker.rank.welcome import Welcome
from elasticmoe.services.worker.rank.windows import RankWindows

log = get_logger("rank")

STATUS_S = 0.1  # at most this often
SAME_STATUS_S = 0.9  # what has not changed is told this often: routers ask who is silent for longer


class Rank(SeatLoop):
    """See SeatLoop. It has a replica's requests, and leads its other ranks, if there are any: they compute what it
    plans (follower.py)."""

    def __init__(self, parts: SeatParts, engine: Engine, tell_ready: Callable[[RankReady], None]) -> None:
        """See SeatLoop. `engine`: what computes."""
        super().__init__(parts, tell_ready)
        self._engine = engine
        self._times = RequestTimes(parts.clock)
        self._reports = Reports(parts.server.send, self._drop_peer, self._times)
        self._steps = Steps(engine, parts.exchange, self._lockstep, parts.hmm, self._reports.report)
        self._migration = Migration(
            parts.seat, engine, parts.transport, watch=parts.server.watch, unwatch=parts.server.unwatch
        )
        self._shares = Shares(parts.clock)
        self._followers: dict[int, StepShares] = {}  # by tp index, as they have told
        push = parts.transport.connect_push("signals", parts.seat.incarnation)
        self._windows = RankWindows(parts.seat, engine.scheduler, push, parts.exchange.take_expert_rows)
        self._welcome = Welcome()
        self._plan: StepPlan | None = None  # with which it has arrived at a barrier where not all are yet
        self._is_handing = False  # see Migration.is_handing
        self._watchers: set[bytes] = set()
        self._progress = 0
        self._last_status: RankStatus | None = None
        self._status_at = 0.0

    def _close(self) -> None:
        self._migration.close()
        self._windows.close()

    def finish(self) -> None:
        """Tell routers of what ends with this rank."""
        error = Unavailable("the rank is shutting down", code="shutting_down")
        self._reports.report(Outcome({}, self._engine.fail_all(error)))

    def _take_over(self, now: float) -> None:
        """Go on with the sequences of the seat's last rank. Their routers are still to connect to this one."""
        num_rows = len(self._memory.ledger.rows())
        outcome = adopt_rows(self._engine, self._memory.spec.vocab)
        self._reports.expect({*outcome.deltas, *(router for router, _ in outcome.failures)}, now)
        self._reports.report(outcome)
        if num_rows:
            num_live = len(self._engine.scheduler.sequences())
            log.info("sequences adopted", num=num_live, rows=num_rows, failed=len(outcome.failures))

    # ---- one turn -------------------------------------------------------------------------------------------------

    def turn(self, now: float) -> int:
        """See SeatLoop. Sequences on their way to other ranks, too."""
        plan = self._plan
        if plan is None:
            plan, wait_ms = self._prepare(now)
            if plan is None:
                return wait_ms
        elif now >= self._look_at:
            self._look(self._server.poll(0), now)
        self._step(plan, now)
        return 0

    def _prepare(self, now: float) -> tuple[StepPlan | None, int]:
        """All that comes before a step: what to bring to it, or how long to wait at most until there is one."""
        failpoint("rank.turn")
        self._shares.begin()
        self._take_messages(now)
        if now >= self._look_at:
            self._look(self._server.poll(0), now)
        self._progress += 1
        self._barrier.count_progress()
        self._change_memory()
        lockstep = self._lockstep
        if self._sync():
            self._engine.scheduler.budget.begin(lockstep.members.bit_count() // self._memory.spec.tp)
            self._migration.ask_again()
            if lockstep.has_come_in:
                self._welcome.begin()
        if wait_s := self._welcome.wait_s(now, self._migration.num_expected):
            return None, max(1, int(wait_s * 1e3))
        self._reports.turn(now)
        for router, message in self._migration.turn(now, lockstep.members):
            self._reports.tell(router, message)
        self._is_handing = self._migration.is_handing
        self._reports.report(self._engine.end_overlong())
        if self._engine.scheduler.unready:
            self._prepare_grammars(now)
        if lockstep.is_member:
            self._engine.scheduler.budget.is_catching_up = lockstep.is_catching_up
            plan = self._steps.plan(decode_only=lockstep.is_urgent, num_clean=lockstep.num_clean)
            if plan.admitted:
                self._times.admitted(plan.admitted, now)
            if plan.num_said or lockstep.shall_meet():
                announced = self._steps.announce(plan)
                if announced is not None:
                    self._shares.arrive()
                return announced, 0
        self._windows.turn(now, lockstep.epoch)
        self._send_status(now)
        self._leave_if_unneeded()
        is_busy = self._memory.is_changing or self._migration.has_work or self._reports.is_waiting
        return None, BUSY_MS if is_busy or self._engine.scheduler.unready else IDLE_MS

    def _prepare_grammars(self, now: float) -> None:
        """Let those run whose grammar is ready, and ask for vocabularies that are missing."""
        self._reports.report(Outcome({}, self._engine.prepare_grammars()))
        for router, question in self._engine.grammars.questions(self._engine.scheduler.unready, now):
            self._reports.tell(router, question)

    def _step(self, plan: StepPlan, now: float) -> None:
        """Meet the others with `plan`, and compute what all have brought."""
        total: int | None = 0
        try:
            total = self._lockstep.meet(
                plan.num_said, is_alone=plan.is_alone, is_handing=self._is_handing, puts_off=plan.puts_off
            )
        except StepAborted:  # before anything was computed here
            self._steps.end_unmet(plan)
        if total is None:
            self._plan = plan
            return
        self._plan = None
        self._shares.meet()
        if total:
            computed = self._steps.run(plan, total, STEP_MS_MAX)
            if computed is not None:
                self._windows.step(computed, self._shares.end(self._engine.cost))
        self._windows.turn(now, self._lockstep.epoch)
        self._send_status(now)

    def _resize_kv(self, num_blocks: int) -> bool:
        return self._engine.resize_kv(num_blocks)

    def _leave_if_unneeded(self) -> None:
        """A rank that leaves ends once the others step without it, its sequences have gone, no router sends it any
        more, and each has been told where to: one may still be on its way here, to a sequence that came and went."""
        if (
            self._migration.is_leaving
            and not self._lockstep.is_member
            and not (self._engine.scheduler.sequences() or self._migration.num_moving or self._watchers)
            and not self._reports.has_unsent
        ):
            log.info("left")
            self.is_stopping = True

    # ---- messages -------------------------------------------------------------------------------------------------

    def _take_messages(self, now: float) -> None:
        while (received := self._server.receive()) is not None:
            peer, message = received
            body = message.body
            if isinstance(body, Submit):
                self._submit(body, peer, now)
            elif isinstance(body, Cancel):
                self._migration.cancel(peer, body.request_id)
                self._engine.cancel(peer, body.request_id)
                self._times.forget(peer, body.request_id)
            elif isinstance(body, VocabularyPiece):
                self._engine.grammars.take(body, self._memory.spec.vocab)
            elif isinstance(body, TellShares):
                self._followers[body.shares.tp] = body.shares
            elif isinstance(body, Watch):
                self._watchers.add(peer)
                self._last_status = None
            elif isinstance(body, Unwatch):
                self._watchers.discard(peer)
            else:
                self._server.send(peer, self._answer(message, now), seq=message.seq)
        self._reports.report(Outcome({}, self._engine.expire(now)))

    def _answer(self, message: Received[ToRank], now: float) -> Message:
        """The answer to a command or a question."""
        body, sender = message.body, message.sender
        try:
            if isinstance(body, GetRankIntegrity):
                return Integrity(tuple(self._engine.check_integrity()), {})
            if isinstance(body, GetRankLoad):
                self._fence.heed(message.epoch)
                return self._load()
            if isinstance(body, Reserve):
                if self._engine.has_followers and not self._lockstep.is_settled:
                    # A follower that is slow to give it up may still write to blocks that are free here.
                    raise Unavailable("the ranks of this replica have not met since a step was given up")
                return self._migration.reserve(sender, body)
            if isinstance(body, HandOver):
                check_ids(body.request, body.output, self._memory.spec.vocab)
                taken = self._migration.take(sender, body, now)
                if body.router not in self._watchers:
                    self._reports.expect((body.router,), now)
                return taken
            if isinstance(body, Unreserve):
                self._migration.unreserve(sender, body)
                return Ack()
            assert isinstance(body, RankCommand)
            self._fence.check(message.epoch, sender)
            self._migration.obey(body)
            if isinstance(body, DecodeOnly | Precopy):
                self._lockstep.hurry(body.decode_only_steps)
            self._last_status = None  # routers shall know at once that it leaves
            return Ack()
        except ElasticMoEError as error:
            log.debug("refused", kind=type(body).__name__, code=error.code, because=error.message)
            return refusal(error)
        except Exception as error:
            return refusal(failure_of(error, "taking a message", kind=type(body).__name__))

    def _load(self) -> RankLoad:
        scheduler, migration = self._engine.scheduler, self._migration
        return RankLoad(
            rank=self._seat.rank,
            incarnation=self._seat.incarnation,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            moving=migration.num_moving,
            handed_over=migration.handed_over,
            taken_over=migration.taken_over,
            blocks_free=scheduler.blocks.num_free,
            blocks_total=scheduler.blocks.num_blocks,
            is_leaving=migration.is_leaving,
            command=migration.command_id,
            routers=len(self._watchers),
            epoch=self._lockstep.epoch,
        )

    def _submit(self, request: Submit, peer: bytes, now: float) -> None:
        try:
            check_ids(request, request.output, self._memory.spec.vocab)
            if request.output and not self._engine.scheduler.has_room(request):
                self._reports.tell(peer, Tokens((Delta(request.request_id, len(request.output), (), "length"),)))
                return
            self._engine.add(request, peer, now)
            self._times.arrived(request, peer, now)
        except Exception as problem:
            error = failure_of(problem, "taking the request", **request.names)
            self._server.send(peer, Failed(request.request_id, error.code, error.message, error.retryable))

    def _drop_peer(self, peer: bytes) -> None:
        log.warning("router is gone; its requests are dropped", peer=peer.decode(errors="replace"))
        self._watchers.discard(peer)
        self._engine.cancel_peer(peer)

    def _is_told(self, status: RankStatus) -> bool:
        """Whether nothing has changed since the last status but that time has passed."""
        last = self._last_status
        return last is not None and msgspec.structs.replace(last, progress=status.progress) == status

    def _send_status(self, now: float) -> None:
        if not self._watchers or (self._last_status is not None and now - self._status_at < STATUS_S):
            return
        scheduler, own = self._engine.scheduler, self._shares.told(0)
        status = RankStatus(
            rank=self._seat.rank,
            incarnation=self._seat.incarnation,
            progress=self._progress,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            tokens_queued=scheduler.tokens_queued,
            blocks_free=scheduler.blocks.num_free,
            blocks_total=scheduler.blocks.num_blocks,
            max_model_len=scheduler.capacity_tokens,
            share_overhead=own.overhead,
            share_waiting=own.waiting,
            is_leaving=self._migration.is_leaving,
            recomputed=scheduler.recomputed + self._steps.num_discarded,
            followers=tuple(self._followers[tp] for tp in sorted(self._followers)),
        )
        if now - self._status_at < SAME_STATUS_S and self._is_told(status):
            return
        self._last_status = status
        self._status_at = now
        for router in list(self._watchers):
            self._reports.tell(router, status)
