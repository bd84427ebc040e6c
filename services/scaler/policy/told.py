"""Who tells of its load, and what each has told, added up as it comes: a turn of the policy looks at sums, whatever the
number of ranks. Pure: time is an argument.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Mapping
from operator import itemgetter

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow
from elasticmoe.common.sketch import Counts
from elasticmoe.services.scaler.policy.sender_clock import SenderClock

STEP_S = 5.0
STEP_WINDOWS = 8  # of a rank: those of STEP_S, and some that a new layout ended early
NUMBERS_MAX = 64  # of a sender's windows that are known by number
WINDOWS_MAX = 64  # of a router


class _Heard:
    """What any sender is known by."""

    __slots__ = ("_clock", "_greatest", "_numbers")

    def __init__(self) -> None:
        self._clock = SenderClock()
        self._numbers: deque[int] = deque(maxlen=NUMBERS_MAX)
        self._greatest = 0

    def ended(self, number: int, ended_s: float, arrived_s: float) -> float | None:
        """When a window ended by our clock; None for one that came before."""
        if number > self._greatest:
            self._greatest = number
        elif number in self._numbers:
            return None
        self._numbers.append(number)
        return self._clock.heard(ended_s, arrived_s)


class Latencies:
    """Counts of one figure, of the windows that ended lately; of at most WINDOWS_MAX of them."""

    __slots__ = ("_counts", "_since", "_windows")

    def __init__(self) -> None:
        self._windows: list[tuple[float, Counts]] = []  # by their ends
        self._counts: dict[int, int] = {}
        self._since = -math.inf

    def add(self, ended: float, counts: Counts) -> None:
        """Those of one more window."""
        if not counts or ended <= self._since:
            return
        if len(self._windows) == WINDOWS_MAX:
            self._forget(1)
        insort(self._windows, (ended, counts))
        mine = self._counts
        for bucket, count in counts:
            mine[bucket] = mine.get(bucket, 0) + count

    def since(self, since: float) -> Mapping[int, int]:
        """By bucket, of the windows that ended after `since`, which only grows."""
        self._since = max(self._since, since)
        num_over = bisect_right(self._windows, self._since, key=itemgetter(0))
        if num_over:
            self._forget(num_over)
        return self._counts

    def _forget(self, num: int) -> None:
        for _, counts in self._windows[:num]:
            for bucket, count in counts:
                self._counts[bucket] -= count
                if not self._counts[bucket]:
                    del self._counts[bucket]
        del self._windows[:num]


class RouterTold(_Heard):
    """What one router's incarnation, expected since `begun_s`, has told. `windows`: with their ends by our clock;
    `newest_s`: the end of the `newest`."""

    __slots__ = ("begun_s", "gaps", "newest", "newest_s", "ttft", "windows")

    def __init__(self, now: float) -> None:
        super().__init__()
        self.begun_s = now
        self.windows: deque[tuple[float, RouterWindow]] = deque(maxlen=WINDOWS_MAX)
        self.newest: RouterWindow | None = None
        self.newest_s = -math.inf
        self.ttft, self.gaps = Latencies(), Latencies()

    def take(self, window: RouterWindow, arrived_s: float) -> float | None:
        """Its end by our clock; None where it came before."""
        ended = self.ended(window.number, window.ended_s, arrived_s)
        if ended is None:
            return None
        self.windows.append((ended, window))
        self.ttft.add(ended, window.ttft)
        self.gaps.add(ended, window.gaps)
        if ended >= self.newest_s:
            self.newest_s, self.newest = ended, window
        return ended


class _Rank(_Heard):
    """One rank's incarnation, expected since `begun_s`. `at`: its place in the columns of RanksTold, -1 before it has
    one; `row`: queued prefill tokens, sequences and KV tokens; `rates`: tokens that came out and went in, per second;
    `steps`: (end of a window, seconds of so many steps)."""

    __slots__ = ("at", "begun_s", "rank", "rates", "row", "steps")

    def __init__(self, rank: RankId, now: float) -> None:
        super().__init__()
        self.rank = rank
        self.begun_s = now
        self.at = -1
        self.row = (0, 0, 0)
        self.rates = (0.0, 0.0)
        self.steps: deque[tuple[float, float, int]] = deque(maxlen=STEP_WINDOWS)

    def step_s(self, since: float) -> float:
        """The mean step since then, 0 of none; those before are forgotten."""
        steps = self.steps
        while steps and steps[0][0] <= since:
            steps.popleft()
        seconds, num = 0.0, 0
        for _, some, so_many in steps:
            seconds += some
            num += so_many
        return seconds / num if num else 0.0


class RanksTold:
    """What the ranks of one layout have told last: sums, and columns with a place for each rank, so that a look is a
    few passes over plain numbers. Not thread-safe.

    queued, running, kv_used: sums of queued prefill tokens, sequences and KV tokens
    kv_shares: used share of each rank's KV
    """

    def __init__(self) -> None:
        self._expected: list[tuple[RankId, str]] = []
        self._ranks: list[_Rank] = []
        self._heard: dict[str, _Rank] = {}  # by incarnation
        self._newest_s: list[float] = []  # the end of each one's newest window by our clock, -inf of none
        self._steps_s: list[float] = []  # each one's mean step, 0 of none
        self._oldest_s: list[float] = []  # the end of the oldest window that is in it, inf of none
        self.kv_shares: list[float] = []
        self.queued = self.running = self.kv_used = 0

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def generated_per_s(self) -> float:
        """New tokens of all replicas, by the newest window of each."""
        return sum(rank.rates[0] for rank in self._ranks)

    @property
    def prompt_per_s(self) -> float:
        """Prompt tokens, the same."""
        return sum(rank.rates[1] for rank in self._ranks)

    def expect(self, ranks: Mapping[RankId, str], now: float) -> None:
        """Hear these incarnations from now on. Of those that were heard before, what they told is kept."""
        expected = list(ranks.items())
        if expected == self._expected:
            return
        before = dict(zip(self._expected, self._ranks, strict=True))
        found = [before.get(key) or _Rank(key[0], now) for key in expected]

        def kept(column: list[float], missing: float) -> list[float]:
            return [column[rank.at] if rank.at >= 0 else missing for rank in found]

        self._newest_s, self._oldest_s = kept(self._newest_s, -math.inf), kept(self._oldest_s, math.inf)
        self._steps_s, self.kv_shares = kept(self._steps_s, 0.0), kept(self.kv_shares, 0.0)
        for at, rank in enumerate(found):
            rank.at = at
        self._expected, self._ranks = expected, found
        self._heard = {name: rank for (_, name), rank in zip(expected, found, strict=True)}
        self.queued, self.running, self.kv_used = (sum(rank.row[at] for rank in found) for at in range(3))

    def take(self, window: RankWindow, arrived_s: float) -> bool:
        """Whether the window is of somebody who is expected, and did not come before."""
        rank = self._heard.get(window.incarnation)
        if rank is None or rank.rank != window.rank:
            return False
        ended = rank.ended(window.number, window.ended_s, arrived_s)
        if ended is None:
            return False
        at = rank.at
        if ended < self._newest_s[at]:
            return True  # the state that a later one told is newer
        self._newest_s[at] = ended
        queued, running, used = rank.row
        rank.row = (window.queued_prefill_tokens, window.running, window.kv_used)
        prompt = window.uncached_tokens + window.cached_tokens
        rank.rates = (window.generated / window.span_s, prompt / window.span_s)
        self.queued += window.queued_prefill_tokens - queued
        self.running += window.running - running
        self.kv_used += window.kv_used - used
        self.kv_shares[at] = window.kv_used / window.kv_total if window.kv_total else 1.0
        if window.steps:
            rank.steps.append((ended, sum([step.seconds for step in window.steps]), len(window.steps)))
        self._count_steps(rank, ended - STEP_S)
        return True

    def _count_steps(self, rank: _Rank, since: float) -> None:
        self._steps_s[rank.at] = rank.step_s(since)
        self._oldest_s[rank.at] = rank.steps[0][0] if rank.steps else math.inf

    def step_s(self, now: float) -> float:
        """The mean step of the slowest rank in the last STEP_S, 0 of none."""
        since = now - STEP_S
        if min(self._oldest_s, default=math.inf) <= since:
            for rank, oldest in zip(self._ranks, self._oldest_s, strict=True):
                if oldest <= since:
                    self._count_steps(rank, since)
        return max(self._steps_s, default=0.0)

    def silent(self, since: float) -> dict[RankId, float]:
        """Those that have told of nothing after `since`, each with the time since when."""
        if min(self._newest_s, default=since) >= since:
            return {}
        pairs = zip(self._ranks, self._newest_s, strict=True)
        return {rank.rank: max(newest, rank.begun_s) for rank, newest in pairs if newest < since}
