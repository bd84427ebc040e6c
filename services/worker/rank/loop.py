"""What the loops of leading and following ranks have in common: a seat's process from its first word to its last."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.protocol.scaler import RankReady
from elasticmoe.common.stop_signals import StopSignals
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.rank.lockstep import Lockstep
from elasticmoe.services.worker.rank.parts import SeatParts

log = get_logger("rank")

IDLE_MS = 500  # the longest sleep, and so the slowest beat of an idle rank's status
BUSY_MS = 5  # the longest sleep of a rank that does not step and has something else to do
LOOK_S = 0.01  # how often a stepping rank looks at its descriptors


class SeatLoop(ABC):
    """One seat's process. A context manager: leaving it unmaps the memory and closes the sockets. Owned by the thread
    that made it; only `stop` may come from elsewhere. `is_stopping`: it was told to stop, or has left, and takes no
    further turn.

    `run` is `start`, then `turn` and `wait` in turns, then `finish`; what drives it otherwise does the same.
    """

    def __init__(self, parts: SeatParts, tell_ready: Callable[[RankReady], None], leader: int | None = None) -> None:
        """`tell_ready` is called once, in `start`. `leader`: the slot that leads the replica, if it is not this one."""
        self._seat = seat = parts.seat
        self._clock = parts.clock
        self._server = parts.server
        self._hmm = parts.hmm
        self._fence = parts.fence
        self._memory = parts.memory
        self._barrier = parts.barrier
        self._exchange = parts.exchange
        self._revision = parts.revision
        self._use_cores = parts.use_cores
        self._ready = RankReady(
            seat.rank, seat.slot, seat.incarnation, parts.attach_ms, parts.build_ms, parts.computes_by
        )
        self._tell_ready = tell_ready
        routings = parts.memory.routings
        self._lockstep = Lockstep(parts.barrier, parts.exchange, routings, seat.slot, parts.clock, leader)
        parts.exchange.listen(lambda: parts.hmm.hear(parts.clock.monotonic()))
        self._look_at = 0.0
        self.is_stopping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._barrier.leave()
        self._exchange.close()
        self._close()
        self._hmm.close()
        self._server.close()
        self._memory.close()

    @abstractmethod
    def _close(self) -> None:
        """Close what is not everybody's."""

    def stop(self) -> None:
        """Let `run` return."""
        self.is_stopping = True

    def run(self) -> None:
        """Serve until SIGTERM, or until it has left. Raises StepTimedOut when a peer stays away too long,
        ElasticMoEError `memory_replaced`."""
        monotonic = self._clock.monotonic
        signals = StopSignals(self.stop)
        signals.listen()
        self._server.watch(signals.fileno())
        try:
            self.start(monotonic())
            while not self.is_stopping:
                wait_ms = self.turn(monotonic())
                if wait_ms:
                    self.wait(wait_ms)
            self.finish()
        finally:
            self._server.unwatch(signals.fileno())
            signals.close()

    def start(self, now: float) -> None:
        """Go on with what the seat's last rank has left, and be there for all others."""
        self._take_over(now)
        self._barrier.join(_number_of(self._seat.incarnation))
        self._server.watch(self._memory.doorbells[self._seat.slot])
        ready = self._ready
        failpoint("rank.ready")
        self._tell_ready(ready)
        self._hmm.applied(self._revision)
        log.info("attached", device=self._seat.device, attach_ms=ready.attach_ms, build_ms=ready.build_ms)

    @abstractmethod
    def _take_over(self, now: float) -> None:
        """Go on with what the seat's last rank has left, before this one joins the others."""

    @abstractmethod
    def turn(self, now: float) -> int:
        """Do what there is to do: messages, memory, and one step. Returns how many milliseconds the rank may sleep at
        most (`wait`) before its next turn; 0 for none.

        Blocks for other ranks only: at a step's barrier, and in its exchange. Where the barrier gives up waiting for
        them, the next turn goes on waiting, and does nothing else but hear the HMM: one that has lost the memory has
        ended those who are waited for, or will.
        """

    def wait(self, wait_ms: int) -> None:
        """Sleep until a message comes, or something else to look at, at most so long; and look at it."""
        self._look(self._server.poll(wait_ms), self._clock.monotonic())

    @abstractmethod
    def finish(self) -> None:
        """Tell of what ends with this rank."""

    def _look(self, readable: set[int], now: float) -> None:
        self._look_at = now + LOOK_S
        if self._memory.doorbells[self._seat.slot] in readable:
            self._barrier.hear()
        for handed in self._hmm.look(readable, now):
            failpoint("rank.apply")
            self._memory.take(*handed)

    def _sync(self) -> bool:
        """Follow to the present generation (see Lockstep.sync), with this rank's part of the machine's cores."""
        is_new = self._lockstep.sync()
        if is_new and self._lockstep.is_member:
            self._use_cores(self._lockstep.members.bit_count())
        return is_new

    def _change_memory(self) -> None:
        """A slice of what the HMM asked for."""
        if self._memory.is_changing and (revision := self._memory.advance(self._resize_kv)):
            log.info("memory changed", revision=revision)
            failpoint("rank.applied")
            self._hmm.applied(revision)

    @abstractmethod
    def _resize_kv(self, num_blocks: int) -> bool:
        """See Mapped.advance."""


def _number_of(incarnation: str) -> int:
    """64 bits, not 0, by which the barrier tells it from others."""
    return int.from_bytes(hashlib.blake2b(incarnation.encode(), digest_size=8).digest()) | 1
