"""`bench accel`: what it says where there is no accelerator, which answers count as the same, and that every step is
told, whatever the others do. Its steps run on the stand-ins in tests/procs/test_bench_accel.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticmoe.cli.bench import accel
from elasticmoe.cli.bench.accel_answers import GreedyAnswer, difference
from elasticmoe.cli.bench.deployment import first_of
from elasticmoe.cli.main import main
from elasticmoe.common.protocol.errors import DeviceError


def answer(tokens: str, *logprobs: float) -> GreedyAnswer:
    return GreedyAnswer(tuple(tokens), logprobs)


@pytest.mark.parametrize(
    ("ours", "theirs", "most", "num_equal"),
    [
        (answer("abc", -1.0, -2.0, -3.0), answer("abc", -1.0, -2.5, -3.0), 0.5, 1),
        (answer("abc", -1.0, -2.0, -9.0), answer("axy", -1.0, -2.1, -1.0), 0.1, 0),  # what follows is another text
        (answer("abc", -1.0, -2.0, -9.0), answer("xyz", -4.0, -2.0, -9.0), 3.0, 0),  # no tie: they disagree
        (answer("a", -1.0), answer("a", -1.0), 0.0, 1),
    ],
)
def test_answers_count_up_to_where_their_tokens_differ(
    ours: GreedyAnswer, theirs: GreedyAnswer, most: float, num_equal: int
) -> None:
    found, equal = difference([ours], [theirs])
    assert found == pytest.approx(most)
    assert equal == num_equal


def test_answers_of_other_lengths_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="shorter"):
        difference([answer("ab", -1.0, -2.0)], [answer("a", -1.0)])


def test_deployments_have_the_first_of_the_devices() -> None:
    assert first_of("", 3) == "host:3"
    assert first_of("npu:4-7", 2) == "npu:4-5"
    assert first_of("cuda:2,cuda:0", 1) == "cuda:0"
    with pytest.raises(ValueError, match=r"--devices npu:0-1: 3 devices needed"):
        first_of("npu:0-1", 3)


class Missing:
    """A process whose driver is not there, but for `devices`."""

    devices: tuple[str, ...] = ()

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> Missing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, _: str) -> None:
        if self.device not in self.devices:
            raise DeviceError(f"no library for {self.device}", code="no_driver")


def test_a_machine_without_accelerators_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accel, "TestProcess", Missing)
    assert main(["bench", "accel", "--output", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    told = "there is no accelerator: no library for npu:0; no library for cuda:0"
    assert (out, err) == ("", f"elasticmoe: nothing_measured: {told}\n")
    assert not (tmp_path / "out").exists()
    for devices, setting in (
        (("cuda:0",), "cuda:0/2"),
        (("npu:0",), "npu:0/2"),
        (("npu:0", "npu:1", "cuda:0"), "npu:0,npu:1"),
    ):
        monkeypatch.setattr(Missing, "devices", devices)
        assert accel.found() == setting


def test_every_step_is_told_whatever_the_others_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(_: Any) -> Any:
        raise httpx.ConnectError("it did not come up")

    monkeypatch.setattr(accel._Accelerators, "contract", fails)
    monkeypatch.setattr(accel._Accelerators, "attach", lambda _: (True, "12 ms", {"ms": 12}))
    monkeypatch.setattr(accel._Accelerators, "decode", lambda _: (False, "1 request failed", None))
    words = ["bench", "accel", "--devices", "npu:0", "--output", str(tmp_path), "--steps", "contract,attach,decode"]
    assert main(words) == 1
    data = json.loads((tmp_path / "accel-npu.json").read_text())
    assert [(row["step"], row["result"], row["found"]) for row in data["rows"]] == [
        ("contract", "failed", "it did not come up"),
        ("attach", "ok", "12 ms"),
        ("decode", "failed", "1 request failed"),
    ]
    assert (data["devices"], data["raw"]["attach"]) == ("npu:0", {"ms": 12})
    assert {"commit", "cpu", "python"} <= set(data["provenance"])
    assert {"driver", "torch", "torch-npu"} <= {one["name"] for one in data["installed"]}
    assert "it did not come up" in capsys.readouterr().out
    assert main([*words[:-1], "contrakt"]) == 1
    assert "unknown step 'contrakt'; known: contract, parity" in capsys.readouterr().err
    assert main(["bench", "accel", "--devices", "npu:0", "--output", str(tmp_path), "--steps", "oracle"]) == 1
    assert "needs two devices" in capsys.readouterr().out
    assert main(["bench", "accel", "--devices", "host:2", "--output", str(tmp_path)]) == 1
    assert "--devices host:2 are no accelerators: these are npu and cuda" in capsys.readouterr().err


@pytest.mark.parametrize(("failed", "result"), [(0, "ok"), (2, "failed")])
def test_scaling_tells_of_both_ways_and_of_requests_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failed: int, result: str
) -> None:
    up = {"direction": "up", "done_s": 2.5, "pause_ms": 40.0, "failed": 0}
    down = {"direction": "down", "done_s": 0.5, "pause_ms": 12.0, "failed": failed}
    ran = {"runs": [{"run": {"figures": [up, down]}}]}
    monkeypatch.setattr(accel._Accelerators, "_bench", lambda *_: ran)
    words = ["bench", "accel", "--devices", "cuda:0-1", "--output", str(tmp_path), "--steps", "scaling"]
    assert main(words) == (failed > 0)
    (row,) = json.loads((tmp_path / "accel-cuda.json").read_text())["rows"]
    assert row["result"] == result
    assert row["found"] == f"up 2.5 s, pause 40 ms; down 0.5 s, pause 12 ms; {failed} requests failed"


def test_a_benchmark_that_fails_is_told_with_its_last_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["bench", "accel", "--devices", "npu:0", "--output", str(tmp_path), "--steps", "attach"]
    assert main(words) == 1
    assert "--devices npu:0: 2 devices needed" in capsys.readouterr().out


def test_what_does_not_compute_there_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["bench", "accel", "--devices", "cuda:0/2", "--compute", "torch_npu", "--output", str(tmp_path / "out")]
    assert main(words) != 0
    assert "torch_npu does not compute on cuda:0/2: torch or triton do" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
