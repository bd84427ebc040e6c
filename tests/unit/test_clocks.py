"""Durations, deadlines and leases go by the monotonic clock (promise P22): here are all the places that read the wall
clock, each with what it is for. `tests/procs/test_clock.py` moves the clock under a running deployment."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.test_tidy import CODE, ROOT, name, tracked, tree

# (file, what it reads): why that may be the wall clock. All of it is shown or compared for equality, never waited for.
ALLOWED = {
    ("cli/bench/accel_resize.py", "time.time"): "brings the times of a log's lines to the monotonic clock",
    ("cli/bench/report.py", "time.strftime"): "the date in a report's heading",
    ("cli/doctor_device.py", "datetime.now"): "the time of a report",
    ("cli/policy.py", "time.strftime"): "shows a decision's time",
    ("cli/policy.py", "time.localtime"): "shows a decision's time",
    ("cli/sentences.py", "time.strftime"): "shows an event's time",
    ("cli/sentences.py", "time.localtime"): "shows an event's time",
    ("cli/launcher.py", "time.time"): "when a process that ended is started again, shown",
    ("cli/status.py", "time.time"): "shows for how long a deployment has run, of which its record has the wall time",
    ("cli/up.py", "time.time"): "the record's time of the start, shown",
    ("common/telemetry.py", "time.strftime"): "the time of a log line",
    ("common/telemetry.py", "time.localtime"): "the time of a log line",
    ("common/telemetry.py", "datetime.fromtimestamp"): "the time of a log line",
    ("common/telemetry.py", "time.time"): "the time of a log line",
    ("services/router/api/request_trace.py", "time.time"): "when spans began, shown",
    ("common/safetensors.py", ".st_mtime_ns"): "equality: whether a file was changed while it was read",
    ("common/transport.py", ".st_mtime_ns"): "equality: whether another process has bound a socket's path",
    ("common/clock.py", "time.time"): "what the clock that services are given tells beside monotonic time",
    ("common/http/listener.py", "time.time"): "`Date` of an answer",
    ("services/router/api/chat_renderer.py", "time.time"): "`created` of an answer",
    ("services/router/api/completion_renderer.py", "time.time"): "`created` of an answer",
    ("services/router/text/template.py", "datetime.now"): "`strftime_now` of chat templates",
    ("services/router/api/responses_renderer.py", "time.time"): "`created_at` of an answer",
    ("services/router/api/front.py", "time.time"): "`created` of the model, shown",
}

WALL = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime", "mktime"},
    "datetime": {"now", "utcnow", "today", "fromtimestamp", "utcfromtimestamp"},
    "date": {"today", "fromtimestamp"},
}
FILE_TIMES = {f"st_{which}{unit}" for which in ("mtime", "atime", "ctime") for unit in ("", "_ns")}
FILE_TIMES |= {"getmtime", "getatime", "getctime", "CLOCK_REALTIME", "clock_gettime"}
NATIVE = re.compile(
    r"system_clock|high_resolution_clock|utc_clock|file_clock|CLOCK_REALTIME|CLOCK_TAI|\bgettimeofday\b|\bstd::time\b"
    r"|\btime\((?:nullptr|NULL|0|&)|\blocaltime|\bgmtime|\bftime\b|\btimespec_get\b"
    # These wait until a time of the wall clock, unless they are told otherwise.
    r"|\bsem_timedwait\b|\bpthread_\w*timed\w+|\bmq_timed\w+|FUTEX_CLOCK_REALTIME"
)


def wall_clock_in(module: ast.Module) -> list[str]:
    """What a Python module reads of the wall clock."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [f"from time import {alias.name}" for alias in node.names if alias.name in WALL["time"]]
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr in WALL.get(owner, ()):
                found.append(f"{owner}.{node.attr}")
            elif node.attr in FILE_TIMES:
                found.append(f".{node.attr}")
    return found


def test_the_wall_clock_is_read_only_for_what_is_shown() -> None:
    found = {(name(path), what) for path in CODE for what in wall_clock_in(tree(path))}
    assert found == set(ALLOWED)


# Loops and decisions that the simulation drives: they are given a Clock, and sleep in nothing but what they are given.
SIMULATED = (
    *("services/scaler/", "services/router/dispatch/", "services/hmm/service.py", "services/hmm/sessions/"),
    *("services/hmm/transition/", "services/worker/rank/", "services/worker/migration/", "services/worker/hmm/"),
)
TIMES = {"time", "time_ns", "monotonic", "monotonic_ns", "sleep"}


def times_in(module: ast.Module) -> list[str]:
    """Where a Python module asks the machine for the time, or sleeps."""
    return [
        f"{node.lineno}: time.{node.attr}"
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "time" and node.attr in TIMES
    ]


def test_what_is_simulated_asks_the_clock_that_it_was_given() -> None:
    paths = [path for path in CODE if name(path).startswith(SIMULATED)]
    assert {room for room in SIMULATED if any(name(path).startswith(room) for path in paths)} == set(SIMULATED)
    assert {name(path): found for path in paths if (found := times_in(tree(path)))} == {}
    assert times_in(ast.parse("import time\nnow = time.monotonic()")) == ["2: time.monotonic"]


def test_native_code_reads_no_wall_clock() -> None:
    sources = [path for path in tracked(".cpp", ".h", ".hpp", ".cc") if name(path).startswith("native/")]
    assert len(sources) > 10
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if NATIVE.search(line)
    ]
    assert found == []


def test_the_store_counts_a_lease_in_milliseconds_from_now() -> None:
    """No time of day is sent to the store, and none is read there; its own clock is in tests/procs/test_clock.py."""
    text = Path(ROOT / "common/store.py").read_text(encoding="utf-8")
    used = Counter(re.findall(r"'(PX|EX|PXAT|EXAT|TIME|EXPIREAT|PEXPIREAT)'", text))
    assert used == {"PX": 2}


@pytest.mark.parametrize(
    "code",
    [
        "import time\ntime.time()",
        "import time as t\nfrom time import time",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\ndatetime.utcnow()",
        "from datetime import date\ndate.today()",
        "import time\nclock = time.time",
        "import time\ntime.clock_gettime(time.CLOCK_REALTIME)",
        "import os\nos.stat('x').st_mtime",
    ],
)
def test_each_way_to_read_it_is_seen(code: str) -> None:
    assert wall_clock_in(ast.parse(code))
    assert not wall_clock_in(ast.parse("import time\ntime.monotonic(); time.perf_counter(); time.sleep(1)"))


@pytest.mark.parametrize(
    "line",
    [
        "auto now = std::chrono::system_clock::now();",
        "clock_gettime(CLOCK_REALTIME, &now);",
        "gettimeofday(&now, nullptr);",
        "seed(time(nullptr));",
        "pthread_cond_timedwait(&condition, &mutex, &until);",
    ],
)
def test_each_native_way_is_seen(line: str) -> None:
    assert NATIVE.search(line)
    assert not NATIVE.search("clock_gettime(CLOCK_MONOTONIC, &now);")
