"""Deployments for a benchmark: started with the ordinary command, on free ports, gone at the end."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.arguments import whole
from elasticmoe.cli.bench.http import ask
from elasticmoe.cli.children import tied_to_us
from elasticmoe.cli.endings import run_command
from elasticmoe.cli.settings import importing_environment
from elasticmoe.common.config import environment_of
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.private import read_secret
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.record import DeploymentRecord, read_record
from elasticmoe.common.wording import counted

COMMAND = [sys.executable, "-m", "elasticmoe.cli.main"]
_TURN_S = 0.02
_KILL_SECONDS_MAX = 15.0
_LARGE_S = 3.0  # that large pages become no more for: the scaler asks the HMM once a second
_LARGE_SECONDS_MAX = 300.0


@dataclass(frozen=True)
class Running:
    """Where it listens, and its run directory."""

    url: str
    run_dir: Path


def first_of(given: str, num: int) -> str:
    """The setting that names `num` devices: the first of those `given` to a benchmark, or of the host's where none
    were. Raises ValueError where there are fewer."""
    if not given:
        return str(DeviceCount("host", num))
    all_ = DeviceCount.parse(given)
    if all_.count < num:
        raise ValueError(f"--devices {given}: {counted(num, 'device')} needed")
    return str(all_.first(num))


def settings_of(model: str) -> dict[str, Any]:
    """The settings, by name, that a named model cannot do without: the oracle's integers, which only float32 holds
    exactly, and a few MiB in all."""
    if not model.startswith("oracle"):
        return {}
    return {"dtype": "float32", "kv_bytes": 16 << 20, "device_bytes": 256 << 20}


def add_devices(parser: argparse.ArgumentParser) -> None:
    """The flag that says on what a benchmark's deployments run."""
    text = "such as npu:0-3: the first of them that are needed (default: of the host's)"
    parser.add_argument("--devices", default="", metavar="DEVICES", help=text)


def add_tp(parser: argparse.ArgumentParser) -> None:
    """The flag that says how many devices a replica of a benchmark's deployments has."""
    parser.add_argument("--tp", type=whole(1), default=1, metavar="N", help="devices of one replica (1)")


