"""Where a rank's time goes, as routers are told."""

from __future__ import annotations

from elasticmoe.common.clock import Clock
from elasticmoe.services.worker.engine.outcome import StepCost

SMOOTHING = 0.05


class Shares:
    """Of the time from a turn's beginning to the end of its step, smoothed over many. Owned by the rank's thread.

    `overhead`: neither in the model nor waiting. `waiting`: for other ranks, at the barrier or in the exchange.
    """

    def __init__(self, clock: Clock) -> None:
        self._now_ns = clock.monotonic_ns
        self._began_ns = 0
        self._arrived_ns = 0
        self._met_ns = 0  # spent at the barrier
        self.overhead = 0.0
        self.waiting = 0.0

    def begin(self) -> None:
        """A turn begins."""
        self._began_ns = self._now_ns()

    def arrive(self) -> None:
        """It arrives at the step's barrier."""
        self._arrived_ns = self._now_ns()

    def meet(self) -> None:
        """All have met."""
        self._met_ns = self._now_ns() - self._arrived_ns

    def end(self, cost: StepCost) -> float:
        """The step is over, computed at this cost. Returns the seconds since the turn began."""
        took = max(1, self._now_ns() - self._began_ns)
        waiting = (cost.wait_ns + self._met_ns) / took
        self.waiting += SMOOTHING * (waiting - self.waiting)
        self.overhead += SMOOTHING * (1.0 - cost.math_ns / took - waiting - self.overhead)
        return took / 1e9
