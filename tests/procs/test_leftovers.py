"""However a deployment ends, it leaves nothing outside of its run directory and the cache: the temporary folder, shared
memory and the home are as they were before. What killed processes left in the run directory goes with `down`, and with
the next `up`."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from elasticmoe.cli.main import main
from elasticmoe.common.record import read_record
from tests.procs.waiting import processes_of, wait_until
from tests.shared_memory import FOLDER, shared_memory

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent.parent


class Place:
    """A home, a temporary folder and a run directory of a user who has nothing yet."""

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary, self.run_dir = folder / "home", folder / "tmp", folder / "run"
        for path in (self.home, self.temporary):
            path.mkdir()
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("ELASTICMOE_", "XDG_"))}
        self.environment = clean | {"HOME": str(self.home), "TMPDIR": str(self.temporary)}

    def listing(self) -> set[str]:
        """All that lies in the places that are not a deployment's own."""
        cache = self.home / ".cache" / "elasticmoe"
        roots = (self.home, self.temporary, *(FOLDER / name for name in shared_memory()))
        found = {path for root in roots for path in (root, *root.rglob("*")) if cache not in (path, *path.parents)}
        return {str(path) for path in found if path != cache.parent}

    def up(self) -> subprocess.Popen[bytes]:
        """Start a deployment and use each of its parts once."""
        flags = ["--replicas", "1", "--devices", "host:1", "--device-memory", "256MiB", "--kv-memory", "8MiB"]
        flags += ["--port", "0", "--admin-port", "0", "--run-dir", str(self.run_dir)]
        launcher = subprocess.Popen(
            [sys.executable, "-m", "elasticmoe.cli.main", "up", "--model", "oracle", *flags],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def url() -> str | None:
            assert launcher.poll() is None
            record = read_record(self.run_dir)
            is_ours = record is not None and record.launcher.pid == launcher.pid and record.state == "serving"
            return record.url if record is not None and is_ours else None

        address = wait_until(url, "it serves", 150.0)
        # A conversation is the text workers' work.
        body = {"model": "oracle", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        return launcher

    def kill_all(self, launcher: subprocess.Popen[bytes]) -> None:
        """SIGKILL to everybody at once, as the kernel does where memory runs out."""
        for pid in (launcher.pid, *processes_of(self.run_dir)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()
        wait_until(lambda: not processes_of(self.run_dir), "no process left", 30.0)


@pytest.fixture
def place() -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="em-"))  # short: socket paths have a limit
    found = Place(folder)
    yield found
    for pid in processes_of(found.run_dir):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)


def test_a_deployment_that_is_killed_leaves_nothing_outside_of_its_run_directory(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = place.listing()
    launcher = place.up()
    environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in processes_of(place.run_dir)]
    children = [entries for entries in environments if b"TMPDIR=" + os.fsencode(place.temporary) not in entries]
    assert len(children) >= 7  # store, keeper, hmm, pool, scaler, router, a rank: all but the launcher
    inside = place.run_dir / "tmp"
    assert all(b"TMPDIR=" + os.fsencode(inside) in entries for entries in children)
    assert place.listing() == before
    (inside / "pymp-x").mkdir()  # what a library may have there when it is killed
    place.kill_all(launcher)
    assert place.listing() == before

    launcher = place.up()
    assert not (inside / "pymp-x").exists()
    place.kill_all(launcher)
    (inside / "pymp-x").mkdir()
    assert main(["down", "--run-dir", str(place.run_dir)]) == 0
    capsys.readouterr()
    assert {path.name for path in place.run_dir.iterdir()} == {"launcher.lock", "logs"}
    assert place.listing() == before


def test_who_makes_a_model_ends_with_the_launcher(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from elasticmoe.cli.console import make_console"
    code += "; from elasticmoe.cli.resolve import make_named; make_named('oracle', Path(sys.argv[1]), make_console())"
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "oracle")], cwd=ROOT, **silent)

    def maker() -> int | None:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        for pid in children:
            with suppress(OSError):  # it has just ended
                if b"elasticmoe.cli.maker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    return int(pid)
        return None

    pid = wait_until(maker, "a model is being made", 30.0)
    pidfd = os.pidfd_open(pid or 0)
    launcher.kill()
    launcher.wait()
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(60_000)  # the kernel ends it; it would have taken seconds to import what it needs
    os.close(pidfd)
    assert not (tmp_path / "oracle").exists()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("moment", ["starts", "serves"])
def test_a_benchmark_that_is_ended_ends_its_deployment(place: Place, end: signal.Signals, moment: str) -> None:
    before = place.listing()
    words = ["bench", "idle", "--model", "oracle", "--replicas", "1", "--output", str(place.home / "results")]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    # As in a terminal, whatever the tests were started by: what `nohup` or a shell's `&` has ignored stays so.
    command = ["env", "--default-signal=HUP,INT,TERM", sys.executable, "-m", "elasticmoe.cli.main", *words]
    bench = subprocess.Popen(command, cwd=ROOT, env=place.environment, **silent)  # type: ignore[call-overload]

    def run_dir() -> Path | None:
        found = [path / "run" for path in place.temporary.glob("em-bench-*")]
        record = read_record(found[0]) if found else None
        is_there = record is not None and (moment == "starts" or record.state == "serving")
        return found[0] if is_there else None

    where = place.run_dir
    try:
        where = wait_until(run_dir, f"its deployment {moment}", 150.0)
        assert processes_of(where)
        bench.send_signal(end)
        assert bench.wait(60) == 128 + signal.SIGINT
        assert processes_of(where) == {}
        assert place.listing() == before
    finally:
        bench.kill()
        bench.wait()
        for pid in processes_of(where):
            os.kill(pid, signal.SIGKILL)
