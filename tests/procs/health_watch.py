"""A process that asks a router for its health, over and over: `python -m tests.procs.health_watch PORT PID`.

Ends when its stdin does, and prints the longest answer in seconds. A process of its own, so that what the test does in
the meantime is not what it measures. Time in which the router's loop or this process could have run, and others had the
processor, does not count: what is measured is the router, not the machine.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAUSE_S = 0.01


def waited_s(thread: int) -> float:
    """How long a thread has been able to run, and did not, because others had the processor."""
    with open(f"/proc/{thread}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[1]) / 1e9


def watch(port: int, pid: int) -> float:
    """Ask until stdin ends; the longest answer. `pid`: the router's, whose first thread has the loop."""
    longest = 0.0
    with socket.create_connection(("127.0.0.1", port), 60.0) as connection:
        print("watching", flush=True)
        while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
            waiting_s, begun, answer = waited_s(pid) + waited_s(os.getpid()), time.monotonic(), b""
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            while b'"ok"' not in answer:
                part = connection.recv(65_536)
                if not part:
                    raise ConnectionError("the router closed the connection")
                answer += part
            took_s = time.monotonic() - begun
            longest = max(longest, took_s - (waited_s(pid) + waited_s(os.getpid()) - waiting_s))
    return longest


class Watch:
    """`longest_s`: set once the watch has ended."""

    longest_s = 0.0


@contextmanager
def health_watched(port: int, pid: int) -> Iterator[Watch]:
    """Watch for the length of the block."""
    command = [sys.executable, "-m", "tests.procs.health_watch", str(port), str(pid)]
    watch = Watch()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "watching\n"
        yield watch
        out, _ = child.communicate("\n")
        watch.longest_s = float(out)


if __name__ == "__main__":
    print(watch(int(sys.argv[1]), int(sys.argv[2])))
