"""The figures of closed-loop clients that have sent a number of requests."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from elasticmoe.cli.load.sample import Sample, percentile
from elasticmoe.common.wording import counted


class Figures(msgspec.Struct, frozen=True):
    """Of one run. Times in milliseconds; `tokens_per_s` over the time from the first request to the last token."""

    concurrency: int
    requests: int
    failed: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    gap_max_ms: float


def figures(samples: Sequence[Sample], concurrency: int) -> Figures:
    """Sum up one run. Raises ValueError when no request succeeded."""
    good = [sample for sample in samples if not sample.error and sample.arrivals]
    if not good:
        raise ValueError(f"{counted(len(samples), 'request')} sent, all failed; the first with: {samples[0].error}")
    start = min(sample.sent for sample in good)
    end = max(sample.arrivals[-1] for sample in good)
    ttft = sorted((sample.arrivals[0] - sample.sent) * 1e3 for sample in good)
    tpot = sorted((s.arrivals[-1] - s.arrivals[0]) * 1e3 / max(1, s.tokens - 1) for s in good)
    gaps = [(b - a) * 1e3 for s in good for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    return Figures(
        concurrency,
        len(samples),
        len(samples) - len(good),
        sum(sample.tokens for sample in good) / (end - start),
        percentile(ttft, 50),
        percentile(ttft, 99),
        percentile(tpot, 50),
        percentile(tpot, 99),
        max(gaps, default=0.0),
    )
