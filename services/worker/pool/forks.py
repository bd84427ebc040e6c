"""Where a pool has its processes from: the template (template.py), found or started, or nothing at all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from elasticmoe.common import fdchannel
from elasticmoe.common.fdchannel import Channel
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.standby import TO_POOL, Fork, FromStandby

_CONNECT_MS = 200
_SEND_MS = 200
COME_UP_S_MAX = 30.0  # until a template listens; it imports everything after that


class Forks:
    """The template as its pool sees it. It takes seconds to import everything; what is asked of it waits meanwhile, and
    nobody here does. Starts processes, so it belongs to the main thread. `path`: the template's socket; `guardian`: who
    becomes the parent of all processes."""

    def __init__(self, path: Path, identity: str, guardian: int) -> None:
        self._path = path
        self._identity = identity
        self._guardian = guardian
        self._channel: Channel[FromStandby] | None = None
        self._pidfd = -1
        self._lost: list[int] = []  # pidfds of those before it
        self._starters: list[subprocess.Popen[bytes]] = []  # they end at once, when they have forked
        self._started_at: float | None = None
        self._lifeline: socket.socket | None = None  # to one that was started: at its end it listens, or has ended
        self.connected_at = 0.0

    def fileno(self) -> int:
        """Readable when the template has ended: it says nothing. -1 without a connection."""
        return self._channel.fileno() if self._channel is not None else -1

    def connect(self) -> bool:
        """Whether the template can be asked, be it one that an earlier pool has left; else one has been started and
        will be there soon. Raises OSError, Unavailable where that one has ended, or did not come up in COME_UP_S_MAX:
        the next call starts another."""
        if self._channel is not None:
            return True
        self.reap()
        is_decided = self._is_decided()
        try:
            channel: Channel[FromStandby] = fdchannel.connect(
                self._path, self._identity, TO_POOL, deadline_ms=_CONNECT_MS
            )
        except ElasticMoEError:
            if is_decided:
                self._give_up_start()
                raise Unavailable("the template ended before it listened") from None
            self._start()
            return False
        try:
            self._pidfd = os.pidfd_open(channel.peer_pid())
        except BaseException:
            channel.close()
            raise
        self._give_up_start()
        self._channel, self.connected_at = channel, time.monotonic()
        return True

    def _start(self) -> None:
        now = time.monotonic()
        if self._started_at is None:
            self._lifeline, theirs = socket.socketpair()
            try:
                self._run(str(self._path), stdin=theirs.fileno())
            except BaseException:
                self._give_up_start()
                raise
            finally:
                theirs.close()
            self._started_at = now
        elif now - self._started_at > COME_UP_S_MAX:
            self._give_up_start()
            raise Unavailable(f"the template did not listen within {COME_UP_S_MAX:g} s")

    def _is_decided(self) -> bool:
        """Whether one that was started listens by now, or has ended."""
        if self._lifeline is None:
            return False
        try:
            return not self._lifeline.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def _give_up_start(self) -> None:
        self._started_at = None
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None

    def _run(self, *arguments: str, stdin: int = subprocess.DEVNULL, pass_fds: tuple[int, ...] = ()) -> None:
        # As this interpreter was started: with the working directory among the modules' places, or without it.
        command = [
            sys.executable,
            *(["-P"] if sys.flags.safe_path else []),
            "-m",
            "elasticmoe.services.worker.pool.template",
        ]
        self._starters.append(
            subprocess.Popen([*command, *arguments, str(self._guardian)], stdin=stdin, pass_fds=pass_fds)
        )

    def fork(self) -> Channel[FromStandby]:
        """Ask the template for a standby; the channel to it, which is the caller's. Only while connected. Raises
        OSError, Unavailable where the template does not take the order."""
        assert self._channel is not None
        ours, theirs = socket.socketpair()
        try:
            self._channel.send(Fork(), (theirs.fileno(),), deadline_ms=_SEND_MS)
        except ElasticMoEError as error:
            ours.close()
            raise Unavailable(f"the template takes no order: {error.message}") from None
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Channel(ours, self._identity, TO_POOL)

    def start_cold(self) -> Channel[FromStandby]:
        """Start a standby from nothing, without a template. The channel is the caller's. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            self._run("--once", str(theirs.fileno()), pass_fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Channel(ours, self._identity, TO_POOL)

    def reap(self) -> None:
        """Let go of processes that have ended."""
        self._starters = [starter for starter in self._starters if starter.poll() is None]
        for pidfd in list(self._lost):
            try:
                if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
                    continue
            except ChildProcessError:
                pass  # its guardian reaps it
            self._lost.remove(pidfd)
            os.close(pidfd)

    def lose(self) -> None:
        """Forget the template, which has ended or is about to. Idempotent."""
        self.close()
        if self._pidfd >= 0:
            self._lost.append(self._pidfd)
            self._pidfd = -1

    def kill(self) -> None:
        """End the template at once, if there is one. Whom it forked live on."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended
        self.lose()

    def close(self) -> None:
        """Leave the template to the next pool. Idempotent."""
        self._give_up_start()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
