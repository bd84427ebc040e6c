"""What `elasticmoe load` makes of results, how it says so, and its flags."""

from __future__ import annotations

import itertools
import json
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.cli.load import command
from elasticmoe.cli.load.histogram import Histogram
from elasticmoe.cli.load.report import CPU_SHARE_MAX, LAG_S_MAX, Report
from elasticmoe.cli.load.result import Objectives, Result, Totals, not_sent, result_of
from elasticmoe.cli.load.results_file import ResultsFile
from elasticmoe.cli.load.sample import CUT_OFF, Sample
from elasticmoe.cli.main import main
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.cli.traces.scale import Fitted, figures_of
from elasticmoe.common.protocol.errors import ConfigError, ElasticMoEError

ARRIVAL = Arrival(2.0, 100, 4)


def result(*arrivals: float, number: int = 0, lag_s: float = 0.0, **fields: Any) -> tuple[Result, list[float]]:
    """Of a request that was due 2 s after the begin; `arrivals` are seconds after that."""
    known = {"error": "", "status": 200, "tokens": len(arrivals), "ended": 102.0 + (arrivals[-1] if arrivals else 0.1)}
    sample = Sample(asked=102.0, sent=102.01, arrivals=[102.0 + at for at in arrivals], **(known | fields))
    made = result_of(number, ARRIVAL, sample, 100.0, lag_s)
    return made, [b - a for a, b in itertools.pairwise(arrivals)]


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=300), st.sampled_from([1, 50, 95, 99, 100]))
def test_percentiles_are_right_to_one_percent(values: list[float], percent: int) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    rank = max(1, -(-len(values) * percent // 100))
    exact = sorted(values)[rank - 1]
    found = histogram.percentile(percent)
    assert found is not None
    assert exact <= found + 1e-9 or exact == pytest.approx(found, rel=1e-6)
    assert found <= max(exact * 1.0101, 1.01e-6)
    assert histogram.largest == max(values)
    assert histogram.mean == pytest.approx(sum(values) / len(values))


def test_a_histogram_of_nothing_has_no_figures() -> None:
    assert (Histogram().percentile(50), Histogram().mean) == (None, None)


def test_a_result_says_when_and_how() -> None:
    found, _ = result(0.5, 0.6, 0.7, 1.5, lag_s=0.002)
    assert msgspec.to_builtins(found) == {
        "number": 0,
        "scheduled_s": 2.0,
        "sent_s": 2.01,
        "first_token_s": 2.5,
        "last_token_s": 3.5,
        "ended_s": 3.5,
        "lag_ms": 2.0,
        "input_tokens": 100,
        "max_tokens": 4,
        "tokens": 4,
        "gap_mean_ms": pytest.approx(333.333),
        "gap_p95_ms": 800.0,
        "gap_max_ms": 800.0,
        "status": 200,
        "outcome": "completed",
        "error": "",
    }


def test_each_outcome_is_told_from_the_others() -> None:
    totals = Totals(Objectives(ttft_s=1.0, itl_s=0.3))
    for each in (
        result(0.5, 0.6, 0.7),
        result(1.5, 1.6),  # late
        result(0.5, 1.0),  # its stream has a gap
        result(0.5),  # one token, no gap
        result(error="queue_full", status=429, tokens=0),
        result(error="overloaded", status=503, tokens=0),
        result(0.5, error=CUT_OFF),
        result(error="http_404", status=404, tokens=0),
        result(0.5, error=None, ended=0.0),
        (not_sent(9, ARRIVAL, 0.1), []),
    ):
        totals.add(*each)
    assert totals.outcomes == {"completed": 4, "refused": 2, "failed": 2, "interrupted": 1, "not_sent": 1}
    assert totals.errors == {"queue_full": 1, "overloaded": 1, CUT_OFF: 1, "http_404": 1, "connections_max": 1}
    assert totals.attainment == pytest.approx(2 / 8)  # neither who was interrupted nor who was not sent
    assert (totals.tokens, totals.prompt_tokens) == (3 + 2 + 2 + 1 + 1 + 1, 600)
    assert (totals.ttft.num, totals.gaps.num, totals.latency.num, totals.refusals.num) == (6, 4, 4, 2)
    assert Totals(Objectives()).attainment is None


def report(*results: tuple[Result, list[float]], **fields: Any) -> Report:
    made = Report(Totals(Objectives(ttft_s=1.0)))
    made.source = "somewhere"
    made.elapsed_s = 10.0
    for name, value in fields.items():
        setattr(made, name, value)
    made.set_trace(Fitted([ARRIVAL], 0.5, 256, 3), figures_of([ARRIVAL, Arrival(4.0, 1, 1)]))
    for each in results:
        made.totals.add(*each)
    return made


def test_text_and_json_tell_the_same() -> None:
    made = report(result(0.5, 0.75), result(2.5, 2.75), num_without_output=7)
    text = made.text()
    assert "requests    2 completed" in text
    assert "50.00 % kept the objectives (TTFT 1000 ms)" in text
    assert "warning" not in text
    told = json.loads(json.dumps(made.json()))
    assert told["outcomes"] == {"completed": 2}
    assert told["attainment"] == 0.5
    assert told["ttft_ms"]["max"] == 2500
    assert told["output_tokens_per_s"] == pytest.approx(4 / 4.75, abs=1e-3)
    assert told["trace"]["without_output"] == 7
    assert "7 requests that made nothing" in made.trace_text()
    assert "times 0.5, to fit the model; 3 cut" in made.trace_text()


def test_a_load_that_nothing_came_of_is_told_too() -> None:
    made = report()
    assert "requests    none" in made.text()
    assert made.json()["attainment"] is None


@pytest.mark.parametrize(
    ("results", "fields", "warning"),
    [
        ([result(0.5, lag_s=2 * LAG_S_MAX)], {}, "the client itself was late: p99 100 ms, more than 50 ms"),
        ([result(0.5)], {"cpu_share": CPU_SHARE_MAX + 0.1}, "used 90 % of a core, more than 80 %"),
        ([(not_sent(0, ARRIVAL, 0.0), [])], {}, "1 request not sent"),
    ],
)
def test_a_client_that_is_the_bottleneck_warns(results: list[Any], fields: dict[str, Any], warning: str) -> None:
    made = report(*results, **fields)
    assert any(warning in each for each in made.json()["warnings"])
    assert f"warning     {made.json()['warnings'][0]}" in made.text()


def test_results_are_lines_and_a_full_disk_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with ResultsFile(path) as file:
        for number in range(3):
            file.write(result(0.5, number=number)[0])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2]
    with ResultsFile(None) as nowhere:
        nowhere.write(result(0.5)[0])
    with pytest.raises(ElasticMoEError, match="cannot be written to") as caught:
        ResultsFile(tmp_path / "none" / "r").__enter__()
    assert caught.value.code == "output_failed"

    def write_to_full() -> None:
        with ResultsFile(Path("/dev/full")) as full:
            full.write(result(0.5)[0])

    with pytest.raises(ElasticMoEError, match="No space left"):
        write_to_full()


# ---- the command -----------------------------------------------------------------------------------------------------


def test_figures_need_no_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["load", "--generate", "step", "--duration", "1m", "--start", "20", "--time-scale", "2", "--figures"]
    assert main([*flags, "--json", "--tokens-max", "512"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["source"] == "step, seed 1"
    assert told["figures"]["duration_s"] == pytest.approx(30, abs=1)
    assert told["figures"]["rate"] == pytest.approx(2 * 5.53, rel=0.25)
    assert told["length_factor"] < 1
    path = tmp_path / "trace"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,900,30\n2023-11-16 18:17:05,40,9\n")
    assert main(["load", str(path), "--figures", "--input-max", "500", "--output-max", "20"]) == 0
    assert "2 requests in 2.0 s" in (out := capsys.readouterr().out)
    assert "270 in, 14 out" in out


@pytest.mark.parametrize(
    ("flags", "code", "complaint"),
    [
        ([], 2, "one of TRACE, --generate is needed"),
        (["x", "--generate", "code"], 2, "it cannot stand beside"),
        (["--generate", "chat"], 2, "'chat' is none of conversation, code, day, step"),
        (["--generate", "step", "--start", "9m", "--figures"], 2, "no request comes from 540 s on"),
        (["--generate", "step", "--ttft", "0s"], 2, "'0s' is not a time above 0, such as 2s"),
        (["--generate", "step", "--duration", "1000h", "--figures"], 2, "a duration of 3.6e+06 s is not above 0"),
        (["--generate", "step", "--time-scale", "0", "--figures"], 2, "--time-scale: 0 is less than 1e-06"),
        (["--generate", "step", "--tokens-max", "1"], 2, "--tokens-max: 1 is less than 2"),
        (["/nonexistent/trace", "--figures"], 1, "bad_trace: trace /nonexistent/trace: No such file"),
        (["--generate", "step", "--url", "http://127.0.0.1:1"], 1, "unreachable: nothing answers"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(
    flags: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["load", *flags])
    except SystemExit as end:
        status = int(str(end.code))
    assert status == code
    told = capsys.readouterr().err
    assert complaint in told
    assert told.count("\n") == 1


def test_more_connections_than_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"set": (256, 1000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["set"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.update(set=wanted))
    with pytest.raises(ConfigError, match="2000 connections need 2064 open files; this user may have 1000 at most"):
        command.make_room(2000)
    assert limits["set"] == (256, 1000)
    command.make_room(100)
    assert limits["set"] == (256, 1000)
    command.make_room(800)
    assert limits["set"] == (864, 1000)
