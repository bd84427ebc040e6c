"""A rank that follows: it has a shard of its replica's weights and KV, and computes what the leader planned (ADR 37).

Its loop is a rank's without requests: it hears the HMM, changes its memory, and meets the others at each step, to which
it brings no tokens. It owns nothing that would be missed: who takes its seat maps the same shard and KV. It answers
what every rank is asked, and no router: where its time goes it tells its leader (shares.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import ElasticMoEError, InvalidRequest
from elasticmoe.common.protocol.ids import CommandId
from elasticmoe.common.protocol.rank import (
    Cancel,
    Drain,
    GetRankIntegrity,
    GetRankLoad,
    RankCommand,
    Submit,
    TellShares,
    ToRank,
    Unwatch,
    Watch,
)
from elasticmoe.common.protocol.replies import Ack, refusal
from elasticmoe.common.protocol.router import Failed
from elasticmoe.common.protocol.scaler import Integrity, RankLoad, RankReady
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.engine import kv_bytes
from elasticmoe.services.worker.engine.failure import failure_of, is_shortage
from elasticmoe.services.worker.engine.outcome import StepCost
from elasticmoe.services.worker.exchange.base import StepAborted, StepTimedOut
from elasticmoe.services.worker.exchange.board import ReplicaBoard, ReplicaPlan
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.registry import Model
from elasticmoe.services.worker.model.weights import KvCache
from elasticmoe.services.worker.rank.lockstep import STEP_MS_MAX
from elasticmoe.services.worker.rank.loop import BUSY_MS, IDLE_MS, SeatLoop
from elasticmoe.services.worker.rank.parts import SeatParts
from elasticmoe.services.worker.rank.shares import Shares, SharesToLeader
from elasticmoe.services.worker.rank.windows import FollowerWindows

log = get_logger("rank")

FAILED_MAX: Final = 8  # steps in a row that raised here: it is this process that is broken


class Follower(SeatLoop):
    """See SeatLoop."""

    def __init__(
        self,
        parts: SeatParts,
        board: ReplicaBoard,
        model: Model,
        kv: KvCache,
        tell_ready: Callable[[RankReady], None],
    ) -> None:
        """See SeatLoop. `board` leads to the leader, whose plans `model` computes in the blocks of `kv`."""
        super().__init__(parts, tell_ready, board.leader)
        self._board = board
        self._model = model
        self._kv = kv
        seat, transport = parts.seat, parts.transport
        push = transport.connect_push("signals", seat.incarnation)
        now = parts.clock.monotonic()
        self._windows = FollowerWindows(seat, push, parts.exchange.take_expert_rows, now)
        self._shares = Shares(parts.clock)
        leader = transport.connect_push(f"rank-{RankId(seat.rank.replica, 0)}", seat.incarnation)
        self._shares_to_leader = SharesToLeader(self._shares, seat.rank.tp, leader)
        self._has_arrived = False  # at a barrier where not all are yet
        self._num_failed = 0  # steps in a row
        self._command: CommandId | None = None
        self._is_leaving = False

    def _close(self) -> None:
        self._windows.close()
        self._shares_to_leader.close()

    def finish(self) -> None:
        """See SeatLoop. Nothing does."""

    def _take_over(self, now: float) -> None:
        del now
        self._board.tell_blocks(self._kv.num_blocks)

    # ---- one turn -------------------------------------------------------------------------------------------------

    def turn(self, now: float) -> int:
        """See SeatLoop."""
        self._windows.turn(now, self._lockstep.epoch)
        self._shares_to_leader.turn(now, self._lockstep.generation)
        if self._has_arrived:
            if now >= self._look_at:
                self._look(self._server.poll(0), now)
        elif not self._prepare(now):
            self._leave_if_unneeded()
            return BUSY_MS if self._memory.is_changing else IDLE_MS
        else:
            self._shares.arrive()
        self._step()
        return 0

    def _prepare(self, now: float) -> bool:
        """All that comes before a step; whether there is one."""
        failpoint("rank.turn")
        self._shares.begin()
        self._take_messages()
        if now >= self._look_at:
            self._look(self._server.poll(0), now)
        self._barrier.count_progress()
        self._change_memory()
        self._sync()
        return self._lockstep.is_member and self._lockstep.shall_meet()

    def _step(self) -> None:
        total: int | None = 0
        try:
            total = self._lockstep.meet(0)
        except StepAborted:
            self._lockstep.abort()
        self._has_arrived = total is None
        if total:
            self._shares.meet()
            self._run(total)

    def _run(self, total_tokens: int) -> None:
        """Compute what the leader planned for the step that all have met for. Raises StepTimedOut, and what went wrong
        where this process cannot go on."""
        exchange = self._exchange
        try:
            exchange.begin_step(total_tokens, STEP_MS_MAX)
            moves, batch = self._plan()
            for old, new in moves:
                kv_bytes.copy_block(self._kv, old, new)
            self._model.forward(batch, exchange)
            self._shares.end(StepCost.of(self._model.times))
            self._num_failed = 0
        except StepTimedOut:
            raise
        except StepAborted as aborted:
            log.info("step discarded", generation=aborted.generation)
            self._lockstep.abort()
        except Exception as error:
            self._live_on(error)

    def _plan(self) -> ReplicaPlan:
        """The leader's; of no parts where others' requests are tried."""
        if not self._lockstep.has_turn:
            return ReplicaPlan((), Batch([], self._kv.geometry.block_size))
        plan = self._board.read(self._lockstep.generation)
        for block in (block for move in plan.moves for block in move):
            if not 0 <= block < self._kv.num_blocks:
                raise ValueError(f"block {block} is to move; {self._kv.num_blocks} are mapped")
        return plan

    def _live_on(self, error: Exception) -> None:
        """A step raised an error: it is lost for all, and the leader plans it again (steps.py), a smaller one where
        memory was lacked. Raises the error again where this process must end of it."""
        self._num_failed += 1
        log.exception("a step failed", in_a_row=self._num_failed, others_wait=self._exchange.is_awaited)
        if is_shortage(error):
            self._lockstep.tell_shortage()  # before this process's end, too
        if not self._exchange.is_awaited or not self._hmm.is_connected or self._num_failed > FAILED_MAX:
            raise error  # nobody can stop the others but this process's end
        self._lockstep.abort()
        self._hmm.close()

    def _resize_kv(self, num_blocks: int) -> bool:
        """See Mapped.advance. Blocks go once the leader does not give them out any more."""
        board, kv = self._board, self._kv
        if num_blocks < kv.num_blocks:
            if board.blocks_of_leader > num_blocks:
                return False
            board.tell_blocks(num_blocks)
            if board.blocks_of_leader > num_blocks:  # it has begun to give out more at this moment
                board.tell_blocks(kv.num_blocks)
                return False
        kv.num_blocks = num_blocks
        board.tell_blocks(num_blocks)
        return True

    def _leave_if_unneeded(self) -> None:
        """A rank that leaves ends once the others step without it."""
        members = self._lockstep.members
        if self._is_leaving and members and not members >> self._seat.slot & 1:
            log.info("left")
            self.is_stopping = True

    # ---- messages -------------------------------------------------------------------------------------------------

    def _take_messages(self) -> None:
        while (received := self._server.receive()) is not None:
            peer, message = received
            body = message.body
            if isinstance(body, Submit):
                error = self._not_leading()
                self._server.send(peer, Failed(body.request_id, error.code, error.message, error.retryable))
            elif not isinstance(body, Cancel | Watch | Unwatch | TellShares):
                self._server.send(peer, self._answer(message), seq=message.seq)

    def _not_leading(self) -> InvalidRequest:
        return InvalidRequest(f"rank {self._seat.rank} has no requests: it computes those of its replica's first rank")

    def _answer(self, message: Received[ToRank]) -> Message:
        body = message.body
        try:
            if isinstance(body, GetRankIntegrity):
                return Integrity(tuple(self._check_integrity()), {})
            if isinstance(body, GetRankLoad):
                self._fence.heed(message.epoch)
                return self._load()
            if not isinstance(body, RankCommand):
                raise self._not_leading()
            self._fence.check(message.epoch, message.sender)
            self._command, self._is_leaving = body.id, isinstance(body, Drain) and bool(body.targets)
            return Ack()
        except ElasticMoEError as error:
            log.debug("refused", kind=type(body).__name__, code=error.code, because=error.message)
            return refusal(error)
        except Exception as error:
            return refusal(failure_of(error, "taking a message", kind=type(body).__name__))

    def _check_integrity(self) -> list[str]:
        """Findings, empty when all is well."""
        rows, leads = self._memory.ledger.rows(), self._board.blocks_of_leader
        findings = [f"ledger rows {rows} are live, and this rank has no sequences"] if rows else []
        if leads > self._kv.num_blocks:
            findings.append(f"the leader gives out {leads} KV blocks, {self._kv.num_blocks} are mapped here")
        return findings

    def _load(self) -> RankLoad:
        """It has no sequences; which of its blocks are free, the leader knows."""
        return RankLoad(
            rank=self._seat.rank,
            incarnation=self._seat.incarnation,
            running=0,
            waiting=0,
            moving=0,
            handed_over=0,
            taken_over=0,
            blocks_free=0,
            blocks_total=self._kv.num_blocks,
            is_leaving=self._is_leaving,
            command=self._command,
            routers=0,
            epoch=self._lockstep.epoch,
        )
