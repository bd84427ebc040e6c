"""Which ranks make no progress, though their processes live. Pure: no clock, no sockets.

A rank counts up its progress on the bus at each turn of its work loop, at each exchange of a step and while it waits
for others, so at least every half second unless it is stopped, wedged, or deep in one layer's mathematics. A rank that
makes no progress is ejected: it is killed, and its seat's next rank goes on with its sequences. There are three cases:

- A rank's count stands while another one's moves: it holds that one up, and is ejected after `stall_s`.
- No count moves, and a rank neither runs nor waits for a processor, whenever it is looked at. It is stopped or sleeps
  in a call, not waiting for a peer, and is ejected after `stall_s`, too. A rank that says that it waits for its device
  is not: then the device computes a long step.
- No count moves, and the other ranks may all be in a long step. Of them, the one whose count has stood longest is
  ejected after ALONE_FACTOR * `stall_s`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from elasticmoe.common.layout import RankId
from elasticmoe.services.scaler.actions import EjectRank
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.observation import Step

ALONE_FACTOR = 4.0
STRIDE_S = 0.6  # a pause between two looks counts as no more: then the watcher itself did not run, or the machine
MOVING_S = 1.0  # a rank that counted up within this time makes progress
QUIET_PER_S = 25.0  # a rank without work counts up a few times a second, one that computes at every exchange


class Pulse(msgspec.Struct, frozen=True):
    """One rank that should get on: its incarnation and its progress counter on the bus. `is_asleep`: just now it
    neither runs (see PoolRank) nor waits for its device (see DeviceStatus)."""

    slot: int
    rank: RankId
    incarnation: str
    progress: int
    is_asleep: bool = False


class Standing(msgspec.Struct, frozen=True):
    """A rank's progress counter. `still_s`: for how long it has stood; `asleep_s`: of that, since the rank was last
    seen to run; `named_s`: of that, what an earlier verdict was about."""

    progress: int
    still_s: float = 0.0
    asleep_s: float = 0.0
    named_s: float = 0.0

    @property
    def due_s(self) -> float:
        """What counts toward the next verdict."""
        return self.still_s - self.named_s


class Watched(msgspec.Struct, frozen=True):
    """What was seen of each rank so far, by incarnation, and when. `is_quiet`: no rank computes, and no rank's count
    has stood for long: the next look may be later."""

    looked_at: float | None = None
    ranks: dict[str, Standing] = {}
    is_quiet: bool = False


def pulses_of(cluster: Cluster) -> tuple[Pulse, ...]:
    """The ranks to be watched: attached, and ready by what their pool says."""
    attached = {device.attached: device for device in cluster.devices if device.attached}
    return tuple(
        Pulse(rank.slot, rank.rank, rank.incarnation, device.progress, rank.is_asleep and not device.is_waiting)
        for rank in cluster.ranks.values()
        if rank.ready and (device := attached.get(rank.incarnation)) is not None
    )


def watch(before: Watched, stall_s: float, now: float, pulses: Iterable[Pulse]) -> Step[Watched]:
    """The ranks to eject now. One that still lives is named again each time the limit has passed once more. Every
    observation has to be shown; seconds are of any monotonic clock."""
    since_s = min(now - before.looked_at, STRIDE_S) if before.looked_at is not None else 0.0
    pulse_of = {pulse.incarnation: pulse for pulse in pulses}
    ranks, steps = {}, 0
    for name, pulse in pulse_of.items():
        was = before.ranks.get(name) or Standing(pulse.progress)
        steps = max(steps, pulse.progress - was.progress)
        if was.progress != pulse.progress:
            ranks[name] = Standing(pulse.progress)
        else:
            asleep_s = was.asleep_s + since_s if pulse.is_asleep else 0.0
            ranks[name] = Standing(was.progress, was.still_s + since_s, asleep_s, was.named_s)
    stood_s = max((at.still_s for at in ranks.values()), default=0.0)
    is_quiet = steps <= QUIET_PER_S * since_s and stood_s < min(MOVING_S, stall_s / 2)
    late, limit_s, waited = _late(ranks, stall_s)
    ejected = tuple(EjectRank(pulse_of[name].rank, name, ranks[name].still_s, limit_s) for name in late)
    for name in waited:
        ranks[name] = msgspec.structs.replace(ranks[name], named_s=ranks[name].still_s)
    return Step(Watched(now, ranks, is_quiet), ejected)


def _late(ranks: Mapping[str, Standing], stall_s: float) -> tuple[list[str], float, Collection[str]]:
    """The ranks to be ejected, the limit that they have passed, and the ranks whose standing that verdict is about."""
    is_awaited = any(at.still_s < min(MOVING_S, stall_s) for at in ranks.values())
    late = [name for name, at in ranks.items() if at.due_s >= stall_s and (is_awaited or at.asleep_s >= stall_s)]
    if late or is_awaited:
        return late, stall_s, late
    limit_s = stall_s * ALONE_FACTOR
    longest = max(ranks, key=lambda name: ranks[name].due_s, default=None)
    if longest is None or ranks[longest].due_s < limit_s:
        return [], limit_s, ()
    return [longest], limit_s, ranks.keys()  # the others may have waited for this one alone
