"""`bench accel` on the stand-ins of accelerators' drivers: the runner that `make accel` is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elasticmoe.cli.main import main
from tests.devices import standins

pytestmark = [pytest.mark.procs, pytest.mark.accel]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", standins.KINDS)
def test_contract_parity_and_oracle_hold(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with standins.memory(monkeypatch) as folder:
        standins.install(kind, monkeypatch)
        words = ["bench", "accel", "--devices", f"{kind}:0-1", "--device-memory", "256MiB", "--output", str(tmp_path)]
        assert main([*words, "--steps", "contract,parity,oracle"]) == 0
        data = json.loads((tmp_path / f"accel-{kind}.json").read_text())
        assert [row["result"] for row in data["rows"]] == ["ok"] * 3
        assert data["raw"]["parity"]["equal"] == data["raw"]["parity"]["answers"]
        assert data["raw"]["oracle"] == {"resizes": 4, "answers": 6, "changed": 0}
        assert not any(standins.used(kind, folder))
