"""Which ranks do not get on, though their processes live. Pure: no clock, no sockets.

A rank counts up its progress on the bus at each turn of its work loop, at each exchange of a step and while it waits
for others, so at least every half second unless it is stopped, wedged, or deep in one layer's mathematics. A rank whose
count stands while another's moves holds that one up: it is ejected after `stall_s`. Where nobody moves, all may be in a
long step, for which they run or wait for a processor. Who does neither, whenever it is looked at, is stopped or sleeps
in a call, not waiting for a peer, and is ejected after `stall_s` too. Of the others the one that has stood longest is
ejected after ALONE_FACTOR * `stall_s`. Ejected means killed: its seat's next rank goes on with its sequences.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from common.layout import RankId
from common.protocol.scaler import HmmStatus, PoolStatus

ALONE_FACTOR = 4.0
STRIDE_S = 0.5  # a pause between two looks counts as no more: then the watcher itself did not run, or the machine
MOVING_S = 1.0  # whoever counted up within this time gets on
QUIET_PER_S = 25.0  # a rank without work counts up a few times a second, one that computes at every exchange


class Pulse(msgspec.Struct, frozen=True):
    """One rank that should get on: its incarnation and its progress counter on the bus. `is_asleep`: see PoolRank."""

    slot: int
    rank: RankId
    incarnation: str
    progress: int
    is_asleep: bool = False


class Stalled(msgspec.Struct, frozen=True):
    """A rank to eject. `still_s`: for how long its counter has stood; `limit_s`: how long it may."""

    rank: RankId
    incarnation: str
    still_s: float
    limit_s: float


def pulses_of(hmm: HmmStatus | None, pool: PoolStatus | None) -> tuple[Pulse, ...]:
    """The ranks to be watched: attached, and ready by what their pool says."""
    if hmm is None or pool is None:
        return ()
    attached = {device.attached: device.progress for device in hmm.devices if device.attached}
    return tuple(
        Pulse(rank.slot, rank.rank, rank.incarnation, attached[rank.incarnation], rank.is_asleep)
        for rank in pool.ranks
        if rank.ready and rank.incarnation in attached
    )


class _Watched:
    """`still_s`: for how long the counter has stood; `asleep_s`: of that, since it was last seen to run; `named_s`: of
    that, what an earlier verdict was about."""

    def __init__(self, progress: int) -> None:
        self.progress = progress
        self.still_s = 0.0
        self.asleep_s = 0.0
        self.named_s = 0.0

    @property
    def due_s(self) -> float:
        """What counts toward the next verdict."""
        return self.still_s - self.named_s


class Watchdog:
    """What was seen of each rank so far. Feed it every observation; seconds are of any monotonic clock."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._looked_at: float | None = None
        self._watched: dict[str, _Watched] = {}  # by incarnation
        self.is_quiet = False  # nobody computes, and nobody has stood for long: the next look may be later

    def look(self, now: float, pulses: Iterable[Pulse]) -> tuple[Stalled, ...]:
        """The ranks to eject now. One that still lives is named again each time the limit has passed once more."""
        since_s = min(now - self._looked_at, STRIDE_S) if self._looked_at is not None else 0.0
        self._looked_at = now
        ranks = {pulse.incarnation: pulse for pulse in pulses}
        self._watched = {name: self._watched.get(name) or _Watched(pulse.progress) for name, pulse in ranks.items()}
        steps = max((ranks[name].progress - watched.progress for name, watched in self._watched.items()), default=0)
        for name, watched in self._watched.items():
            if watched.progress != ranks[name].progress:
                self._watched[name] = _Watched(ranks[name].progress)
            else:
                watched.still_s += since_s
                watched.asleep_s = watched.asleep_s + since_s if ranks[name].is_asleep else 0.0
        stood_s = max((watched.still_s for watched in self._watched.values()), default=0.0)
        self.is_quiet = steps <= QUIET_PER_S * since_s and stood_s < min(MOVING_S, self._stall_s / 2)
        late, limit_s = self._late()
        return tuple(Stalled(ranks[name].rank, name, self._watched[name].still_s, limit_s) for name in late)

    def _late(self) -> tuple[list[str], float]:
        """Who is to be ejected, and the limit that it has passed; the verdict is noted."""
        is_awaited = any(watched.still_s < min(MOVING_S, self._stall_s) for watched in self._watched.values())
        limit_s = self._stall_s
        late = [
            name
            for name, watched in self._watched.items()
            if watched.due_s >= limit_s and (is_awaited or watched.asleep_s >= limit_s)
        ]
        for name in late:
            self._watched[name].named_s = self._watched[name].still_s
        if late or is_awaited:
            return late, limit_s
        limit_s = self._stall_s * ALONE_FACTOR
        longest = max(self._watched, key=lambda name: self._watched[name].due_s, default=None)
        if longest is None or self._watched[longest].due_s < limit_s:
            return [], limit_s
        for watched in self._watched.values():  # the others may have waited for this one alone
            watched.named_s = watched.still_s
        return [longest], limit_s
