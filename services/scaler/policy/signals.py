"""The windows of all routers and ranks, added up to what is known of the load at a moment. Pure: time is an argument.

Rates are what was counted over the time that it was counted in: a window that was lost takes its time with it, and does
not count as zero. A window that came twice, or from somebody who is not expected, counts for nothing; one that came
late counts at its own time. Ranks' windows are of the layout in force or are dropped: what an older layout's step took,
or its KV held, says nothing of this one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow, StepSample
from elasticmoe.common.sketch import Counts, merge, share_within, total, value
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.figures import MISSING, UNKNOWN, Figure, Known, Signals
from elasticmoe.services.scaler.policy.sender_clock import SenderClock

RATE_S = 10.0  # of admissions
BURST_S = 2.0  # of admissions, as they are at this moment
LAST_S = 0.9  # the same at the very last: of a router's newest window, as long as none is cut short
STEP_S = 5.0
STEP_WINDOWS = 8  # of a rank: those of STEP_S, and some that a new layout ended early
LATENCY_S = 10.0
MEAN_HALF_LIFE_S = 120.0  # of what changes slowly: lengths of outputs, the prefix cache's share
NUMBERS_MAX = 64  # of a sender's windows that are known by number
WINDOWS_MAX = 64
STEPS_MAX = 4_096  # between two looks


class _Heard:
    """What any sender is known by."""

    def __init__(self) -> None:
        self.clock = SenderClock()
        self.numbers: deque[int] = deque(maxlen=NUMBERS_MAX)
        self.newest_s = -math.inf  # the end of its newest window, by our clock

    def ended(self, number: int, ended_s: float, arrived_s: float) -> float | None:
        """When a window ended by our clock; None for one that came before."""
        if number in self.numbers:
            return None
        self.numbers.append(number)
        self.clock = self.clock.seen(ended_s, arrived_s)
        return self.clock.on_ours(ended_s)


class _Router(_Heard):
    """What is known of one router's incarnation."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: deque[tuple[float, RouterWindow]] = deque(maxlen=WINDOWS_MAX)
        self.newest: RouterWindow | None = None


class _Rank(_Heard):
    """What is known of one rank's incarnation by the layout in force."""

    def __init__(self) -> None:
        super().__init__()
        self.row = (0, 0, 0, 0.0)  # queued prefill tokens, running, KV used, its share
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=STEP_WINDOWS)  # (end, seconds of so many steps)

    def take_steps(self, ended: float, steps: Sequence[StepSample]) -> None:
        """Steps of a window."""
        self._steps.append((ended, sum([step.seconds for step in steps]), len(steps)))

    def step_s(self, since: float) -> float | None:
        """The mean step since then; None of none."""
        recent = [(seconds, num) for ended, seconds, num in self._steps if ended > since]
        num = sum(each for _, each in recent)
        return sum(seconds for seconds, _ in recent) / num if num else None


class _Ratio:
    """A sum over a sum, both of which fade."""

    def __init__(self) -> None:
        self._above = self._below = 0.0
        self._at = -math.inf

    def add(self, at: float, above: float, below: float) -> None:
        """Count; what comes out of order counts as if it came now."""
        if at > self._at:
            fade = 0.5 ** ((at - self._at) / MEAN_HALF_LIFE_S)
            self._above, self._below, self._at = self._above * fade, self._below * fade, at
        self._above += above
        self._below += below

    @property
    def figure(self) -> Figure:
        """Missing where nothing, or next to nothing, was counted."""
        return self._above / self._below if self._below > 1e-9 else MISSING


