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
# The HTTP statuses of refusals that alerts are about. Counters have them from the start.
REFUSALS = ("401", "403", "429", "503")


class Alert(NamedTuple):
    """What deserves attention: that the PromQL `condition` has held for `held` (a PromQL duration; empty: at once).
    `why`: what that says, and what to do. `severity`: `critical` where clients are not served, or lose what they were
    promised, until somebody acts. `name`: the end of the alert's name, where a metric has several. A condition that
    adds up or compares does so within a deployment, `OF_DEPLOYMENT`, or its one listener, `OF_LISTENER`; of a metric
    that both listeners tell it takes the one's that it is about."""

    condition: str
    why: str
    severity: Literal["warning", "critical"] = "warning"
    held: str = ""
    name: str = ""


class Measure(NamedTuple):
    """One metric. `name` without the endings that Prometheus' text adds. `alerts`: none for what belongs on a
    dashboard. `source`: whose state it is."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    alerts: tuple[Alert, ...] = ()
    source: Literal["router", "scaler", "ranks"] = "router"

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
