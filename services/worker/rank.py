"""A rank: the engine's shell. It takes messages, meets the other ranks at each step, and sends what came of it.

One thread. While any rank has work, all step together: each step starts at a barrier of the bus where every rank says
how many tokens it brings. When nobody brought any, all go to sleep on their sockets and their doorbell. Who gets work
first arrives at the barrier and then rings; whoever wakes looks whether a peer waits there (a stale ring costs a look).

When the bus's generation changes, because a rank died or joined, the step in flight is discarded and planned again once
the HMM publishes a running generation.
"""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from types import FrameType, TracebackType
from typing import Self

from common.config import PoolConfig
from common.protocol import rank as rank_messages
from common.protocol.codec import encode
from common.protocol.errors import ElasticMoEError, Unavailable
from common.protocol.pool import StartRank
from common.protocol.rank import Cancel, GetRankIntegrity, Submit, ToRank, Watch
from common.protocol.router import Failed, RankStatus, Tokens
from common.protocol.scaler import Integrity, RankReady
from common.telemetry import get_logger
from common.transport import Server
from native.bus import BusAborted, BusTimeout
from services.worker.attach import attach, resume
from services.worker.engine.engine import Engine, Outcome
from services.worker.engine.scheduler import Plan
from services.worker.exchange.shm import ShmExchange
from services.worker.model.registry import build_model

log = get_logger("rank")

IDLE_MS = 500  # the longest sleep, and so the slowest beat of an idle rank's status
STATUS_S = 0.1  # at most this often
LOOK_S = 0.05  # how often a busy rank looks at the pipe and the HMM's channel
RESUME_S = 0.5  # between attempts to reach a restarted HMM
MEET_MS = 500.0  # a rank that waits for others looks that often whether it shall stop
STEP_MS_MAX = 120_000.0  # a step that takes longer has a wedged rank in it
SMOOTHING = 0.05  # of the reported shares of a step


