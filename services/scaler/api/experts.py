"""How often each expert was routed to lately, from what ranks tell of sampled steps, and how evenly that falls on them.

The scaler's loop adds what comes, the admin listener adds it up when somebody asks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.signals import RankWindow
from elasticmoe.services.scaler.api import views
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot, unready

HALF_LIFE_S = 60.0
RANKS_KEPT = 1_024
FORGOTTEN_ROWS = 0.01
FORGOTTEN_STEPS = 0.5


class _Told:
    """One rank's: rows by place, and the steps that they are of; both fade."""

    def __init__(self) -> None:
        self.rows: dict[int, float] = {}
        self.steps = 0.0
        self.at_s = 0.0

    def faded(self, now: float) -> float:
        """The share of it that is left."""
        return math.exp2(-max(0.0, now - self.at_s) / HALF_LIFE_S)

    def add(self, window: RankWindow) -> None:
        fade = self.faded(window.ended_s) if self.steps else 0.0
        self.at_s = max(self.at_s, window.ended_s)
        self.steps = self.steps * fade + window.expert_steps
        kept = {place: faded for place, rows in self.rows.items() if (faded := rows * fade) > FORGOTTEN_ROWS}
        for place, rows in window.expert_rows:
            kept[place] = kept.get(place, 0.0) + rows
        self.rows = kept


class ExpertLoads:
    """What all ranks have told. Bounded by the number of ranks that were heard and of the model's experts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[str, _Told] = {}  # by incarnation, in the order in which they were heard last

    def take(self, window: RankWindow) -> None:
        """A rank's window. The loop's thread."""
        if not window.expert_steps:
            return
        with self._lock:
            told = self._told.pop(window.incarnation, None) or _Told()
            told.add(window)
            self._told[window.incarnation] = told
            while len(self._told) > RANKS_KEPT:
                del self._told[next(iter(self._told))]

    def read(self, snapshot: StatusSnapshot, now: float) -> views.ExpertsView:
        """The layout's experts with what is known of them at `now`, of the monotonic clock. Any thread. Raises Unready
        before the first layout."""
        layout = snapshot.layout
        if layout is None:
            raise unready(snapshot, "no layout has been made yet")
        ranks = snapshot.cluster.ranks if snapshot.cluster is not None else {}
        living = {rank.incarnation: slot for slot, rank in ranks.items()}
        with self._lock:
            for name in [name for name, told in self._told.items() if told.steps * told.faded(now) < FORGOTTEN_STEPS]:
                del self._told[name]
            known = {slot: self._told[name] for name, slot in living.items() if name in self._told}
            steps = max((each.steps * each.faded(now) for each in known.values()), default=0.0)
            rates = {slot: _owned(layout, slot, each) for slot, each in known.items()}
        return views.ExpertsView(
            epoch=layout.epoch,
            sampled_steps=round(steps, 1),
            owners=[list(layout.owners(layer)) for layer in range(len(layout.homes))],
            load=_shares(layout, rates),
            ranks=_ranks(layout, rates),
        )


def _owned(layout: Layout, slot: int, told: _Told) -> dict[tuple[int, int], float]:
    """Rows per step, by layer and expert, of those experts that live at `slot`: what a rank told of others is of an
    earlier layout, and is theirs to tell who have them now."""
    width = _width(layout)
    found = {}
    for place, rows in told.rows.items():
        layer, expert = divmod(place, width) if width else (0, 0)
        if layer < len(layout.homes) and expert < len(layout.homes[layer]) and slot in layout.homes[layer][expert]:
            found[layer, expert] = rows / told.steps
    return found


def _width(layout: Layout) -> int:
    return max((len(experts) for experts in layout.homes), default=0)


def _shares(layout: Layout, rates: Mapping[int, Mapping[tuple[int, int], float]]) -> list[list[int]]:
    """Of each expert what was routed to it, in thousandths of the layer's mean; an empty list of a layer of which
    nothing is known."""
    found = []
    for layer, experts in enumerate(layout.homes):
        rows = [
            sum(rates[slot].get((layer, expert), 0.0) for slot in slots if slot in rates)
            for expert, slots in enumerate(experts)
        ]
        total = sum(rows)
        found.append([round(1_000 * each * len(rows) / total) for each in rows] if total else [])
    return found


def _ranks(layout: Layout, owned: Mapping[int, Mapping[tuple[int, int], float]]) -> list[views.ExpertsOfRank]:
    """Rows per step of each rank, over the mean of all."""
    counts = layout.num_experts()
    rates = {slot: sum(each.values()) for slot, each in owned.items()}
    mean = sum(rates.values()) / max(1, len(rates))
    return [
        views.ExpertsOfRank(
            rank=str(seat.rank),
            slot=seat.slot,
            device=seat.device,
            experts=counts[seat.slot],
            rows_per_step=round(rates[seat.slot], 2) if seat.slot in rates else None,
            imbalance=round(rates[seat.slot] / mean, 3) if seat.slot in rates and mean else None,
        )
        for seat in layout.seats
    ]
