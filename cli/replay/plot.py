"""The plot of a replay: what came, and the size that each policy wanted for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from elasticmoe.cli.traces.arrival import Arrival

BIN_S = 10.0


class Drawn(Protocol):
    """A run, as far as it is drawn."""

    @property
    def sizes(self) -> list[tuple[float, int]]:
        """(Since when, replicas), from the beginning on."""

    @property
    def missed(self) -> list[float]:
        """When each request came that broke an objective."""


def plot(path: Path, title: str, arrivals: Sequence[Arrival], seconds: float, runs: Mapping[str, Drawn]) -> None:
    """Draw the requests per second, and a panel for each run: the replicas that were wanted, and the share of
    each BIN_S seconds' requests that broke an objective.

    Raises OSError where it cannot be written. Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    came = by_bin([arrival.at_s for arrival in arrivals])
    bins = range(int(seconds / BIN_S) + 1)
    middles = [(each + 0.5) * BIN_S for each in bins]
    figure, axes = pyplot.subplots(1 + len(runs), 1, figsize=(11, 1.5 * (1 + len(runs))), sharex=True)
    axes[0].plot(middles, [came[each] / BIN_S for each in bins], color="black", linewidth=0.8)
    axes[0].set(ylabel="requests/s", ylim=(0, None), xlim=(0, seconds))
    axes[0].set_title(title, fontsize=10)
    most = max(size for run in runs.values() for _, size in run.sizes)
    for panel, (name, run) in zip(axes[1:], runs.items(), strict=True):
        missed = by_bin(run.missed)
        times = [*(when for when, _ in run.sizes), seconds]
        panel.step(times, [*(size for _, size in run.sizes), run.sizes[-1][1]], where="post", linewidth=1.0)
        shares = [missed[each] / came[each] if came[each] else 0.0 for each in bins]
        panel.bar(middles, [most * share for share in shares], width=BIN_S, color="tab:red", alpha=0.4)
        panel.set(ylabel="replicas", ylim=(0, most + 0.5))
        panel.text(0.005, 0.97, name, transform=panel.transAxes, va="top", fontsize=8)
    axes[-1].set_xlabel("seconds; red: share of requests that broke an objective, full height: all")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def by_bin(times: Sequence[float]) -> Counter[int]:
    """How many in each BIN_S seconds."""
    return Counter(int(at / BIN_S) for at in times)
