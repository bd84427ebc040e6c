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
        return self.at(self.requests_per_s * factor)

    def at(self, requests_per_s: float) -> Demand:
        """The same requests, so many in a second."""
        return msgspec.structs.replace(self, requests_per_s=requests_per_s)


def demand_of(signals: Signals) -> Demand | Unknown:
    """The demand, or that it is not known. Lengths are means of minutes: of the requests of some seconds, a single long
    one would make a peak of work that nobody is going to ask for."""
    admitted = signals.admitted_per_s
    if isinstance(admitted, Unknown):
        return Unknown()
    asked = signals.asked_tokens
    most = OUTPUT_TOKENS if isinstance(asked, Missing | Unknown) else min(asked, OUTPUT_TOKENS)
    output = most if isinstance(signals.output_tokens, Missing | Unknown) else signals.output_tokens
    uncached = 1.0 if isinstance(signals.uncached_share, Missing | Unknown) else signals.uncached_share
    prompt = 0.0 if isinstance(signals.prompt_tokens, Missing | Unknown) else signals.prompt_tokens
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
