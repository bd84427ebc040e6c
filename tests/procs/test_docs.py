"""Every command block of README and docs, typed into a shell in the order of its page, on a fresh deployment.

A page that starts no deployment of its own finds one running: what `make up` starts. The home, the run directory and
the working directory are new. Ports are others than the pages say, so that nobody else on the machine is in the way;
and the demo model's place in the cache is taken by the tiny one, which serves the same API in a tenth of the time.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.record import read_record
from cli.resolve import models_recipe
from tests.markdown import ROOT, Block, blocks_of, commands, pages
from tests.procs.waiting import free_port, processes_of, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

PAGES = [page for page in pages() if commands(blocks_of(page))]
_PAGE_S_MAX = 300.0
_END_S_MAX = 60.0
_STARTS = re.compile(r"\b(?:elasticmoe|make) up\b")
_PORT = re.compile(r"(?<=127\.0\.0\.1:)\d{4,5}\b|(?<=localhost:)\d{4,5}\b|(?<=port[ =])\d{4,5}\b|(?<=_PORT=)\d{4,5}\b")
_TAIL = 4_000


class Shell:
    """A user's fresh home with the program in PATH. Owns `base` and all that runs in it until `leave`."""

    def __init__(self, model: Path) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="emd-"))  # short: socket paths have a limit
        self.home, self.runtime = self.base / "home", self.base / "run"
        for folder in (self.home / "work", self.runtime):
            folder.mkdir(parents=True)
        models = self.home / ".cache/elasticmoe/models"
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
        }
        self.run_dir = self.runtime / f"elasticmoe-{os.geteuid()}" / "default"
        self.launcher: subprocess.Popen[bytes] | None = None

    def start(self, argv: list[str]) -> None:
        """A deployment in the foreground of another terminal."""
        output = self.base / "up"
        with open(output, "wb") as file:
            self.launcher = subprocess.Popen(
                argv,
                env=self.environment,
                cwd=self.home / "work",
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

        def serves() -> bool:
            assert self.launcher is not None
            assert self.launcher.poll() is None, output.read_text()
            record = read_record(self.run_dir)
            return record is not None and record.state == "serving"

        wait_until(serves, "the deployment serves", 120.0)

    def type(self, blocks: list[Block]) -> None:
        """Type the blocks into one shell that stops at the first command that fails. Fails the test with it."""
        script = "set -e -o pipefail\n"
        for block in blocks:
            text = _PORT.sub(self._port, block.script)
            script += f"echo {shlex.quote('# ' + block.place)} >&2\n{text}"
        with open(self.base / "typed", "wb") as file:
            shell = subprocess.Popen(
                ["bash", "-c", script],
                env=self.environment,
                cwd=self.home / "work",
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
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

    def _port(self, match: re.Match[str]) -> str:
        return self.ports.setdefault(match[0], str(free_port()))

    def leave(self) -> None:
        """Stop what still runs, as a user would, and prove that nothing is left but the cache."""
        try:
            down = subprocess.run(
                ["elasticmoe", "down"],
                env=self.environment,
                cwd=self.home,
                capture_output=True,
                text=True,
                timeout=_END_S_MAX,
            )
            assert down.returncode == 0, down.stderr
            if self.launcher is not None:
                assert self.launcher.wait(_END_S_MAX) == 0, (self.base / "up").read_text()
            wait_until(lambda: not processes_of(self.run_dir), "no process left", 10.0)
            assert list(self.runtime.iterdir()) == []
            assert {entry.name for entry in self.home.iterdir()} <= {"work", ".cache"}
        finally:
            self.discard()

    def discard(self) -> None:
        """Kill and remove what is left. Idempotent."""
        if self.launcher is not None and self.launcher.poll() is None:
            self.launcher.kill()
            self.launcher.wait()
        shutil.rmtree(self.base, ignore_errors=True)


@pytest.fixture
def shell(model_folder: Callable[[str], Path]) -> Iterator[Shell]:
    made = Shell(model_folder("tiny-mixtral"))
    yield made
    made.discard()


def what_make_up_starts() -> list[str]:
    """The command line of `make up`, without the installation."""
    told = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", "install", "up"], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    program, *arguments = shlex.split(told.stdout)
    assert Path(program).name == "elasticmoe", told.stdout
    return [str(Path(sys.executable).with_name("elasticmoe")), *arguments]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_works_on_a_fresh_deployment(shell: Shell, page: Path) -> None:
    blocks = commands(blocks_of(page))
    if not any(_STARTS.search(block.script) for block in blocks):
        shell.start(what_make_up_starts())
    shell.type(blocks)
    shell.leave()


def test_a_command_that_fails_is_told_with_its_place(shell: Shell) -> None:
    page = ROOT / "README.md"
    blocks = [
        Block(page, 1, "sh", "true\n"),
        Block(page, 7, "sh", "elasticmoe status\n"),
        Block(page, 9, "sh", "true\n"),
    ]
    with pytest.raises(AssertionError, match=r"README\.md:7.*exit status 1"):
        shell.type(blocks)
