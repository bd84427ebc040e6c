"""What measures a device takes the environment that is there: the torch that its owner chose for it stays."""

from __future__ import annotations

import subprocess

import pytest

from tests.devices import vendor


def commands_of(target: str) -> str:
    """What `make` would do where a source of the package is newer than its installation."""
    command = ["make", "--dry-run", "--no-print-directory", "--what-if=pyproject.toml", target]
    return subprocess.run(command, cwd=vendor.ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["accel", "accel-test"])
def test_measuring_installs_nothing(target: str) -> None:
    assert "pip" in commands_of("test"), "as targets of development do"
    commands = commands_of(target)
    assert "pip" not in commands
    assert "elasticmoe" in commands


@pytest.mark.parametrize("target", ["accel", "accel-test"])
def test_without_an_installation_it_says_what_to_do(target: str) -> None:
    done = subprocess.run(["make", "BIN=nowhere", target], cwd=vendor.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "there is no nowhere/elasticmoe: install a torch for the device" in done.stderr
    assert not done.stdout
