"""`python -m elasticmoe.services.router.text.forkserver DIRECTORY FD`: loads a tokenizer once, then forks workers.

One thread, no loop of its own beyond this file, nothing that a request can reach: it forks, kills and reaps. A worker
is there in milliseconds and shares the tokenizer's memory. FD is a socket of kind SOCK_SEQPACKET; when its other end is
closed, or the process that started this one dies, everything here ends.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.ties import end_with_parent
from elasticmoe.services.router.text import process
from elasticmoe.services.router.text.codec import TextCodec, load_codec
from elasticmoe.services.router.text.worker import serve

ORDER = struct.Struct("<cIQ")  # FORK with a socket, or KILL; the worker's number; its memory in bytes
ENDING = struct.Struct("<Ii")  # the number of a worker that has ended, and its exit status, negative for a signal
NOT_STARTED = 1 << 16  # in place of the status, of one that never was: no process, memory or descriptor for it
FORK, KILL = b"f", b"k"


class ForkServer:
    """The workers that live, by number, with their pidfds."""

    def __init__(self, control: socket.socket, codec: TextCodec) -> None:
        self._control = control
        self._codec = codec
        self._workers: dict[int, tuple[int, int]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, None)

    def run(self) -> None:
        """Until the router closes its end."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._reap(key.data)
                elif not self._take_order():
                    for pid, _pidfd in self._workers.values():
                        os.kill(pid, signal.SIGKILL)
                    return

    def _take_order(self) -> bool:
        raw, fds, _flags, _address = socket.recv_fds(self._control, ORDER.size, 1)
        if not raw:
            return False
        kind, number, memory_bytes = ORDER.unpack(raw)
        if kind == FORK and not fds:  # the limit of open files is reached: the kernel has dropped it
            self._tell_ending(number, NOT_STARTED)
        elif kind == FORK:
            with socket.socket(fileno=fds[0]) as sock:
                self._fork(number, sock, memory_bytes)
        elif number in self._workers:  # not reaped yet, so its process id is still its own
            os.kill(self._workers[number][0], signal.SIGKILL)
        return True

    def _fork(self, number: int, sock: socket.socket, memory_bytes: int) -> None:
        """A start that fails half-way costs that worker only, and the router is told."""
        parent, pid, pidfd = os.getpid(), -1, -1
        try:
            pid = os.fork()
            if pid == 0:
                self._become_worker(parent, sock, memory_bytes)
            pidfd = os.pidfd_open(pid)
            self._selector.register(pidfd, selectors.EVENT_READ, number)
        except (OSError, MemoryError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            print(f"elasticmoe-router: a text worker could not be started: {why}", file=sys.stderr)
            if pid > 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if pidfd >= 0:
                os.close(pidfd)
            self._tell_ending(number, NOT_STARTED)
        else:
            self._workers[number] = (pid, pidfd)

    def _become_worker(self, parent: int, sock: socket.socket, memory_bytes: int) -> None:
        """Never returns."""
        try:
            end_with_parent(parent)
            process.be_first_to_go()
            self._control.close()
            self._selector.close()
            for _pid, pidfd in self._workers.values():
                os.close(pidfd)
            serve(sock, self._codec, memory_bytes)
        except OSError:  # the router has gone, or wants no answer any more
            pass
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        finally:
            os._exit(0)

    def _reap(self, number: int) -> None:
        pid, pidfd = self._workers.pop(number)
        self._selector.unregister(pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        self._tell_ending(number, os.waitstatus_to_exitcode(status))

    def _tell_ending(self, number: int, status: int) -> None:
        with contextlib.suppress(BlockingIOError):  # a router that does not read gets on without
            self._control.send(ENDING.pack(number, status), socket.MSG_DONTWAIT)


def main() -> int:
    """The exit status."""
    end_with_parent(os.getppid())
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the router says when it is the end
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[2]))
    try:
        codec = load_codec(Path(sys.argv[1]))
        codec.table  # noqa: B018 - made here, so that the workers share it
    except ElasticMoEError as error:
        print(f"elasticmoe-router: text workers: {error.message}", file=sys.stderr)
        return 1
    gc.collect()
    gc.freeze()  # a collection in a worker would write to every object, and so copy the pages that it shares
    process.give_memory_back()
    try:
        control.sendall(codec.digest.encode())
        ForkServer(control, codec).run()
    except BrokenPipeError:  # the router has ended meanwhile
        return 0
    except OSError as error:  # no process or no memory for one: the router starts a new fork server, which has room
        print(f"elasticmoe-router: text workers: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
