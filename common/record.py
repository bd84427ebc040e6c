"""`deployment.json` in the run directory: what runs, written by the launcher, read by the other commands and by
the scaler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from elasticmoe.common.devices.names import COUNT_PATTERN
from elasticmoe.common.private import is_private, read_private
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.wording import undecodable

FILE_NAME = "deployment.json"
STATE_FORMAT = 1  # of what a run directory's state and store hold; 0: before it was written down
DAMAGED = "damaged_record"
_BYTES_MAX = 1024 * 1024

_Text = Annotated[str, Meta(max_length=512)]
Port = Annotated[int, Meta(ge=1, le=65_535)]


class ProcessRecord(msgspec.Struct, frozen=True):
    """A process of the deployment. `start_ticks` tells it from a later process that got the same id."""

    name: _Text
    pid: Annotated[int, Meta(ge=1, le=1 << 30)]
    start_ticks: Annotated[int, Meta(ge=0)]
    restarts: Annotated[int, Meta(ge=0)] = 0

    def is_alive(self) -> bool:
        """Whether that very process still runs, as a process of ours (a zombie does not)."""
        return start_ticks(self.pid) == self.start_ticks and owner_of(self.pid) == os.geteuid()


class DownRecord(msgspec.Struct, frozen=True):
    """A process of the deployment that does not run now and is started again.

    name: of the process
    restarts: how often it was started again, the one to come included
    reason: how it ended, and the last line of its log
    at: Unix time in seconds at which it is started again
    is_failing: it does not stay up, and the deployment goes on without it until then
    """

    name: _Text
    restarts: Annotated[int, Meta(ge=0)]
    reason: Annotated[str, Meta(max_length=4096)]
    at: float
    is_failing: bool = False


class DeploymentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment. The launcher owns it and writes it whole at each change.

    state: what the launcher does with it now
    launcher: the launcher's own process
    processes: its children that run; `down`: those that do not run now and are started again
    model: folder of the checkpoint; `served_name`: what clients call it
    dtype: of weights and KV
    devices: as they were configured; `tp`: devices of one replica
    url, port: of the listener for clients
    admin_url, admin_port: of the admin listener
    started_at: Unix time in seconds
    compute: the backend that ranks compute with; `activations`: what they multiply bfloat16 weights by
    store: the server that holds its layout, without user and password; empty for the embedded one
    state_format: STATE_FORMAT of the version that started it; 0 of one that did not write it down
    keeps_state: whether its state stays when it is stopped, unless who stops it says otherwise; None of a version that
        leaves nothing behind, whoever says what
    """

    state: Literal["starting", "serving", "stopping"]
    launcher: ProcessRecord
    processes: tuple[ProcessRecord, ...]
    model: Annotated[str, Meta(max_length=4096)]
    served_name: _Text
    dtype: _Text
    devices: Annotated[str, Meta(pattern=COUNT_PATTERN)]
    url: _Text
    admin_url: _Text
    port: Port
    admin_port: Port
    started_at: float
    compute: _Text = "host"
    activations: _Text = "float32"
    tp: Annotated[int, Meta(ge=1)] = 1
    store: Annotated[str, Meta(max_length=4096)] = ""
    state_format: Annotated[int, Meta(ge=0)] = 0
    down: tuple[DownRecord, ...] = ()
    keeps_state: bool | None = None


def start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when it does not run or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The second field is the program's name in parentheses and may hold anything, also ") ".
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def owner_of(pid: int) -> int | None:
    """The user that a process runs as; None when it does not run."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def write_record(run_dir: Path, record: DeploymentRecord) -> None:
    """Replace the file atomically; mode 0600. Raises OSError."""
    temporary = run_dir / f".{FILE_NAME}.new"
    raw = msgspec.json.format(msgspec.json.encode(record), indent=2)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(raw + b"\n")
        os.replace(temporary, run_dir / FILE_NAME)
    except OSError:
        temporary.unlink(missing_ok=True)  # the disk is full: half a record is of no use
        raise


def read_record(run_dir: Path) -> DeploymentRecord | None:
    """The record, or None when there is none. Raises ConfigError when it cannot be read, is damaged, or could be
    somebody else's: then it is not even looked at."""
    if not is_private(run_dir):
        return None
    raw = read_private(run_dir / FILE_NAME, _BYTES_MAX)
    if raw is None:
        return None
    try:
        record = msgspec.json.decode(raw, type=DeploymentRecord)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{run_dir / FILE_NAME} is damaged: {undecodable(error)}", code=DAMAGED) from None
    for url, port in ((record.url, record.port), (record.admin_url, record.admin_port)):
        if not _is_listener(url, port):
            raise ConfigError(f"{run_dir / FILE_NAME} is damaged: {url!r} is no listener of port {port}", code=DAMAGED)
    return record


def _is_listener(url: str, port: int) -> bool:
    """Whether `url` is what a launcher writes: a host and its port, nothing else that a client would heed."""
    try:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return bool(host) and parts.port == port and url.lower() == f"http://{host}:{port}"
    except ValueError:
        return False


def living_record(run_dir: Path) -> DeploymentRecord | None:
    """The record of a deployment whose launcher runs, or None. Raises ConfigError."""
    record = read_record(run_dir)
    return record if record is not None and record.launcher.is_alive() else None
