"""`deployment.json` in the run directory: what runs, written by the launcher, read by the other commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from common.protocol.errors import ConfigError

FILE_NAME = "deployment.json"


class ProcessRecord(msgspec.Struct, frozen=True):
    """A process of the deployment. `start_ticks` tells it from a later process that got the same id."""

    name: str
    pid: int
    start_ticks: int
    restarts: int = 0

    def is_alive(self) -> bool:
        """Whether that very process still runs (a zombie does not)."""
        return start_ticks(self.pid) == self.start_ticks


class DeploymentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment. `started_at`: Unix time in seconds."""

    state: Literal["starting", "serving", "stopping"]
    launcher: ProcessRecord
    processes: tuple[ProcessRecord, ...]
    model: str
    served_name: str
    dtype: str
    devices: str
    url: str
    admin_url: str
    port: int
    admin_port: int
    started_at: float


def start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when it does not run or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The second field is the program's name in parentheses and may hold anything, also ") ".
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def write_record(run_dir: Path, record: DeploymentRecord) -> None:
    """Replace the file atomically; mode 0600. Raises OSError."""
    temporary = run_dir / f".{FILE_NAME}.new"
    raw = msgspec.json.format(msgspec.json.encode(record), indent=2)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(raw + b"\n")
    os.replace(temporary, run_dir / FILE_NAME)


def read_record(run_dir: Path) -> DeploymentRecord | None:
    """The record, or None when there is none. Raises ConfigError when it cannot be read."""
    try:
        raw = (run_dir / FILE_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{run_dir / FILE_NAME}: {error.strerror}") from None
    try:
        return msgspec.json.decode(raw, type=DeploymentRecord)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{run_dir / FILE_NAME} is damaged: {error}") from None


def living_record(run_dir: Path) -> DeploymentRecord | None:
    """The record of a deployment whose launcher runs, or None. Raises ConfigError."""
    record = read_record(run_dir)
    return record if record is not None and record.launcher.is_alive() else None
