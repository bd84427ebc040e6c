"""Tests of what uses devices, on each backend: `host:N` names a device of the one that the fixture has chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from elasticmoe.common.devices import factory
from tests.devices import strict

KINDS = ("host", "strict")


@pytest.fixture(params=KINDS)
def granularity(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the backend that the test runs on."""
    return choose(request.param, tmp_path, monkeypatch)


def choose(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let `host:N` be devices of the backend `kind`, whose memory may be in `folder`; its granularity."""
    if kind == "host":
        return 4096
    (folder / "devices").mkdir()
    monkeypatch.setenv(strict.FOLDER, str(folder / "devices"))
    monkeypatch.setitem(factory._BACKENDS, "host", strict.StrictDevice)
    return strict.GRANULARITY
