"""`elasticmoe load` against a deployment: what it sends is what the trace says, and ^C leaves what there is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.procs.deployment import Deployment
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs

REQUESTS_MAX = 4


@pytest.fixture(scope="module")
def deployment(model_folder: Callable[[str], Path]) -> Iterator[Deployment]:
    made = Deployment(model_folder("oracle"), replicas=1, requests_max=REQUESTS_MAX, max_sequences=REQUESTS_MAX)
    made.wait_ready()
    try:
        yield made
        made.stop()
    finally:
        made.discard()


def start(deployment: Deployment, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "elasticmoe.cli.main", "load", "--run-dir", str(deployment.run_dir), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_trace(folder: Path, lines: list[dict[str, Any]]) -> str:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def results_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_trace_is_sent_as_it_says(deployment: Deployment, tmp_path: Path) -> None:
    lengths = [(20, 5), (70, 1), (33, 12), (70, 7)]
    trace = write_trace(
        tmp_path,
        [
            {"timestamp": 400 * n, "input_length": prompt, "output_length": output, "hash_ids": [3]}
            for n, (prompt, output) in enumerate(lengths)
        ],
    )
    results = tmp_path / "results.jsonl"
    flags = (trace, "--time-scale", "2", "--ttft", "30s", "--itl", "20s", "--results", str(results), "--json")
    process = start(deployment, *flags)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    told = json.loads(out)
    assert told["outcomes"] == {"completed": 4}
    assert told["attainment"] == 1.0
    assert told["output_tokens"] == sum(output for _, output in lengths)
    assert told["prompt_tokens"] == sum(prompt for prompt, _ in lengths)
    found = sorted(results_in(results), key=lambda line: int(line["number"]))
    assert [line["scheduled_s"] for line in found] == [0.0, 0.2, 0.4, 0.6]
    assert [(line["input_tokens"], line["tokens"]) for line in found] == lengths
    assert all(line["sent_s"] >= line["scheduled_s"] for line in found)


def test_what_is_refused_is_told_by_its_code(deployment: Deployment, tmp_path: Path) -> None:
    """Many at once, more than are taken: an open loop sends them all."""
    num = 8 * REQUESTS_MAX
    line = {"timestamp": 0, "input_length": 30, "output_length": 60}
    process = start(deployment, write_trace(tmp_path, [line] * num), "--json")
    out, _ = process.communicate(timeout=60)
    told = json.loads(out)
    assert process.returncode == 0  # the server has answered all of them
    assert told["outcomes"]["completed"] + told["outcomes"]["refused"] == num
    assert told["outcomes"]["refused"] > 0
    assert sum(told["errors"].values()) == told["outcomes"]["refused"]
    assert not any(code.startswith("http_") for code in told["errors"])
    assert told["attainment"] == pytest.approx(told["outcomes"]["completed"] / num)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_what_there_is(deployment: Deployment, tmp_path: Path, number: signal.Signals) -> None:
    lines = [{"timestamp": 0, "input_length": 9, "output_length": 3}]
    lines += [{"timestamp": 3_600_000, "input_length": 9, "output_length": 3}]
    results = tmp_path / "results.jsonl"
    process = start(deployment, write_trace(tmp_path, lines), "--results", str(results))
    try:
        assert process.stdout is not None
        assert "Mooncake trace" in process.stdout.readline()
        wait_until(lambda: results.is_file() and results.read_text().count("\n") == 1, "the first has ended", 30.0)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, err) == (130, "")
    assert "requests    1 completed" in out
    assert len(results_in(results)) == 1