class Intake:
    """Windows as they arrive. Bounded by the number of routers and ranks that are expected; not thread-safe."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._routers: dict[str, _Router] = {}
        self._ranks: dict[tuple[RankId, str], _Rank] = {}
        self._epoch = 0
        self._num_ranks: int | None = None
        self._latencies_since_s = -math.inf  # those before tell of another size
        self._begun_s: dict[object, float] = {}  # since when one is expected that has told nothing
        self._steps: deque[StepSample] = deque(maxlen=STEPS_MAX)
        self._output, self._asked, self._uncached, self._prompt = _Ratio(), _Ratio(), _Ratio(), _Ratio()
        self._kept: deque[tuple[float, float, float]] = deque()  # (end, requests that kept both objectives, all)
        self._kept_sums = [0.0, 0.0]

    def configure(self, config: PolicyConfig) -> None:
        """Judge by another configuration from now on; of requests that have ended, by the one that was in force."""
        self._config = config

    def expect(self, routers: Collection[str], ranks: Mapping[RankId, str], epoch: int, now: float) -> None:
        """From now on these are heard: incarnations of routers, and of the ranks of the layout of `epoch`. All others'
        load is none of this deployment's. Of the same ones, what was told is kept; of another epoch, none of ranks."""
        if epoch != self._epoch:
            self._epoch, self._ranks = epoch, {}
            self._begun_s = {key: at for key, at in self._begun_s.items() if key in self._routers}
            self._steps.clear()
        known = self._routers
        self._routers = {name: known.get(name) or _Router() for name in routers}
        before = self._ranks
        self._ranks = {key: before.get(key) or _Rank() for key in ranks.items()}
        if self._num_ranks is not None and len(ranks) != self._num_ranks:
            self._latencies_since_s = now + self._config.settle_s
        self._num_ranks = len(ranks)
        expected = {*self._routers, *self._ranks}
        self._begun_s = {key: self._begun_s.get(key, now) for key in expected}

    def take_router(self, window: RouterWindow, arrived_s: float) -> None:
        """A router's window; dropped where the router is not expected, or the window came before."""
        router = self._routers.get(window.router)
        ended = router.ended(window.number, window.ended_s, arrived_s) if router else None
        if router is None or ended is None:
            return
        router.windows.append((ended, window))
        if ended >= router.newest_s:
            router.newest_s, router.newest = ended, window
        self._output.add(ended, window.output_tokens, window.finished)
        self._asked.add(ended, window.max_tokens, window.admitted)
        self._prompt.add(ended, window.prompt_tokens, window.admitted)
        num = sum(count for _, _, count in window.joint)
        share = share_within(window.joint, self._config.ttft_s, self._config.itl_s) or 0.0
        # Whoever was refused or failed was not served in time either.
        if all_ := num + window.failed + window.refused:
            self._kept.append((ended, share * num, all_))
            self._kept_sums[0] += share * num
            self._kept_sums[1] += all_

    def take_rank(self, window: RankWindow, arrived_s: float) -> None:
        """A rank's window; dropped where the rank is not expected, the window is of another layout, or came before."""
        rank = self._ranks.get((window.rank, window.incarnation)) if window.epoch == self._epoch else None
        ended = rank.ended(window.number, window.ended_s, arrived_s) if rank else None
        if rank is None or ended is None:
            return
        self._steps.extend(window.steps)
        self._uncached.add(ended, window.uncached_tokens, window.uncached_tokens + window.cached_tokens)
        if ended < rank.newest_s:
            return  # the state that a later one told is newer
        rank.newest_s = ended
        share = window.kv_used / window.kv_total if window.kv_total else 1.0
        rank.row = (window.queued_prefill_tokens, window.running, window.kv_used, share)
        rank.take_steps(ended, window.steps)

    def take_steps(self) -> list[StepSample]:
        """The steps that were told since the last call, of the layout in force."""
        steps = list(self._steps)
        self._steps.clear()
        return steps

    def signals(self, now: float) -> Signals:
        """What is known at `now`. Latencies are those since the deployment has this size, and has settled in it."""
        silent = self._silent(now)
        heard = [router for name, router in self._routers.items() if name not in silent]
        is_demand_known = bool(heard) and len(heard) == len(self._routers)
        is_ranks_known = bool(self._ranks) and silent.keys().isdisjoint(self._ranks)
        ranks = [rank for key, rank in self._ranks.items() if key not in silent]
        queues, running, used, shares = zip(*(rank.row for rank in ranks), strict=True) if ranks else ((),) * 4
        ttft, itl = self._latencies(heard, max(now - LATENCY_S, self._latencies_since_s))
        admitted, refused = _rates(heard, now - RATE_S)
        burst = sum(_rates(heard, now - BURST_S))
        steps = [step for rank in ranks if (step := rank.step_s(now - STEP_S)) is not None]
        newest = [router.newest for router in heard if router.newest is not None]
        oldest = max(newest, key=lambda window: window.oldest_queued_s, default=None)
        return Signals(
            at_s=now,
            silent=tuple(sorted(key if isinstance(key, str) else str(key[0]) for key in silent)),
            silent_since_s=min(silent.values(), default=None),
            admitted_per_s=admitted + refused if is_demand_known else UNKNOWN,
            burst_per_s=burst if is_demand_known else UNKNOWN,
            last_per_s=_last_rate(heard) if is_demand_known else UNKNOWN,
            prompt_tokens=self._prompt.figure,
            queued=sum(window.queued for window in newest),
            oldest_queued_s=oldest.oldest_queued_s if oldest else 0.0,
            oldest_prompt_tokens=oldest.oldest_prompt_tokens if oldest else 0,
            refused_per_s=refused,
            output_tokens=self._output.figure,
            asked_tokens=self._asked.figure,
            uncached_share=self._uncached.figure,
            ttft_s=ttft,
            itl_s=itl,
            step_s=max(steps, default=MISSING),
            queued_prefill_tokens=_known(is_ranks_known, sum(queues)),
            running=_known(is_ranks_known, sum(running)),
            kv_used=_known(is_ranks_known, sum(used)),
            kv_share_most=_known(is_ranks_known, max(shares, default=0.0)),
            attainment=self._attainment(now - self._config.attainment_over_s),
        )

    def _silent(self, now: float) -> dict[str | tuple[RankId, str], float]:
        """Those not heard of for too long, or never, each with the time since when."""
        since = now - self._config.unknown_after_s
        routers: dict[str | tuple[RankId, str], float] = {
            name: router.newest_s for name, router in self._routers.items() if router.newest_s < since
        }
        ranks = {key: rank.newest_s for key, rank in self._ranks.items() if rank.newest_s < since}
        return {key: max(newest, self._begun_s[key]) for key, newest in (routers | ranks).items()}

    def _latencies(self, routers: list[_Router], since: float) -> tuple[Figure, Figure]:
        recent = [window for router in routers for ended, window in router.windows if ended > since]
        return _tail(merge(one.ttft for one in recent), self._config.quantile), _mean(merge(one.gaps for one in recent))

    def _attainment(self, since: float) -> Figure:
        while self._kept and self._kept[0][0] < since:
            _, kept, num = self._kept.popleft()
            self._kept_sums[0] -= kept
            self._kept_sums[1] -= num
        good, num = self._kept_sums
        return min(1.0, max(0.0, good / num)) if self._kept else MISSING


