"""The windows of all routers and ranks, added up to what is known of the load at a moment. Pure: time is an argument.

Rates are what was counted over the time that it was counted in: a window that was lost takes its time with it, and does
not count as zero. A window that came twice, or from somebody who is not expected, counts for nothing; one that came
late counts at its own time. Ranks' windows are of the layout in force or are dropped: what an older layout's step took,
or its KV held, says nothing of this one.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Collection, Mapping

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow, Signal, StepSample
from elasticmoe.common.sketch import Counts, share_within, total, value
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.figures import MISSING, UNKNOWN, Figure, Known, Signals, Throughput
from elasticmoe.services.scaler.policy.step_model import LEARNED_MAX
from elasticmoe.services.scaler.policy.told import Latencies, RanksTold, RouterTold

RATE_S = 10.0  # of admissions
BURST_S = 2.0  # of admissions, as they are at this moment
LAST_S = 0.9  # the same at the very last: of a router's newest window, as long as none is cut short
LATENCY_S = 10.0
NO_ROUTER = "any router"  # who is silent where none was ever heard
MEAN_HALF_LIFE_S = 120.0  # of what changes slowly: lengths of outputs, the prefix cache's share
STEP_WINDOWS_MAX = 512  # between two looks


class _Ratio:
    """A sum over a sum, both of which fade. What is counted between two looks counts as if it came with the second."""

    def __init__(self) -> None:
        self._above = self._below = 0.0
        self._new_above = self._new_below = 0.0
        self._at = -math.inf

    def add(self, above: float, below: float) -> None:
        """Count."""
        self._new_above += above
        self._new_below += below

    def figure(self, at: float) -> Figure:
        """Missing where nothing, or next to nothing, was counted."""
        fade = 0.5 ** (max(0.0, at - self._at) / MEAN_HALF_LIFE_S)
        self._above, self._below = self._above * fade + self._new_above, self._below * fade + self._new_below
        self._new_above = self._new_below = 0.0
        self._at = max(at, self._at)
        return self._above / self._below if self._below > 1e-9 else MISSING


class Intake:
    """Windows as they arrive. Bounded by the number of routers and ranks that are expected; not thread-safe."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._routers: dict[str, RouterTold] = {}
        self._ranks = RanksTold()
        self._epoch = 0
        self._num_ranks: int | None = None
        self._alone_since_s: float | None = None  # since when no router is expected, because none was heard
        self._latencies_since_s = -math.inf  # those before tell of another size
        self._steps: deque[tuple[StepSample, ...]] = deque(maxlen=STEP_WINDOWS_MAX)
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
            self._epoch, self._ranks = epoch, RanksTold()
            self._steps.clear()
        self._ranks.expect(ranks, now)
        if self._routers.keys() != set(routers):
            self._routers = {name: self._routers.get(name) or RouterTold(now) for name in routers}
        if routers or self._alone_since_s is None:
            self._alone_since_s = None if routers else now
        if self._num_ranks is not None and len(ranks) != self._num_ranks:
            self._latencies_since_s = now + self._config.settle_s
        self._num_ranks = len(ranks)

    def take(self, window: Signal, arrived_s: float) -> bool:
        """A window of either kind; False where it counts for nothing."""
        return (
            self.take_rank(window, arrived_s) if isinstance(window, RankWindow) else self.take_router(window, arrived_s)
        )

    def take_router(self, window: RouterWindow, arrived_s: float) -> bool:
        """A router's window. False where the router is not expected, or the window came before: it counts for
        nothing."""
        router = self._routers.get(window.router)
        ended = router.take(window, arrived_s) if router is not None else None
        if ended is None:
            return False
        self._output.add(window.output_tokens, window.finished)
        self._asked.add(window.max_tokens, window.admitted)
        self._prompt.add(window.prompt_tokens, window.admitted)
        num = sum(count for _, _, count in window.joint)
        share = share_within(window.joint, self._config.ttft_s, self._config.itl_s) or 0.0
        # Whoever was refused or failed was not served in time either.
        if all_ := num + window.failed + window.refused:
            self._kept.append((ended, share * num, all_))
            self._kept_sums[0] += share * num
            self._kept_sums[1] += all_
        return True

    def take_rank(self, window: RankWindow, arrived_s: float) -> bool:
        """A rank's window. False where the rank is not expected, the window is of another layout, or came before: it
        counts for nothing."""
        if window.epoch != self._epoch or not self._ranks.take(window, arrived_s):
            return False
        if window.steps:
            self._steps.append(window.steps)
        self._uncached.add(window.uncached_tokens, window.uncached_tokens + window.cached_tokens)
        return True

    def take_steps(self) -> list[StepSample]:
        """The steps that were told since the last call, of the layout in force; of hundreds of ranks, those of as many
        as a model learns steps at once."""
        windows = list(self._steps)
        self._steps.clear()
        return list(itertools.chain.from_iterable(windows[:: 1 + len(windows) // (LEARNED_MAX + 1)]))

    def signals(self, now: float) -> Signals:
        """What is known at `now`, which only grows. Latencies are those since the deployment has this size, and has
        settled in it."""
        silent = self._silent(now)
        heard = [router for name, router in self._routers.items() if name not in silent]
        is_demand_known = bool(heard) and len(heard) == len(self._routers)
        ranks = self._ranks
        is_ranks_known = len(ranks) > 0 and not any(isinstance(key, RankId) for key in silent)
        ttft, itl = self._latencies(heard, max(now - LATENCY_S, self._latencies_since_s))
        admitted, refused = _rates(heard, now - RATE_S)
        burst = sum(_rates(heard, now - BURST_S))
        newest = [router.newest for router in heard if router.newest is not None]
        oldest = max(newest, key=lambda window: window.oldest_queued_s, default=None)
        return Signals(
            at_s=now,
            silent=tuple(sorted(map(str, silent))),
            silent_since_s=min(silent.values(), default=None),
            admitted_per_s=admitted + refused if is_demand_known else UNKNOWN,
            burst_per_s=burst if is_demand_known else UNKNOWN,
            last_per_s=_last_rate(heard) if is_demand_known else UNKNOWN,
            prompt_tokens=self._prompt.figure(now),
            queued=sum(window.queued for window in newest),
            oldest_queued_s=oldest.oldest_queued_s if oldest else 0.0,
            oldest_prompt_tokens=oldest.oldest_prompt_tokens if oldest else 0,
            refused_per_s=refused,
            output_tokens=self._output.figure(now),
            asked_tokens=self._asked.figure(now),
            uncached_share=self._uncached.figure(now),
            ttft_s=ttft,
            itl_s=itl,
            step_s=ranks.step_s(now) or MISSING,
            queued_prefill_tokens=_known(is_ranks_known, ranks.queued),
            running=_known(is_ranks_known, ranks.running),
            kv_used=_known(is_ranks_known, ranks.kv_used),
            kv_share_most=_known(is_ranks_known, max(ranks.kv_shares, default=0.0)),
            attainment=self._attainment(now - self._config.attainment_over_s),
        )

    def throughput(self, now: float) -> Throughput:
        """What the replicas do at `now`; as `signals`."""
        ranks = self._ranks
        is_known = len(ranks) > 0 and not ranks.silent(now - self._config.unknown_after_s)
        return Throughput(_known(is_known, ranks.generated_per_s), _known(is_known, ranks.prompt_per_s))

    def _silent(self, now: float) -> dict[str | RankId, float]:
        """Those not heard of for too long, or never, each with the time since when."""
        since = now - self._config.unknown_after_s
        routers: dict[str | RankId, float] = {
            name: max(router.newest_s, router.begun_s)
            for name, router in self._routers.items()
            if router.newest_s < since
        }
        if not self._routers and self._alone_since_s is not None and self._alone_since_s < since:
            routers[NO_ROUTER] = self._alone_since_s
        return routers | self._ranks.silent(since)

    def _latencies(self, routers: list[RouterTold], since: float) -> tuple[Figure, Figure]:
        ttft, gaps = _merged([one.ttft for one in routers], since), _merged([one.gaps for one in routers], since)
        return _tail(ttft, self._config.quantile), _mean(gaps)

    def _attainment(self, since: float) -> Figure:
        while self._kept and self._kept[0][0] < since:
            _, kept, num = self._kept.popleft()
            self._kept_sums[0] -= kept
            self._kept_sums[1] -= num
        good, num = self._kept_sums
        return min(1.0, max(0.0, good / num)) if self._kept else MISSING


def _known(is_known: bool, figure: float) -> Known:
    return float(figure) if is_known else UNKNOWN


def _merged(latencies: list[Latencies], since: float) -> Counts:
    """What was counted after `since`."""
    merged: dict[int, int] = {}
    for one in latencies:
        for bucket, count in one.since(since).items():
            merged[bucket] = merged.get(bucket, 0) + count
    return tuple(sorted(merged.items()))


def _rates(routers: list[RouterTold], since: float) -> tuple[float, float]:
    """Admitted and refused requests, each per second."""
    admitted = refused = 0.0
    for router in routers:
        recent = [window for ended, window in router.windows if ended > since]
        span = sum(window.span_s for window in recent)
        if span:
            admitted += sum(window.admitted for window in recent) / span
            refused += sum(window.refused for window in recent) / span
    return admitted, refused


def _last_rate(routers: list[RouterTold]) -> float:
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
