"""The plot of `bench scaling`: what clients and devices saw around the command, a line per method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elasticmoe.cli.bench.scaling_figures import BIN_S, SLO_BIN_S, Series

BEFORE_S = 10.0
AFTER_S_MAX = 60.0
_PANELS = ("tokens per second", "longest gap, ms", "device memory, GiB")
_SLO_PANEL = "share within the SLO"


def plot(path: Path, title: str, lines: Mapping[str, Mapping[str, Series]], *, with_slo: bool) -> bool:
    """Draw `lines[direction][method]`: a column per direction, a panel per figure, time 0 at the command.

    Returns False, and draws nothing, where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [*_PANELS, *([_SLO_PANEL] if with_slo else [])]
    figure, axes = pyplot.subplots(
        len(names), len(lines), figsize=(6.5 * len(lines), 2.4 * len(names)), squeeze=False, sharex="col"
    )
    for column, (direction, methods) in enumerate(lines.items()):
        for row, name in enumerate(names):
            panel = axes[row][column]
            for method, series in methods.items():
                panel.plot(*points(series, row), label=method, linewidth=1.2)
            panel.axvline(0.0, color="black", linewidth=0.6, linestyle=":")
            panel.set(ylabel=name if column == 0 else None, xlim=(-BEFORE_S, reach(methods.values())))
            if row == 1:
                panel.set_yscale("log")
            else:
                panel.set_ylim(bottom=0)
        axes[0][column].set_title(f"{title}, {direction}", fontsize=10)
        axes[-1][column].set_xlabel("seconds from the command")
    axes[0][-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def points(series: Series, panel: int) -> tuple[list[float], list[Any]]:
    """The line of one panel: middles of the bins, and values (None where there is none)."""
    start, width = (series.slo_start, SLO_BIN_S) if panel == len(_PANELS) else (series.start, BIN_S)
    panels: list[list[Any]] = [
        list(series.tokens_per_s),
        [gap or None for gap in series.gap_ms],  # the axis is logarithmic
        [nbytes / 2**30 for nbytes in series.memory],
        list(series.slo),
    ]
    values = panels[panel]
    return [start + (number + 0.5) * width for number in range(len(values))], values


def reach(methods: Any) -> float:
    """How far to the right the slowest method goes, at most AFTER_S_MAX."""
    ends = [series.start + len(series.tokens_per_s) * BIN_S for series in methods]
    return min(max(ends, default=BEFORE_S), AFTER_S_MAX)
