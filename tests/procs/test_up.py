"""`elasticmoe up` with the real services: it serves, survives the death of each of them, and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticmoe.common.record import read_record
from tests.procs.deployment import Deployment
from tests.procs.waiting import processes_of, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(300)]

Deploy = Callable[..., Deployment]


def complete(url: str, **fields: Any) -> dict[str, Any]:
    """A greedy completion of the oracle model."""
    body = {"model": "oracle", "prompt": [5, 6, 7], "max_tokens": 16, "temperature": 0, "ignore_eos": True, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


LISTENING = "0A"


def tcp_descriptors(pid: int, *, listening: bool = False) -> list[str]:
    """The process's TCP sockets: those that listen, or all others."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    of_tcp = {f"socket:[{fields[9]}]" for fields in table if (fields[3] == LISTENING) == listening}
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(entry))
    return [target for target in found if target in of_tcp]


def test_it_serves_and_stops_cleanly(deploy: Deploy) -> None:
    deployment = deploy("oracle", served_name="oracle")
    for name in ("router", "scaler"):
        held = tcp_descriptors(deployment.launcher.pid, listening=True)
        assert set(tcp_descriptors(deployment.pids[name], listening=True)) < set(held)
    assert len(held) == 2
    assert not tcp_descriptors(deployment.launcher.pid), "it asks no more whether they are ready"
    assert sorted(deployment.pids) == ["hmm", "keeper", "pool", "router", "scaler", "store"]
    assert sorted(deployment.rank_pids()) == ["r0t0", "r1t0"]
    first = complete(deployment.base_url)
    assert first["usage"]["completion_tokens"] == 16
    assert complete(deployment.base_url)["choices"] == first["choices"]
    report = deployment.stop()
    assert report.count("finish", "length") == 2
    assert report.num_tokens == 32


@pytest.mark.parametrize("name", ["store", "keeper", "hmm", "pool", "scaler", "router"])
def test_a_service_that_is_killed_comes_back(deploy: Deploy, name: str) -> None:
    deployment = deploy("oracle", served_name="oracle")
    before = complete(deployment.base_url)["choices"]
    old = deployment.kill(name)
    deployment.wait_restarted(name, old)
    deployment.wait_serving()
    assert complete(deployment.base_url)["choices"] == before
    deployment.stop()


def test_no_process_outlives_a_killed_launcher(deploy: Deploy) -> None:
    deployment = deploy("oracle", served_name="oracle")
    before = processes_of(deployment.run_dir)
    assert len(before) >= len(deployment.pids) + 3  # the launcher, and the two ranks
    deployment.launcher.kill()
    deployment.launcher.wait(60)
    wait_until(lambda: not processes_of(deployment.run_dir), "no orphan", timeout_s=60.0)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="em-"))
    yield path
    shutil.rmtree(path)


def test_detached_it_is_watched_and_stopped_by_other_commands(
    folder: Path, model_folder: Callable[[str], Path]
) -> None:
    run_dir = folder / "run"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ELASTICMOE_")}
    environment |= {"ELASTICMOE_RUN_DIR": str(run_dir), "ELASTICMOE_HOME": str(folder)}

    def elasticmoe(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "elasticmoe.cli.main", *argv]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    small = ("--replicas", "1", "--devices", "host:1", "--device-memory", "256MiB", "--kv-memory", "8MiB")
    ports = ("--port", "0", "--admin-port", "0")
    up = elasticmoe("up", "--model", str(model_folder("oracle")), "--dtype", "float32", *small, *ports, "--detach")
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        assert "is served at" in up.stdout

        def heard() -> Any:
            """What each part says, once none of them has been waited for in vain."""
            status = json.loads(elasticmoe("status", "--json").stdout)
            is_whole = not any("error" in status[part] for part in ("layout", "devices", "load"))
            return status if is_whole and status["layout"]["phase"] == "serving" else None

        status = wait_until(heard, "all parts answer", 60.0)
        assert status["running"] is True
        assert [rank["ready"] for rank in status["layout"]["ranks"]] == [True]
        assert status["devices"]["devices"][0]["memory"]["budget"] == 256 << 20
        assert "r0t0" in elasticmoe("status").stdout
        answer = elasticmoe("chat", "--once", "Hello", "--max-tokens", "4")
        assert (answer.returncode, answer.stderr) == (0, "")
        again = elasticmoe("up", "--model", str(model_folder("oracle")), *ports, "--detach")
        assert again.returncode == 1
        assert again.stderr.startswith("elasticmoe: already_running: ")
    finally:
        down = elasticmoe("down")
    assert down.returncode == 0
    assert re.fullmatch(r"stopped in \d+\.\d s", down.stdout.splitlines()[-1])
    wait_until(lambda: not processes_of(run_dir), "no process left")
    assert not run_dir.exists()


def test_a_detached_start_that_fails_says_why(folder: Path, model_folder: Callable[[str], Path]) -> None:
    run_dir = folder / "run"
    command = [sys.executable, "-m", "elasticmoe.cli.main", "up", "--model", str(model_folder("oracle")), "--detach"]
    command += ["--run-dir", str(run_dir), "--port", "0", "--admin-port", "0"]
    points = folder / "points"
    points.mkdir()
    (points / "hmm.load.arm").write_text("raise does_not_fit")  # in the HMM, when all has been started
    environment = {**os.environ, "ELASTICMOE_FAILPOINT_DIR": str(points)}
    up = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert up.returncode == 1
    line = up.stderr.strip()
    assert line.startswith("elasticmoe: does_not_fit: "), up.stdout + up.stderr
    assert "\n" not in line
    assert "does_not_fit" not in up.stdout, "it is told once"
    assert "hmm.load" in line
    assert read_record(run_dir) is None
    assert (run_dir / "logs/failure.txt").read_text().strip() == line.removeprefix("elasticmoe: ")
    wait_until(lambda: not processes_of(run_dir), "no process left")
