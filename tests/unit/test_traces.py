"""Traces that are read: every published form, and one clear error for each line that is not right."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.cli.traces import readers
from elasticmoe.cli.traces.arrival import PREFIX_BLOCK_TOKENS, Arrival
from elasticmoe.cli.traces.readers import BAD_TRACE, LINE_BYTES_MAX, TOKENS_MAX, read_trace
from elasticmoe.cli.traces.scale import cut, figures_of, fit_lengths, speed_up, window
from elasticmoe.common.protocol.errors import ConfigError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST_GPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
# Beside the checkout or above it, where somebody has put them; they are not part of the project.
REAL = next(
    (found for folder in Path(__file__).parents if (found := folder / "shared" / "traces").is_dir()),
    Path("shared/traces"),
)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    """Why the file is refused: one line that begins with the file's name."""
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert caught.value.code == BAD_TRACE
    assert caught.value.message.startswith(f"trace {path}")
    assert "\n" not in caught.value.message.replace(str(path), "")
    return caught.value.message.removeprefix(f"trace {path}").lstrip(":, ")


def test_the_form_is_known_by_the_content(tmp_path: Path) -> None:
    azure = AZURE + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.9799600,110,27\n"
    assert read_trace(write(tmp_path, azure)) == readers.Trace("Azure", [Arrival(0, 4808, 10), Arrival(1, 110, 27)], 0)
    zoned = AZURE + "2024-05-12 00:00:00.5+00:00,7,1\n2024-05-12 01:00:01+01:00,8,2\n"
    assert read_trace(write(tmp_path, zoned)).arrivals == [Arrival(0, 7, 1), Arrival(0.5, 8, 2)]
    burst = BURST_GPT + "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,230,1317,Conversation log\n"
    assert read_trace(write(tmp_path, burst)) == readers.Trace(
        "BurstGPT", [Arrival(0, 472, 18), Arrival(40.5, 1087, 230)], 0
    )
    mooncake = [
        {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 10, "output_length": 5, "other": None},
    ]
    assert read_trace(write(tmp_path, "\n".join(json.dumps(line) for line in mooncake))) == readers.Trace(
        "Mooncake", [Arrival(0, 6758, 500, (0, 1, 2)), Arrival(3, 10, 5)], 0
    )


def test_columns_go_by_their_names_and_files_by_what_editors_make_of_them(tmp_path: Path) -> None:
    text = '\ufeffResponse tokens, Session ID ,Timestamp,Request tokens\r\n\r\n9,"a, b",2.0,8\r\n7,c,1.0,6\r\n'
    assert read_trace(write(tmp_path, text)).arrivals == [Arrival(0, 6, 7), Arrival(1, 8, 9)]  # ordered, too


