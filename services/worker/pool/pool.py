"""The worker pool: keeps standby processes ready and turns them into ranks when the scaler asks.

A standby is forked from a template process that has everything imported (template.py), so it is there in milliseconds;
it holds no memory of the model. The pool sees a process end by its pidfd, reports it, and has another standby forked.
It makes no decisions: which seat gets a rank, and whether a dead one is replaced, is the scaler's to say.

Ranks are no children of the pool but of its *guardian*, the launcher, and outlive the pool: the next one finds them by
their seats' records (seats.py) before it answers anybody (ADR 16). It is the launcher that ends them with the
deployment. Where there is none, the pool is its own guardian: its end is the end of its ranks. One thread owns
everything here.
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress

from elasticmoe.common.config import PoolConfig
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.fence import Fence
from elasticmoe.common.machine import usable_cores
from elasticmoe.common.protocol import pool as pool_messages
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, InvalidRequest, NotFound, Unavailable
from elasticmoe.common.protocol.limits import RANKS_MAX, TP_MAX
from elasticmoe.common.protocol.pool import GetPool, StartRank, StopRank, ToPool
from elasticmoe.common.protocol.replies import Ack, refusal
from elasticmoe.common.protocol.scaler import PoolStatus, RankExited, RankStarted
from elasticmoe.common.stop_signals import StopSignals
from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.ties import take_in_orphans
from elasticmoe.common.transport import Server, new_identity
from elasticmoe.common.wording import counted
from elasticmoe.services.worker.pool.children import Child
from elasticmoe.services.worker.pool.forks import Forks
from elasticmoe.services.worker.pool.seats import Seats, path_of

log = get_logger("pool")

POLL_MS = 1_000
STOP_GRACE_S = 10.0
STANDBY_FAILURES_MAX = 5  # in a row, before the pool gives up
STANDBY_SETTLED_S = 30.0  # whoever lived longer did not die of its start
STANDBY_BACKOFF_S = 0.2
FORK_BACKOFF_S_MAX = 5.0
FORK_S_MAX = 120.0  # a template that has forked nobody by then is not going to
TEMPLATE_LOOK_S = 0.02  # how often one that comes up is looked for
SHORTAGE_S = 0.05
RECORD_LOOK_S = 0.05  # how often a record is looked at whose rank cannot tell that it has changed
RECORD_S_MAX = 1.0  # a rank writes its record as soon as it holds it


class Pool:
    """Owns its view of the processes, and the pool's socket."""

    def __init__(self, config: PoolConfig, launcher: int = 0) -> None:
        """`launcher`: process id of the parent that takes in and reaps ranks; 0 where there is none. Raises Conflict
        when the pool's socket is in use, Unavailable where the file of seats finds no room."""
        self._config = config
        self._cores = max(1, int(usable_cores()))  # as ranks count them, standby.py
        self._guardian = launcher or os.getpid()
        if not launcher:
            take_in_orphans()
        self._identity = new_identity(config.pool_name)
        self._server: Server[ToPool] = Server(config.socket(config.pool_name), self._identity, pool_messages.CODEC)
        self._fence = Fence(config.state_dir, config.pool_name)
        self._seats = Seats(path_of(config.state_dir, config.pool_name))
        self._children: list[Child] = []
        self._forks = Forks(config.socket(f"{config.pool_name}-template"), self._identity, self._guardian)
        self._watched: set[int] = set()
        self._subscriber: bytes | None = None  # the scaler that asked last: receives events
        self._failures = 0
        self._fork_at = 0.0
        self._num_unforked = 0  # attempts in a row to start a standby
        self._signals = StopSignals(self.stop)
        self._stopping = False

    def stop(self) -> None:
        """Let `run` return."""
        self._stopping = True

    def run(self) -> None:
        """Serve until a signal comes. Raises Unavailable when standbys cannot be kept alive."""
        self._signals.listen()
        self._server.watch(self._signals.fileno())
        try:
            self._adopt()
            while not self._stopping:
                try:
                    self._turn()
                except MemoryError:  # without a pool no rank is replaced; a turn can be taken again
                    with suppress(MemoryError):
                        log.error("a turn found no memory")
                    time.sleep(SHORTAGE_S)  # nothing to wait for tells that there is memory again
        finally:
            self._stop_all()
            self._signals.close()
            self._server.close()
            self._seats.close()

    def _turn(self) -> None:
        failpoint("pool.turn")
        self._fork_standbys()
        self._wait(POLL_MS)
        self._take_messages()
        self._reap()

    # ---- ranks of an earlier pool ---------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over the ranks that an earlier pool has left. Blocks for RECORD_S_MAX for one whose record cannot be
        read: it is killed then, and its seat can be filled. Raises Unavailable where one cannot be watched."""
        failpoint("pool.adopt")
        for slot in range(RANKS_MAX):
            deadline = time.monotonic() + RECORD_S_MAX
            while not self._stopping and (pid := self._seats.holder(slot)):
                if self._adopt_rank(slot, pid, is_late=time.monotonic() > deadline):
                    break
                time.sleep(RECORD_LOOK_S)
        failpoint("pool.adopted")

    def _adopt_rank(self, slot: int, pid: int, *, is_late: bool) -> bool:
        """Whether it is over with the process that holds `slot`, one way or the other."""
        child = Child(None)
        try:
            child.open(pid)
        except Unavailable:
            if self._seats.holder(slot) == pid:
                raise
            return False  # it has just ended
        record = self._seats.read(slot)
        if self._seats.holder(slot) == pid:  # else the descriptor may be another process's
            if record is not None and record.pid == pid:
                child.seat = record.seat
                child.look_at(record)
                self._children.append(child)
                log.info("rank adopted", rank=record.seat.rank, device=record.seat.device, pid=pid)
                return True
            if is_late:
                log.error("a rank is killed: its seat's record cannot be read", slot=slot, pid=pid)
                child.signal(signal.SIGKILL)
        child.close()
        return is_late

    # ---- processes ------------------------------------------------------------------------------------------------

    def _fork_standbys(self) -> None:
        """Keep `standbys` processes without a seat, beyond the ranks."""
        if time.monotonic() < self._fork_at or not self._config.standbys:
            return
        try:
            if not self._forks.connect():
                self._fork_at = time.monotonic() + TEMPLATE_LOOK_S
                return
            while sum(child.seat is None for child in self._children) < self._config.standbys:
                self._children.append(Child(self._forks.fork()))
        except (OSError, Unavailable) as error:  # of a host without memory, processes or descriptors: the ranks live on
            self._put_forks_off(getattr(error, "strerror", None) or str(error))

    def _put_forks_off(self, because: str) -> None:
        self._num_unforked += 1
        self._fork_at = time.monotonic() + min(FORK_BACKOFF_S_MAX, STANDBY_BACKOFF_S * 2**self._num_unforked)
        log.error("no standby could be started", because=because, failures=self._num_unforked)

    def _wait(self, timeout_ms: int) -> None:
        now = time.monotonic()
        timers = [child.kill_at for child in self._children if child.kill_at is not None and child.pidfd >= 0]
        if self._fork_at > now:
            timers.append(self._fork_at)
        silent = [child for child in self._children if child.seat and not child.channel and not child.ready]
        if silent:
            timers.append(now + RECORD_LOOK_S)
        if timers:
            timeout_ms = min(timeout_ms, max(0, int((min(timers) - now) * 1e3) + 1))
        self._watch()
        readable = self._server.poll(timeout_ms)
        if self._forks.fileno() in readable:
            self._forks.lose()
            self._on_standby_death("the template died", self._forks.connected_at)
        for child in self._children:
            if child.channel is not None and child.channel.fileno() in readable:
                self._receive(child)
        for child in silent:
            self._look_at_record(child)

    def _watch(self) -> None:
        wanted = {fd for child in self._children for fd in child.fds} | ({self._forks.fileno()} - {-1})
        for fd in self._watched - wanted:
            self._server.unwatch(fd)
        for fd in wanted - self._watched:
            self._server.watch(fd)
        self._watched = wanted

    def _receive(self, child: Child) -> None:
        try:
            if child.receive():
                self._look_at_record(child)
            elif child.pidfd >= 0:
                self._num_unforked = 0
        except Unavailable as error:
            log.warning("a standby is given up", because=error.message)

    def _look_at_record(self, child: Child) -> None:
        if child.seat is not None and child.look_at(self._seats.read(child.seat.slot)):
            assert child.ready is not None, "it has just become so"
            self._failures = 0
            self._notify(child.ready)

    def _reap(self) -> None:
        now = time.monotonic()
        for child in list(self._children):
            if not child.has_ended():
                if child.kill_at is not None and now >= child.kill_at and child.pidfd >= 0:
                    child.kill_at = None
                    child.signal(signal.SIGKILL)
                continue
            self._look_at_record(child)  # its last words
            code = child.exit_code()
            child.close()
            self._children.remove(child)  # last: what fails before is done again
            if child.seat is not None:
                self._on_rank_exit(child, child.seat, code)
            elif child.pid:
                self._on_standby_death("standby died", child.started_at, pid=child.pid, exit_code=code)
            else:
                self._put_forks_off("a process ended before it was there")
        self._forks.reap()
        if now - min((child.started_at for child in self._children if not child.pid), default=now) > FORK_S_MAX:
            self._forks.kill()  # what it was asked for ends with it

    def _on_standby_death(self, text: str, started_at: float, **facts: object) -> None:
        self._failures = 1 if time.monotonic() - started_at > STANDBY_SETTLED_S else self._failures + 1
        log.warning(text, failures=self._failures, **facts)
        if self._failures > STANDBY_FAILURES_MAX:
            died = f"{counted(self._failures, 'process', 'processes')} died in a row before they had a seat"
            raise Unavailable(f"{died}; the last: {text}")
        self._fork_at = time.monotonic() + STANDBY_BACKOFF_S * 2**self._failures

    def _on_rank_exit(self, child: Child, seat: StartRank, code: int | None) -> None:
        if child.failure is not None:
            reason = f"{child.failure.code}: {child.failure.message}"
        elif code is None:
            reason = "ended, and nobody knows how"
        else:
            reason = f"killed by signal {-code}" if code < 0 else f"exited with status {code}"
        log.warning("rank exited", rank=seat.rank, pid=child.pid, reason=reason)
        self._notify(RankExited(seat.rank, seat.slot, seat.incarnation, code, reason))

    def _stop_all(self) -> None:
        """End what ends with this pool: its standbys, and ranks where nobody else takes them in."""
        if self._guardian != os.getpid():
            for child in self._children:
                child.close()
            self._forks.close()
            return
        self._forks.kill()
        poller = select.poll()
        for child in self._children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S
        for child in self._children:
            if child.pidfd >= 0:
                poller.register(child.pidfd, select.POLLIN)
                if not poller.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                    child.signal(signal.SIGKILL)
                    poller.poll()
                poller.unregister(child.pidfd)
                child.exit_code()
            child.close()

    # ---- messages -------------------------------------------------------------------------------------------------

    def _notify(self, event: Message) -> None:
        if self._subscriber is not None:
            self._server.send(self._subscriber, event)

    def _take_messages(self) -> None:
        while (received := self._server.receive()) is not None:
            peer, message = received
            try:
                answer = self._answer(peer, message)
            except ElasticMoEError as error:
                answer = refusal(error)
            self._server.send(peer, answer, seq=message.seq)

    def _answer(self, peer: bytes, message: Received[ToPool]) -> Message:
        body = message.body
        if isinstance(body, GetPool):
            self._fence.heed(message.epoch)
            self._subscriber = peer
            return self._status()
        self._fence.check(message.epoch, message.sender)
        return self._start_rank(body, message.epoch) if isinstance(body, StartRank) else self._stop_rank(body)

    def _status(self) -> PoolStatus:
        ranks = tuple(child.describe(child.seat) for child in self._children if child.seat is not None)
        standbys = sum(child.seat is None and child.pid > 0 and child.channel is not None for child in self._children)
        return PoolStatus(standbys, ranks, not self._config.standbys, self._cores, self._config.threads_max)

    def _start_rank(self, message: StartRank, fence: int) -> RankStarted:
        if message.rank.tp >= TP_MAX:
            raise InvalidRequest(f"{message.rank} exceeds the limit of tp {TP_MAX}", code="tp_unsupported")
        for child in self._children:
            if child.seat is None:
                continue
            if child.seat.incarnation == message.incarnation:
                return RankStarted(message.rank, message.incarnation)
            if child.seat.slot == message.slot:
                raise Conflict(f"slot {message.slot} has a living rank {child.seat.incarnation}", code="seat_taken")
        if not self._config.standbys:
            try:
                self._children.append(Child(self._forks.start_cold()))
            except OSError as error:
                raise Unavailable(f"no process could be started: {error.strerror}", code="no_standby") from None
        for child in self._children:
            is_there = child.pid > 0 and not child.has_ended()
            if child.seat is None and child.channel is not None and (is_there or not self._config.standbys):
                try:
                    child.channel.send(message, epoch=fence)
                except ElasticMoEError:  # it has just died; the next turn reaps it
                    child.close_channel()
                    continue
                child.seat = message
                log.info("rank started", rank=message.rank, device=message.device, pid=child.pid)
                return RankStarted(message.rank, message.incarnation)
        raise Unavailable("no standby process is ready", code="no_standby")

    def _stop_rank(self, message: StopRank) -> Ack:
        for child in self._children:
            if child.seat is not None and child.seat.incarnation == message.incarnation:
                child.kill_at = time.monotonic() + message.grace_ms / 1e3
                child.signal(signal.SIGTERM)
                return Ack()
        raise NotFound(f"no rank {message.incarnation} in this pool", code="unknown_rank")
