"""What `bench idle` reads of processes: it sees who wakes up and who computes, and nobody who has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.cli.bench.idle import _line_of, _parents, processes_of, usage_of, watch
from tests.procs.waiting import wait_until

SLEEPER = "import sys, time\nprint(flush=True)\nsys.stdin.read()"
WAKER = "import sys, time\nprint(flush=True)\nwhile True: time.sleep(0.01)"
WORKER = "import threading\nprint(flush=True)\nwhile True: pass"


@pytest.fixture
def processes() -> Iterator[dict[int, str]]:
    programs = {"sleeper": SLEEPER, "waker": WAKER, "worker": WORKER}
    started = {
        name: subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name, code in programs.items()
    }
    for process in started.values():
        assert process.stdout is not None
        process.stdout.readline()
    sleeper = Path(f"/proc/{started['sleeper'].pid}/stat")
    wait_until(lambda: ") S " in sleeper.read_text(), "the sleeper sleeps")
    yield {process.pid: name for name, process in started.items()}
    for process in started.values():
        process.kill()
        process.communicate()


def test_who_wakes_and_who_computes_is_seen(processes: dict[int, str]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def seen() -> dict[str, dict[str, Any]] | None:
        rows = {row["process"]: row for row in watch(processes | {ended.pid: "ended"}, 0.5)}
        return rows if rows["worker"]["% of a core"] and rows["waker"]["switches per s"] else None

    rows = wait_until(seen, "both have been given a core for a while", 100.0)
    assert rows is not None
    assert set(rows) == {"sleeper", "waker", "worker", "all"}
    assert rows["sleeper"]["switches per s"] < rows["waker"]["switches per s"]
    assert rows["sleeper"]["% of a core"] < rows["worker"]["% of a core"]
    for row in rows.values():
        assert row["threads"] >= 1
        assert row["PSS MiB"] >= row["USS MiB"] > 1
    assert rows["all"]["threads"] == 3


def test_processes_of_one_name_are_one_row(processes: dict[int, str]) -> None:
    rows = watch(dict.fromkeys(processes, "rank"), 0.1)
    assert [row["process"] for row in rows] == ["rank", "all"]
    assert rows[0]["threads"] == rows[1]["threads"] == 3


def test_descent_is_told_and_nothing_is_made_up(tmp_path: Path) -> None:
    line = _line_of(os.getpid(), _parents())
    assert line[:2] == [os.getpid(), os.getppid()]
    assert usage_of(2**22 + 1) is None
    with pytest.raises(ValueError, match="no deployment runs in"):
        processes_of(tmp_path)
    with pytest.raises(ValueError, match="no process could be watched"):
        watch({2**22 + 1: "nobody"}, 0.0)