@contextmanager
def running(model: str, replicas: int, *, devices: str = "", **settings: Any) -> Iterator[Running]:
    """`elasticmoe up --detach` … `elasticmoe down`. `devices`: empty for one of the host's per replica. `settings` are
    fields of elasticmoe.common.config by name.

    Raises ValueError when it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="em-bench-") as directory:
        run_dir = Path(directory) / "run"
        where = ["--run-dir", str(run_dir)]
        size = [
            "--replicas",
            str(replicas),
            "--devices",
            devices or str(DeviceCount("host", replicas)),
            "--port",
            "0",
            "--admin-port",
            "0",
        ]
        try:
            status, _ = run_command(
                [*COMMAND, "up", "--model", model, "--detach", *where, *size],
                stdout=subprocess.DEVNULL,
                env=dict(os.environ) | environment_of(settings),
            )
            record = read_record(run_dir)
            if status or record is None:
                raise ValueError(f"the deployment of {model} did not come up")
            yield Running(record.url, run_dir)
        finally:  # also where `up` was interrupted when it had just come up; where nothing runs there is nothing to do
            down = [*COMMAND, "down", *where]
            subprocess.run(down, check=True, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_settled(deployment: Running) -> None:
    """Wait until the HMM makes no more large pages of what is loaded, which takes a part of the machine (ADR 36), or
    _LARGE_SECONDS_MAX. Raises ValueError where the scaler does not answer."""
    token = read_secret(deployment.run_dir / "secrets" / "admin.token")
    local, path = deployment.run_dir / "sockets" / "admin.sock", "/v1/devices"
    begun = since = time.monotonic()
    seen = -1
    while time.monotonic() - since < _LARGE_S and since - begun < _LARGE_SECONDS_MAX:
        answer = asyncio.run(ask("GET", f"http://localhost{path}", local=local, token=token))
        now = sum(device["large_pages"] for device in _document(path, *answer)["devices"])
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(10 * _TURN_S)


class Deployment:
    """One deployment beside others, for benchmarks that go on working while it starts and stops.

    Its launcher is our child, in a session of its own, so that Ctrl-C reaches it only through us; it dies with the
    thread that made it. Owns a folder with the run directory and its logs until `remove`. `settings` are fields of
    elasticmoe.common.config by name.
    """

    def __init__(self, model: str, replicas: int, devices: str, *, port: int = 0, **settings: Any) -> None:
        self.replicas = replicas
        self._folder = Path(tempfile.mkdtemp(prefix="em-bench-"))  # short: socket paths have a limit
        self.run_dir = self._folder / "run"
        up = ["up", "--model", model, "--run-dir", str(self.run_dir), "--keep-logs"]
        up += ["--replicas", str(replicas), "--devices", devices]
        up += ["--port", str(port), "--admin-port", "0"]
        with open(self._folder / "output", "wb") as output:
            self._launcher = subprocess.Popen(
                tied_to_us([*COMMAND, *up]),
                env=importing_environment() | environment_of(settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def record(self) -> DeploymentRecord | None:
        """What the launcher wrote last; None before and after."""
        try:
            return read_record(self.run_dir)
        except ConfigError:
            return None

    def pid(self, name: str) -> int | None:
        """Process id of a child of the launcher (`hmm`, `pool`, …), None where it does not run."""
        record = self.record
        found = [process.pid for process in record.processes if process.name == name] if record else []
        return found[0] if found else None

    @property
    def url(self) -> str:
        """Where clients reach it. Only after `ready`."""
        return self._living().url

    @property
    def port(self) -> int:
        """The port of `url`."""
        return self._living().port

    @property
    def history_path(self) -> Path:
        """The router's history, where the setting `history` is on."""
        return self.run_dir / "logs" / "history-router.jsonl"

    def _living(self) -> DeploymentRecord:
        record = self.record
        if record is None:
            raise ValueError(f"the deployment in {self.run_dir} does not run: {self._last_line()}")
        return record

    async def ready(self, timeout_s: float) -> Deployment:
        """Wait until it serves. Raises ValueError with the launcher's last line when it ended or takes too long."""
        deadline = time.monotonic() + timeout_s
        while (record := self.record) is None or record.state != "serving":
            if self._launcher.poll() is not None:
                raise ValueError(f"the deployment did not come up: {self._last_line()}")
            if time.monotonic() > deadline:
                raise ValueError(f"the deployment was not ready within {timeout_s:g} s")
            await asyncio.sleep(_TURN_S)
        return self

    async def get(self, path: str) -> Any:
        """GET a JSON document of the admin listener. Raises ValueError for an answer that is an error."""
        return await self._ask("GET", path, b"")

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST a JSON document to the admin listener. Raises ValueError for an answer that is an error."""
        return await self._ask("POST", path, msgspec.json.encode(body))

    async def put(self, path: str, body: dict[str, Any]) -> Any:
        """PUT a JSON document to the admin listener. Raises ValueError for an answer that is an error."""
        return await self._ask("PUT", path, msgspec.json.encode(body))

    async def _ask(self, method: str, path: str, body: bytes) -> Any:
        self._living()
        token, local = read_secret(self.run_dir / "secrets" / "admin.token"), self.run_dir / "sockets" / "admin.sock"
        answer = await ask(method, f"http://localhost{path}", local=local, token=token, body=body)
        return _document(path, *answer)

    async def metrics(self) -> str:
        """The router's metrics as text. Raises ValueError."""
        return (await ask("GET", f"{self.url}/metrics"))[1].decode()

    async def served_name(self) -> str:
        """The model's name as requests have to give it. Raises ValueError."""
        return str(_document("/v1/models", *await ask("GET", f"{self.url}/v1/models"))["data"][0]["id"])

    async def stop(self, timeout_s: float, *, at_once: bool = False) -> None:
        """Stop it and wait until none of its processes is left. `at_once`: running requests are cut off.

        What does not end in time is killed, and ValueError raised. Idempotent.
        """
        if self._launcher.poll() is None:
            self._launcher.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        interrupts = 2 if at_once else 0  # the first may come before the launcher listens for it
        while self._launcher.poll() is None and time.monotonic() < deadline:
            if interrupts and (record := self.record) is not None and record.state == "stopping":
                self._launcher.send_signal(signal.SIGINT)  # while it stops: kill what is left
                interrupts -= 1
            await asyncio.sleep(_TURN_S)
        if self._launcher.poll() is None:
            self._launcher.kill()  # its children die with it
            await self._wait_gone(_KILL_SECONDS_MAX)
            raise ValueError(f"the deployment did not stop within {timeout_s:g} s and was killed")
        await self._wait_gone(_KILL_SECONDS_MAX)

    async def _wait_gone(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while left := processes_of(self.run_dir):
            if time.monotonic() > deadline:
                for pid in left:  # ours: only what we started has our folder's name in its environment
                    os.kill(pid, signal.SIGKILL)
                raise ValueError(f"{counted(len(left), 'process', 'processes')} outlived the launcher: killed")
            await asyncio.sleep(_TURN_S * 5)
        self._launcher.poll()

    def remove(self) -> None:
        """Remove the folder with its logs. Kills what still runs. Idempotent."""
        if self._launcher.poll() is None:
            self._launcher.kill()
            self._launcher.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _last_line(self) -> str:
        lines = (self._folder / "output").read_text(errors="replace").strip().split("\n")
        return lines[-1] or "it printed nothing"


def _document(path: str, status: int, body: bytes) -> Any:
    if status >= 400:
        raise ValueError(f"{path}: HTTP {status} {body[:200].decode(errors='replace')}")
    return msgspec.json.decode(body)


def processes_of(run_dir: Path) -> list[int]:
    """Living processes that were started for a run directory, by their environment."""
    mark = b"ELASTICMOE_RUN_DIR=" + os.fsencode(run_dir)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or it is somebody else's
    return found
