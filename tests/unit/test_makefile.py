"""Every target of the Makefile, but not run: what it would type has no hole where a variable was to be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GIVEN = {"ARGS", "STANDIN"}  # by whoever calls it, or nobody
TARGETS = sorted(set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)))


def test_there_are_targets() -> None:
    assert {"up", "test", "lint", "picture", "docs"} <= set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_has_all_of_its_variables(target: str) -> None:
    words = ["make", "--no-print-directory", "--warn-undefined-variables", "-n", "-o", "install", target]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    missing = set(re.findall(r"undefined variable [`'](\w+)'", told.stderr))
    assert missing <= GIVEN
