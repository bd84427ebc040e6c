"""The router's metrics (`measures.py` names them), as it counts them and as its ranks report them.

What ranks report is read when it is scraped, so it cannot be stale; what the router counts is counted as it happens.
Latencies are as the router sees them: from acceptance, tokenization excluded, network to the client excluded.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from elasticmoe.common.error_codes.clients import CLIENTS
from elasticmoe.common.error_codes.internal import INTERNAL
from elasticmoe.common.layout import Layout, RankId
from elasticmoe.common.measures import REFUSALS, Measure
from elasticmoe.common.protocol.router import StepShares
from elasticmoe.services.router import measures
from elasticmoe.services.router.dispatch.links import RankLink
from elasticmoe.services.router.dispatch.streams import FINISH_REASONS, Stream

_FAST_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_SLOW_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
# What an accepted request may end with: what clients are told, what ranks tell, and any other code of a rank.
_OTHER = "other"
_CODES = frozenset({*CLIENTS, *INTERNAL, "not_ready", "cancelled", "out_of_memory", _OTHER})


class Metrics:
    """Counters and histograms of one router, in a registry of their own.

    What alerts are about is there from the start, at 0: to Prometheus a series that begins at 1 has not grown.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._prompt_tokens = self._counter(measures.PROMPT_TOKENS)
        self._generation_tokens = self._counter(measures.GENERATION_TOKENS)
        self._ttft = self._histogram(measures.TTFT, _FAST_S)
        self._gap = self._histogram(measures.GAP, _FAST_S)
        self._e2e = self._histogram(measures.E2E, _SLOW_S)
        self._prompt_size = self._histogram(measures.PROMPT_SIZE, _TOKENS)
        self._output_size = self._histogram(measures.OUTPUT_SIZE, _TOKENS)
        self._success = measures.SUCCESS.counter(self.registry)
        self._failed = measures.FAILED.counter(self.registry)
        self._refused = measures.REFUSED.counter(self.registry)
        for reason in FINISH_REASONS:
            self._success.labels(model_name, reason)
        for code in sorted(_CODES):
            self._failed.labels(model_name, code)
        for status in REFUSALS:
            self._refused.labels(model_name, status)
        self.resubmitted = self._counter(measures.RESUBMITTED)
        self.moved = self._counter(measures.MOVED)
        self.recomputed = self._counter(measures.RECOMPUTED)
        self.spans_lost = self._counter(measures.SPANS_LOST)
        self.bad_messages = self._counter(measures.BAD_MESSAGES)

    def _counter(self, measure: Measure) -> Counter:
        return measure.counter(self.registry).labels(self._model)

    def _histogram(self, measure: Measure, buckets: tuple[float, ...]) -> Histogram:
        return measure.histogram(self.registry, buckets).labels(self._model)

    def accepted(self, prompt_tokens: int) -> None:
        """A generation was submitted."""
        self._prompt_tokens.inc(prompt_tokens)
        self._prompt_size.observe(prompt_tokens)

    def tokens(self, count: int, seconds: float, is_first: bool) -> None:
        """`count` tokens came, `seconds` after the ones before or after acceptance."""
        self._generation_tokens.inc(count)
        (self._ttft if is_first else self._gap).observe(seconds)

    def ended(self, stream: Stream, now: float) -> None:
        """A generation has ended."""
        assert stream.ending is not None
        if stream.ending.kind == "finish":
            self._success.labels(self._model, stream.ending.reason).inc()
            self._e2e.observe(now - stream.accepted_at)
            self._output_size.observe(stream.num_tokens)
        else:
            self._failed.labels(self._model, _known(stream.ending.reason)).inc()

    def refused(self, status: int) -> None:
        """An error was answered."""
        self._refused.labels(self._model, str(status)).inc()

    def watch(self, links: Mapping[RankId, RankLink], layout: Callable[[], Layout | None]) -> None:
        """Report what the ranks of `links` say, from now on."""
        self.registry.register(_RankCollector(self._model, links, layout))

    def render(self) -> bytes:
        """The Prometheus text."""
        return generate_latest(self.registry)


def _known(code: str) -> str:
    """A code as a label: ranks choose codes, and a label must not grow without bound."""
    return code if code in _CODES else _OTHER


class _RankCollector(Collector):
    """Gauges from the statuses of the moment."""

    def __init__(self, model: str, links: Mapping[RankId, RankLink], layout: Callable[[], Layout | None]) -> None:
        self._model = model
        self._links = links
        self._layout = layout

    def collect(self) -> Iterable[Metric]:
        """All gauges; a rank that has not reported or has left the layout has none."""
        yield from self._engine_metrics()
        yield from self._layout_metrics()

    def _engine_metrics(self) -> Iterable[Metric]:
        running, waiting = measures.RUNNING.family(), measures.WAITING.family()
        usage, queued = measures.KV_USAGE.family(), measures.QUEUED.family()
        silent, blocks = measures.SILENT.family(), measures.KV_BLOCKS.family()
        shares = measures.STEP_SHARE.family()
        now = time.monotonic()
        for rank, link in self._links.items():
            status = link.status
            if status is None or link.left_at is not None:
                continue
            engine = [self._model, str(rank.replica)]
            used = status.blocks_total - status.blocks_free
            running.add_metric(engine, status.running)
            waiting.add_metric(engine, status.waiting)
            usage.add_metric(engine, used / status.blocks_total if status.blocks_total else 0.0)
            queued.add_metric(engine, status.tokens_queued)
            silent.add_metric(engine, link.silent_s(now))
            blocks.add_metric([*engine, "free"], status.blocks_free)
            blocks.add_metric([*engine, "used"], used)
            of_ranks = (StepShares(rank.tp, status.share_overhead, status.share_waiting), *status.followers)
            for one in of_ranks:
                labels = [*engine, str(RankId(rank.replica, one.tp))]
                shares.add_metric([*labels, "overhead"], one.overhead)
                shares.add_metric([*labels, "waiting"], one.waiting)
        return [running, waiting, usage, queued, silent, blocks, shares]

    def _layout_metrics(self) -> Iterable[Metric]:
        layout = self._layout()
        epoch, experts = measures.EPOCH.family(), measures.EXPERTS.family()
        if layout is not None:
            epoch.add_metric([], layout.epoch)
            counts = collections.Counter(slot for layer in layout.homes for slots in layer for slot in slots)
            for seat in layout.seats:
                experts.add_metric([str(seat.rank)], counts[seat.slot])
        return [epoch, experts]
