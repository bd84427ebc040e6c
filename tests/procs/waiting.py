"""Waiting for what another process does: always for a condition, always with a deadline."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
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


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
