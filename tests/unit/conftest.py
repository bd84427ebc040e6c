"""Unit tests share a process, and what one process may do with device memory depends on what it has done before."""

from __future__ import annotations

import pytest

from elasticmoe.common.devices.rules import PROCESS, ProcessRules


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins as a process that has neither exported nor imported handles."""
    for name, value in vars(ProcessRules()).items():
        monkeypatch.setattr(PROCESS, name, value)
