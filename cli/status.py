"""`elasticmoe status`: what runs in a run directory, as tables or JSON."""

from __future__ import annotations

import argparse
import select
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.admin import Admin, connect
from cli.console import size
from cli.http import client as http_client
from cli.paths import run_dir_of
from cli.record import DeploymentRecord, living_record
from cli.rundir import last_failure
from cli.scale import phase_text
from cli.terminal import Cleaned, say_json, show, table_console
from common.protocol.errors import ElasticMoEError

HELP = "show a deployment's processes, devices and ranks"

_TIMEOUT_S = 3.0
_WATCH_INTERVAL_S = 1.0
_WATCH_INTERVAL_BUSY_S = 0.2
_PHASES = ("prepare", "commit", "migrate", "release")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `status`."""
    parser.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    how.add_argument("--watch", action="store_true", help="refresh every second until Ctrl-C or q")


def run(args: argparse.Namespace) -> int:
    """Returns 0 when a deployment runs there, 1 when none does."""
    path = run_dir_of(args.run_dir)
    if args.watch:
        return _watch(path)
    status = collect(path)
    if args.json:
        say_json(status)
    else:
        show(render(status))
    return 0 if status["running"] else 1


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything that can be learnt now, as JSON values. A part that does not answer is given as its error's text."""
    record = living_record(run_dir)
    status: dict[str, Any] = {"run_dir": str(run_dir), "running": record is not None}
    if record is None:
        failure = last_failure(run_dir)
        return status if failure is None else status | {"failure": failure}
    status["deployment"] = msgspec.to_builtins(record)
    status["uptime_s"] = round(time.time() - record.started_at, 1)
    for process, entry in zip(record.processes, status["deployment"]["processes"], strict=True):
        entry["alive"] = process.is_alive()
    views = {"layout": "/v1/layout", "devices": "/v1/devices", "operations": "/v1/operations"}
    try:
        with connect(run_dir) as admin:
            status |= {name: _view(admin, path) for name, path in views.items()}
    except ElasticMoEError as error:
        status |= {name: {"error": error.message} for name in views}
    with http_client(timeout=_TIMEOUT_S) as client:
        status["load"] = _load_of(client, f"{record.url}/load")
    return status


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
        return {"error": f"does not answer: {type(error).__name__}"}
    except (ValueError, RecursionError):
        return {"error": "answered without JSON"}


def render(status: dict[str, Any]) -> RenderableType:
    """Tables of what `collect` found."""
    if not status["running"]:
        text = f"nothing runs in {status['run_dir']}"
        if "failure" in status:
            text += f"\nthe last run failed: {status['failure']}"
        return Text(text)
    record = msgspec.convert(status["deployment"], DeploymentRecord)
    head = Text(
        f"{record.served_name} ({record.dtype})  {record.state} for {_duration(status['uptime_s'])}\n"
        f"{record.url}/v1   admin {record.admin_url}   run directory {status['run_dir']}"
    )
    parts: list[RenderableType] = [head, _processes(status), *_failing(status)]
    parts += [_devices(status["devices"]), _ranks(status["layout"])]
    parts.append(_load(status["load"]))
    parts += _operations(status.get("operations") or {})
    return Group(*parts)


def _operations(operations: dict[str, Any]) -> list[RenderableType]:
    """The operation in progress with its bars, or one line about the last one."""
    if "error" in operations:
        return [Text(f"Operations: {operations['error']}")]
    listed = operations.get("operations") or []
    if not listed:
        return []
    last = listed[0]
    if last.get("outcome"):
        return [Text("Last operation: " + operation_line(last))]
    return [Text("Operation: " + operation_line(last), style="bold"), _bars(last)]


def operation_line(operation: dict[str, Any]) -> str:
    """One operation in one line."""
    text = f"{operation['op_id']} ({operation['kind'].replace('_', ' ')}) "
    if not operation.get("outcome"):
        return text + f"{phase_text(operation)} for {operation['elapsed_s']:.1f} s: {operation['reason']}"
    figures, error = operation.get("figures") or {}, operation.get("error") or {}
    text += f"{operation['outcome']} after {operation['elapsed_s']:.2f} s"
    if error:
        return text + f": {error.get('code')}: {error.get('message')}"
    facts = [f"{size(figures.get('bytes_copied', 0))} copied", f"{figures.get('sequences_moved', 0)} sequences moved"]
    if figures.get("capacity_s") is not None:
        facts.insert(0, f"capacity after {figures['capacity_s']:.2f} s")
    return text + ", " + ", ".join(facts)


