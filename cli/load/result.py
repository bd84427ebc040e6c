"""What came of each arrival of a trace, and of all of them together. Pure."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Literal

import msgspec

from elasticmoe.cli.load.histogram import Histogram
from elasticmoe.cli.load.sample import REFUSED, Sample, percentile
from elasticmoe.cli.traces.arrival import Arrival

Outcome = Literal["completed", "refused", "failed", "not_sent", "interrupted"]
NO_ROOM = "connections_max"
_ITL_PERCENT = 95


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One request, a line of the results' file. Seconds count from the begin of the load; null is what has not been.

    `number`: its place in the trace. `lag_ms`: how late the client itself was to send it. `input_tokens` and
    `max_tokens`: as asked for; `tokens`: that came. Gaps are those between events of its stream. `outcome`: `refused`
    was turned away with 429 or 503; `not_sent` found all of the client's own connections in use; `interrupted` had not
    ended when the load was ended. `error`: code of what was wrong; empty where nothing was.
    """

    number: int
    scheduled_s: float
    sent_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float | None
    lag_ms: float
    input_tokens: int
    max_tokens: int
    tokens: int
    gap_mean_ms: float | None
    gap_p95_ms: float | None
    gap_max_ms: float | None
    status: int
    outcome: Outcome
    error: str


def result_of(number: int, arrival: Arrival, sample: Sample, begun: float, lag_s: float) -> Result:
    """The result of a request that was under way. `begun`: when the load began, on the sample's clock; its `asked` is
    when it was to be sent."""
    gaps = gaps_of(sample)

    def since(at: float) -> float | None:
        return round(at - begun, 6) if at else None

    return Result(
        number=number,
        scheduled_s=round(sample.asked - begun, 6),
        sent_s=since(sample.sent),
        first_token_s=since(sample.arrivals[0]) if sample.arrivals else None,
        last_token_s=since(sample.arrivals[-1]) if sample.arrivals else None,
        ended_s=since(sample.ended),
        lag_ms=round(lag_s * 1e3, 3),
        input_tokens=arrival.input_tokens,
        max_tokens=arrival.output_tokens,
        tokens=sample.tokens,
        gap_mean_ms=round(sum(gaps) / len(gaps) * 1e3, 3) if gaps else None,
        gap_p95_ms=round(percentile(sorted(gaps), _ITL_PERCENT) * 1e3, 3) if gaps else None,
        gap_max_ms=round(max(gaps) * 1e3, 3) if gaps else None,
        status=sample.status,
        outcome=_outcome(sample),
        error=sample.error or "",
    )


def not_sent(number: int, arrival: Arrival, lag_s: float) -> Result:
    """The result of an arrival that found no free connection. Nothing of it reached the server."""
    return Result(
        number=number,
        scheduled_s=round(arrival.at_s, 6),
        sent_s=None,
        first_token_s=None,
        last_token_s=None,
        ended_s=None,
        lag_ms=round(lag_s * 1e3, 3),
        input_tokens=arrival.input_tokens,
        max_tokens=arrival.output_tokens,
        tokens=0,
        gap_mean_ms=None,
        gap_p95_ms=None,
        gap_max_ms=None,
        status=0,
        outcome="not_sent",
        error=NO_ROOM,
    )


def gaps_of(sample: Sample) -> list[float]:
    """The times between the events of its stream, in seconds."""
    return [later - earlier for earlier, later in itertools.pairwise(sample.arrivals)]


def _outcome(sample: Sample) -> Outcome:
    if sample.error is None:
        return "interrupted"
    if not sample.error:
        return "completed"
    return "refused" if sample.status in REFUSED else "failed"


class Objectives(msgspec.Struct, frozen=True):
    """What a request has to keep, in seconds: its first token after it was due, and the 95th percentile of the gaps of
    its stream. None: no bound."""

    ttft_s: float | None = None
    itl_s: float | None = None


class Totals:
    """All results of one load, in bounded memory."""

    def __init__(self, objectives: Objectives) -> None:
        self.objectives = objectives
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.num_attained = 0
        self.prompt_tokens = 0
        self.tokens = 0
        self.ttft = Histogram()
        self.gaps = Histogram()
        self.latency = Histogram()
        self.refusals = Histogram()
        self.lag = Histogram()
        self.last_token_s = 0.0

    def add(self, result: Result, gaps: list[float]) -> None:
        """Count a request. `gaps`: of its stream, in seconds."""
        self.outcomes[result.outcome] += 1
        self.lag.add(result.lag_ms / 1e3)
        if result.error:
            self.errors[result.error] += 1
        if result.outcome == "not_sent":
            return
        self.tokens += result.tokens
        if result.first_token_s is not None:
            self.prompt_tokens += result.input_tokens
            self.ttft.add(result.first_token_s - result.scheduled_s)
            self.last_token_s = max(self.last_token_s, result.last_token_s or 0.0)
        for gap in gaps:
            self.gaps.add(gap)
        if result.ended_s is not None and result.outcome in ("completed", "refused"):
            known = self.latency if result.outcome == "completed" else self.refusals
            known.add(result.ended_s - result.scheduled_s)
        self.num_attained += self._is_attained(result)

    def _is_attained(self, result: Result) -> bool:
        if result.outcome != "completed" or result.first_token_s is None:
            return False
        ttft, itl = self.objectives.ttft_s, self.objectives.itl_s
        is_soon = ttft is None or result.first_token_s - result.scheduled_s <= ttft
        return is_soon and (itl is None or (result.gap_p95_ms or 0.0) <= itl * 1e3)

    @property
    def attainment(self) -> float | None:
        """The share of requests that kept the objectives, of those that reached their end or were refused, or failed;
        None without one."""
        judged = sum(self.outcomes[outcome] for outcome in ("completed", "refused", "failed"))
        return self.num_attained / judged if judged else None
