"""A launcher of stand-ins, as a test runs and watches it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from elasticmoe.common.config import environment_of
from elasticmoe.common.record import DeploymentRecord, read_record
from tests.procs.waiting import processes_of, wait_until

ROOT = Path(__file__).parent.parent.parent
ALL = {"store": "store", "hmm": "idle", "pool": "pool", "scaler": "scaler", "router": "router"}
SERVING = "is served at"


class Run:
    """`elasticmoe up` as a process of its own, with stand-ins (stand_in.py). Its output is read line by line.

    `settings` are fields of elasticmoe.common.config by name. Owned by the test, until `close`.
    """

    def __init__(self, home: Path, run_dir: Path, behaviours: dict[str, str], *flags: str, **settings: object) -> None:
        self.run_dir = run_dir
        self.lines: list[str] = []
        up = ["up", "--model", "oracle", "--port", "0", "--admin-port", "0", "--run-dir", str(run_dir), *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.procs.stand_in", "elasticmoe", json.dumps(behaviours), *up],
            cwd=ROOT,
            env=os.environ | {"ELASTICMOE_HOME": str(home), "COLUMNS": "500"} | environment_of(settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,  # else lines wait in a buffer that select() does not see
        )

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def read(self, until: str, timeout_s: float = 90.0) -> str:
        """Read lines until one contains `until`."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.output], [], [], left)[0]:
                break
            line = self.output.readline().decode()
            if not line:
                raise AssertionError(f"ended before {until!r}:\n{''.join(self.lines)}")
            self.lines.append(line)
            if until in line:
                return line.strip()
        raise AssertionError(f"no {until!r} within {timeout_s:g} s:\n{''.join(self.lines)}")

    def end(self, timeout_s: float = 90.0) -> int:
        """Wait for the end and take the rest of the output."""
        code = self.process.wait(timeout_s)
        self.lines += self.output.read().decode().splitlines(keepends=True)
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def record(self) -> DeploymentRecord:
        record = read_record(self.run_dir)
        assert record is not None
        return record

    def pids(self) -> list[tuple[str, int]]:
        return [(process.name, process.pid) for process in self.record().processes]

    def pid(self, name: str) -> int:
        return dict(self.pids())[name]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.output.close()
        wait_until(lambda: not processes_of(self.run_dir), "all processes gone")


Start = Callable[..., Run]


def store_command(run_dir: Path, command: str) -> bytes:
    """Send one command to the store of a run directory; its raw answer, empty when it does not answer."""
    password = (run_dir / "secrets/store.password").read_text()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60.0)
            connection.connect(str(run_dir / "sockets/store.sock"))
            connection.sendall(f"AUTH {password}\r\n{command}\r\nECHO done\r\n".encode())
            answer = b""
            while not answer.endswith(b"done\r\n") and (part := connection.recv(4096)):
                answer += part
            return answer
    except OSError:
        return b""
