"""A pool's processes, standbys and ranks, as the pool sees them. None of them is its child as the system counts."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress

from elasticmoe.common.fdchannel import Channel, close_all
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import PoolRank, RankReady
from elasticmoe.common.protocol.standby import Forked, FromStandby, SeatRecord

_RECEIVE_MS = 100  # for the rest of a message that has begun to come
_EXIT_CODE = 52 - 3  # proc(5) counts from 1, and the first two fields are cut off


class Child:
    """One process and what the pool knows of it. Owned by the pool, with its channel and its pidfd until `close`.

    `pid` 0 and `pidfd` -1: it has been asked for and is not there yet. `channel` None: nothing more is said, by a rank
    that serves, or by one that an earlier pool started. `seat` None: a standby.
    """

    def __init__(self, channel: Channel[FromStandby] | None) -> None:
        self.channel = channel
        self.pid = 0
        self.pidfd = -1
        self.started_at = time.monotonic()
        self.seat: StartRank | None = None
        self.ready: RankReady | None = None
        self.failure: Refused | None = None
        self.kill_at: float | None = None  # SIGKILL is due, also once it is there

    @property
    def fds(self) -> list[int]:
        """What the pool has to watch."""
        return [*([self.channel.fileno()] if self.channel else ()), *([self.pidfd] if self.pidfd >= 0 else ())]

    def open(self, pid: int) -> None:
        """It is the process `pid`. Raises Unavailable where it has ended or the system gives no descriptor."""
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise Unavailable(f"process {pid} cannot be watched: {error.strerror}", code="no_standby") from None
        self.pid = pid

    def receive(self) -> bool:
        """Take a message that has begun to come; whether its seat's record is another one now. At the end of the other
        side `channel` becomes None. Raises Unavailable as `open` does, then too."""
        assert self.channel is not None
        try:
            received, fds = self.channel.receive(deadline_ms=_RECEIVE_MS)
            close_all(fds)
            if not isinstance(received.body, Forked):
                return True
        except ElasticMoEError:
            self.close_channel()
            return self.seat is not None
        except BaseException:  # what it said is lost
            self.close_channel()
            raise
        try:
            self.open(received.body.pid)
        except BaseException:  # it leaves
            self.close_channel()
            raise
        return False

    def look_at(self, record: SeatRecord | None) -> bool:
        """Take over what its seat's record says; whether it has become ready."""
        if record is None or self.seat is None or record.seat.incarnation != self.seat.incarnation:
            return False  # it has not written yet
        has_come = self.ready is None and record.ready is not None
        self.ready, self.failure = record.ready, record.failure
        return has_come

    def has_ended(self) -> bool:
        """Whether the process has ended, or will never be there."""
        if self.pidfd < 0:
            return self.channel is None
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended. One that is not there yet gets it when it comes."""
        if self.pidfd < 0:
            self.kill_at = time.monotonic()
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def exit_code(self) -> int | None:
        """How the process, which has ended, did: negative for a signal; None where nobody knows any more. Reaps it
        where it was a child of this process; of another's child the kernel tells until that one reaps it."""
        if self.pidfd < 0:
            return None
        try:
            info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return _exit_code_of_zombie(self.pid)
        if info is None:
            return None
        return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status

    def close_channel(self) -> None:
        """Nothing more is said. Idempotent."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def close(self) -> None:
        """Let go of it; a standby leaves then. Idempotent."""
        self.close_channel()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def describe(self, seat: StartRank) -> PoolRank:
        """The rank, for the scaler."""
        ready = self.ready
        return PoolRank(
            seat.rank,
            seat.slot,
            seat.device,
            seat.incarnation,
            self.pid,
            ready=ready is not None,
            attach_ms=ready.attach_ms if ready else 0.0,
            is_asleep=self._is_asleep(),
            computes_by=ready.computes_by if ready else "",
        )

    def _is_asleep(self) -> bool:
        """Whether its main thread, which does a rank's work, neither runs nor waits for a processor now."""
        fields = _stat(self.pid)
        return bool(fields) and fields[0] != b"R"


def _stat(pid: int) -> list[bytes]:
    """The fields of a process's /proc/PID/stat behind its name, its state first; empty where there is none."""
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return os.read(file, 1024).rpartition(b")")[2].split()
    except OSError:
        return []
    finally:
        os.close(file)


def _exit_code_of_zombie(pid: int) -> int | None:
    fields = _stat(pid)
    return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE])) if fields and fields[0] == b"Z" else None
