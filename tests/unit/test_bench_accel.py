"""`bench accel`: what it says where there is no accelerator, which answers count as the same, and that every step is
told, whatever the others do. Its steps run on the stand-ins in tests/procs/test_bench_accel.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from elasticmoe.cli.bench import accel
from elasticmoe.cli.bench.accel_aims import attach_aim, copies_aim, decode_aim, flip_aim
from elasticmoe.cli.bench.accel_answers import UNLIKELY, GreedyAnswer, difference
from elasticmoe.cli.bench.accel_floor import chosen_experts, step_bytes
from elasticmoe.cli.bench.accel_resize import transition_of
from elasticmoe.cli.bench.accel_sized import SizedModel
from elasticmoe.cli.bench.deployment import Running, first_of
from elasticmoe.cli.bench.scaling_figures import Figures
from elasticmoe.cli.bench.scaling_run import Run
from elasticmoe.cli.main import main
from elasticmoe.cli.models.configs import TINY_QWEN3_MOE
from elasticmoe.common.families import parse_spec
from elasticmoe.common.protocol.errors import DeviceError


def answer(tokens: str, *logprobs: float, **likely: float) -> GreedyAnswer:
    """`likely`: the other tokens that are likely at each place."""
    return GreedyAnswer(tuple(tokens), logprobs, (likely,) * len(tokens))


@pytest.mark.parametrize(
    ("ours", "theirs", "most", "num_equal"),
    [
        (answer("abc", -1.0, -2.0, -3.0), answer("abc", -1.0, -2.5, -3.0), 0.5, 1),
        # What follows is another text.
        (answer("abc", -1.0, -2.0, -9.0, x=-2.05), answer("axy", -1.0, -2.1, -1.0, b=-2.1), 0.1, 0),
        # No tie: they disagree of the one token, of the other, or one has not even thought of it.
        (answer("abc", -1.0, -2.0, -9.0, x=-4.0), answer("xyz", -1.0, -2.0, -9.0, a=-1.0), 3.0, 0),
        (answer("abc", -1.0, -2.0, -9.0, x=-1.0), answer("xyz", -1.0, -2.0, -9.0, a=-5.0), 4.0, 0),
        (answer("abc", -1.0, -2.0, -9.0, x=-1.0), answer("xyz", -1.0, -2.0, -9.0), UNLIKELY, 0),
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
    assert {(one["result"], one["found"]) for one in data["aims"]} == {
        ("not measured", "attach: ok"),  # by a step that told of no aim
        ("not measured", "scaling: not asked for"),
        ("not measured", "decode: failed"),
    }
    assert {"commit", "cpu", "python"} <= set(data["provenance"])
    assert {"driver", "torch", "torch-npu"} <= {one["name"] for one in data["installed"]}
    assert "it did not come up" in capsys.readouterr().out
    assert main([*words[:-1], "contrakt"]) == 1
    assert "unknown step 'contrakt'; known: contract, parity" in capsys.readouterr().err
    assert main(["bench", "accel", "--devices", "npu:0", "--output", str(tmp_path), "--steps", "oracle"]) == 1
    assert "needs two devices" in capsys.readouterr().out
    assert main(["bench", "accel", "--devices", "host:2", "--output", str(tmp_path)]) == 1
    assert "--devices host:2 are no accelerators: these are npu and cuda" in capsys.readouterr().err


def figures(direction: str, done_s: float, pause_ms: float, failed: int) -> Figures:
    """Of a change, with a step of 10 ms before it."""
    zeros = dict.fromkeys((field.name for field in msgspec.structs.fields(Figures)), 0)
    told = {"direction": direction, "done_s": done_s, "pause_ms": pause_ms, "failed": failed, "gap_p50_ms": 10.0}
    return Figures(**{**zeros, **told})  # type: ignore[arg-type]


def operation(gap_ms: float | None, copied_s: float) -> dict[str, Any]:
    """What a change leaves, with what was seen beside it."""
    return {
        "planned": {"experts_moved": 5},
        "figures": {"bytes_copied": 80_000_000},
        "watched": {"flip_gap_ms": gap_ms, "copied_s": copied_s},
    }


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> SizedModel:
    """In place of one that is made."""
    spec = parse_spec(TINY_QWEN3_MOE, "bfloat16")
    model = SizedModel("/checkpoint", spec, {"device_bytes": 1 << 30}, {"name": "small"})
    monkeypatch.setattr(accel, "find_sized", lambda *_: model)
    return model


CEILING = {"bytes_per_s": 1e9, "memory_bytes_per_s": 2e9}


@pytest.mark.parametrize(("failed", "result"), [(0, "ok"), (2, "failed")])
@pytest.mark.usefixtures("sized")
def test_scaling_tells_of_both_ways_and_of_requests_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failed: int, result: str
) -> None:
    changes = (figures("up", 2.5, 40.0, 0), figures("down", 0.5, 12.0, failed))
    ran = Run(changes, (), (operation(12.0, 0.1), operation(9.0, 0.0)))
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(accel, "resize", lambda *_, **__: ran)
    monkeypatch.setattr(accel, "measure_ceiling", lambda *given: asked.append(given) or CEILING)
    words = ["bench", "accel", "--devices", "cuda:0-1", "--output", str(tmp_path), "--steps", "scaling"]
    assert main(words) == (failed > 0)
    data = json.loads((tmp_path / "accel-cuda.json").read_text())
    (row,) = data["rows"]
    assert row["result"] == result
    assert row["found"] == f"up 2.5 s, pause 40 ms; down 0.5 s, pause 12 ms; {failed} requests failed"
    aims = {one["aim"]: one for one in data["aims"]}
    assert (aims["flip"]["result"], aims["copies"]["result"]) == ("missed", "met"), "a missed aim is no failure"
    assert aims["flip"]["figures"] == {"gap_ms": 40.0, "flip_gap_ms": 12.0, "step_ms": 10.0, "ratio": 4.0}
    assert aims["copies"]["figures"]["ratio"] == pytest.approx(0.8)
    ((devices, large, sizes),) = asked
    assert (devices, large, len(sizes)) == (("cuda:0", "cuda:1"), 256 << 20, 1 + 3 + 5), "the sizes that were copied"


@pytest.mark.usefixtures("sized")
def test_decoding_is_told_beside_the_floor_of_its_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"concurrency": n, "TPOT p50 ms": 1.0, "tokens/s best": 100.0} for n in (1, 8, 32)]
    monkeypatch.setattr(accel._Accelerators, "_bench", lambda *_, **__: {"rows": rows})
    monkeypatch.setattr(accel, "measure_ceiling", lambda *_: CEILING)
    words = ["bench", "accel", "--devices", "cuda:0", "--output", str(tmp_path), "--steps", "decode"]
    assert main(words) == 0
    data = json.loads((tmp_path / "accel-cuda.json").read_text())
    found = [one for one in data["aims"] if one["aim"].startswith("decode")]
    floors = [one["figures"]["floor_ms"] for one in found]
    assert floors == sorted(floors)
    for one, floor in zip(found, data["raw"]["decode"]["floors"], strict=True):
        assert one["figures"]["bytes"] == pytest.approx(floor["dense"] + floor["experts"] + floor["kv"])
        assert one["figures"]["ratio"] == pytest.approx(1.0 / one["figures"]["floor_ms"])
        assert one["result"] == ("met" if one["figures"]["ratio"] <= 1.5 else "missed")


def test_a_step_reads_dense_weights_the_experts_that_are_to_be_expected_and_its_kv() -> None:
    assert chosen_experts(64, 8, 1) == pytest.approx(8)
    assert chosen_experts(64, 8, 2) == pytest.approx(8 + 8 * 56 / 64)
    assert chosen_experts(64, 8, 10_000) == pytest.approx(64)
    spec = parse_spec(TINY_QWEN3_MOE, "float32")
    hidden, layers, vocab, width, heads, kv_heads, dim = 96, 3, spec.vocab, 40, 6, 3, 24
    read = step_bytes(spec, 1, 10.0)
    attention = hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden + 2 * dim
    layer = attention + 2 * hidden + hidden * 11
    assert read.dense == 4 * (vocab * hidden + hidden + hidden + layers * layer)  # the head, and a row of the embedding
    assert read.experts == pytest.approx(4 * layers * 3 * 3 * hidden * width)
    assert read.kv == 4 * 10 * layers * 2 * kv_heads * dim
    assert read.total == read.dense + read.experts + read.kv


def test_aims_are_met_to_the_letter() -> None:
    assert (attach_aim(200.0).result, attach_aim(200.1).result) == ("met", "missed")
    assert [flip_aim(10.0, [9.0, gap], [1.0]).result for gap in (15.0, 15.1)] == ["met", "missed"]
    assert [copies_aim(7, seconds, 10.0).result for seconds in (1.0, 1.01, 0.0)] == ["met", "missed", "not measured"]
    assert [decode_aim(ms, 100.0, 1e5).result for ms in (1.5, 1.6)] == ["met", "missed"]


def test_the_hmms_log_says_when_it_copied_and_when_all_had_flipped() -> None:
    """Of each leg, and of the attempt at it that was committed."""

    def line(phase: str, second: str, leg: str = "0.0", op_id: str = "op") -> str:
        entry = {"ts": f"2026-11-29T07:00:{second}+00:00", "message": "transition"}
        return json.dumps(entry | {"operation_id": op_id, "attempt": f"{op_id}/{leg}", "phase": phase})

    lines = [
        line("copying", "00.000"),
        line("aborted", "00.500"),
        line("staged", "09.000", op_id="other"),
        "half",
        "[]",
    ]
    assert transition_of(lines, "op").copied_s == 0.0
    lines += [line("copying", "01.000", "0.1"), line("staged", "01.250", "0.1"), line("committed", "02.000", "0.1")]
    assert transition_of(lines, "op").copied_s == pytest.approx(0.25)
    assert transition_of(lines, "op").flips is None
    lines += [line("flipped", "02.010", "0.1"), line("copying", "03.000", "1.0"), line("staged", "03.500", "1.0")]
    lines += [line("committed", "04.000", "1.0"), line("flipped", "04.020", "1.0")]
    assert transition_of(lines, "op").copied_s == pytest.approx(0.75)
    flips = transition_of(lines, "op").flips
    assert flips is not None
    assert [flip.end - flip.start for flip in flips] == pytest.approx([0.012, 0.022]), "a millisecond on each side"
    assert transition_of([], "op").copied_s == 0.0


def test_a_benchmark_that_fails_is_told_with_its_last_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["bench", "accel", "--devices", "npu:0", "--output", str(tmp_path), "--steps", "attach"]
    assert main([*words, "--sized-model", "tiny-mixtral"]) == 1
    assert "--devices npu:0: 2 devices needed" in capsys.readouterr().out


def test_what_does_not_compute_there_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["bench", "accel", "--devices", "cuda:0/2", "--compute", "torch_npu", "--output", str(tmp_path / "out")]
    assert main(words) != 0
    assert "torch_npu does not compute on cuda:0/2: torch or triton do" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


Answered = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answered:
    """Runs a step with a compute backend, where deployments give one answer with these logprobs, each time that they
    are asked; its row, and the settings of the deployments."""

    def run(step: str, compute: str, *logprobs: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        replies, started = iter(logprobs), list[dict[str, Any]]()

        @contextmanager
        def running(_: str, __: int, *, devices: str = "", **settings: Any) -> Iterator[Running]:
            started.append(settings | {"devices": devices})
            yield Running("http://localhost", tmp_path)

        monkeypatch.setattr(accel, "running", running)
        monkeypatch.setattr(accel, "answers_of", lambda _: [answer("ab", -1.0, next(replies))])
        monkeypatch.setattr(accel, "subprocess", SimpleNamespace(run=lambda *_, **__: None, DEVNULL=None))
        words = ["bench", "accel", "--devices", "npu:0-1", "--output", str(tmp_path), "--steps", step]
        main([*words, "--compute", compute])
        (row,) = json.loads((tmp_path / "accel-npu.json").read_text())["rows"]
        return row, started

    return run


@pytest.mark.parametrize(
    ("compute", "dtype", "logprob", "result"),
    [
        ("torch", "float32", -2.01, "ok"),
        ("torch", "float32", -2.1, "failed"),
        ("torch_npu", "bfloat16", -2.1, "ok"),
        ("torch_npu", "bfloat16", -2.5, "failed"),
    ],
)
def test_parity_is_in_a_dtype_that_computes_there_and_as_near_as_that_can_be(
    answered: Answered, compute: str, dtype: str, logprob: float, result: str
) -> None:
    row, started = answered("parity", compute, logprob, -2.0)
    assert row["result"] == result
    assert f"1 of 1 answers have the same tokens in {dtype}" in row["found"]
    ours, theirs = started
    assert (ours["devices"], ours["dtype"], ours["compute"]) == ("npu:0", dtype, compute)
    assert theirs == {"devices": "", "dtype": dtype, "activations": dtype, "compute": "torch"}


@pytest.mark.parametrize(
    ("compute", "logprob", "result", "text"),
    [
        ("torch", -2.0, "ok", "0 of 4 answers changed in 4 resizes"),
        ("torch", -2.0001, "failed", "1 of 4 answers changed in 4 resizes"),
        ("torch_npu", -2.1, "ok", "1 of 4 answers changed in 4 resizes, logprobs by at most 0.1: no bits are promised"),
        (
            "torch_npu",
            -2.5,
            "failed",
            "1 of 4 answers changed in 4 resizes, logprobs by at most 0.5: no bits are promised",
        ),
    ],
)
def test_bits_are_asked_of_the_oracle_where_they_are_promised(
    answered: Answered, compute: str, logprob: float, result: str, text: str
) -> None:
    """One of its answers changes, after the second resize."""
    row, _ = answered("oracle", compute, -2.0, -2.0, logprob, -2.0, -2.0)
    assert (row["result"], row["found"]) == (result, text)
