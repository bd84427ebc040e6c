"""`python -m services.worker.template CONTROL_FD POOL_PID GUARDIAN_PID`: has everything imported, and forks standbys.

The pool starts it and asks it for each standby. What has been imported is frozen: the garbage collector of a forked
process would otherwise walk all of it, and so copy every page that is shared with this one. That took 130 ms of CPU in
the midst of an attach that takes 15.

A standby is no child of this process, which dies with the pool: it is forked twice, so that the kernel makes it a child
of its *guardian*, the launcher, and kills it when that one ends (ADR 16). Where there is no launcher, the guardian is
the pool.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time

from common.config import PoolConfig, load
from common.fdchannel import Channel
from common.protocol import pool as pool_messages
from common.protocol.errors import ElasticMoEError, Unavailable
from common.protocol.pool import ToPool
from common.protocol.standby import TO_TEMPLATE, Fork, Forked
from common.ties import end_with_parent

_ADOPTED_TURN_S = 0.0005


def main() -> int:
    """Run until the pool ends or closes the socket; exit status 0."""
    control, pool, guardian = (int(argument) for argument in sys.argv[1:])
    end_with_parent(pool)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to translate
    import services.worker.rank  # noqa: F401 - imported for the processes that are forked from here

    config = load(PoolConfig)
    channel: Channel[Fork] = Channel.of(control, "template:0", TO_TEMPLATE)
    gc.collect()
    gc.freeze()
    poller = select.poll()
    poller.register(control, select.POLLIN)
    while True:
        poller.poll()
        try:
            _, fds = channel.receive()
        except Unavailable:  # the pool is gone, or wants no more
            return 0
        if _fork_twice():
            for fd in fds:
                os.close(fd)
            continue
        channel.close()
        os._exit(_be_standby(config, fds[0], guardian))


def _fork_twice() -> bool:
    """Whether this is still the template; False in a grandchild of it, whose parent has ended."""
    try:
        child = os.fork()
    except OSError as error:  # the socket's end tells the pool
        print(f"no standby can be forked: {error.strerror}", file=sys.stderr, flush=True)
        return True
    if child:
        os.waitpid(child, 0)
        return True
    parent = os.getpid()
    try:
        if os.fork():
            os._exit(0)
    except OSError:
        os._exit(1)
    while os.getppid() == parent:  # it is ending
        time.sleep(_ADOPTED_TURN_S)
    return False


def _be_standby(config: PoolConfig, fd: int, guardian: int) -> int:
    """What a forked process does; its exit status."""
    end_with_parent(guardian)
    from services.worker.standby import standby_main

    channel: Channel[ToPool] = Channel.of(fd, f"standby:{os.getpid()}", pool_messages.CODEC)
    try:
        channel.send(Forked(os.getpid()))
        return standby_main(config, channel)
    except ElasticMoEError as error:  # the pool is gone
        print(f"standby: {error.message}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
