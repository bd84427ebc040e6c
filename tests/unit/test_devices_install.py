"""What measures a device takes the environment that is there: the torch that its owner chose for it stays."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.devices import vendor


def make(*words: str) -> subprocess.CompletedProcess[str]:
    """As somebody types it: not as a part of the `make` that runs the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=vendor.ROOT, capture_output=True, text=True, check=False, env=environment)


def commands_of(target: str) -> str:
    """What `make` would do where a source of the package is newer than its installation."""
    done = make("--dry-run", "--what-if=pyproject.toml", target)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["accel", "accel-test"])
def test_measuring_installs_nothing(target: str) -> None:
    assert "pip" in commands_of("test"), "as targets of development do"
    commands = commands_of(target)
    assert "pip" not in commands
    assert "elasticmoe" in commands


@pytest.mark.parametrize("target", ["accel", "accel-test"])
def test_without_an_installation_it_says_what_to_do(target: str) -> None:
    done = make("BIN=nowhere", target)
    assert done.returncode != 0
    assert "there is no nowhere/elasticmoe: install a torch for the device" in done.stderr
    assert not done.stdout
