"""What a metric is called, what it means and what it suggests to be woken for: said once, where the metric is named.

`docs/reference/metrics.md` is made from the MEASURES of router and scaler; they make their metrics from them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily

# Labels that a scrape gives to all that a deployment, or one of its listeners, tells: all have them, or none has.
OF_DEPLOYMENT = "namespace, deployment"
OF_LISTENER = f"{OF_DEPLOYMENT}, instance"


class Measure(NamedTuple):
    """One metric. `name` without the endings that Prometheus' text adds. `source`: whose state it is. `alert`: a PromQL
    condition that deserves attention once it has held for `held` (a PromQL duration; empty: at once), empty for what
    belongs on a dashboard; `why`: what that says, and what to do. An alert that adds up or compares does so within a
    deployment: `OF_DEPLOYMENT`, or its one listener: `OF_LISTENER`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    alert: str = ""
    why: str = ""
    source: Literal["router", "scaler", "ranks"] = "router"
    held: str = ""

    @property
    def exposed(self) -> str:
        """The name as it is scraped; of a histogram, without `_bucket`, `_sum` and `_count`."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def counter(self, registry: CollectorRegistry) -> Counter:
        """A counter of this name in `registry`."""
        assert self.kind == "counter"
        return Counter(self.name, self.text, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        """A gauge of this name in `registry`."""
        assert self.kind == "gauge"
        return Gauge(self.name, self.text, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry, buckets: tuple[float, ...]) -> Histogram:
        """A histogram of this name in `registry`."""
        assert self.kind == "histogram"
        return Histogram(self.name, self.text, self.labels, buckets=buckets, registry=registry)

    def family(self) -> GaugeMetricFamily:
        """A gauge whose values are filled in at each scrape."""
        assert self.kind == "gauge"
        return GaugeMetricFamily(self.name, self.text, labels=self.labels)


def measures_in(module: Mapping[str, object]) -> tuple[Measure, ...]:
    """Those that a module names, in their order there."""
    return tuple(value for value in module.values() if isinstance(value, Measure))
