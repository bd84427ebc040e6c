"""What cannot be served is refused with one line that gives the limit and the value, and nothing stays behind."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from elasticmoe.cli.main import main
from tests.procs.clients import check_against_oracle, closed_loop
from tests.procs.deployment import Deployment
from tests.procs.waiting import processes_of, wait_until

pytestmark = pytest.mark.procs

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="em-"))  # short: socket paths have a limit
    yield folder / "run"
    shutil.rmtree(folder, ignore_errors=True)


def up(run_dir: Path, *flags: str) -> tuple[int, str]:
    """Run `elasticmoe up` to its end: exit code and the one line it says about its failure."""
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "elasticmoe.cli.main",
            "up",
            "--run-dir",
            str(run_dir),
            "--port",
            "0",
            "--admin-port",
            "0",
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not processes_of(run_dir)
    lines = [line for line in (ended.stderr + ended.stdout).splitlines() if line.startswith("elasticmoe:")]
    assert len(lines) == 1, ended.stderr + ended.stdout
    return ended.returncode, lines[0]


def test_checkpoint_with_a_damaged_header(run_dir: Path, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(model_folder("oracle"), model)
    weights = next(model.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    weights.write_bytes(data)
    code, line = up(run_dir, "--model", str(model))
    assert code == 1
    assert "bad_checkpoint" in line
    assert str(1 << 40) in line
    assert str(8 << 20) in line
    assert not run_dir.exists()  # it was found before anything was started


def test_checkpoint_that_was_cloned_without_lfs(
    run_dir: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "pointers"
    shutil.copytree(model_folder("oracle"), model)
    next(model.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    code, line = up(run_dir, "--model", str(model))
    assert code == 1
    assert line.startswith("elasticmoe: lfs_pointer: model.safetensors is a Git LFS pointer")
    assert not run_dir.exists()


def test_checkpoint_that_lacks_a_tensor(run_dir: Path, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "more-layers"
    shutil.copytree(model_folder("oracle"), model)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (model / "config.json").write_text(json.dumps(config))
    code, line = up(run_dir, "--model", str(model))
    assert code == 1
    assert "bad_checkpoint" in line
    assert "model.layers.2" in line
    assert not run_dir.exists()


def test_device_too_small(run_dir: Path, model_folder: Callable[[str], Path]) -> None:
    code, line = up(run_dir, "--model", str(model_folder("tiny-mixtral")), "--device-memory", "1MiB")
    assert code == 1
    assert "1.00 MiB of --device-memory" in line
    assert "KV" in line


def test_more_replicas_than_devices(run_dir: Path, model_folder: Callable[[str], Path]) -> None:
    code, line = up(run_dir, "--model", str(model_folder("oracle")), "--replicas", "3", "--devices", "host:2")
    assert code == 1
    assert "3" in line
    assert "2" in line


def test_store_that_does_not_answer(run_dir: Path, model_folder: Callable[[str], Path]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        port = unused.getsockname()[1]
        code, line = up(run_dir, "--model", str(model_folder("oracle")), "--store", f"redis://127.0.0.1:{port}/0")
    assert code == 1
    assert "store_unavailable" in line
    assert not run_dir.exists()


def test_model_folder_that_is_not_there(run_dir: Path) -> None:
    code, line = up(run_dir, "--model", "/nowhere/model")
    assert code == 1
    assert "/nowhere/model" in line


@pytest.mark.parametrize("flag", ["--port", "--admin-port"])
def test_occupied_port(flag: str, run_dir: Path, model_folder: Callable[[str], Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, line = up(run_dir, "--model", str(model_folder("oracle")), flag, port)
    assert code == 1
    assert port in line
    assert "in use" in line
    assert not run_dir.exists()


def test_port_that_is_taken_between_the_check_and_the_start(
    run_dir: Path,
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("elasticmoe.cli.checks.check_ports", lambda _: None)
    flags = ["--model", str(model_folder("oracle")), "--run-dir", str(run_dir), "--admin-port", "0", "--detach"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["up", "--port", str(taken.getsockname()[1]), *flags]) == 1
    assert capsys.readouterr().err.startswith("elasticmoe: port_in_use: ")
    assert not run_dir.exists()


async def test_a_deployment_refuses_what_it_should_and_outlives_its_store(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=2, max_model_len=128)
    with httpx.Client(timeout=30, trust_env=False) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": deployment.token}):
            for path in ("/v1/layout", "/v1/devices", "/v1/config", "/metrics", "/openapi.json", "/nowhere"):
                refused = client.get(deployment.admin_url + path, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_admin_token")
        browser = client.get(deployment.admin_url + "/health", headers={"Origin": "http://evil"})
        assert browser.status_code == 403
        allowed = {"Authorization": f"Bearer {deployment.token}"}
        assert client.get(deployment.admin_url + "/nowhere", headers=allowed).status_code == 404
        assert "elasticmoe:epoch 1.0" in client.get(deployment.admin_url + "/metrics", headers=allowed).text
        long = client.post(
            deployment.base_url + "/v1/completions",
            json={"model": "oracle", "prompt": [1] * 120, "max_tokens": 20},
        )
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "128" in long.json()["error"]["message"]
    # The store stops answering: serving goes on, and everything is as before when it is back.
    deployment.kill("store", signal.SIGSTOP)
    streams = await closed_loop(deployment.base_url, clients=8, requests=40, seed=9, prompt_tokens=(5, 50))
    assert check_against_oracle(streams, model_folder("oracle")) > 300
    deployment.kill("store", signal.SIGCONT)
    wait_until(lambda: deployment.admin("/v1/layout")["phase"] == "serving", "serving")
    # It dies: the launcher starts another with its data.
    pid = deployment.kill("store")
    deployment.wait_restarted("store", pid)
    streams = await closed_loop(deployment.base_url, clients=8, requests=16, seed=10, prompt_tokens=(5, 50))
    check_against_oracle(streams, model_folder("oracle"))
