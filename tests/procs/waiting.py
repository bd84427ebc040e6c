"""Waiting for what another process does: always for a condition, always with a deadline."""

from __future__ import annotations

import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_TURN_S = 0.01


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = 30.0) -> T:
    """The first true value of `condition`. Fails the test, naming `what`, when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        is_late = time.monotonic() > deadline  # before the look: it counts though this process stood still before it
        if value := condition():
            return value
        if is_late:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        threading.Event().wait(_TURN_S)


def processes_of(run_dir: Path) -> dict[int, str]:
    """Every living process that was started for a run directory, by its environment: pid -> command line."""
    mark = b"ELASTICMOE_RUN_DIR=" + os.fsencode(run_dir)
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command:  # a zombie has none
                    found[int(entry.name)] = command
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or it is somebody else's
    return found


def _ports_of_this_process() -> Iterator[int]:
    """Ports below those that the kernel gives out by itself, so that no connection of another test takes one before it
    is used. Each worker of pytest has a share of its own; another run on this machine most likely begins elsewhere."""
    lowest, count = 12_000, 1_000
    kernel_gives_from = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    shares = max(8, (kernel_gives_from - lowest) // count)
    share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % shares
    begins = random.randrange(count)
    for turn in itertools.count(begins):
        yield lowest + share * count + turn % count


_PORTS = _ports_of_this_process()


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens now, and that is given out once: two calls never have the same."""
    for port in itertools.islice(_PORTS, 1_000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("each of a thousand ports of 127.0.0.1 is in use")
