"""The tables of `bench scaling`: from the runs to rows of text. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from elasticmoe.cli.bench.scaling_figures import Figures
from elasticmoe.cli.bench.scaling_run import DIRECTIONS, Run

REFERENCE = "cold-restart"
NOTHING = "–"
NOTE_CHARS_MAX = 80  # the raw data have the whole reason
_GIB, _MIB = 2**30, 2**20

Row = dict[str, Any]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One method, under one load, in one round: what it gave, or why it failed."""

    method: str
    load: str
    turn: int
    run: Run | None = None
    error: str = ""


def tables(results: Sequence[Result]) -> list[tuple[str, list[Row]]]:
    """Titles and rows: a row per method and direction, over the rounds (see `middle`, `worst` and `total`); a method
    that never came through has one row with the reason. Memory is from the first load that ran."""
    found = []
    loads = list(dict.fromkeys(result.load for result in results))
    makers = {"closed": ("Closed loop (saturated)", _closed), "open": ("Open loop", _open)}
    for load in loads:
        title, make = makers[load]
        found.append((title, _rows([result for result in results if result.load == load], make)))
    first = [result for result in results if result.load == loads[0]]
    found.append(("Memory and KV", _rows(first, _memory)))
    return found


Maker = Callable[[Sequence[Figures], Sequence[Figures]], Row]


def _rows(results: Sequence[Result], make: Maker) -> list[Row]:
    methods = list(dict.fromkeys(result.method for result in results))
    errors = {result.method: result.error for result in results if result.error}
    rows: list[Row] = []
    for index, direction in enumerate(DIRECTIONS):
        reference = _figures(results, REFERENCE, index)
        for method in methods:
            mine = _figures(results, method, index)
            if mine:
                rows.append({"method": method, "change": direction, **make(mine, reference)})
            elif index == 0:
                rows.append({"method": method, "change": "failed"})
    fullest: Row = max(rows, key=len)
    heads = list(fullest)
    if errors:
        heads.append("note")
    for row in rows:
        row["note"] = _short(errors.get(row["method"], ""))
    return [{head: row.get(head, "") for head in heads} for row in rows]


def _short(text: str) -> str:
    return text if len(text) <= NOTE_CHARS_MAX else text[: NOTE_CHARS_MAX - 1] + "…"


def _figures(results: Sequence[Result], method: str, index: int) -> list[Figures]:
    return [result.run.figures[index] for result in results if result.method == method and result.run is not None]


def _closed(mine: Sequence[Figures], reference: Sequence[Figures]) -> Row:
    before, during, after = (middle(mine, f"tokens_per_s_{when}") for when in ("before", "during", "after"))
    return {
        "first token s": seconds(middle(mine, "first_token_s")),
        "95 % s": seconds(middle(mine, "capacity_s")),
        "95 % ÷ cold": ratio(middle(mine, "capacity_s"), middle(reference, "capacity_s")),
        "done s": seconds(middle(mine, "done_s")),
        **_pause(mine),
        "tok/s before": whole(before),
        "during": whole(during),
        "after": whole(after),
        "during ÷ before": ratio(during, before),
        "during ÷ lesser": ratio(during, min(before or 0.0, after or 0.0)),
        **_requests(mine),
    }


def _open(mine: Sequence[Figures], reference: Sequence[Figures]) -> Row:
    return {
        "first token s": seconds(middle(mine, "first_token_s")),
        "÷ cold": ratio(middle(mine, "first_token_s"), middle(reference, "first_token_s")),
        "done s": seconds(middle(mine, "done_s")),
        **_pause(mine),
        "SLO % before": percent(middle(mine, "slo_before")),
        "SLO % during": percent(middle(mine, "slo_during")),
        "SLO % after": percent(middle(mine, "slo_after")),
        **_requests(mine),
    }


def _memory(mine: Sequence[Figures], reference: Sequence[Figures]) -> Row:
    peaks = [figures.bytes_peak / max(figures.bytes_before, figures.bytes_after, 1) for figures in mine]
    peak = middle(mine, "bytes_peak")
    return {
        "GiB before": gib(middle(mine, "bytes_before")),
        "peak": gib(peak),
        "after": gib(middle(mine, "bytes_after")),
        "peak ÷ larger": f"{statistics.median(peaks):.2f}",
        "peak ÷ cold": ratio(peak, middle(reference, "bytes_peak")),
        "moved MiB": whole((middle(mine, "bytes_moved") or 0) / _MIB),
        "KV blocks before": whole(middle(mine, "kv_blocks_before")),
        "KV blocks after": whole(middle(mine, "kv_blocks_after")),
    }


def _pause(mine: Sequence[Figures]) -> Row:
    pause, usual = worst(mine, "pause_ms"), middle(mine, "gap_p99_ms")
    return {
        "pause ms": whole(pause),
        "gap p50 ms": whole(middle(mine, "gap_p50_ms")),
        "gap p99 ms": whole(usual),
        "pause ÷ p99": ratio(pause, usual),
    }


def _requests(mine: Sequence[Figures]) -> Row:
    return {name: total(mine, name) for name in ("failed", "refused", "recomputed")}


def middle(figures: Sequence[Figures], name: str) -> float | None:
    """The median over the rounds; None where one of them has none, or there are no rounds."""
    values = [getattr(item, name) for item in figures]
    return None if not values or None in values else float(statistics.median(values))


def worst(figures: Sequence[Figures], name: str) -> float:
    """The largest over the rounds."""
    return float(max(getattr(item, name) for item in figures))


def total(figures: Sequence[Figures], name: str) -> int:
    """The sum over the rounds: of what should not happen at all."""
    return int(sum(getattr(item, name) for item in figures))


def ratio(value: float | None, reference: float | None) -> str:
    """A quotient with two digits behind the point."""
    return NOTHING if value is None or not reference else f"{value / reference:.2f}"


def seconds(value: float | None) -> str:
    """Seconds with two digits behind the point."""
    return NOTHING if value is None else f"{value:.2f}"


def whole(value: float | None) -> str:
    """Without digits behind the point."""
    return NOTHING if value is None else f"{value:.0f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return NOTHING if value is None else f"{value * 100:.0f}"


def gib(value: float | None) -> str:
    """Bytes in GiB."""
    return NOTHING if value is None else f"{value / _GIB:.2f}"
