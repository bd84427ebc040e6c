"""A benchmark of steady states waits until the HMM makes no more large pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.cli.bench import deployment


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> deployment.Running:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/admin.token").write_text("secret\n")
    monkeypatch.setattr(deployment, "_LARGE_S", 0.05)
    monkeypatch.setattr(deployment, "_TURN_S", 0.001)
    return deployment.Running("http://127.0.0.1:1", tmp_path)


def told(monkeypatch: pytest.MonkeyPatch, status: int, figures: list[int]) -> list[str]:
    """The scaler tells of these large pages, the last figure for ever; the tokens that it was asked with."""
    asked: list[str] = []

    async def ask(method: str, url: str, *, local: Path, token: str) -> tuple[int, bytes]:
        assert (method, url, local.name) == ("GET", "http://localhost/v1/devices", "admin.sock")
        asked.append(token)
        devices: list[dict[str, Any]] = [{"large_pages": figures[min(len(asked), len(figures)) - 1]}]
        return status, msgspec.json.encode({"devices": devices})

    monkeypatch.setattr(deployment, "ask", ask)
    return asked


def test_it_waits_until_they_become_no_more(running: deployment.Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = told(monkeypatch, 200, [0, 2, 4, 4, 6])
    deployment.wait_settled(running)
    assert len(asked) > 5
    assert set(asked) == {"secret"}


def test_it_does_not_wait_for_ever(running: deployment.Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_LARGE_SECONDS_MAX", 0.1)
    asked = told(monkeypatch, 200, list(range(100_000)))
    deployment.wait_settled(running)
    assert 1 < len(asked) < 100_000


def test_a_scaler_that_refuses_ends_it(running: deployment.Running, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, 503, [0])
    with pytest.raises(ValueError, match="/v1/devices: HTTP 503"):
        deployment.wait_settled(running)
