"""`elasticmoe status`: what runs in a run directory, as tables or JSON."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from elasticmoe.cli.admin import Admin, connect
from elasticmoe.cli.http import client as http_client
from elasticmoe.cli.http import why
from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.rundir import last_failure
from elasticmoe.cli.status_view import render
from elasticmoe.cli.terminal import say_json, show
from elasticmoe.cli.watch import watch
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.record import living_record

HELP = "show a deployment's processes, devices and ranks"

_TIMEOUT_S = 3.0
_WATCH_INTERVAL_S = 1.0
_WATCH_INTERVAL_BUSY_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `status`."""
    parser.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    how.add_argument(
        "--watch", action="store_true", help="fill the terminal and refresh every second, until q or Ctrl-C"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when a deployment runs there, 1 when none does."""
    path = run_dir_of(args.run_dir)
    if args.watch:
        return watch(lambda: collect(path, is_watched=True), _pause_s)
    status = collect(path)
    if args.json:
        say_json(status)
    else:
        show(render(status))
    return 0 if status["running"] else 1


def collect(run_dir: Path, *, is_watched: bool = False) -> dict[str, Any]:
    """Everything that can be learnt now, as JSON values. A part that does not answer is given as its error's text.
    `is_watched`: without what costs too much to be asked for again and again."""
    record = living_record(run_dir)
    status: dict[str, Any] = {"run_dir": str(run_dir), "running": record is not None}
    if record is None:
        failure = last_failure(run_dir)
        return status if failure is None else status | {"failure": failure}
    status["deployment"] = msgspec.to_builtins(record)
    status["uptime_s"] = round(time.time() - record.started_at, 1)
    status["launcher"] = {"pid": record.launcher.pid, "state": record.state, "since": record.started_at}
    for process, entry in zip(record.processes, status["deployment"]["processes"], strict=True):
        entry["alive"] = process.is_alive()
    views = {"layout": "/v1/layout", "devices": "/v1/devices", "operations": "/v1/operations", "policy": "/v1/policy"}
    try:
        with connect(run_dir) as admin:
            status |= {name: _view(admin, path) for name, path in views.items()}
    except ElasticMoEError as error:
        status |= {name: {"error": error.message} for name in views}
    with http_client(timeout=_TIMEOUT_S) as client:
        status["load"] = _load_of(client, f"{record.url}/load")
    for rank in () if is_watched else status["layout"].get("ranks", ()):  # the kernel walks all that a rank has mapped
        rank["mapped_large"] = _mapped_large(rank.get("pid"))
    return status


def _mapped_large(pid: int | None) -> int | None:
    """Bytes of shared memory that the rank's page tables reach by large entries (proc_pid_smaps(5)); None where that
    cannot be read: the process runs in a container, or is another user's."""
    if not pid:
        return None
    try:
        if b"elasticmoe" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None  # a process id of another namespace than this one
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemPmdMapped:"))


def _view(admin: Admin, path: str) -> dict[str, Any]:
    try:
        return admin.call("GET", path, timeout_s=_TIMEOUT_S)
    except ElasticMoEError as error:
        return {"error": error.message}


def _load_of(client: httpx.Client, url: str) -> Any:
    try:
        answer = client.get(url)
        return answer.json() if answer.status_code == 200 else {"error": f"answered {answer.status_code}"}
    except httpx.HTTPError as error:
        return {"error": f"does not answer: {why(error)}"}
    except (ValueError, RecursionError):
        return {"error": "answered without JSON"}


def _is_scaling(status: dict[str, Any]) -> bool:
    listed = (status.get("operations") or {}).get("operations") or [{"outcome": "none"}]
    return not listed[0].get("outcome")


def _pause_s(status: dict[str, Any]) -> float:
    return _WATCH_INTERVAL_BUSY_S if _is_scaling(status) else _WATCH_INTERVAL_S
