"""Where a rank's time goes, as routers are told: by leaders, also of what their followers tell them."""

from __future__ import annotations

from typing import Final

from elasticmoe.common.clock import Clock
from elasticmoe.common.endpoints import PushEnd
from elasticmoe.common.protocol.rank import TellShares
from elasticmoe.common.protocol.router import StepShares
from elasticmoe.services.worker.engine.outcome import StepCost

SMOOTHING = 0.05
TELL_S: Final = 0.5  # a follower tells its leader at most this often


class Shares:
    """Of the time from a turn's beginning to the end of its step, smoothed over many. Owned by the rank's thread.

    `overhead`: neither in the model nor waiting. `waiting`: for other ranks, at the barrier or in the exchange; a
    follower waits at the barrier for its leader's plan, too. The rest was spent in the model.
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

    def told(self, tp: int) -> StepShares:
        """As others are told them, of the rank with this tp index."""
        return StepShares(tp, round(self.overhead, 4), round(self.waiting, 4))


class SharesToLeader:
    """Tells a follower's shares to its leader, which tells them to routers with its own. Owned by the rank's thread.
    `end` leads to the leader, and is closed by `close`. What it cannot take now is told in the next TELL_S.

    Nothing blocks, and nothing is sent where no steps are taken, but once in a generation: it may have another leader.
    """

    def __init__(self, shares: Shares, tp: int, end: PushEnd) -> None:
        self._shares = shares
        self._tp = tp
        self._end = end
        self._told: StepShares | None = shares.told(tp)
        self._generation = 0
        self._tell_at = 0.0

    def turn(self, now: float, generation: int) -> None:
        """Tell them if they have changed, or the generation has, and it is time."""
        if generation != self._generation:
            self._generation, self._told = generation, None
        if now < self._tell_at:
            return
        shares = self._shares.told(self._tp)
        if shares != self._told:
            self._tell_at = now + TELL_S
            if self._end.push(TellShares(shares)):
                self._told = shares

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._end.close()
