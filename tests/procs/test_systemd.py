"""deploy/elasticmoe.service as systemd itself reads it, and what docs/systemd.md says of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elasticmoe.cli.main import make_parser
from elasticmoe.common.config import PREFIX, RESERVED, defaults
from tests.markdown import ROOT

UNIT, PAGE = ROOT / "deploy/elasticmoe.service", ROOT / "docs/systemd.md"
PROGRAM = "/opt/elasticmoe/.venv/bin/elasticmoe"

pytestmark = pytest.mark.procs


def complaints(unit: str, folder: Path) -> str:
    """What `systemd-analyze verify` says of a unit; nothing, where all of it is understood."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    path = folder / "elasticmoe.service"
    path.write_text(unit.replace(PROGRAM, str(Path(sys.executable).with_name("elasticmoe"))))
    command = [program, "verify", "--man=no", "--recursive-errors=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = (done.stdout + done.stderr).strip()
    return told or f"exit status {done.returncode}" * bool(done.returncode)


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    unit = UNIT.read_text()
    assert complaints(unit, tmp_path) == ""
    assert "KilMode" in complaints(unit.replace("KillMode", "KilMode"), tmp_path)
    assert "restart specifier" in complaints(unit.replace("on-failure", "on-failur"), tmp_path)
    assert "not executable" in complaints(unit.replace(PROGRAM, "/nonexistent"), tmp_path)


def test_the_page_and_the_unit_say_the_same() -> None:
    unit, page = UNIT.read_text(), PAGE.read_text()
    cells = re.findall(r"^\| (`[^|]*=[^|]*`)[^|]* \|", page, re.MULTILINE)
    lines = [line for cell in cells for line in re.findall(r"`([^`]*=[^`]*)`", cell)]
    assert {"KillMode=mixed", "TimeoutStopSec=130"} <= set(lines)
    for line in lines:
        name, _, value = line.partition("=… ")
        assert f"{name}=" in unit if value else line in unit, line
    variables = re.findall(r"^Environment=(\w+)=(\S+)$", unit, re.MULTILINE)
    known = {PREFIX + name.upper() for name in (*defaults(), *RESERVED)} | {f"{PREFIX}RUN_DIR"}
    assert {name for name, _ in variables} <= known
    assert all(value in page for name, value in variables if name != f"{PREFIX}HOME")
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop) >= make_parser().parse_args(["down"]).timeout
