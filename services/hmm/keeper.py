"""The keeper: a process that holds file descriptors and does nothing else, so that memory outlives the HMM.

Run as `python -m elasticmoe.services.hmm.keeper`. It loads neither numpy nor torch, has no state on disk and never maps
what it holds: it has as little reason to fail as a process can have.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import sys
from typing import Final

from elasticmoe.common.config import KeeperConfig
from elasticmoe.common.fdchannel import Channel, Listener, close_all
from elasticmoe.common.process import leave, run_service
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError, ProtocolError, Unavailable
from elasticmoe.common.protocol.keeper import TO_KEEPER, Fetch, Forget, Keep, Kept
from elasticmoe.common.protocol.limits import FDS_MAX
from elasticmoe.common.protocol.replies import Ack, refusal
from elasticmoe.common.stop_signals import StopSignals
from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.transport import new_identity

FDS_SPARE: Final = 320  # of the open files that are allowed: for channels, and what one message brings
CHANNELS_MAX: Final = 16
_RECEIVE_MS: Final = 1_000


class Keeper:
    """The loop and the descriptors. Owns both."""

    def __init__(self, config: KeeperConfig) -> None:
        """Raises Conflict when another keeper runs in this run directory."""
        self._identity = new_identity("keeper")
        self._listener = Listener(config.socket("keeper"))
        self._log = get_logger("keeper")
        self._kept: dict[str, int] = {}
        self._kept_max = max(0, open_files_max() - FDS_SPARE)
        self._channels: dict[int, Channel[Keep | Forget | Fetch]] = {}
        self._signals = StopSignals(self.stop)
        self._is_stopping = False

    def stop(self) -> None:
        """Let `run` return."""
        self._is_stopping = True

    def run(self) -> None:
        """Serve until a signal."""
        self._signals.listen()
        self._log.info("keeper ready", pid=os.getpid(), descriptors_max=self._kept_max)
        while not self._is_stopping:
            poller = select.poll()
            for fd in (self._signals.fileno(), self._listener.fileno(), *self._channels):
                poller.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poller.poll(60_000)}
            for fd in ready & set(self._channels):
                self._serve(fd)
            if self._listener.fileno() in ready:
                self._accept()

    def _accept(self) -> None:
        try:
            channel = self._listener.accept(self._identity, TO_KEEPER)
        except ElasticMoEError as error:
            self._log.warning("connection refused", code=error.code, reason=error.message)
            return
        if channel is None:
            return
        if len(self._channels) >= CHANNELS_MAX:
            self._log.warning("connection refused", code="too_many", limit=CHANNELS_MAX)
            channel.close()
            return
        self._channels[channel.fileno()] = channel

    def _serve(self, fd: int) -> None:
        channel = self._channels[fd]
        try:
            received, fds = channel.receive(deadline_ms=_RECEIVE_MS)
            if isinstance(received.body, Fetch):
                self._catch_up(fd)
            answer, answer_fds = self._handle(received.body, fds)
            with contextlib.suppress(Unavailable):  # it has died: what it had sent before is taken all the same
                channel.send(answer, answer_fds, deadline_ms=_RECEIVE_MS)
        except ElasticMoEError as error:
            if isinstance(error, ProtocolError):
                self._log.warning("bad message", code=error.code, reason=error.message)
                if error.code == "version_mismatch":  # told, so that the other side can say why it does not start
                    channel.refuse(error, deadline_ms=_RECEIVE_MS)
            del self._channels[fd]
            channel.close()

    def _catch_up(self, asking: int) -> None:
        """Take what others have sent: who asks for everything may come after one that has just died."""
        for fd in [one for one in self._channels if one != asking]:
            while fd in self._channels and self._channels[fd].is_readable:
                self._serve(fd)

    def _handle(self, body: Keep | Forget | Fetch, fds: list[int]) -> tuple[Message, tuple[int, ...]]:
        if len(fds) != (len(body.names) if isinstance(body, Keep) else 0):
            close_all(fds)
            return refusal(ProtocolError(f"{type(body).__name__} came with {len(fds)} descriptors")), ()
        if isinstance(body, Fetch):
            names = tuple(sorted(name for name in self._kept if name > body.after))[:FDS_MAX]
            return Kept(names), tuple(self._kept[name] for name in names)
        if isinstance(body, Keep) and len(self._kept.keys() | set(body.names)) > self._kept_max:
            close_all(fds)
            held = f"{len(self._kept)} descriptors are held, and {self._kept_max} can be"
            text = f"{held}: allow more open files (ulimit -n)"
            return refusal(ElasticMoEError(text, code="too_many")), ()
        close_all([self._kept.pop(name) for name in set(body.names) & self._kept.keys()])
        if isinstance(body, Keep):
            for name, fd in zip(body.names, fds, strict=True):
                if name in self._kept:  # named twice
                    os.close(self._kept[name])
                self._kept[name] = fd
        return Ack(), ()

    def close(self) -> None:
        """Close everything; memory that only the keeper held is gone then."""
        for channel in self._channels.values():
            channel.close()
        self._listener.close()
        close_all(self._kept.values())
        self._signals.close()


def open_files_max() -> int:
    """How many files this process may have open, once it has asked for as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def run(config: KeeperConfig) -> None:
    """Until SIGTERM or SIGINT."""
    keeper = Keeper(config)
    try:
        keeper.run()
    finally:
        keeper.close()


if __name__ == "__main__":
    leave(run_service("keeper", KeeperConfig, run))
