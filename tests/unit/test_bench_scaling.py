"""The arithmetic, the tables and the plot of `bench scaling`; its load against a scripted server."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.cli.bench import scaling
from elasticmoe.cli.bench.report import table
from elasticmoe.cli.bench.scaling_figures import (
    Bounds,
    Change,
    Figures,
    Series,
    Window,
    attainment,
    gaps_of,
    is_attained,
    longest,
    measure,
    median_of,
    series_of,
    throughput,
    time_to,
)
from elasticmoe.cli.bench.scaling_history import first_token
from elasticmoe.cli.bench.scaling_memory import bytes_of, device_files
from elasticmoe.cli.bench.scaling_methods import counters, kv_blocks, rank_names
from elasticmoe.cli.bench.scaling_plot import plot, points, reach
from elasticmoe.cli.bench.scaling_run import Recipe, Run, check_steady
from elasticmoe.cli.bench.scaling_table import Result, middle, ratio, tables, worst
from elasticmoe.cli.load.sample import CUT_OFF, Sample

BOUNDS = Bounds(ttft_s=1.0, gap_s=0.5)


def request(asked: float, *arrivals: float, error: str | None = "", ended: float = 0.0, **fields: Any) -> Sample:
    end = ended or (arrivals[-1] if arrivals else asked)
    return Sample(asked=asked, sent=asked, arrivals=list(arrivals), error=error, ended=end, **fields)


def steady_stream(start: float, end: float, every: float) -> Sample:
    num = round((end - start) / every)
    return request(start - every, *(start + n * every for n in range(num)))


# ---- windows and gaps ------------------------------------------------------------------------------------------------


def test_throughput_counts_what_came_in_a_half_open_window() -> None:
    arrivals = [0.0, 1.0, 1.5, 2.0, 3.0]
    assert throughput(arrivals, Window(1.0, 3.0)) == 1.5
    assert throughput(arrivals, Window(4.0, 5.0)) == 0.0
    assert throughput(arrivals, Window(2.0, 2.0)) == 0.0


def test_time_to_finds_the_first_moment_with_enough_throughput_ahead() -> None:
    arrivals = [*(10 + n * 0.5 for n in range(10)), *(15 + n * 0.1 for n in range(100))]
    moment = time_to(arrivals, 10.0, 25.0, 9.5, 2.0)
    assert moment is not None
    assert 14.8 <= moment <= 15.01
    assert time_to(arrivals, 10.0, 25.0, 11.0, 2.0) is None
    assert time_to(arrivals, 10.0, 11.0, 1.0, 2.0) is None  # no window ends in time


def test_gaps_are_within_streams_and_a_cut_off_stream_waits_for_anybodys_next_token() -> None:
    whole = request(0.0, 1.0, 1.25, 3.0)
    cut = request(0.0, 1.0, 1.5, error=CUT_OFF, ended=2.0)
    assert sorted(gaps_of([whole, cut], 9.0)) == [(1.0, 1.25), (1.0, 1.5), (1.25, 3.0), (1.5, 3.0)]
    assert (1.5, 9.0) in gaps_of([cut], 9.0)  # nobody got a token again


def test_a_client_that_was_turned_away_pauses_until_its_first_token() -> None:
    assert gaps_of([request(1.0, 4.0, refusals=3)], 9.0) == [(1.0, 4.0)]
    assert gaps_of([request(1.0, error=None, refusals=3)], 9.0) == [(1.0, 9.0)]
    assert gaps_of([request(1.0, 4.0)], 9.0) == []  # waiting for the first token is no gap


def test_the_longest_gap_counts_whole_when_a_part_of_it_is_in_the_window() -> None:
    gaps = [(0.0, 1.0), (0.9, 1.4), (5.0, 9.0)]
    assert longest(gaps, Window(1.2, 2.0)) == pytest.approx(0.5)
    assert longest(gaps, Window(6.0, 6.1)) == 4.0
    assert longest(gaps, Window(2.0, 3.0)) == 0.0


def test_memory_is_the_median_of_a_window() -> None:
    assert median_of([(0.0, 9), (1.0, 1), (1.5, 3), (1.9, 2)], Window(1.0, 2.0)) == 2
    assert median_of([], Window(1.0, 2.0)) == 0


# ---- SLO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "verdict"),
    [
        (request(0.0, 0.9, 1.2), True),
        (request(0.0, 1.1, 1.2), False),  # first token too late
        (request(0.0, 0.5, 1.2), False),  # a gap
        (request(0.0, 0.5, error="HTTP 500"), False),
        (request(0.0, 0.5, error=None), None),  # it may still keep them
        (request(0.0, 0.5, 2.0, error=None), False),
        (request(0.0, error=None), None),
    ],
)
def test_slo_of_a_request(item: Sample, verdict: bool | None) -> None:
    assert is_attained(item, BOUNDS) is verdict


def test_attainment_is_a_share_of_the_decided_requests_asked_for_in_the_window() -> None:
    items = [request(1.0, 1.5), request(1.2, 9.0), request(1.5, error=None), request(3.0, 9.0)]
    assert attainment(items, Window(1.0, 2.0), BOUNDS) == 0.5
    assert attainment(items, Window(5.0, 6.0), BOUNDS) is None


# ---- a whole change --------------------------------------------------------------------------------------------------


def restart() -> tuple[list[Sample], Change]:
    """10 tokens/s until 20.0, nothing until 25.0, then 20 tokens/s until 40."""
    before = steady_stream(0.0, 20.0, 0.1)
    cut = request(19.0, 19.5, 19.95, error=CUT_OFF, ended=20.0)
    after = [steady_stream(25.0, 40.0, 0.1), steady_stream(25.0, 40.0, 0.1)]
    change = Change(
        direction="up",
        issued=20.0,
        done=25.0,
        before=Window(10.0, 19.0),
        after=Window(30.0, 40.0),
        serving=25.0,
        bytes_moved=7,
        kv_blocks_before=1,
        kv_blocks_after=2,
    )
    return [before, cut, *after], change


def test_figures_of_a_restart() -> None:
    requests, change = restart()
    figures = measure(requests, [(15.0, 4), (22.0, 9), (35.0, 6)], change, BOUNDS, prompt_tokens=100, window_s=2.0)
    assert figures.first_token_s == 5.0
    assert figures.capacity_s is not None
    assert 4.9 <= figures.capacity_s <= 5.1
    assert figures.done_s == 5.0
    assert figures.pause_ms == pytest.approx(5050)
    assert figures.gap_p50_ms == pytest.approx(100)
    assert figures.gap_p99_ms == pytest.approx(100)
    assert figures.tokens_per_s_before == pytest.approx(10, rel=0.05)
    assert figures.tokens_per_s_during == 0.0
    assert figures.tokens_per_s_after == pytest.approx(20, rel=0.05)
    assert (figures.failed, figures.refused, figures.recomputed) == (1, 0, 102)
    assert (figures.bytes_before, figures.bytes_peak, figures.bytes_after) == (4, 9, 6)
    assert figures.bytes_moved == 7


def test_throughput_during_a_quick_change_is_taken_over_at_least_a_window() -> None:
    change = Change(direction="up", issued=10.0, done=10.2, before=Window(0.0, 9.0), after=Window(15.0, 20.0))
    figures = measure([steady_stream(0.0, 20.0, 0.1)], [], change, BOUNDS, prompt_tokens=1, window_s=2.0)
    assert figures.tokens_per_s_during == pytest.approx(10, rel=0.1)
    assert figures.first_token_s is None
    assert figures.capacity_s == 0.0


def test_series_have_a_bin_that_starts_at_the_command() -> None:
    requests, change = restart()
    series = series_of(requests, [(22.5, 9)], change, BOUNDS)
    assert series.start == -10.0
    assert len(series.tokens_per_s) == len(series.gap_ms) == len(series.memory) == 30
    assert series.slo_start == -10.0
    assert len(series.slo) == 6
    at = -int(series.start)
    assert series.tokens_per_s[at : at + 5] == [0.0] * 5
    assert series.gap_ms[at + 2] == pytest.approx(5050)
    assert series.memory[at + 2] == 9
    assert series.tokens_per_s[at + 10] == pytest.approx(20, rel=0.1)


def test_requests_that_fail_before_the_command_end_the_run() -> None:
    check_steady([request(0.0, 1.0)])
    with pytest.raises(ValueError, match="1 request failed before the first command; one with: HTTP 500"):
        check_steady([request(0.0, 1.0), request(0.0, error="HTTP 500")])
    with pytest.raises(ValueError, match="no token"):
        check_steady([request(0.0, error=None)])


# ---- history and documents -------------------------------------------------------------------------------------------


def lines(*events: dict[str, Any]) -> list[bytes]:
    return [json.dumps(event).encode() for event in events]


def test_the_first_token_of_a_new_rank_by_acceptance_or_move() -> None:
    history = [
        *lines(
            {"t": 1.0, "event": "start", "router": "x"},
            {"t": 1.0, "event": "accepted", "id": "a", "rank": "r0t0", "prompt": 3, "max_tokens": 4},
            {"t": 1.1, "event": "chunk", "id": "a", "index": 0, "ids": [1]},
            {"t": 2.0, "event": "moved", "id": "a", "rank": "r2t0"},
            {"t": 2.1, "event": "accepted", "id": "b", "rank": "r2t0", "prompt": 3, "max_tokens": 4},
        ),
        b'{"t": 2.2, "ev',
        *lines(
            {"t": 2.3, "event": "chunk", "id": "a", "index": 1, "ids": [1]},
            {"t": 2.4, "event": "chunk", "id": "b", "index": 0, "ids": [1]},
        ),
    ]
    assert first_token(history, {"r2t0"}, 0.0, 9.0) == 2.3
    assert first_token(history, {"r2t0"}, 2.35, 9.0) == 2.4
    assert first_token(history, {"r2t0"}, 0.0, 2.2) is None
    assert first_token(history, {"r3t0"}, 0.0, 9.0) is None


def test_layouts_and_metrics_are_read_by_name() -> None:
    layout = {"ranks": [{"replica": 0, "tp": 0, "kv_blocks": 5}, {"replica": 2, "tp": 0, "kv_blocks": 7}]}
    assert rank_names(layout) == {"r0t0", "r2t0"}
    layout["ranks"].append({"replica": 2, "tp": 1, "kv_blocks": 7})
    assert kv_blocks(layout) == 12, "of a replica's blocks each rank has a part"
    text = '# TYPE x_total counter\nx:requests_resubmitted_total{model_name="m"} 2.0\nx:other_total 5.0\n'
    assert counters(text, "resubmitted") == 2


def test_device_memory_is_what_its_files_really_have() -> None:
    others = device_files([os.getpid()])  # of tests before
    fd = os.memfd_create("host:7.weights", os.MFD_CLOEXEC)
    twin = os.dup(fd)
    try:
        os.ftruncate(fd, 1 << 20)
        os.pwrite(fd, b"x" * 8192, 0)
        found = device_files([os.getpid(), 2**22 + 1])  # the latter does not exist
        paths = [path for path in found if path not in others]
        assert len(paths) == 1
        assert bytes_of([*paths, "/proc/self/fd/1000000"]) == 8192
    finally:
        os.close(fd)
        os.close(twin)


# ---- tables and plot -------------------------------------------------------------------------------------------------


def figures_of(**changes: Any) -> Figures:
    requests, change = restart()
    found = measure(requests, [(15.0, 2**30), (22.0, 2**31)], change, BOUNDS, prompt_tokens=1, window_s=2.0)
    return type(found)(**{name: changes.get(name, getattr(found, name)) for name in found.__struct_fields__})


def result(method: str, load: str, turn: int = 0, **changes: Any) -> Result:
    requests, change = restart()
    series = series_of(requests, [], change, BOUNDS)
    figures = figures_of(**changes)
    return Result(method=method, load=load, turn=turn, run=Run((figures, figures), (series, series), (None, None)))


def test_tables_have_a_row_per_method_and_direction_and_ratios_to_the_restart() -> None:
    results = [
        result("elastic", "closed", capacity_s=1.0, failed=0),
        result("elastic", "closed", 1, capacity_s=2.0, failed=0),
        result("cold-restart", "closed", capacity_s=6.0),
        Result(method="colocated", load="closed", turn=0, error="it did not fit"),
        result("elastic", "open", slo_during=1.0),
    ]
    (title, closed), (open_title, opened), (_, memory) = tables(results)
    assert title.startswith("Closed")
    assert open_title.startswith("Open")
    assert [(row["method"], row["change"]) for row in closed] == [
        ("elastic", "up"),
        ("cold-restart", "up"),
        ("colocated", "failed"),
        ("elastic", "down"),
        ("cold-restart", "down"),
    ]
    assert closed[0]["95 % s"] == "1.50"
    assert closed[0]["95 % ÷ cold"] == "0.25"
    assert closed[2]["note"] == "it did not fit"
    assert (closed[0]["during ÷ before"], closed[0]["during ÷ lesser"]) == ("0.00", "0.00")
    assert opened[0]["SLO % during"] == "100"
    assert opened[0]["÷ cold"] == "–"  # it did not run
    assert memory[0]["peak ÷ larger"] == "2.00"
    for rows in (closed, opened, memory):
        widths = {len(line) for line in table(rows).splitlines()}
        assert len(widths) == 1


def test_a_table_of_failures_alone() -> None:
    (_, rows), _ = tables([Result(method="elastic", load="closed", turn=0, error="no " * 99)])
    assert [list(row) for row in rows] == [["method", "change", "note"]]
    assert len(rows[0]["note"]) == 80


def test_middle_and_worst_over_the_rounds() -> None:
    rounds = [figures_of(capacity_s=1.0, pause_ms=5.0), figures_of(capacity_s=3.0, pause_ms=9.0)]
    assert middle(rounds, "capacity_s") == 2.0
    assert middle([*rounds, figures_of(capacity_s=None)], "capacity_s") is None
    assert middle([], "capacity_s") is None
    assert worst(rounds, "pause_ms") == 9.0
    assert ratio(1.0, None) == "–"
    assert ratio(1.0, 0.0) == "–"


def test_the_plot_has_a_column_per_direction(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    requests, change = restart()
    series = series_of(requests, [(22.5, 2**30)], change, BOUNDS)
    path = tmp_path / "results" / "scaling.png"
    assert plot(path, "demo", {"up": {"elastic": series}, "down": {"elastic": series}}, with_slo=True)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_lines_of_the_plot() -> None:
    series = Series(-1.0, -5.0, [1.0, 2.0], [0.0, 3.0], [0, 2**30], [None, 1.0])
    assert points(series, 0) == ([-0.5, 0.5], [1.0, 2.0])
    assert points(series, 1) == ([-0.5, 0.5], [None, 3.0])
    assert points(series, 2) == ([-0.5, 0.5], [0.0, 1.0])
    assert points(series, 3) == ([-2.5, 2.5], [None, 1.0])
    assert reach([series]) == 1.0


# ---- the command -----------------------------------------------------------------------------------------------------


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--methods", "elastic,magic"), "unknown method 'magic'"),
        (("--loads", "half-open"), "unknown load 'half-open'"),
        (("--from", "3", "--to", "2"), "--from 3"),
        (("--set", "kv_bytes"), "NAME=VALUE"),
        (("--window-s", "30"), "--window-s 30"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        scaling.run(arguments(*flags))


def test_a_method_that_fails_is_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    async def run_once(recipe: Recipe, kind: Any, seed: int) -> Run:
        seen.append((kind.settings, recipe.rate, seed))
        if kind.settings:
            raise ValueError("the deployment did not come up:\nunknown setting")
        run = result("elastic", "closed").run
        assert run is not None
        return run

    monkeypatch.setattr(scaling, "run_once", run_once)
    monkeypatch.setattr(scaling, "plot", lambda *_, **__: True)
    flags = ("--methods", "no-standby,elastic", "--loads", "closed,open", "--rate", "2.5", "--rounds", "2")
    assert scaling.run(arguments(*flags, "--output", str(tmp_path))) == 1
    assert [(rate, seed) for _, rate, seed in seen] == [(0.0, 1), (0.0, 1), (2.5, 1), (2.5, 1)] + [
        (0.0, 2),
        (0.0, 2),
        (2.5, 2),
        (2.5, 2),
    ]
    printed = capsys.readouterr().out
    assert "the deployment did not come up: unknown setting" in printed
    raw = json.loads((tmp_path / "scaling.json").read_bytes())
    assert [item["error"] != "" for item in raw["runs"]] == [True, False] * 4
    assert raw["recipe"]["sizes"] == [2, 3]
    assert raw["provenance"]["cores"]