def test_requests_that_made_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    text = BURST_GPT + "5,ChatGPT,472,0,472,Conversation log\n6,GPT-4,10,2,12,API log\n"
    assert read_trace(write(tmp_path, text)) == readers.Trace("BurstGPT", [Arrival(0, 10, 2)], 1)
    assert "no request that wants a token" in refusal(write(tmp_path, BURST_GPT + "5,ChatGPT,472,0,472,log\n"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "it is empty; it has to be Azure"),
        ("a,b,c\n1,2,3\n", "line 1: 'a,b,c' begins none of Azure"),
        (AZURE, "it holds no request"),
        (AZURE + "\n\nyesterday,1,1\n", "line 4: TIMESTAMP is 'yesterday'; it has to be a time"),
        (AZURE + "1900-01-01 00:00:00,1,1\n", "line 2: TIMESTAMP is '1900-01-01 00:00:00'"),
        (AZURE + "2023-11-16 18:17:03,0,1\n", f"line 2: ContextTokens is '0'; it has to be from 1 to {TOKENS_MAX}"),
        (AZURE + "2023-11-16 18:17:03,1,-1\n", "line 2: GeneratedTokens is '-1'; it has to be a whole number from 0"),
        (AZURE + "2023-11-16 18:17:03,1.5,1\n", "line 2: ContextTokens is '1.5'"),
        (AZURE + f"2023-11-16 18:17:03,{TOKENS_MAX + 1},1\n", f"line 2: ContextTokens is '{TOKENS_MAX + 1}'"),
        (AZURE + f"2023-11-16 18:17:03,{'9' * 5000},1\n", "line 2: ContextTokens is '9"),
        (AZURE + "2023-11-16 18:17:03,1\n", "line 2: 2 fields; the header has 3"),
        (AZURE + '2023-11-16 18:17:03,"1,1\n', "is not CSV"),
        (BURST_GPT + "nan,m,1,1,2,l\n", "line 2: Timestamp is 'nan'"),
        (BURST_GPT + "inf,m,1,1,2,l\n", "line 2: Timestamp is 'inf'"),
        (BURST_GPT + "-1,m,1,1,2,l\n", "line 2: Timestamp is '-1'"),
        ('{"timestamp": 1, "input_length": 2}\n', 'line 1: \'{"timestamp": 1, "input_length": 2}\': needs a field'),
        ('{"timestamp": 1, "input_length": 2, "output_length": "3"}\n', "output_length: has to be a"),
        ('{"timestamp": -1, "input_length": 2, "output_length": 3}\n', "line 1: timestamp is '-1.0'"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 3}\n', "line 1: input_length is '0'; it has to be from"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [-7]}\n', "line 1: hash_ids is '-7'"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3}\nx\n', "line 2: 'x' is not a JSON object"),
        ("{" + "[" * 100_000, "is not a JSON object"),
    ],
)
def test_a_bad_line_is_one_clear_error(tmp_path: Path, text: str, complaint: str) -> None:
    found = refusal(write(tmp_path, text))
    assert complaint in found
    assert len(found) < 400


def test_what_is_no_text_is_said(tmp_path: Path) -> None:
    assert "line 1: byte 2 is not UTF-8; a packed trace" in refusal(write(tmp_path, b"\x1f\x8b\x08\x00"))
    assert f"line 1: over {LINE_BYTES_MAX} bytes" in refusal(write(tmp_path, b"{" * (LINE_BYTES_MAX + 1)))
    assert "Is a directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none")


def test_the_number_of_requests_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ARRIVALS_MAX", 2)
    rows = "2023-11-16 18:17:03,1,1\n"
    assert len(read_trace(write(tmp_path, AZURE + rows * 2)).arrivals) == 2
    assert refusal(write(tmp_path, AZURE + rows * 3)) == "line 4: more than 2 requests"


_FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12)
_LINES = st.one_of(
    st.lists(_FIELDS, min_size=1, max_size=4).map(",".join),
    st.dictionaries(st.sampled_from(["timestamp", "input_length", "output_length", "hash_ids"]), st.integers()).map(
        json.dumps
    ),
    st.binary(max_size=30),
)
_RIGHT = {AZURE: "2023-11-16 18:17:03,1,1", BURST_GPT: "1,m,1,1,2,l"}
_RIGHT[""] = '{"timestamp": 1, "input_length": 2, "output_length": 3}'


@given(st.sampled_from(sorted(_RIGHT)), _LINES)
def test_any_line_is_read_or_refused_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, header: str, line: str | bytes
) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(f"{header}{_RIGHT[header]}\n".encode() + raw)
    trace, error = None, None
    try:
        trace = read_trace(path)
    except ConfigError as caught:
        error = caught
    if trace is None:
        assert error is not None
        assert error.code == BAD_TRACE
        assert re.match(rf"trace {re.escape(str(path))}, line [2-9]", error.message)
        return
    assert all(one.input_tokens >= 1 and one.output_tokens >= 1 and one.at_s >= 0 for one in trace.arrivals)
    assert [one.at_s for one in trace.arrivals] == sorted(one.at_s for one in trace.arrivals)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the Azure traces are not in {REAL}; they are not part of the project")
