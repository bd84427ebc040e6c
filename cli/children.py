"""One child process of the launcher: start, watch, stop. Its output goes to a log file, its life ends with ours."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elasticmoe.cli.terminal import clean
from elasticmoe.common.record import ProcessRecord, start_ticks

_LOG_TAIL_BYTES = 16 * 1024
_LOG_LINE_CHARS_MAX = 400


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process that the launcher keeps running.

    `argv[0]` is an absolute path. `grace_s`: seconds between SIGTERM and SIGKILL. `awaits`: the Unix socket at which it
    answers, where others wait for that; `after`: names of children that have to answer before it starts. `sockets`:
    names of the launcher's listening sockets that it serves. `is_vital`: without it nobody is served, so a deployment
    in which it does not stay up ends. `is_outlived`: what it started may go on without it, and is ended after it when
    the deployment stops. `ends_after`: names of the only children that need it until they have ended: it is asked to
    end then, and waited for in its turn; empty: it is asked in its turn.
    """

    name: str
    argv: tuple[str, ...]
    grace_s: float = 10.0
    awaits: Path | None = None
    after: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    is_vital: bool = False
    is_outlived: bool = False
    ends_after: tuple[str, ...] = ()


class Child:
    """A running (or ended, not yet reaped) process. Owns its pidfd and its process group until `reap`."""

    def __init__(
        self,
        spec: ChildSpec,
        environment: Mapping[str, str],
        directory: Path,
        log: Path,
        listeners: Mapping[str, socket.socket],
    ) -> None:
        """Start it in its own process group with `directory` as working directory, and hand it those of `listeners`
        that it serves. Raises OSError."""
        self.spec = spec
        self._log = log
        fds = tuple(listeners[name].fileno() for name in spec.sockets)
        names = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(spec.sockets)} if fds else {}
        with open(log, "ab") as file:
            self._log_start = file.tell()
            self._popen = subprocess.Popen(
                tied_to_us(spec.argv, fds),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment) | names,
                cwd=directory,
                process_group=0,
                pass_fds=fds,
            )
        self.pidfd = os.pidfd_open(self._popen.pid)
        self._ticks = start_ticks(self._popen.pid) or 0
        self._started = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id; it stays reserved until `reap`."""
        return self._popen.pid

    def record(self, num_restarts: int) -> ProcessRecord:
        """How `deployment.json` names it."""
        return ProcessRecord(self.spec.name, self.pid, self._ticks, num_restarts)

    @property
    def age_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, waiting at most `timeout_s`. Does not reap."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(max(0, timeout_s) * 1e3))

    def terminate(self) -> None:
        """Ask it to end (SIGTERM to the process alone: it ends its own children in order)."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        except ProcessLookupError:
            pass  # it has ended; wait() and reap() see that

    def kill(self) -> None:
        """SIGKILL to the whole process group. Call before `reap` only: until then the group's number is ours."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nobody of the group is left

    def reap(self) -> int:
        """Collect an ended process and whatever is left of its group. Returns the exit code, negative for a signal."""
        self.kill()
        code = self._popen.wait(timeout=10)
        os.close(self.pidfd)
        return code

    def last_line(self) -> str:
        """The last line that this incarnation logged, shortened; empty when it logged nothing."""
        try:
            with open(self._log, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                start = self._log_start if self._log_start <= size else 0  # it was emptied meanwhile
                file.seek(max(start, size - _LOG_TAIL_BYTES))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return clean(_said(last)[:_LOG_LINE_CHARS_MAX])


def _said(line: str) -> str:
    """A line of a log in JSON as a line of text."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict) or "message" not in entry:
        return line
    return ": ".join(str(entry[key]) for key in ("code", "message") if key in entry)


def tied_to_us(argv: Sequence[str], fds: Sequence[int] = ()) -> list[str]:
    """The command that becomes `argv` and dies with the thread of ours that starts it; see child.py for `fds`."""
    wrapper = Path(__file__).with_name("child.py")
    handed = ",".join(map(str, fds)) or "-"
    return [sys.executable, "-I", "-S", str(wrapper), str(os.getpid()), handed, *argv]
