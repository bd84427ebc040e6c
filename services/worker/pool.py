"""The worker pool: keeps standby processes ready and turns them into ranks when the scaler asks.

A standby is forked from a server process that has everything imported (multiprocessing's forkserver), so it is there
in milliseconds; it holds no memory of the model. The pool sees a child end by its sentinel, reports it, and forks
another standby. It makes no decisions: which seat gets a rank, and whether a dead one is replaced, is the scaler's to
say.

A child leaves when its pipe to the pool ends, so no rank outlives its pool. One thread owns everything here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from types import FrameType

import msgspec

from common.config import PoolConfig
from common.failpoint import failpoint
from common.fence import Fence
from common.protocol import pool as pool_messages
from common.protocol.codec import Codec, Message, Received, encode
from common.protocol.errors import Conflict, ElasticMoEError, InvalidRequest, NotFound, ProtocolError, Unavailable
from common.protocol.limits import TP_MAX
from common.protocol.pool import GetPool, StartRank, StopRank, ToPool
from common.protocol.replies import Ack, Refused, refusal
from common.protocol.scaler import PoolRank, PoolStatus, RankExited, RankReady, RankStarted
from common.telemetry import get_logger
from common.transport import Server, new_identity
from services.worker.standby import standby_main

log = get_logger("pool")

FromRank = RankReady | Refused
FROM_RANK: Codec[FromRank] = Codec(FromRank)

POLL_MS = 1_000
STOP_GRACE_S = 10.0
STANDBY_FAILURES_MAX = 5  # in a row, before the pool gives up
STANDBY_SETTLED_S = 30.0  # whoever lived longer did not die of its start
STANDBY_BACKOFF_S = 0.2
FORK_BACKOFF_S_MAX = 5.0
SHORTAGE_S = 0.05


class Child:
    """One forked process and what the pool knows of it. Owned by the pool."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe
        self.pipe_fd = pipe.fileno()
        self.started_at = time.monotonic()
        self.seat: StartRank | None = None  # None: a standby
        self.ready: RankReady | None = None
        self.reason = ""
        self.kill_at: float | None = None

    @property
    def pid(self) -> int:
        """Process id in this pid namespace."""
        return self.process.pid or 0


