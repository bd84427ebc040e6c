"""Moments of another process's monotonic clock, told by ours. Pure: time is an argument.

The two clocks need not agree: they may be of different machines. What a message tells of its sender's clock arrives
some time after; the least that was seen of `arrival - moment` is the clocks' distance and the fastest delivery. What
took longer is late by the difference, and what it tells is that much older.
"""

from __future__ import annotations

from collections import deque

MEMORY_S = 60.0  # clocks of two machines drift apart by less than a millisecond in it
SAMPLES_MAX = 64


class SenderClock:
    """What is known of one sender's clock. Not thread-safe.

    `least`: (arrival by ours, distance) of messages of the last MEMORY_S, each with a greater distance than those
    before it: the first has the least of all.
    """

    __slots__ = ("least",)

    def __init__(self) -> None:
        self.least: deque[tuple[float, float]] = deque()

    def heard(self, moment_s: float, arrived_s: float) -> float:
        """`moment_s` of the sender's clock by ours, told by a message that arrived at `arrived_s`, not before the last
        one: never before it was, and later by the fastest delivery seen at the most."""
        least, distance = self.least, arrived_s - moment_s
        while least and least[-1][1] >= distance:
            least.pop()
        while least and least[0][0] <= arrived_s - MEMORY_S:
            least.popleft()
        if len(least) == SAMPLES_MAX:
            least.pop()
        least.append((arrived_s, distance))
        return moment_s + least[0][1]
