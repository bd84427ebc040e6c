"""The processes as compose.yaml runs them, without an engine: no launcher, each with a run directory that holds the
shared sockets, its own state, and the secrets of its container. (`make compose-test` does it with containers.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from elasticmoe.cli import container
from elasticmoe.common.config import environment_of
from elasticmoe.common.store_access import PASSWORDS, READER
from tests.procs.waiting import free_port, processes_of, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent.parent
MODULES = {
    "store": ["elasticmoe.cli.container", "store"],
    "keeper": ["elasticmoe.services.hmm.keeper"],
    "hmm": ["elasticmoe.services.hmm"],
    "worker": ["elasticmoe.services.worker"],
    "scaler": ["elasticmoe.services.scaler"],
    "router": ["elasticmoe.services.router"],
}


class Containers:
    """What `docker compose up` starts, as processes. Owns them and their folders until `close`."""

    def __init__(self, model: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="em-"))
        self.port, self.admin_port = free_port(), free_port()
        (self.folder / "sockets").mkdir(mode=0o700)
        container.init(self.folder / "secrets")
        self._settings = {"model": model, "dtype": "float32", "port": self.port, "admin_port": self.admin_port}
        self._settings |= {"kv_bytes": 16 << 20, "device_bytes": 256 << 20, "standbys": 1}
        self.processes = {name: self._start(name) for name in MODULES}

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        run_dir = self.folder / name
        for part in ("", "state", "logs", "store"):
            (run_dir / part).mkdir(mode=0o700)
        (run_dir / "sockets").symlink_to(self.folder / "sockets")  # as the volume
        own = self.folder / "secrets" / name
        if own.is_dir():
            (run_dir / "secrets").symlink_to(own)
        else:
            (run_dir / "secrets").mkdir(mode=0o700)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ELASTICMOE_")}
        with open(self.folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *MODULES[name]],
                cwd=ROOT,
                env=inherited | environment_of(self._settings | {"run_dir": run_dir}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def check(self, name: str) -> bool:
        """The container's health check."""
        ended = self.processes[name].poll()
        assert ended is None, f"{name} ended with {ended}: {(self.folder / f'{name}.log').read_text()[-2000:]}"
        environment = os.environ | environment_of(self._settings | {"run_dir": self.folder / name})
        command = [sys.executable, "-m", "elasticmoe.cli.container", "check", name]
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=30, capture_output=True).returncode == 0

    def close(self) -> dict[str, int]:
        """Stop in reverse order; the exit statuses."""
        codes = {}
        for name, process in reversed(self.processes.items()):
            process.terminate()
            codes[name] = process.wait(30)
        for name in MODULES:
            wait_until(lambda name=name: not processes_of(self.folder / name), "all ended")
        return codes


@pytest.fixture
def containers(model_folder: Callable[[str], Path]) -> Iterator[Containers]:
    made = Containers(model_folder("oracle"))
    yield made
    for process in made.processes.values():
        if process.poll() is None:
            process.kill()
            process.wait()
    shutil.rmtree(made.folder)


def test_each_process_does_with_what_its_container_has(containers: Containers) -> None:
    url = f"http://127.0.0.1:{containers.port}"
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def is_ready() -> bool:
            try:
                return client.get("/ready").status_code == 200
            except httpx.HTTPError:
                return False

        for name in ("store", "keeper", "hmm", "worker"):
            wait_until(lambda name=name: containers.check(name), f"{name} is healthy", 60.0)
        wait_until(is_ready, "the router is ready", 60.0)
        body = {"model": "oracle", "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 8)
    for name in ("scaler", "router"):
        wait_until(lambda name=name: containers.check(name), f"{name} is healthy", 60.0)
    the_routers_password_reads_layouts_and_nothing_else(containers)
    assert set(containers.close().values()) == {0}


def the_routers_password_reads_layouts_and_nothing_else(containers: Containers) -> None:
    socket = containers.folder / "sockets" / "store.sock"
    password = (containers.folder / "router" / "secrets" / PASSWORDS[READER]).read_text()
    store = redis.Redis(unix_socket_path=str(socket), username=READER, password=password)
    key = "elasticmoe:default:{}"
    assert int(store.get(key.format("epoch")) or 0) == 1
    assert store.get(key.format("layout"))
    assert store.xread({key.format("layouts"): "0-0"})
    for command in (
        ("SET", key.format("layout"), "x"),
        ("SET", key.format("lease"), "me", "PX", "60000"),
        ("GET", key.format("lease")),
        ("GET", key.format("operation")),
        ("GET", "elasticmoe:other:layout"),
        ("EVAL", "return 1", "0"),
        ("CONFIG", "GET", "requirepass"),
        ("ACL", "LIST"),
        ("KEYS", "*"),
        ("CLIENT", "LIST"),
        ("FLUSHALL",),
        ("SHUTDOWN", "NOSAVE"),
        ("SUBSCRIBE", "x"),
        ("XADD", key.format("layouts"), "*", "epoch", "9"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            store.execute_command(*command)
    store.close()
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(unix_socket_path=str(socket), password=password).ping()  # of another user
