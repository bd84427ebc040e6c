"""What a test does to a running deployment beyond signals: the contents of its store, second instances of services."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import redis

from elasticmoe.common.config import environment_of
from tests.procs.deployment import ROOT, Deployment
from tests.procs.waiting import wait_until


@contextmanager
def store_client(deployment: Deployment) -> Iterator[redis.Redis]:
    """A connection to the deployment's embedded store."""
    password = (deployment.run_dir / "secrets/store.password").read_text().strip()
    url = f"unix://:{password}@{deployment.run_dir / 'sockets/store.sock'}"
    client = redis.Redis.from_url(url, socket_timeout=60)
    try:
        yield client
    finally:
        client.close()


def snapshot_of(client: redis.Redis) -> dict[bytes, bytes]:
    """All keys of the store as they are now."""
    dumped: Any = {key: client.dump(key) for key in client.scan_iter()}
    return {key: value for key, value in dumped.items() if value is not None}


def roll_back(client: redis.Redis, snapshot: dict[bytes, bytes]) -> int:
    """Make the store what it was at `snapshot`, at once. Returns the epoch that it has then: the scaler puts that right
    within moments."""
    pipeline = client.pipeline(transaction=True)
    pipeline.flushall()
    for key, value in snapshot.items():
        pipeline.restore(key, 0, value)
    pipeline.get("elasticmoe:default:epoch")
    return int(pipeline.execute()[-1])


@contextmanager
def another(deployment: Deployment, name: str, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A second instance of a service, with the settings of the first but for `settings`. Killed at the end."""
    raw = Path(f"/proc/{deployment.pids[name]}/environ").read_bytes()
    inherited = dict(entry.split("=", 1) for entry in os.fsdecode(raw).split("\0") if "=" in entry)
    log = deployment.run_dir / f"logs/second-{name}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}"],
            cwd=ROOT,
            env=inherited | environment_of(settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_answers(url: str, process: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    """Wait until `url` answers 200."""

    def answers() -> bool:
        assert process.poll() is None, f"the process ended with {process.returncode}"
        try:
            return httpx.get(url, timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(answers, f"{url} answers", timeout_s)
