"""`python -m elasticmoe.services.worker.pool.template PATH GUARDIAN_PID`: imports everything, and forks standbys.

What has been imported is frozen: the garbage collector of a forked process would otherwise walk all of it, and so copy
every page that is shared with this one. That took 130 ms of CPU in the midst of an attach that takes 15.

Neither this process nor a standby stays the child of whoever started it. Each is forked once more, so that the kernel
makes it a child of its *guardian*, the launcher, and kills it when that one ends (ADR 16). So the next pool finds it at
PATH, a Unix socket, and has standbys at once; importing would take seconds, and processor time that ranks compute with.
Where there is no launcher, the pool is the guardian.

Its standard input is a socket of whoever started it, and closed once it listens: so its end tells that it does, or that
it never will.

`python -m elasticmoe.services.worker.pool.template --once FD GUARDIAN_PID` becomes a standby, which talks over FD.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import stat
import sys
import time
from pathlib import Path

from elasticmoe.common.config import PoolConfig, keep_torch_alone, load
from elasticmoe.common.fdchannel import DESCRIPTORS_CUT, Channel, Listener, close_all
from elasticmoe.common.protocol import pool as pool_messages
from elasticmoe.common.protocol.errors import Conflict, ElasticMoEError, ProtocolError
from elasticmoe.common.protocol.pool import ToPool
from elasticmoe.common.protocol.standby import TO_TEMPLATE, Fork, Forked
from elasticmoe.common.ties import end_with_parent

_IDENTITY = "template:0"
_ADOPTED_TURN_S = 0.0005
_RECEIVE_MS = 200  # for the rest of a message that has begun to come
_NOTHING = -1
_POOLS_MAX = 64  # one is there, as a rule


def main() -> int:
    """Run until the guardian ends; the exit status."""
    place, guardian = sys.argv[-2], int(sys.argv[-1])
    _leave_parent()
    end_with_parent(guardian)
    os.setpgid(0, 0)  # who ends the pool's process group means the pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to translate
    config = load(PoolConfig)
    if sys.argv[1] == "--once":
        return _be_standby(config, int(place))
    try:
        listener = Listener(Path(place))  # what a pool asks for meanwhile waits
    except Conflict:  # another one is there
        return 0
    _close_lifeline()
    keep_torch_alone()
    gc.disable()  # next to nothing of what is imported is garbage, and looking for it takes a tenth of the time
    import elasticmoe.services.worker.rank.assembly  # noqa: F401 - imported for the processes that are forked from here

    gc.collect()
    gc.freeze()
    gc.enable()
    fd = _serve(listener)
    return _be_standby(config, fd, guardian)


def _close_lifeline() -> None:
    """The standard input's other end tells whoever started this process that it listens now."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, sys.stdin.fileno(), inheritable=True)
    os.close(null)


def _serve(listener: Listener) -> int:
    """Fork for whoever asks. Returns in forked processes only: the descriptor over which this one talks to its pool."""
    channels: dict[int, Channel[Fork]] = {}
    poller = select.poll()
    poller.register(listener.fileno(), select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll()}
        for fd in ready & set(channels):
            sent = _receive(channels[fd])
            if sent is None:
                poller.unregister(fd)
                channels.pop(fd).close()
            if sent is None or sent == _NOTHING:
                continue
            if _fork_orphan():
                for channel in channels.values():
                    channel.close()
                listener.drop()
                return sent
            os.close(sent)
        new = _accept(listener) if listener.fileno() in ready else None
        if new is not None and len(channels) < _POOLS_MAX:
            channels[new.fileno()] = new
            poller.register(new.fileno(), select.POLLIN)
        elif new is not None:
            new.close()


def _accept(listener: Listener) -> Channel[Fork] | None:
    try:
        return listener.accept(_IDENTITY, TO_TEMPLATE)
    except ElasticMoEError as error:  # another user's, or one that no descriptor was left for
        print(f"template: {error.message}", file=sys.stderr, flush=True)
        return None


def _receive(channel: Channel[Fork]) -> int | None:
    """The socket that comes with an order. _NOTHING where this process had no descriptor left for it: the socket's end
    tells the pool, as where no process can be forked. None at the other side's end, or where that breaks the protocol:
    it is told so, and the connection is over."""
    fds: list[int] = []
    try:
        _, fds = channel.receive(deadline_ms=_RECEIVE_MS)
        if len(fds) == 1 and stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
            return fds[0]
        raise ProtocolError(f"an order comes with one socket; this one with {len(fds)} descriptors")
    except ProtocolError as error:
        if error.code == DESCRIPTORS_CUT:
            print(f"no standby can be forked: {error.message}", file=sys.stderr, flush=True)
            return _NOTHING
        close_all(fds)
        channel.refuse(error, deadline_ms=_RECEIVE_MS)
    except ElasticMoEError:
        pass  # the pool is gone
    return None


def _fork_orphan() -> bool:
    """Whether this is the forked process, a child of nobody who still lives here. Where none can be forked, the end of
    its socket tells the pool."""
    try:
        child = os.fork()
    except OSError as error:
        print(f"no standby can be forked: {error.strerror}", file=sys.stderr, flush=True)
        return False
    if child:
        os.waitpid(child, 0)
        return False
    try:
        _leave_parent()
    except OSError:
        os._exit(1)
    return True


def _leave_parent() -> None:
    """Go on in a forked process, once this one has ended: whoever takes in orphans is its parent then."""
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(_ADOPTED_TURN_S)


def _be_standby(config: PoolConfig, fd: int, guardian: int | None = None) -> int:
    """What a forked process does; its exit status. `guardian`: where the kernel has not been told yet."""
    if guardian is not None:
        end_with_parent(guardian)
    from elasticmoe.services.worker.pool.standby import standby_main

    channel: Channel[ToPool] = Channel.of(fd, f"standby:{os.getpid()}", pool_messages.CODEC)
    try:
        channel.send(Forked(os.getpid()))
    except ElasticMoEError:  # the pool is gone
        return 0
    return standby_main(config, channel)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # to unload what has been imported takes long, and changes pages that are shared
