"""A new member's patience with those who hand sequences over to it as it comes in. Pure.

It finds places kept for sequences that others hand over at this very moment. It waits for them a little before its
first steps, so that they do not miss one.
"""

from __future__ import annotations

WELCOME_S = 0.05  # of waiting, altogether; megabytes of KV take 10 to 20 ms
WELCOMES = 3  # of the first steps that are waited before


class Welcome:
    """Owned by the rank's thread."""

    def __init__(self) -> None:
        self._num_left = 0
        self._left_s = 0.0
        self._since: float | None = None  # it waits

    def begin(self) -> None:
        """The rank has come in."""
        self._num_left, self._left_s, self._since = WELCOMES, WELCOME_S, None

    def wait_s(self, now: float, num_expected: int) -> float:
        """How long to wait before the next step, with so many sequences still to come; 0 to take it now."""
        if not self._num_left:
            return 0.0
        if self._since is None:
            self._since = now
        left_s = self._left_s - (now - self._since)
        if num_expected and left_s > 0:
            return left_s
        self._num_left, self._left_s, self._since = self._num_left - 1, left_s, None
        return 0.0
