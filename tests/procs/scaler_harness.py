"""A real scaler process alone: no store, no HMM, no pool. Its admin listener answers; orders find nothing ready."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from elasticmoe.common.config import environment_of
from tests.procs.router_harness import ROOT, plain_client
from tests.procs.waiting import wait_until

TOKEN = "s3cret-token"


class ScalerProcess:
    """One scaler as a child process. `http` sends the token."""

    def __init__(self, run_dir: Path, model: Path, **settings: Any) -> None:
        self.run_dir = run_dir
        (run_dir / "secrets").mkdir(parents=True)
        (run_dir / "secrets" / "admin.token").write_text(TOKEN)
        values = {"run_dir": run_dir, "model": model, "admin_port": 0, **settings}
        values.setdefault("store_url", f"unix://{run_dir}/nowhere.sock")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ELASTICMOE_")}
        with (run_dir / "scaler.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "elasticmoe.services.scaler"],
                cwd=ROOT,
                env=environment | environment_of(values),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.http = plain_client("")
        self.http.headers["authorization"] = f"Bearer {TOKEN}"
        try:
            self.port = wait_until(self._bound_port, "the scaler is bound", timeout_s=30.0) or 0
            self.url = f"http://127.0.0.1:{self.port}"
            self.http.base_url = self.url
            wait_until(self._answers, "the scaler listens", timeout_s=30.0)
        except BaseException:
            self.stop()
            raise

    def _bound_port(self) -> int | None:
        assert self.process.poll() is None, self.log_text
        match = re.search(r"admin listener .*port=(\d+)", self.log_text)
        return int(match[1]) if match else None

    def _answers(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + " ")))

    def stop(self) -> None:
        """SIGTERM, then the end."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(20.0)
        finally:
            self.process.kill()
            self.process.wait()

    @property
    def log_text(self) -> str:
        """What it has logged."""
        return (self.run_dir / "scaler.log").read_text()
