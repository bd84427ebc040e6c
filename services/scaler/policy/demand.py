"""How much is asked of the deployment: as requests per second with their work, and how that will go on. Pure data and
functions.

Counted at admission: what is counted at completion hides what waits. `Demand` is of the deployment; a replica's share
of it is the width's part.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from elasticmoe.common.described import says
from elasticmoe.services.scaler.policy.figures import Missing, Signals, Unknown

BUCKET_S = 10.0
LEVEL_GAIN, TREND_GAIN = 0.5, 0.2  # of the slow predictor, each bucket
OUTPUT_TOKENS = 256.0  # expected of a request where none has finished yet, and it may get more


class Demand(msgspec.Struct, frozen=True):
    """Requests per second; tokens of each that are to be computed before its first token, and that it gets; KV that it
    holds on average."""

    requests_per_s: Annotated[float, says("Admitted requests per second")]
    prefill_tokens: Annotated[float, says("Tokens of each that are to be computed before its first token")]
    output_tokens: Annotated[float, says("Tokens that each gets")]
    prompt_tokens: Annotated[float, says("Tokens of its prompt, those in the prefix cache too")]

    @property
    def kv_tokens(self) -> float:
        """Of a running sequence, in the mean of its life."""
        return self.prompt_tokens + self.output_tokens / 2

    def times(self, factor: float) -> Demand:
        """The same requests, more often."""
        return msgspec.structs.replace(self, requests_per_s=self.requests_per_s * factor)


def demand_of(signals: Signals) -> Demand | Unknown:
    """The demand, or that it is not known. Without a request in the window, it is 0, of requests as they were."""
    admitted, prompts = signals.admitted_per_s, signals.prompt_tokens_per_s
    if isinstance(admitted, Unknown) or isinstance(prompts, Unknown):
        return Unknown()
    asked = signals.asked_tokens
    most = OUTPUT_TOKENS if isinstance(asked, Missing | Unknown) else min(asked, OUTPUT_TOKENS)
    output = most if isinstance(signals.output_tokens, Missing | Unknown) else signals.output_tokens
    uncached = 1.0 if isinstance(signals.uncached_share, Missing | Unknown) else signals.uncached_share
    prompt = prompts / admitted if admitted > 0.0 else 0.0
    return Demand(admitted, prompt * uncached, max(1.0, output), prompt)


class Forecast(msgspec.Struct, frozen=True):
    """A level and a trend per bucket of requests per second, of whole buckets of BUCKET_S (Holt's linear method).
    `sum_`, `num`: of the bucket that began at `begun_s`."""

    level: float | None = None
    trend: float = 0.0
    begun_s: float | None = None
    sum_: float = 0.0
    num: int = 0

    def seen(self, requests_per_s: float, now: float) -> Forecast:
        """After a turn at `now`."""
        if self.begun_s is None:
            return Forecast(None, 0.0, now, requests_per_s, 1)
        if now - self.begun_s < BUCKET_S:
            return msgspec.structs.replace(self, sum_=self.sum_ + requests_per_s, num=self.num + 1)
        mean = self.sum_ / self.num
        if self.level is None or now - self.begun_s > 3 * BUCKET_S:  # the first, or after a gap: no trend is known
            return Forecast(mean, 0.0, now, requests_per_s, 1)
        expected = self.level + self.trend
        level = expected + LEVEL_GAIN * (mean - expected)
        trend = self.trend + LEVEL_GAIN * TREND_GAIN * (mean - expected)
        return Forecast(level, trend, now, requests_per_s, 1)

    def after(self, seconds: float) -> float | None:
        """Requests per second so long from now; None before the first whole bucket."""
        return None if self.level is None else max(0.0, self.level + self.trend * seconds / BUCKET_S)

    def growth_per_s(self) -> float:
        """The relative growth of the load in a second, 0 where it falls."""
        return max(0.0, self.trend / BUCKET_S / self.level) if self.level else 0.0


class DemandPeaks(msgspec.Struct, frozen=True):
    """The greatest demand and the most KV of the last while. (time, work per second, KV tokens, demand)."""

    entries: tuple[tuple[float, float, float, Demand], ...] = ()

    def seen(self, now: float, over_s: float, work: float, kv_tokens: float, demand: Demand) -> DemandPeaks:
        """After a turn at `now`; only what may be the greatest of something later is kept."""
        kept = [
            entry
            for entry in self.entries
            if entry[0] > now - over_s and not (entry[1] <= work and entry[2] <= kv_tokens)
        ]
        return DemandPeaks((*kept, (now, work, kv_tokens, demand)))

    @property
    def demand(self) -> Demand:
        """The one with the most work. There is one after the first turn."""
        return max(self.entries, key=lambda entry: entry[1])[3]

    @property
    def work(self) -> float:
        """The most."""
        return max(entry[1] for entry in self.entries)

    @property
    def kv_tokens(self) -> float:
        """The most."""
        return max(entry[2] for entry in self.entries)
