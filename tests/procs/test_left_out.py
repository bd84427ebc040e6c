"""A run of tests says at its end what it has left out, and what runs that."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.procs
ROOT = Path(__file__).parent.parent.parent
FILE = "tests/unit/test_hmm_memory_shortage.py"  # all its tests are slow, and what it imports is not


def left_out(*arguments: str) -> dict[str, int]:
    """How many tests of each mark a run says it has left out."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode in (0, 5), ended.stdout + ended.stderr  # 5: no test was left
    told = re.findall(r"^left out: (\d+) (\w+) tests, which `.+` runs$", ended.stdout, re.MULTILINE)
    return {mark: int(number) for number, mark in told}


def test_it_says_what_was_left_out() -> None:
    told = left_out("-m", "not slow", "-n", "1", FILE)
    assert told.keys() == {"slow"}
    assert told["slow"] >= 4
