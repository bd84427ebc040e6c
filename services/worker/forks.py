"""The template process (template.py) as its pool sees it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from common.fdchannel import Channel
from common.protocol.errors import ElasticMoEError, Unavailable
from common.protocol.standby import TO_POOL, Fork, FromStandby

_SEND_MS = 200
_END_S = 5.0


class Forks:
    """A template, from its start until it has ended. It takes seconds to import everything; what is asked of it waits
    meanwhile, and nobody here does."""

    def __init__(self, identity: str, guardian: int) -> None:
        """Start it. Whom it forks become children of `guardian`. By the main thread: the template's life is tied to the
        thread that starts it. Raises OSError."""
        self._identity = identity
        ours, theirs = socket.socketpair()
        try:
            # As this interpreter was started: without the working directory among the modules' places, or with it.
            command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "services.worker.template"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), str(guardian)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel: Channel[FromStandby] = Channel(ours, identity, TO_POOL)

    def fileno(self) -> int:
        """Readable when it has ended: it says nothing."""
        return self._channel.fileno()

    def fork(self) -> Channel[FromStandby]:
        """Ask for a standby; the channel to it, which is the caller's. Raises OSError, Unavailable where the template
        does not take the order."""
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

    def has_ended(self) -> bool:
        """Whether it has; it is reaped then."""
        return self._process.poll() is not None

    def release(self) -> None:
        """Let it end once it has done what it was asked for. Idempotent."""
        self._channel.close()

    def kill(self) -> None:
        """End it at once. Whom it forked live on. Idempotent."""
        self._channel.close()
        self._process.send_signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # the kernel is at it; it is reaped with a later one
            self._process.wait(_END_S)
