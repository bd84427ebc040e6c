"""Moments of another process's monotonic clock, told by ours. Pure.

The two clocks need not agree: they may be of different machines. What a message tells of its sender's clock arrives
some time after; the least that was seen of `arrival - moment` is the clocks' distance and the fastest delivery. What
took longer is late by the difference, and what it tells is that much older.
"""

from __future__ import annotations

import msgspec

MEMORY_S = 60.0  # clocks of two machines drift apart by less than a millisecond in it
SAMPLES_MAX = 64


class SenderClock(msgspec.Struct, frozen=True):
    """What is known of one sender's clock. `least`: (arrival by ours, distance) of messages of the last MEMORY_S,
    each with a greater distance than those before it: the first has the least of all."""

    least: tuple[tuple[float, float], ...] = ()

    def seen(self, moment_s: float, arrived_s: float) -> SenderClock:
        """After a message that told `moment_s` of the sender's clock and arrived at `arrived_s` of ours."""
        distance = arrived_s - moment_s
        kept = [(at, least) for at, least in self.least if at > arrived_s - MEMORY_S and least < distance]
        return SenderClock((*kept[: SAMPLES_MAX - 1], (arrived_s, distance)))

    def on_ours(self, moment_s: float) -> float:
        """The sender's moment by our clock: never before it was, and later by the fastest delivery seen at the most.

        Raises ValueError before the first message: nothing is known then.
        """
        if not self.least:
            raise ValueError("no message of this sender has been seen: its clock is not known")
        return moment_s + self.least[0][1]
