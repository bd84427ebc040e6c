"""Logs as lines of JSON: what every line has, that nothing takes its place, and what ends a process, too."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.cli.children import Child, ChildSpec
from elasticmoe.cli.console import make_console
from elasticmoe.common.protocol.rank import Origin, Sampling, Submit
from elasticmoe.common.telemetry import get_logger, log_about, setup_logging

ROOT = Path(__file__).parent.parent.parent
OF_EVERY_LINE = {"ts", "level", "service", "logger", "message"}


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    """What a process sets up once, undone."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before[0], before[1]
    logging.captureWarnings(False)


def run(code: str) -> list[dict[str, object]]:
    """What a process logs that runs `code` with logs in JSON."""
    begin = "from elasticmoe.common.telemetry import *\nlog = setup_logging('hmm', log_format='json')\n"
    done = subprocess.run([sys.executable, "-c", begin + code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_an_object_with_the_same_keys() -> None:
    lines = run(
        "log.info('ready', rank='r0t0', attach_ms=1.5, slots=(0, 1), nothing=None, odd=object, bad=float('nan'))\n"
        "log.warning('two\\nlines', message='no', service='no', stack='no')\n"
        "import warnings; warnings.warn('odd')\n"
        "try: 1 / 0\nexcept ZeroDivisionError: log.exception('failed', operation_id='op-1')\n"
        "import threading; thread = threading.Thread(target=lambda: {}['x']); thread.start(); thread.join()\n"
        "raise ValueError('the end')\n"
    )
    assert all(line.keys() >= OF_EVERY_LINE and line["service"] == "hmm" for line in lines)
    assert [line["level"] for line in lines] == ["info", "warning", "warning", "error", "critical", "critical"]
    assert (lines[0]["rank"], lines[0]["attach_ms"], lines[0]["slots"], lines[0]["nothing"]) == (
        "r0t0",
        1.5,
        [0, 1],
        None,
    )
    assert (lines[0]["odd"], lines[0]["bad"]) == ("<class 'object'>", "nan")
    assert lines[1]["message"] == "two\nlines"
    assert (lines[3]["operation_id"], "ZeroDivisionError" in str(lines[3]["stack"])) == ("op-1", True)
    assert "KeyError" in str(lines[4]["stack"])
    assert "the end" in str(lines[5]["stack"])


@pytest.mark.usefixtures("_logging_as_before")
def test_lines_of_a_task_name_its_request(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("router", log_format="json")

    async def answer(request_id: str) -> None:
        log_about(request_id=request_id, trace_id="t")
        log_about(request_id=request_id)  # of the connection's next request: nothing stays of the one before
        await asyncio.sleep(0)
        get_logger("http").error("failed")

    async def both() -> None:
        await asyncio.gather(asyncio.create_task(answer("a")), asyncio.create_task(answer("b")))
        get_logger("http").error("neither")

    asyncio.run(both())
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line.get("request_id"), line.get("trace_id")) for line in lines] == [
        ("a", None),
        ("b", None),
        (None, None),
    ]


def test_a_request_has_the_same_names_in_every_process() -> None:
    submit = Submit("chatcmpl-1-0", (1,), 4, Sampling(seed=1))
    assert submit.names == {"stream": "chatcmpl-1-0"}
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    told = Submit("chatcmpl-1-0", (1,), 4, Sampling(seed=1), origin=Origin("mine", parent))
    assert told.names == {"request_id": "mine", "stream": "chatcmpl-1-0", "trace_id": "ab" * 16}


def test_the_launcher_logs_in_json_and_tells_its_childrens_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = make_console(log_format="json")
    console.progress("loading", 1, 4)
    console.line("\na line\n")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["message"] for line in lines] == ["loading: 1 B of 4 B", "a line"]
    words = json.dumps({"level": "error", "message": "port 1 is in use", "code": "port_in_use"})
    child = Child(ChildSpec("child", ("/bin/echo", words)), os.environ, tmp_path, tmp_path / "x.log", {})
    assert child.wait(60)
    assert child.reap() == 0
    assert child.last_line() == "port_in_use: port 1 is in use"


def test_no_fact_has_the_name_of_what_every_line_has() -> None:
    """Such a fact would not be in the line."""
    calls = {
        f"{log}.{how}" for log in ("log", "self._log") for how in ("debug", "info", "warning", "error", "exception")
    }
    found = [
        f"{path}:{node.lineno}"
        for folder in ("common", "services")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls
        if {keyword.arg for keyword in node.keywords} & (OF_EVERY_LINE | {"stack"})
    ]
    assert found == []
