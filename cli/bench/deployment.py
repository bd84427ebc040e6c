"""A deployment for a benchmark: started with the ordinary command, on free ports, gone at the end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cli.record import read_record


@dataclass(frozen=True)
class Running:
    """Where it listens, and its run directory."""

    url: str
    admin_url: str
    run_dir: Path

    @property
    def token(self) -> str:
        """The admin token."""
        return (self.run_dir / "secrets" / "admin.token").read_text().strip()


@contextmanager
def running(model: str, replicas: int) -> Iterator[Running]:
    """`elasticmoe up --detach` … `elasticmoe down`. Raises ValueError when it does not come up."""
    with tempfile.TemporaryDirectory(prefix="em-bench-") as directory:
        run_dir = Path(directory) / "run"
        where = ["--run-dir", str(run_dir)]
        size = ["--replicas", str(replicas), "--devices", f"host:{replicas}", "--port", "0", "--admin-port", "0"]
        up = subprocess.run([*_COMMAND, "up", "--model", model, "--detach", *where, *size], stdout=subprocess.DEVNULL)
        record = read_record(run_dir)
        if up.returncode or record is None:
            raise ValueError(f"the deployment of {model} did not come up")
        try:
            yield Running(record.url, record.admin_url, run_dir)
        finally:
            subprocess.run([*_COMMAND, "down", *where], check=True, stdout=subprocess.DEVNULL)


_COMMAND = [sys.executable, "-m", "cli.main"]
