"""`status --watch` in terminals: it fills them, keys need no Enter, and the terminal is given back in every way out."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.cli.main import main
from tests.procs.terminals import Terminal
from tests.procs.waiting import wait_until
from tests.unit.test_cli_watch import SIZES, status

pytestmark = pytest.mark.procs

PROGRAM = """
import json, sys
from elasticmoe.cli.watch import watch
status = json.loads(sys.argv[1])
sys.exit(watch(lambda: status, lambda _: 0.05))
"""


def in_terminal(value: dict[str, Any], columns: int, rows: int) -> Terminal:
    return Terminal([sys.executable, "-c", PROGRAM, json.dumps(value)], columns, rows)


@pytest.mark.parametrize(("columns", "rows"), SIZES[:3])
def test_it_fills_the_terminal_and_q_leaves_without_enter(columns: int, rows: int) -> None:
    with in_terminal(status(), columns, rows) as terminal:
        terminal.read_until(lambda output: output.count("\x1b[H") >= 3, "it is drawn again")
        assert len(terminal.screen) <= rows + 1
        assert max(map(len, terminal.screen)) <= columns
        assert "r2t0" in "\n".join(terminal.screen) or "3 ready" in "\n".join(terminal.screen)
        terminal.type("x")  # means nothing
        terminal.type("q")
        assert terminal.end() == 0
        assert terminal.is_as_it_was


@pytest.mark.parametrize(("keys", "code"), [("\x03", 0), ("Q", 0)])
def test_other_keys_that_leave(keys: str, code: int) -> None:
    with in_terminal(status(), 70, 24) as terminal:
        terminal.read_until(lambda output: "op-0123456789ab" in output, "it is drawn")
        terminal.type(keys)
        assert terminal.end() == code
        assert terminal.is_as_it_was


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_it_leaves_the_terminal_as_it_was(number: signal.Signals) -> None:
    with in_terminal(status(), 70, 24) as terminal:
        terminal.read_until(lambda output: "op-0123456789ab" in output, "it is drawn")
        assert not terminal.is_as_it_was
        os.kill(terminal.job, number)
        assert terminal.end() == (0 if number == signal.SIGINT else 128 + number)
        assert terminal.is_as_it_was


@contextmanager
def stopped() -> Iterator[Terminal]:
    """One that has been stopped by Ctrl-Z."""
    with in_terminal(status(), 70, 24) as terminal:
        terminal.read_until(lambda output: "op-0123456789ab" in output, "it is drawn")
        state = Path(f"/proc/{terminal.job}/stat")
        terminal.type("\x1a")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "it is stopped")
        terminal.read_until(lambda _: terminal.is_as_it_was, "the terminal is as it was")
        yield terminal


def test_it_can_be_stopped_and_continued() -> None:
    with stopped() as terminal:
        drawn = len(terminal.output)
        os.killpg(terminal.job, signal.SIGCONT)
        terminal.read_until(lambda output: "op-0123456789ab" in output[drawn:], "it is drawn again")
        assert not terminal.is_as_it_was
        terminal.type("q")
        assert terminal.end() == 0
        assert terminal.is_as_it_was


def test_a_key_that_is_pressed_while_it_is_continued_counts() -> None:
    with stopped() as terminal:
        terminal.type("q")
        os.killpg(terminal.job, signal.SIGCONT)
        assert terminal.end() == 0
        assert terminal.is_as_it_was


def test_another_size_is_another_drawing() -> None:
    with in_terminal(status(), 70, 24) as terminal:
        terminal.read_until(lambda output: "Processes: 7 running" in output, "it is folded")
        terminal.resize(120, 60)
        terminal.read_until(lambda output: "Processes\r\n" in output or "router" in output, "it is unfolded")
        terminal.type("q")
        assert terminal.end() == 0


def test_what_cannot_be_asked_any_more_ends_it_with_the_terminal_as_it_was() -> None:
    failing = PROGRAM.replace("lambda: status, lambda", "asked.pop, lambda").replace(
        "sys.exit", "asked = [status] * 3\nsys.exit"
    )
    with Terminal([sys.executable, "-c", failing, json.dumps(status())], 70, 24) as terminal:
        assert terminal.end() == 1
        assert "IndexError" in terminal.output
        assert terminal.is_as_it_was


def test_without_a_terminal_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--watch", "--run-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("elasticmoe: no_terminal: --watch ")


def test_the_command_itself_in_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elasticmoe.cli.main", "status", "--watch", "--run-dir", str(tmp_path)]
    with Terminal(command, 70, 24) as terminal:
        terminal.read_until(lambda output: "nothing runs in" in output, "it is drawn")
        terminal.type("q")
        assert terminal.end() == 0
        assert terminal.is_as_it_was