def _bars(operation: dict[str, Any]) -> Table:
    """A bar of the phases, and one of the bytes while some are copied."""
    table = Table.grid(padding=(0, 1))
    legs = max(1, operation.get("legs", 1))
    done = (operation.get("leg", 1) - 1) * len(_PHASES) if operation.get("legs") else 0
    done += _PHASES.index(operation["phase"]) if operation["phase"] in _PHASES else 0
    table.add_row("phase", ProgressBar(legs * len(_PHASES), done, width=40), phase_text(operation))
    progress = operation.get("progress")
    if operation["phase"] == "prepare" and progress and progress.get("bytes_total"):
        bar = ProgressBar(progress["bytes_total"], progress["bytes_done"], width=40)
        table.add_row("bytes", bar, f"{size(progress['bytes_done'])} of {size(progress['bytes_total'])}")
    return table


def _table(title: str, *columns: str) -> Table:
    """Texts left, numbers (in parentheses the unit, if any) right: all columns after the first two are numbers."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    return table


def _processes(status: dict[str, Any]) -> Table:
    table = _table("Processes", "name", "state", "pid", "restarts")
    table.add_row("launcher", "running", str(status["deployment"]["launcher"]["pid"]), "0")
    for process in status["deployment"]["processes"]:
        state = Text("running") if process["alive"] else Text("ended", style="red")
        table.add_row(process["name"], state, str(process["pid"]), str(process["restarts"]))
    for down in status["deployment"].get("down", ()):
        state = Text("failing" if down["is_failing"] else "restarting", style="red")
        table.add_row(down["name"], state, "", str(down["restarts"]))
    return table


def _failing(status: dict[str, Any]) -> list[RenderableType]:
    """A line for each process that does not stay up: what goes on without it, and why."""
    return [
        Text(f"{down['name']} does not stay up and is tried again; the rest goes on. {down['reason']}", style="red")
        for down in status["deployment"].get("down", ())
        if down["is_failing"]
    ]


def _devices(devices: dict[str, Any]) -> RenderableType:
    if "error" in devices:
        return Text(f"Devices: {devices['error']}")
    table = _table("Devices", "device", "state", "budget", "weights", "KV", "other", "free")
    for device in devices.get("devices", ()):
        memory = device.get("memory") or {}
        figures = (size(memory.get(name, 0)) for name in ("budget", "weights", "kv", "other", "free"))
        table.add_row(str(device.get("device")), str(device.get("state")), *figures)
    table.caption = f"{devices.get('standby_processes', 0)} standby processes"
    return table


def _ranks(layout: dict[str, Any]) -> RenderableType:
    if "error" in layout:
        return Text(f"Ranks: {layout['error']}")
    table = _table(
        f"Ranks (epoch {layout.get('epoch')}, {layout.get('phase')})",
        *("rank", "device", "state", "slot", "pid", "experts", "KV blocks"),
    )
    for rank in layout.get("ranks", ()):
        name = f"r{rank.get('replica')}t{rank.get('tp')}"
        state = "ready" if rank.get("ready") else "starting" if rank.get("pid") else "empty"
        if rank.get("state") in ("joining", "leaving"):
            state = rank["state"]
        row = (rank.get("slot"), rank.get("pid") or "", rank.get("experts"), rank.get("kv_blocks"))
        table.add_row(name, str(rank.get("device")), state, *map(str, row))
    return table


def _load(load: Any) -> RenderableType:
    if not isinstance(load, dict):
        return Text(f"Load: {load}")
    if "error" in load:
        return Text(f"Load: {load['error']}")
    facts = [f"{key} {value}" for key, value in load.items() if isinstance(value, (int, float, str))]
    return Text("Load: " + ", ".join(facts))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _is_scaling(status: dict[str, Any]) -> bool:
    listed = (status.get("operations") or {}).get("operations") or [{"outcome": "none"}]
    return not listed[0].get("outcome")


def _watch(path: Path) -> int:
    console = table_console()
    keys = sys.stdin.isatty()
    try:
        status = collect(path)
        with Live(Cleaned(render(status)), console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                wait_s = _WATCH_INTERVAL_BUSY_S if _is_scaling(status) else _WATCH_INTERVAL_S
                if keys and select.select([sys.stdin], [], [], wait_s)[0]:
                    if sys.stdin.readline().strip() in ("", "q"):
                        return 0
                elif not keys:
                    time.sleep(wait_s)
                status = collect(path)
                live.update(Cleaned(render(status)), refresh=True)
    except KeyboardInterrupt:
        return 0
