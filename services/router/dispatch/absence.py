"""Time in which the router itself stood still, and heard nobody.

What ranks said meanwhile waits in its sockets, and a turn may come before it is read. So that time is no rank's
silence: without this a stopped process, or a machine that stood still, would take requests away from ranks that work on
them.
"""

from __future__ import annotations

from dataclasses import dataclass

ABSENT_S = 1.0  # between two turns: more of a pause does not count


@dataclass(frozen=True, slots=True)
class Absence:
    """What was too long between two turns, the earlier one at `turned` and the later one at `now`; seconds of the
    monotonic clock. A pause counts for ABSENT_S, however late all turns are: else a router that is always late would
    never find a dead rank."""

    turned: float
    now: float

    @property
    def seconds(self) -> float:
        """How long it was; 0 or less: there was none."""
        return self.now - self.turned - ABSENT_S

    def moved(self, at: float) -> float:
        """When to say that something happened at `at`, so that its age leaves the absence out.

        What happened since the earlier turn is pressed into ABSENT_S: so the order of any two moments stays.
        """
        age_s = self.now - at
        return self.now - max(age_s - self.seconds, age_s * ABSENT_S / (self.seconds + ABSENT_S))
