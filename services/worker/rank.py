"""A rank: the engine's shell. It takes messages, meets the other ranks at each step, and sends what came of it.

One thread does everything, and between steps what cannot be done during one: messages, changes of its memory, moving
sequences to another rank. How ranks step together and change layouts: lockstep.py. What they have mapped: memory.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

import msgspec

from common.config import PoolConfig
from common.failpoint import failpoint
from common.fence import Fence
from common.protocol import rank as rank_messages
from common.protocol.codec import Message, Received
from common.protocol.errors import ElasticMoEError, Unavailable
from common.protocol.pool import StartRank
from common.protocol.rank import (
    Cancel,
    GetRankIntegrity,
    GetRankLoad,
    HandOver,
    Move,
    Reserve,
    Submit,
    ToRank,
    Unreserve,
    Unwatch,
    Watch,
)
from common.protocol.replies import Ack, refusal
from common.protocol.router import Delta, Failed, RankStatus, Tokens
from common.protocol.scaler import Integrity, RankLoad, RankReady
from common.telemetry import get_logger
from common.transport import Server, Sockets
from services.worker.engine.adoption import adopt_rows
from services.worker.engine.engine import Engine
from services.worker.engine.failure import failure_of
from services.worker.engine.outcome import Outcome
from services.worker.exchange.base import StepAborted
from services.worker.exchange.shm import ShmExchange
from services.worker.exchange.shm_barrier import ShmBarrier
from services.worker.hmm_link import HmmLink
from services.worker.intake import check_ids
from services.worker.lockstep import STEP_MS_MAX, Lockstep
from services.worker.memory import Memory
from services.worker.migration import Migration
from services.worker.model.registry import build_model
from services.worker.reports import Reports, tokens_of
from services.worker.steps import Steps
from services.worker.warm_up import warm_up

log = get_logger("rank")

IDLE_MS = 500  # the longest sleep, and so the slowest beat of an idle rank's status
BUSY_MS = 5  # the longest sleep of a rank that does not step and has something else to do
STATUS_S = 0.1  # at most this often
SAME_STATUS_S = 0.9  # what has not changed is told this often: routers ask who is silent for longer (links.py)
LOOK_S = 0.01  # how often a stepping rank looks at its descriptors
WELCOME_S = 0.05  # a new member waits for what others hand over to it as it comes; megabytes of KV take 10 to 20 ms
WELCOMES = 3  # of its first turns in which it waits so, WELCOME_S in all
SMOOTHING = 0.05  # of the reported shares of a step


class Rank:
    """One seat's process. A context manager: leaving it unmaps the memory and closes the sockets."""

    def __init__(self, config: PoolConfig, seat: StartRank, tell_ready: Callable[[RankReady], None]) -> None:
        """Attach and build. Raises the HMM's refusal, Unavailable, or DeviceError; the process ends then. `tell_ready`
        is called once, in `run`."""
        self._seat = seat
        self._tell_ready = tell_ready
        started = time.perf_counter()
        self._server: Server[ToRank] = Server(config.socket(f"rank-{seat.rank}"), seat.incarnation, rank_messages.CODEC)
        self._hmm = HmmLink(config.socket("handles"), seat, watch=self._server.watch, unwatch=self._server.unwatch)
        self._fence = Fence(config.state_dir, f"rank-{seat.slot}")
        failpoint("rank.attach")
        reply, fds = self._hmm.attach()
        self._memory = Memory(reply, fds, seat.device, seat.slot, self._hmm.handed())
        attached = time.perf_counter()
        bus = self._memory.bus
        self._barrier = ShmBarrier(bus, self._memory.doorbells, seat.slot)
        exchange = ShmExchange(bus, self._memory.spec.num_experts_by_layer)
        # The memory was sized when it was made; a scaler that was restarted with larger limits cannot stretch it.
        ledger, max_tokens = self._memory.ledger, min(seat.max_tokens, bus.max_tokens)
        model = build_model(self._memory.weights, max_tokens)
        self._engine = Engine(
            model,
            exchange,
            self._memory.weights.kv,
            ledger,
            max_tokens=max_tokens,
            max_sequences=min(seat.max_sequences, ledger.num_rows),
            max_model_len=min(seat.max_model_len, ledger.max_tokens),
        )
        self._lockstep = Lockstep(self._barrier, exchange, self._memory.routings, seat.slot, lambda: self._stopping)
        self._steps = Steps(self._engine, exchange, self._lockstep, self._hmm, self._send)
        self._migration = Migration(
            seat, self._engine, Sockets(config.socket), watch=self._server.watch, unwatch=self._server.unwatch
        )
        failpoint("rank.warm_up")
        if not self._is_awaited:
            warm_up(model, self._memory)
        self._attach_ms = (attached - started) * 1e3
        self._build_ms = (time.perf_counter() - attached) * 1e3
        self._revision = self._memory.revision
        self._reports = Reports(self._server.send)
        self._watchers: set[bytes] = set()
        self._num_welcomes = 0  # left
        self._welcome_s = 0.0  # left
        self._progress = 0
        self._met_ns = 0  # spent at the last step's first barrier
        self._overhead = 0.0
        self._waiting = 0.0
        self._last_status: RankStatus | None = None
        self._status_at = 0.0
        self._look_at = 0.0
        self._stopping = False

    @property
    def _is_awaited(self) -> bool:
        """Whether the others cannot step until this rank is there: its predecessor, a member, died."""
        now = self._barrier.membership()
        return now.generation > 0 and not now.is_running and bool(now.members >> self._seat.slot & 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._barrier.leave()
        self._migration.close()
        self._hmm.close()
        self._server.close()
        self._memory.close()

    def stop(self, *_: int | FrameType | None) -> None:
        """Signal handler: only records."""
        self._stopping = True

    def run(self) -> None:
        """Serve until SIGTERM, or until it has left. Raises StepTimedOut when a peer stays away too long,
        ElasticMoEError `memory_replaced`."""
        signal.signal(signal.SIGTERM, self.stop)
        self._adopt(time.monotonic())
        self._barrier.join(int(self._seat.incarnation.rpartition(":")[2], 16))
        self._server.watch(self._memory.doorbells[self._seat.slot])
        ready = RankReady(self._seat.rank, self._seat.slot, self._seat.incarnation, self._attach_ms, self._build_ms)
        failpoint("rank.ready")
        self._tell_ready(ready)
        self._hmm.applied(self._revision)
        log.info("attached", device=self._seat.device, attach_ms=ready.attach_ms, build_ms=ready.build_ms)
        while not self._stopping:
            self._turn()
        self._send_failures(self._engine.fail_all(Unavailable("the rank is shutting down", code="shutting_down")))

    def _adopt(self, now: float) -> None:
        """Go on with the sequences of the seat's last rank. Their routers are still to connect to this one."""
        num_rows = len(self._memory.ledger.rows())
        outcome = adopt_rows(self._engine, self._memory.spec.vocab)
        self._reports.expect({*outcome.deltas, *(router for router, _ in outcome.failures)}, now)
        self._send(outcome)
        if num_rows:
            num_live = len(self._engine.scheduler.sequences())
            log.info("sequences adopted", num=num_live, rows=num_rows, failed=len(outcome.failures))

    # ---- one turn -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        failpoint("rank.turn")
        started = time.perf_counter_ns()
        now = time.monotonic()
        self._take_messages(now)
        if now >= self._look_at:
            self._look(self._server.poll(0), now)
        self._progress += 1
        self._barrier.count_progress()
        self._change_memory()
        self._follow_members()
        for router in self._reports.turn(now):
            self._drop_peer(router)
        for router, message in self._migration.turn(now, self._lockstep.members):
            self._tell(router, message)
        self._send(self._engine.end_overlong())
        lockstep = self._lockstep
        plan = None
        if lockstep.is_member:
            plan = self._steps.plan(decode_only=lockstep.is_urgent, num_clean=lockstep.num_clean)
        if plan is None or not (plan.num_said or lockstep.shall_meet()):
            self._send_status(now)
            self._leave_if_unneeded()
            is_busy = self._memory.is_changing or self._migration.has_work or self._reports.is_waiting
            self._look(self._server.poll(BUSY_MS if is_busy else IDLE_MS), time.monotonic())
            return
        met, total = time.perf_counter_ns(), 0
        try:
            total = lockstep.meet(plan.num_said, is_alone=plan.is_alone)
        except StepAborted:  # before anything was computed
            lockstep.abort()
        self._met_ns = time.perf_counter_ns() - met
        if total:
            self._steps.run(plan, total, STEP_MS_MAX)
            self._note_shares(started)
        self._send_status(now)

    def _follow_members(self) -> None:
        """Learn who steps together now. A rank that has come in by a flip finds places kept for sequences that others
        hand over at this very moment: it waits for them a little, so that they do not miss a step."""
        if self._lockstep.sync():
            self._migration.ask_again()
            if self._lockstep.has_come_in:
                self._num_welcomes, self._welcome_s = WELCOMES, WELCOME_S
        if not self._num_welcomes:
            return
        self._num_welcomes -= 1
        now = time.monotonic()
        until = now + self._welcome_s
        while self._migration.num_expected and now < until:
            self._look(self._server.poll(max(1, int((until - now) * 1e3))), now)
            now = time.monotonic()
            self._take_messages(now)
        self._welcome_s = until - now

    def _note_shares(self, started: int) -> None:
        took = time.perf_counter_ns() - started
        cost = self._engine.cost
        waiting = (cost.wait_ns + self._met_ns) / took
        self._waiting += SMOOTHING * (waiting - self._waiting)
        self._overhead += SMOOTHING * (1.0 - cost.math_ns / took - waiting - self._overhead)

    def _change_memory(self) -> None:
        """A slice of what the HMM asked for."""
        if self._memory.is_changing and (revision := self._memory.advance(self._engine.resize_kv)):
            log.info("memory changed", revision=revision)
            failpoint("rank.applied")
            self._hmm.applied(revision)

    def _leave_if_unneeded(self) -> None:
        """A rank that leaves ends once the others step without it, its sequences have gone, and no router sends it
        any more."""
        if (
            self._migration.is_leaving
            and not self._lockstep.is_member
            and not (self._engine.scheduler.sequences() or self._migration.num_moving or self._watchers)
        ):
            log.info("left")
            self._stopping = True

    # ---- descriptors ----------------------------------------------------------------------------------------------

    def _look(self, readable: set[int], now: float) -> None:
        self._look_at = now + LOOK_S
        if self._memory.doorbells[self._seat.slot] in readable:
            self._barrier.hear()
        handed = self._hmm.look(readable, now)
        if handed is not None:
            failpoint("rank.apply")
            self._memory.take(*handed)

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
            elif isinstance(body, Watch):
                self._watchers.add(peer)
                self._last_status = None
            elif isinstance(body, Unwatch):
                self._watchers.discard(peer)
            else:
                self._server.send(peer, self._answer(message, now), seq=message.seq)
        self._send_failures(self._engine.expire(now))

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
            assert isinstance(body, Move)
            self._fence.check(message.epoch, sender)
            self._migration.command(body)
            self._lockstep.hurry(body.urgent_steps)
            self._last_status = None  # routers shall know at once that it leaves
            return Ack()
        except ElasticMoEError as error:
            log.debug("refused", message=type(body).__name__, code=error.code, because=error.message)
            return refusal(error)
        except Exception as error:
            return refusal(failure_of(error, type(body).__name__, "taking a message"))

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
            move_op_id=migration.op_id,
            routers=len(self._watchers),
            epoch=self._lockstep.epoch,
        )

    def _submit(self, request: Submit, peer: bytes, now: float) -> None:
        try:
            check_ids(request, request.output, self._memory.spec.vocab)
            if request.output and not self._engine.scheduler.has_room(request):
                self._tell(peer, Tokens((Delta(request.request_id, len(request.output), (), "length"),)))
                return
            self._engine.add(request, peer, now)
        except Exception as problem:
            error = failure_of(problem, request.request_id, "taking the request")
            self._server.send(peer, Failed(request.request_id, error.code, error.message, error.retryable))

    def _tell(self, router: bytes, message: Message) -> None:
        if not self._reports.tell(router, message):
            self._drop_peer(router)

    def _send(self, outcome: Outcome) -> None:
        for router, suspected in outcome.suspected:
            self._tell(router, suspected)
        for router, deltas in outcome.deltas.items():
            for message in tokens_of(deltas):
                self._tell(router, message)
        self._send_failures(outcome.failures)

    def _send_failures(self, failures: list[tuple[bytes, Failed]]) -> None:
        for router, failed in failures:
            self._tell(router, failed)

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
        scheduler = self._engine.scheduler
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
            share_overhead=round(self._overhead, 4),
            share_waiting=round(self._waiting, 4),
            is_leaving=self._migration.is_leaving,
            recomputed=scheduler.recomputed + self._steps.num_discarded,
        )
        if now - self._status_at < SAME_STATUS_S and self._is_told(status):
            return
        self._last_status = status
        self._status_at = now
        for router in list(self._watchers):
            self._tell(router, status)
