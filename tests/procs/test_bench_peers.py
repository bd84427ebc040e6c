"""`bench serve --peers` from end to end: ours beside an engine in an environment of its own, which computes nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from elasticmoe.cli.bench import serve
from elasticmoe.cli.bench.peers.engine import Demand, Engine, Launch
from elasticmoe.cli.bench.peers.environment import Environment

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]


def launch(environment: Environment, model: Path, port: int, demand: Demand) -> Launch:
    """Its weights are the name of the checkpoint."""
    assert (model / "weights").read_text() == "oracle"
    assert demand.tokens > 1024
    argv = (str(environment.python), "-m", "tests.unit.toy_peer", str(port))
    return Launch(argv, {"PYTHONPATH": str(ROOT)})


def convert(_: Environment, checkpoint: Path, folder: Path) -> None:
    (folder / "weights").write_text(checkpoint.name)


TOY = Engine("toy", "Toy 1", (), launch, convert=convert)


def test_ours_is_measured_beside_another_engine(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ELASTICMOE_HOME", str(tmp_path / "home"))
    for name, value in (("DTYPE", "float32"), ("KV_BYTES", str(16 << 20)), ("DEVICE_BYTES", str(256 << 20))):
        monkeypatch.setenv(f"ELASTICMOE_{name}", value)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    words = [
        "--models",
        str(model_folder("oracle")),
        "--replicas",
        "1",
        "--tp",
        "2",
        "--concurrency",
        "1,4",
        "--rounds",
        "1",
    ]
    words += ["--requests-per-client", "2", "--prompt-tokens", "16", "--output-tokens", "8", "--output", str(tmp_path)]
    args = parser.parse_args(words)
    args.peers = (TOY,)
    assert serve.run(args) == 0
    told = json.loads((tmp_path / "peers.json").read_text())
    (result,) = told["results"]
    assert [visit["title"] for visit in result["visits"]] == [
        "ElasticMoE, replicas: 1",
        "ElasticMoE, replicas: 1 of 2 ranks",
        "Toy 1",
    ]
    assert result["failures"] == []
    for visit in result["visits"]:
        assert visit["start_s"] > 0
        assert visit["memory_bytes"] > 2 << 20
        figures = [cell["figures"] for cell in visit["cells"].values()]
        assert [(one["requests"], one["failed"]) for one in figures] == [(2, 0), (8, 0), (3, 0)]
    printed = capsys.readouterr().out
    assert "Toy 1: installing it unless it is there" in printed
    assert "start to first token s" in printed
