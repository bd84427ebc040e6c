"""What is known of one request that was sent, and percentiles. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

CUT_OFF = "cut_off"
TIMED_OUT = "timed_out"
BAD_STREAM = "bad_stream"
NO_CONNECTION = "no_connection"
REFUSED = (429, 503)  # statuses of a request that was turned away before it was taken


class Sample(msgspec.Struct):
    """One request, filled in while it runs. Times in seconds of the monotonic clock; 0 for what has not been.

    `asked`: when its client first wanted it. `sent`: when the connection stood. `arrivals`: when each event with a part
    of the answer came. `tokens`: as the server counted them; where it does not, the events. `status`: HTTP status of
    the answer, 0 without one. `error`: None while it runs, empty when it ended whole, else the code of what was wrong.
    `ended`: when one or the other was known. `refusals`: attempts that were not taken. `target`: the label of the
    deployment that took it.
    """

    asked: float = 0.0
    sent: float = 0.0
    arrivals: list[float] = []
    tokens: int = 0
    status: int = 0
    error: str | None = None
    ended: float = 0.0
    refusals: int = 0
    target: str = ""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
