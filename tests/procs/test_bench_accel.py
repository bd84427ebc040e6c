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
        assert data["raw"]["oracle"] == {"resizes": 4, "answers": 6, "changed": 0, "most": 0.0}
        assert not any(standins.used(kind, folder))


@pytest.mark.timeout(600)
def test_parity_and_oracle_hold_with_the_vendors_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tests compute them, in bfloat16, of the model that is taken where none is named."""
    with standins.memory(monkeypatch) as folder:
        standins.install("npu", monkeypatch, operators=True)
        words = ["bench", "accel", "--devices", "npu:0-1", "--device-memory", "256MiB", "--output", str(tmp_path)]
        assert main([*words, "--compute", "torch_npu", "--steps", "parity,oracle"]) == 0
        data = json.loads((tmp_path / "accel-npu.json").read_text())
        assert [row["result"] for row in data["rows"]] == ["ok"] * 2
        assert data["raw"]["parity"]["dtype"] == "bfloat16"
        assert data["raw"]["parity"]["most"] > 0.0, "that is another arithmetic"
        assert not any(standins.used("npu", folder))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", standins.KINDS)
def test_each_aim_is_measured_and_told_as_no_devices(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with standins.memory(monkeypatch) as folder:
        standins.install(kind, monkeypatch)
        words = ["bench", "accel", "--devices", f"{kind}:0-1", "--device-memory", "256MiB", "--output", str(tmp_path)]
        words += ["--sized-model", "tiny-qwen3-moe", "--output-tokens", "8"]
        assert main([*words, "--steps", "attach,scaling,decode,exchange"]) == 0
        data = json.loads((tmp_path / f"accel-{kind}.json").read_text())
        assert [row["result"] for row in data["rows"]] == ["ok"] * 4
        assert {aim["result"] for aim in data["aims"]} <= {"met", "missed"}
        assert all(aim["figures"] for aim in data["aims"])
        grown, ceiling = data["raw"]["scaling"]["run"]["operations"][0], data["raw"]["scaling"]["ceiling"]
        assert ceiling["bytes"] == grown["figures"]["bytes_copied"], "plain copies were of the same sizes"
        assert {row["bits"] for row in data["raw"]["exchange"]} == {"the same"}
        assert data["driver"]["is_vendors"] is False
        assert str(folder) not in json.dumps(data)
        assert "these are figures of no device" in capsys.readouterr().out
        assert not any(standins.used(kind, folder))
