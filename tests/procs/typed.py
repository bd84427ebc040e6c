"""What a page tells to type, typed into a shell: in a fresh home, by this user or by another one.

Ports are others than the pages say, so that nobody else on the machine is in the way; and the demo model's place in the
cache is taken by the model that a test gives, which serves the same API in a tenth of the time.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from elasticmoe.cli.resolve import models_recipe
from elasticmoe.common.record import read_record
from tests.markdown import Block
from tests.procs.deployment import STALL_S
from tests.procs.waiting import free_port, wait_until

_PAGE_S_MAX = 300.0
_END_S_MAX = 60.0
_PORT = re.compile(r"(?<=127\.0\.0\.1:)\d{4,5}\b|(?<=localhost:)\d{4,5}\b|(?<=port[ =])\d{4,5}\b|(?<=_PORT=)\d{4,5}\b")
_TAIL = 4_000


class Shell:
    """A fresh home, with the program in PATH. Owns `base` and all that runs in it until `discard`.

    `become`: a command line that runs the one behind it as the user `uid`, who owns the home then. `work`: the folder
    of the home in which is typed. `environment` may be changed before anything is.
    """

    def __init__(self, model: Path, *, uid: int | None = None, become: Sequence[str] = (), work: str = "work") -> None:
        self.base = Path(tempfile.mkdtemp(prefix="emd-"))  # short: socket paths have a limit
        self.home, self.runtime = self.base / "home", self.base / "run"
        self.work = self.home / work
        models = self.home / ".cache/elasticmoe/models"
        for folder in (self.work, self.runtime, models):
            folder.mkdir(parents=True)
        shutil.copytree(model, models / "demo")
        (models / "demo.recipe").write_text(models_recipe())
        self.ports = {"8000": str(free_port()), "8100": str(free_port())}
        self.environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "LANG": "C.UTF-8",
            "ELASTICMOE_PORT": self.ports["8000"],
            "ELASTICMOE_ADMIN_PORT": self.ports["8100"],
            "ELASTICMOE_RANK_STALL_S": str(STALL_S),
        }
        self.run_dir = self.runtime / f"elasticmoe-{os.geteuid()}" / "default"
        self.launcher: subprocess.Popen[bytes] | None = None
        self._become = become
        if uid is not None:
            for path in (self.base, *self.base.rglob("*")):
                os.chown(path, uid, uid)

    def start(self, argv: list[str]) -> None:
        """A deployment in the foreground of another terminal."""
        output = self.base / "up"
        self.launcher = self._popen(argv, output)

        def serves() -> bool:
            assert self.launcher is not None
            assert self.launcher.poll() is None, output.read_text()
            record = read_record(self.run_dir)
            return record is not None and record.state == "serving"

        wait_until(serves, "the deployment serves", 120.0)

    def type(self, blocks: list[Block]) -> str:
        """Type the blocks into one shell that stops at the first command that fails. Fails the test with it. Returns
        what was printed."""
        script = "set -e -o pipefail\n"
        for block in blocks:
            text = _PORT.sub(self._port, block.script)
            script += f"echo {shlex.quote('# ' + block.place)} >&2\n{text}"
        shell = self._popen(["bash", "-c", script], self.base / "typed", start_new_session=True)
        try:
            code: int | None = shell.wait(_PAGE_S_MAX)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:
                os.killpg(shell.pid, signal.SIGKILL)  # also what it left in the background
            except ProcessLookupError:
                pass
            shell.wait()
        typed = (self.base / "typed").read_text(errors="replace")
        place = [line for line in typed.splitlines() if line.startswith("# ")][-1:]
        assert code == 0, f"{place}: exit status {code}\n{typed[-_TAIL:]}"
        return typed

    def _port(self, match: re.Match[str]) -> str:
        return self.ports.setdefault(match[0], str(free_port()))

    def _popen(self, argv: Sequence[str], output: Path, *, start_new_session: bool = False) -> subprocess.Popen[bytes]:
        with open(output, "wb") as file:
            return subprocess.Popen(
                [*self._become, *argv],
                env=self.environment,
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=start_new_session,
            )

    def leave(self) -> None:
        """Stop what still runs, as a user would, and prove that nothing is left but the cache and what was typed."""
        down = self._popen(["elasticmoe", "down"], self.base / "down")
        assert down.wait(_END_S_MAX) == 0, (self.base / "down").read_text()
        if self.launcher is not None:
            assert self.launcher.wait(_END_S_MAX) == 0, (self.base / "up").read_text()
        self.wait_ended()
        assert list(self.runtime.iterdir()) == []
        assert {entry.name for entry in self.home.iterdir()} <= {self.work.name, ".cache"}

    def wait_ended(self) -> None:
        """Until nothing runs that was started here. Fails the test after ten seconds."""
        wait_until(lambda: not self.processes(), "no process left", 10.0)

    def processes(self) -> list[int]:
        """Every living process with this home, by its environment."""
        mark, found = b"HOME=" + os.fsencode(self.home), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (command := _environment_of(entry)) is not None and mark in command:
                found.append(int(entry.name))
        return found

    def discard(self) -> None:
        """Kill and remove what is left. Idempotent."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if self.launcher is not None:
            self.launcher.wait()
        shutil.rmtree(self.base, ignore_errors=True)


def _environment_of(process: Path) -> list[bytes] | None:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return None  # it has ended, or is somebody else's