@pytest.mark.parametrize(
    ("name", "num", "gap_cv", "dispersion"), [("conv", 19366, 1.09, 1.4), ("code", 8819, 13.2, 13)]
)
def test_the_real_traces_have_the_figures_that_are_told_of_them(
    name: str, num: int, gap_cv: float, dispersion: float
) -> None:
    path = REAL / f"azure-2023-{name}.csv"
    arrivals = read_trace(path).arrivals
    found = figures_of(arrivals)
    assert found.num == num
    assert found.gap_cv == pytest.approx(gap_cv, rel=0.02)
    assert found.dispersion[1] == pytest.approx(dispersion, rel=0.02)
    with path.open(newline="") as file:
        assert sum(int(row["ContextTokens"]) for row in csv.DictReader(file)) == sum(
            one.input_tokens for one in arrivals
        )


def test_time_is_scaled_and_a_window_begins_at_its_start() -> None:
    arrivals = [Arrival(at, 10, 5) for at in (0.0, 2.0, 4.0, 9.0)]
    assert [one.at_s for one in speed_up(arrivals, 2)] == [0, 1, 2, 4.5]
    assert [one.at_s for one in window(arrivals, 1.0, 3.5)] == [1, 3]
    assert [one.at_s for one in window(arrivals, 2.0)] == [0, 2, 7]
    with pytest.raises(ValueError, match=r"from 10 s on; the last comes at 9.0 s"):
        window(arrivals, 10)
    with pytest.raises(ValueError, match=r"from 5 s on before 8 s"):
        window(arrivals, 5, 3)
    for factor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="time scale"):
            speed_up(arrivals, factor)


def test_lengths_fit_a_model_and_keep_their_shape() -> None:
    arrivals = [Arrival(at, 800, 200) for at in range(199)] + [Arrival(200, 100_000, 3000)]
    found = fit_lengths(arrivals, 100)
    assert (found.factor, found.num_cut) == (0.1, 1)
    assert found.arrivals[0] == Arrival(0, 80, 20)
    assert found.arrivals[-1] == Arrival(200, 1, 99)
    assert fit_lengths(arrivals[:-1], 5000).arrivals == arrivals[:-1]  # never made longer
    with pytest.raises(ValueError, match="at most 1 tokens"):
        fit_lengths(arrivals, 1)


@given(st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 20_000)), max_size=30), st.integers(2, 5000))
def test_every_length_fits(lengths: list[tuple[int, int]], tokens_max: int) -> None:
    arrivals = [
        Arrival(at, prompt, output, tuple(range(-(-prompt // PREFIX_BLOCK_TOKENS))))
        for at, (prompt, output) in enumerate(lengths)
    ]
    found = fit_lengths(arrivals, tokens_max)
    assert len(found.arrivals) == len(arrivals)
    for one in found.arrivals:
        assert one.input_tokens >= 1
        assert one.output_tokens >= 1
        assert one.input_tokens + one.output_tokens <= tokens_max
        assert (len(one.prefixes) - 1) * found.block_tokens < one.input_tokens  # no id behind the prompt's end


def test_cuts_take_prefixes_along() -> None:
    arrivals = [Arrival(0, 1500, 40, (7, 8, 9)), Arrival(1, 20, 3)]
    assert cut(arrivals, 600, 10) == [Arrival(0, 600, 10, (7, 8)), Arrival(1, 20, 3)]
    assert cut(arrivals) == arrivals
    with pytest.raises(ValueError, match="outputs cut at 0"):
        cut(arrivals, None, 0)


def test_figures_are_of_the_whole_windows() -> None:
    arrivals = [Arrival(at, 10, 5) for at in (0.0, 0.5, 1.0, 2.5, 30.0)]
    found = figures_of(arrivals)
    assert (found.num, found.rate, found.input_tokens) == (5, 5 / 30, 10)
    counts = [2, 1, 1] + [0] * 27  # the one at 30 s is behind the last whole second
    mean = sum(counts) / 30
    assert found.dispersion[1] == pytest.approx(sum((count - mean) ** 2 for count in counts) / 30 / mean)
    assert found.dispersion[60] is None
    assert found.peak_ratio == pytest.approx(3.0)
    assert figures_of(arrivals[:1]).gap_cv is None
    with pytest.raises(ValueError, match="without a request"):
        figures_of([])