class Rank:
    """One seat's process. A context manager: leaving it unmaps the memory and closes the sockets."""

    def __init__(self, config: PoolConfig, seat: StartRank, pipe: Connection) -> None:
        """Attach and build. Raises the HMM's refusal, Unavailable, or DeviceError; nothing stays open then."""
        self._config = config
        self._seat = seat
        self._pipe = pipe
        self._hmm_path = config.socket("handles")
        self._memory = attach(self._hmm_path, seat, seat.incarnation)
        started = time.perf_counter()
        self._bus = self._memory.bus
        self._exchange = ShmExchange(self._bus, self._memory.reply.spec.num_experts_by_layer)
        # The memory was sized when it was made; a scaler that was restarted with larger limits cannot stretch it.
        ledger, max_tokens = self._memory.ledger, min(seat.max_tokens, self._bus.max_tokens)
        self._engine = Engine(
            build_model(self._memory.weights, max_tokens),
            self._exchange,
            self._memory.weights.kv,
            ledger,
            max_tokens=max_tokens,
            max_sequences=min(seat.max_sequences, ledger.num_rows),
            max_model_len=min(seat.max_model_len, ledger.max_tokens),
        )
        self._server: Server[ToRank] = Server(config.socket(f"rank-{seat.rank}"), seat.incarnation, rank_messages.CODEC)
        self._build_ms = (time.perf_counter() - started) * 1e3
        self._watchers: set[bytes] = set()
        self._channel_open = True
        self._generation = 0
        self._is_member = False
        self._is_awake = False
        self._progress = 0
        self._met_ns = 0  # spent at the last step's first barrier
        self._overhead = 0.0
        self._waiting = 0.0
        self._last_status: RankStatus | None = None
        self._status_at = 0.0
        self._look_at = 0.0
        self._resume_at = 0.0
        self._stopping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bus.leave()
        self._server.close()
        self._memory.close()

    def stop(self, *_: int | FrameType | None) -> None:
        """Signal handler: only records."""
        self._stopping = True

    def run(self) -> None:
        """Serve until SIGTERM or the pool's end. Raises BusTimeout when a peer stays away beyond STEP_MS_MAX."""
        signal.signal(signal.SIGTERM, self.stop)
        self._forget_predecessor()
        self._bus.join(int(self._seat.incarnation.rpartition(":")[2], 16))
        for fd in (self._pipe.fileno(), self._memory.channel.fileno(), self._memory.doorbells[self._seat.slot]):
            self._server.watch(fd)
        ready = RankReady(
            self._seat.rank, self._seat.slot, self._seat.incarnation, self._memory.attach_ms, self._build_ms
        )
        self._pipe.send_bytes(encode(ready, sender=self._seat.incarnation, epoch=self._seat.epoch))
        log.info("attached", device=self._seat.device, attach_ms=ready.attach_ms, build_ms=ready.build_ms)
        while not self._stopping:
            self._turn()
        self._send_failures(self._engine.fail_all(Unavailable("the rank is shutting down", code="shutting_down")))

    def _forget_predecessor(self) -> None:
        """Close the rows that the seat's last holder left. (Its sequences end at the router, which sees a new
        incarnation.)"""
        rows = self._memory.ledger.rows()
        for row in rows:
            self._memory.ledger.close_row(row)
        if rows:
            log.warning("sequences of the predecessor dropped", num=len(rows))

    # ---- one turn -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        started = time.perf_counter_ns()
        now = time.monotonic()
        self._take_messages(now)
        if now >= self._look_at:
            self._look(self._server.poll(0), now)
        self._progress += 1
        self._bus.bump_progress()
        self._sync_membership()
        plan = self._engine.plan() if self._is_member else None
        if plan is None or not (self._is_awake or plan.num_tokens or self._peer_waits()):
            self._send_status(now)
            self._look(self._server.poll(IDLE_MS), time.monotonic())
            return
        try:
            met = time.perf_counter_ns()
            total = self._meet(plan.num_tokens)
            self._met_ns = time.perf_counter_ns() - met
            self._is_awake = total > 0
            if total:
                self._step(plan, total, started)
        except BusAborted as aborted:
            self._is_member = False  # until the next running generation
            log.info("step discarded", generation=aborted.generation)
        self._send_status(now)

    def _peer_waits(self) -> bool:
        try:
            return self._bus.idle_wait(self._generation, 0)
        except BusAborted:
            return False

    def _meet(self, num_tokens: int) -> int:
        """Arrive at the step's barrier and wait for the others; the tokens of all ranks together.

        Whoever comes from sleep first arrives, then rings those that are not there yet.
        """
        deadline = time.monotonic() + STEP_MS_MAX / 1e3
        wait_ms = MEET_MS if self._is_awake else 0.0
        while True:
            try:
                return sum(tokens for _, tokens, _ in self._bus.step(self._generation, num_tokens, 0, wait_ms))
            except BusTimeout:
                if self._stopping:
                    return 0
                if time.monotonic() > deadline:
                    raise
                for slot, fd in self._memory.doorbells.items():
                    if slot != self._seat.slot:
                        os.eventfd_write(fd, 1)
                wait_ms = MEET_MS

    def _step(self, plan: Plan, total: int, started: int) -> None:
        outcome = self._engine.compute(plan, total, STEP_MS_MAX)
        self._send(outcome)
        took = time.perf_counter_ns() - started
        cost = self._engine.cost
        waiting = (cost.wait_ns + self._met_ns) / took
        self._waiting += SMOOTHING * (waiting - self._waiting)
        self._overhead += SMOOTHING * (1.0 - cost.math_ns / took - waiting - self._overhead)

    def _sync_membership(self) -> None:
        generation, members, running = self._bus.membership()
        if generation == self._generation:
            return
        self._generation = generation
        self._is_member = running and bool(members >> self._seat.slot & 1)
        if self._is_member:
            self._exchange.set_routing(generation, self._memory.reply.owners)
            self._is_awake = True  # the first step of a generation is everybody's
        log.info("membership", generation=generation, members=bin(members), running=running)

    # ---- descriptors ----------------------------------------------------------------------------------------------

    def _look(self, readable: set[int], now: float) -> None:
        self._look_at = now + LOOK_S
        doorbell = self._memory.doorbells[self._seat.slot]
        if doorbell in readable:
            try:
                os.eventfd_read(doorbell)
            except BlockingIOError:  # a membership change was rung and answered between poll and read
                log.debug("doorbell was silent")
        if self._pipe.fileno() in readable:
            log.info("the pool is gone")
            self._stopping = True
        if self._channel_open and self._memory.channel.fileno() in readable:
            self._server.unwatch(self._memory.channel.fileno())
            self._memory.channel.close()
            self._channel_open = False
            log.warning("the HMM is gone; serving goes on")
        if not self._channel_open and now >= self._resume_at:
            self._resume_at = now + RESUME_S
            self._resume()

    def _resume(self) -> None:
        try:
            self._memory.channel = resume(self._hmm_path, self._seat, self._seat.incarnation)
        except ElasticMoEError as error:
            log.debug("no HMM yet", because=error.message)
            return
        self._channel_open = True
        self._server.watch(self._memory.channel.fileno())
        log.info("introduced to the restarted HMM")

    # ---- messages -------------------------------------------------------------------------------------------------

    def _take_messages(self, now: float) -> None:
        while (received := self._server.receive()) is not None:
            peer, message = received
            body = message.body
            if isinstance(body, Submit):
                self._submit(body, peer, now)
            elif isinstance(body, Cancel):
                self._engine.cancel(peer, body.request_id)
            elif isinstance(body, Watch):
                self._watchers.add(peer)
                self._last_status = None
            else:
                assert isinstance(body, GetRankIntegrity)
                self._server.send(peer, Integrity(tuple(self._engine.check_integrity()), {}), seq=message.seq)
        self._send_failures(self._engine.expire(now))

    def _submit(self, request: Submit, peer: bytes, now: float) -> None:
        try:
            self._check(request)
            self._engine.add(request, peer, now)
        except ElasticMoEError as error:
            self._server.send(peer, Failed(request.request_id, error.code, error.message, error.retryable))

    def _check(self, request: Submit) -> None:
        """What the router has checked already, checked again where a bad index would hurt every tenant."""
        vocab = self._memory.reply.spec.vocab
        for name, ids in (
            ("prompt", request.prompt),
            ("stop_token_ids", request.stop_token_ids),
            ("logit_bias", tuple(token for token, _ in request.sampling.logit_bias)),
        ):
            if ids and max(ids) >= vocab:
                raise ElasticMoEError(
                    f"{name} has token id {max(ids)}; the vocabulary has {vocab}", code="token_out_of_range"
                )

    def _send(self, outcome: Outcome) -> None:
        for peer, deltas in outcome.deltas.items():
            if not self._server.send(peer, Tokens(tuple(deltas))):
                self._drop_peer(peer)
        self._send_failures(outcome.failures)

    def _send_failures(self, failures: list[tuple[bytes, Failed]]) -> None:
        for peer, failed in failures:
            if not self._server.send(peer, failed):
                self._drop_peer(peer)

    def _drop_peer(self, peer: bytes) -> None:
        log.warning("router is gone; its requests are dropped", peer=peer.decode(errors="replace"))
        self._watchers.discard(peer)
        self._engine.cancel_peer(peer)

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
        )
        self._last_status = status
        self._status_at = now
        for peer in list(self._watchers):
            if not self._server.send(peer, status):
                self._drop_peer(peer)