class Pool:
    """Owns the children and the pool's socket."""

    def __init__(self, config: PoolConfig) -> None:
        """Raises Conflict when the pool's socket is in use."""
        self._config = config
        self._identity = new_identity(config.pool_name)
        self._server: Server[ToPool] = Server(config.socket(config.pool_name), self._identity, pool_messages.CODEC)
        self._fence = Fence(config.state_dir, config.pool_name)
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(["services.worker.standby", "services.worker.preload"])
        self._children: list[Child] = []
        self._subscriber: bytes | None = None  # the scaler that asked last: receives events
        self._failures = 0
        self._fork_at = 0.0
        self._num_unforked = 0  # attempts in a row to start a standby
        self._stopping = False

    def stop(self, *_: int | FrameType | None) -> None:
        """Signal handler: only records."""
        self._stopping = True

    def run(self) -> None:
        """Serve until a signal comes. Raises Unavailable when standbys cannot be kept alive."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        try:
            while not self._stopping:
                try:
                    self._turn()
                except MemoryError:  # the pool's end would be the end of all its ranks; a turn can be taken again
                    with suppress(MemoryError):
                        log.error("a turn found no memory")
                    time.sleep(SHORTAGE_S)  # nothing to wait for tells that there is memory again
        finally:
            self._stop_all()
            self._server.close()

    def _turn(self) -> None:
        failpoint("pool.turn")
        self._fork_standbys()
        self._wait(POLL_MS)
        self._take_messages()
        self._reap()

    # ---- children -------------------------------------------------------------------------------------------------

    def _fork_standbys(self) -> None:
        """Keep `standbys` processes without a seat, beyond the ranks."""
        while sum(child.seat is None for child in self._children) < self._config.standbys:
            if time.monotonic() < self._fork_at:
                return
            try:
                self._add_child(self._forks)
            except Unavailable as error:  # of a host without memory, processes or descriptors: the ranks live on
                self._num_unforked += 1
                self._fork_at = time.monotonic() + min(FORK_BACKOFF_S_MAX, STANDBY_BACKOFF_S * 2**self._num_unforked)
                log.error("no standby could be started", because=error.message, failures=self._num_unforked)
                return
            self._num_unforked = 0

    def _add_child(self, context: ForkServerContext | SpawnContext) -> Child:
        """Start a process. Raises Unavailable `no_standby` where the system gives none."""
        try:
            ours, theirs = context.Pipe()
            process = context.Process(target=standby_main, args=(theirs, msgspec.json.encode(self._config)))
        except OSError as error:
            raise Unavailable(f"no pipe to a process: {error.strerror}", code="no_standby") from None
        try:
            process.start()
            child = Child(process, ours)
            self._server.watch(process.sentinel)
            self._server.watch(child.pipe_fd)
            self._children.append(child)
        except (OSError, EOFError) as error:  # EOFError: the fork server could not
            self._abandon(process, ours)
            text = f"no process could be started: {getattr(error, 'strerror', None) or type(error).__name__}"
            raise Unavailable(text, code="no_standby") from None
        except MemoryError:
            self._abandon(process, ours)
            raise
        finally:
            theirs.close()
        return child

    def _abandon(self, process: multiprocessing.process.BaseProcess, pipe: Connection) -> None:
        """End a process that did not become a child: one that has begun sees its pipe close."""
        self._server.unwatch(pipe.fileno())
        pipe.close()
        if process.pid is not None:
            self._server.unwatch(process.sentinel)
            process.kill()
            process.join()

    def _wait(self, timeout_ms: int) -> None:
        timers = [child.kill_at for child in self._children if child.kill_at is not None]
        if self._fork_at > time.monotonic():
            timers.append(self._fork_at)
        if timers:
            timeout_ms = min(timeout_ms, max(0, int((min(timers) - time.monotonic()) * 1e3) + 1))
        readable = self._server.poll(timeout_ms)
        for child in self._children:
            if child.pipe_fd in readable and not child.pipe.closed:
                self._take_report(child)

    def _take_report(self, child: Child) -> None:
        try:
            if not child.pipe.poll():
                return
            received = FROM_RANK.decode(child.pipe.recv_bytes())
        except (EOFError, OSError):
            self._close_pipe(child)
            return
        except MemoryError:  # what it said is lost: it ends, and another one says it
            self._close_pipe(child)
            raise
        except ProtocolError as error:
            log.warning("bad report", pid=child.pid, because=error.message)
            return
        if isinstance(received.body, RankReady):
            child.ready = received.body
            self._failures = 0
            self._notify(received.body)
        else:
            child.reason = f"{received.body.code}: {received.body.message}"

    def _reap(self) -> None:
        now = time.monotonic()
        for child in list(self._children):
            if child.process.is_alive():
                if child.kill_at is not None and now >= child.kill_at:
                    child.process.kill()
                    child.kill_at = None
                continue
            if not child.pipe.closed:
                self._take_report(child)  # its last words
            self._forget(child)
            if child.seat is None:
                self._on_standby_death(child)
            else:
                self._on_rank_exit(child, child.seat)

    def _forget(self, child: Child) -> None:
        self._server.unwatch(child.process.sentinel)
        if not child.pipe.closed:
            self._close_pipe(child)
        child.process.join()
        self._children.remove(child)  # last: what fails before is done again

    def _close_pipe(self, child: Child) -> None:
        self._server.unwatch(child.pipe_fd)
        child.pipe.close()

    def _on_standby_death(self, child: Child) -> None:
        lived_s = time.monotonic() - child.started_at
        self._failures = 1 if lived_s > STANDBY_SETTLED_S else self._failures + 1
        log.warning("standby died", pid=child.pid, exit_code=child.process.exitcode, failures=self._failures)
        if self._failures > STANDBY_FAILURES_MAX:
            raise Unavailable(
                f"{self._failures} standby processes died in a row; the last with {child.process.exitcode}"
            )
        self._fork_at = time.monotonic() + STANDBY_BACKOFF_S * 2**self._failures

    def _on_rank_exit(self, child: Child, seat: StartRank) -> None:
        code = child.process.exitcode or 0
        reason = child.reason or (f"killed by signal {-code}" if code < 0 else f"exited with status {code}")
        log.warning("rank exited", rank=seat.rank, pid=child.pid, reason=reason)
        self._notify(RankExited(seat.rank, seat.slot, seat.incarnation, code, reason))

    def _stop_all(self) -> None:
        for child in self._children:
            child.process.terminate()
        deadline = time.monotonic() + STOP_GRACE_S
        for child in self._children:
            child.process.join(max(0.0, deadline - time.monotonic()))
            if child.process.is_alive():
                child.process.kill()
                child.process.join()

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
            self._subscriber = peer
            return self._status()
        self._fence.check(message.epoch, message.sender)
        return self._start_rank(body, message.epoch) if isinstance(body, StartRank) else self._stop_rank(body)

    def _status(self) -> PoolStatus:
        ranks = tuple(_describe(child, child.seat) for child in self._children if child.seat is not None)
        return PoolStatus(len(self._children) - len(ranks), ranks, not self._config.standbys)

    def _start_rank(self, message: StartRank, fence: int) -> RankStarted:
        if message.rank.tp >= TP_MAX:
            raise InvalidRequest(f"{message.rank} exceeds the limit of tp {TP_MAX}", code="tp_unsupported")
        for child in self._children:
            if child.seat is None:
                continue
            if child.seat.incarnation == message.incarnation:
                return RankStarted(message.rank, message.incarnation, child.pid)
            if child.seat.slot == message.slot:
                raise Conflict(f"slot {message.slot} has a living rank {child.seat.incarnation}", code="seat_taken")
        if not self._config.standbys:  # nothing is kept ready: imports and all, as without this pool
            self._add_child(multiprocessing.get_context("spawn"))
        for child in self._children:
            if child.seat is None and not child.pipe.closed and child.process.is_alive():
                try:
                    child.pipe.send_bytes(encode(message, sender=self._identity, epoch=fence))
                except OSError:  # it has just died; the next turn reaps it
                    self._close_pipe(child)
                    continue
                child.seat = message
                log.info("rank started", rank=message.rank, device=message.device, pid=child.pid)
                return RankStarted(message.rank, message.incarnation, child.pid)
        raise Unavailable("no standby process is ready", code="no_standby")

    def _stop_rank(self, message: StopRank) -> Ack:
        for child in self._children:
            if child.seat is not None and child.seat.incarnation == message.incarnation:
                child.process.terminate()
                child.kill_at = time.monotonic() + message.grace_ms / 1e3
                return Ack()
        raise NotFound(f"no rank {message.incarnation} in this pool", code="unknown_rank")


def _describe(child: Child, seat: StartRank) -> PoolRank:
    attach_ms = child.ready.attach_ms if child.ready else 0.0
    is_ready, is_asleep = child.ready is not None, _is_asleep(child.pid)
    return PoolRank(seat.rank, seat.slot, seat.device, seat.incarnation, child.pid, is_ready, attach_ms, is_asleep)


def _is_asleep(pid: int) -> bool:
    """Whether the process's main thread, which does a rank's work, neither runs nor waits for a processor now."""
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it has just died
        return False
    try:
        stat = os.read(file, 512)
    except OSError:
        return False
    finally:
        os.close(file)
    return stat.rpartition(b")")[2].split(maxsplit=1)[0] != b"R"
