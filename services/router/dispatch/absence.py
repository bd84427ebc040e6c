"""Time in which the router itself stood still, and heard nobody.

What ranks said meanwhile waits in its sockets, and a turn may come before it is read. So that time is no rank's
silence: without this a stopped process, or a machine that stood still, would take requests away from ranks that work on
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe.services.router.dispatch.pace import TICK_S

ABSENT_S = 1.0  # between two turns: no busy loop takes as long


@dataclass(frozen=True, slots=True)
class Absence:
    """Between two turns. `since`: when the later one was due, `now`: when it came; seconds of the monotonic clock."""

    since: float
    now: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.now - self.since

    @property
    def counts(self) -> bool:
        """It is longer than a busy router needs."""
        return self.seconds > ABSENT_S

    def moved(self, at: float) -> float:
        """When to say that something happened at `at`, so that its age leaves the absence out.

        What happened since the earlier turn, TICK_S before `since`, is pressed into TICK_S: so the order of any two
        moments stays.
        """
        age_s = self.now - at
        return self.now - max(age_s - self.seconds, age_s * TICK_S / (self.seconds + TICK_S))
