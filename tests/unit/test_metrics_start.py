"""What alerts count is there from a process's start: to Prometheus a counter that begins at 1 has not grown, so its
first event would wake nobody, and the first after each restart neither."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import NamedTuple, get_args

import pytest
from prometheus_client import CollectorRegistry

from elasticmoe.common.error_codes import CODES
from elasticmoe.common.error_codes.clients import CLIENTS
from elasticmoe.common.error_codes.internal import INTERNAL
from elasticmoe.common.measures import Measure
from elasticmoe.services.router import measures as router_measures
from elasticmoe.services.router.dispatch.streams import Ending
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.scaler import measures as scaler_measures
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.operation.operation import OperationKind, OperationOutcome
from elasticmoe.services.scaler.policy.state import Reason
from elasticmoe.services.worker.engine.failure import OUT_OF_MEMORY
from tests.boards import selectors

# What a process has before anything has happened, and what it tells of.
STARTED: dict[str, tuple[CollectorRegistry, tuple[Measure, ...]]] = {
    "router": (Metrics("m").registry, router_measures.MEASURES),
    "scaler": (Meters().registry, scaler_measures.MEASURES),
}


class Counted(NamedTuple):
    """A counter or a histogram that an alert names, and the values of its labels that the alert is about."""

    process: str
    measure: Measure
    label: str = ""
    values: tuple[str, ...] = ()


def counted() -> list[Counted]:
    """Of every alert's condition."""
    found = []
    for process, (_, measures) in STARTED.items():
        by_name = {one.exposed: one for one in measures if one.kind != "gauge"}
        for alert in (alert for measure in measures for alert in measure.alerts):
            for name, matchers in selectors(alert.condition):
                measure = by_name.get(re.sub("_(bucket|sum|count)$", "", name))
                if measure is None:
                    continue
                found.append(Counted(process, measure))
                for label, operator, value in matchers:
                    if operator in ("=", "=~") and value:
                        found.append(Counted(process, measure, label, tuple(value.split("|"))))
    return found


def told(registry: CollectorRegistry, measure: Measure) -> list[dict[str, str]]:
    """The labels of each series of a metric."""
    names = (measure.exposed, f"{measure.exposed}_count")
    return [one.labels for family in registry.collect() for one in family.samples if one.name in names]


def test_alerts_count_what_the_tests_here_look_for() -> None:
    named = {(one.measure.exposed, value) for one in counted() for value in one.values}
    assert named >= {
        ("elasticmoe:scale_operations_total", "aborted"),
        ("elasticmoe:policy_decisions_total", "cancel_stuck"),
        *(("elasticmoe:requests_refused_total", status) for status in ("401", "403", "429", "503")),
    }
    assert {one.measure.exposed for one in counted()} >= {
        "elasticmoe:requests_failed_total",
        "vllm:prompt_tokens_total",
    }


@pytest.mark.parametrize("case", counted(), ids=lambda case: f"{case.process}-{case.measure.name}-{case.label}")
def test_every_label_that_an_alert_is_about_is_there_from_the_start(case: Counted) -> None:
    series = told(STARTED[case.process][0], case.measure)
    assert series, "nothing is told of it"
    assert set(case.values) <= {labels[case.label] for labels in series if case.label}


def test_every_counter_is_told_of_from_the_start() -> None:
    for registry, measures in STARTED.values():
        assert [one.name for one in measures if one.kind != "gauge" and not told(registry, one)] == []


def test_the_router_counts_every_code_that_it_may_meet_and_no_other() -> None:
    metrics = Metrics("m")
    before = told(metrics.registry, router_measures.FAILED)
    assert {labels["code"] for labels in before} == {
        *(*CLIENTS, *INTERNAL, "not_ready", "cancelled"),
        *(OUT_OF_MEMORY, "other"),
    }
    for code in (*CODES, "made_up", "x" * 41):
        metrics.ended(SimpleNamespace(ending=Ending("error", code)), 0.0)  # type: ignore[arg-type]
    assert told(metrics.registry, router_measures.FAILED) == before, "a label does not grow"
    value = metrics.registry.get_sample_value
    assert value("elasticmoe:requests_failed_total", {"model_name": "m", "code": "rank_lost"}) == 1
    assert value("elasticmoe:requests_failed_total", {"model_name": "m", "code": "other"}) == 2 + len(
        set(CODES) - {labels["code"] for labels in before}
    )


def test_the_scaler_counts_every_end_of_an_operation_and_every_reason() -> None:
    registry = Meters().registry
    ends = {(labels["kind"], labels["outcome"]) for labels in told(registry, scaler_measures.OPERATIONS)}
    assert ends == set(itertools.product(get_args(OperationKind), get_args(OperationOutcome)))
    assert {labels["reason"] for labels in told(registry, scaler_measures.DECISIONS)} == set(Reason)