def _known(is_known: bool, figure: float) -> Known:
    return float(figure) if is_known else UNKNOWN


def _rates(routers: list[_Router], since: float) -> tuple[float, float]:
    """Admitted and refused requests, each per second."""
    admitted = refused = 0.0
    for router in routers:
        recent = [window for ended, window in router.windows if ended > since]
        span = sum(window.span_s for window in recent)
        if span:
            admitted += sum(window.admitted for window in recent) / span
            refused += sum(window.refused for window in recent) / span
    return admitted, refused


def _last_rate(routers: list[_Router]) -> float:
    """Admitted and refused requests of the newest windows that last for LAST_S together, per second."""
    rate = 0.0
    for router in routers:
        num, span = 0, 0.0
        for _, window in reversed(router.windows):
            num, span = num + window.admitted + window.refused, span + window.span_s
            if span >= LAST_S:
                break
        rate += num / max(span, LAST_S)
    return rate


def _tail(counts: Counts, quantile: float) -> Figure:
    """The quantile, by the rank below: of few requests, the slowest one alone is no tail."""
    rank = max(1, math.floor(quantile * total(counts)))
    seen = 0
    for bucket, count in counts:
        seen += count
        if seen >= rank:
            return value(bucket)
    return MISSING


def _mean(counts: Counts) -> Figure:
    num = total(counts)
    return sum(value(bucket) * count for bucket, count in counts) / num if num else MISSING
