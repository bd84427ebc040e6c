"""`bench serve --recipes` from end to end: two recipes of the oracle model beside one another."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from elasticmoe.cli.bench.deployment import COMMAND

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(300)]


def test_recipes_take_turns_and_are_told_beside_the_first(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    small = f"dtype=float32 kv_bytes={16 << 20} device_bytes={256 << 20}"
    words = ["--models", str(model_folder("oracle")), "--concurrency", "1,4", "--rounds", "2"]
    words += ["--requests-per-client", "2", "--prompt-tokens", "16", "--output-tokens", "8", "--output", str(tmp_path)]
    words += ["--recipes", f"one: {small}; two ranks: tp=2 {small}"]
    ran = subprocess.run([*COMMAND, "bench", "serve", *words], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert "of the first's, median" in ran.stdout
    data = json.loads((tmp_path / "serve.json").read_text())
    rows = data["rows"]
    assert [(row["recipe"], row["concurrency"], row["failed"]) for row in rows] == [
        ("one", 1, 0),
        ("two ranks", 1, 0),
        ("one", 4, 0),
        ("two ranks", 4, 0),
    ]
    for number in (0, 2):
        first, second = rows[number : number + 2]
        assert (first["of the first's, median"], first["middle half"]) == ("1.00", "1.00 to 1.00")
        theirs, mine = (
            [figures["tokens_per_s"] for figures, _ in one["rounds"]] for one in data["rounds"][number:][:2]
        )
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        assert second["of the first's, median"] == f"{sum(ratios) / 2:.2f}"
    assert [data["rounds"][1][name] for name in ("replicas", "tp", "devices")] == [1, 2, "host:2"]
