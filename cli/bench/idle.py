"""`elasticmoe bench idle`: what a deployment costs while nobody asks it anything.

For each process, over the same seconds: context switches (of all its threads, voluntary and not), processor time, and
at the end threads and memory. Memory is the *proportional* share (PSS), by which what processes share counts once in
all of them together, and the private part (USS). What the kernel counts is read from /proc (proc_pid_status(5),
proc_pid_stat(5), proc_pid_smaps(5)); nothing is attached to the processes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from elasticmoe.cli.admin import connect
from elasticmoe.cli.arguments import whole
from elasticmoe.cli.bench.deployment import running
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.settings import parse_seconds
from elasticmoe.cli.terminal import say
from elasticmoe.common.record import read_record

SETTLE_S = 10.0  # after the start: what was begun then has ended
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_UTIME, _STIME = 11, 12  # of /proc/PID/stat, behind the program's name


class Usage(NamedTuple):
    """What one process has used since its start: processor seconds, and context switches of its living threads."""

    cpu_s: float
    switches: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench idle`."""
    parser.add_argument("--model", default="tiny", metavar="MODEL", help="name or path of the model (tiny)")
    parser.add_argument("--replicas", type=whole(1), default=2, metavar="N", help="replicas that wait (2)")
    parser.add_argument("--seconds", type=parse_seconds, default=30.0, metavar="S", help="how long it is watched (30)")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data. Raises ValueError when there was nothing to watch."""
    with running(args.model, args.replicas) as deployment:
        time.sleep(SETTLE_S)
        rows = watch(processes_of(deployment.run_dir), args.seconds)
    say(table(rows))
    facts = {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]])), "seconds": args.seconds, "rows": rows}
    say(f"raw data: {write_raw(args.output, 'idle', facts)}")
    return 0


def processes_of(run_dir: Path) -> dict[int, str]:
    """Every process of the deployment by its id, with a name: launcher, its children, ranks, and whom these started.
    Raises ValueError when none runs there."""
    record = read_record(run_dir)
    if record is None:
        raise ValueError(f"no deployment runs in {run_dir}")
    named = {record.launcher.pid: "launcher"} | {process.pid: process.name for process in record.processes}
    with connect(run_dir) as admin:
        ranks = admin.call("GET", "/v1/layout")["ranks"]
    named |= {rank["pid"]: f"rank r{rank['replica']}t{rank['tp']}" for rank in ranks if rank["pid"]}
    parents = _parents()
    found = dict(named)
    for pid in parents:
        line = _line_of(pid, parents)
        if record.launcher.pid in line and pid not in named:
            owner = next(named[one] for one in line if one in named)
            found[pid] = "template, standbys" if owner == "launcher" else f"{owner}: others"
    return found


def watch(processes: dict[int, str], seconds: float) -> list[dict[str, Any]]:
    """What each of them uses in that time, those of one name together, and the sum. Who ends meanwhile is left out."""
    begun = time.monotonic()
    before = {pid: usage for pid in processes if (usage := usage_of(pid)) is not None}
    time.sleep(seconds)
    after = {pid: usage for pid in before if (usage := usage_of(pid)) is not None}
    took = time.monotonic() - begun
    rows: dict[str, dict[str, Any]] = {}
    for pid, usage in after.items():
        row = _row_of(pid, processes[pid], before[pid], usage, took)
        known = rows.setdefault(processes[pid], {"process": processes[pid]} | dict.fromkeys(list(row)[1:], 0))
        known |= {name: known[name] + value for name, value in row.items() if name != "process"}
    if not rows:
        raise ValueError("no process could be watched")
    names = list(next(iter(rows.values())))[1:]
    total = {name: round(sum(row[name] for row in rows.values()), 3) for name in names}
    return [*rows.values(), {"process": "all"} | total]


def _row_of(pid: int, name: str, before: Usage, after: Usage, took: float) -> dict[str, Any]:
    pss, uss = _memory_mib(pid)
    return {
        "process": name,
        "switches per s": round((after.switches - before.switches) / took, 2),
        "% of a core": round(100 * (after.cpu_s - before.cpu_s) / took, 3),
        "threads": _count(pid),
        "PSS MiB": pss,
        "USS MiB": uss,
    }


def usage_of(pid: int) -> Usage | None:
    """None when it does not run, or is another user's."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        switches = sum(_switches(task) for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return None
    return Usage((int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS_PER_S, switches)


def _switches(task: Path) -> int:
    try:
        lines = (task / "status").read_text().splitlines()
    except OSError:
        return 0  # the thread has ended
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches:" in line)


def _count(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _memory_mib(pid: int) -> tuple[float, float]:
    """Proportional and private memory; zeros where it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0, 0.0
    kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    private = kib.get("Private_Clean", 0) + kib.get("Private_Dirty", 0)
    return round(kib.get("Pss", 0) / 1024, 1), round(private / 1024, 1)


def _parents() -> dict[int, int]:
    """Of every process, its parent's id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
    return found


def _line_of(pid: int, parents: dict[int, int]) -> list[int]:
    """The process, its parent, and so on."""
    line: list[int] = []
    while pid in parents and pid not in line:
        line.append(pid)
        pid = parents[pid]
    return line
