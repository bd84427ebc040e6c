"""Spans as they are made and handed on: whose trace they are of, what is counted where nobody takes them, and that the
extra is asked for in one line where it is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import pytest

from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.tracing.opening import open_spans
from elasticmoe.common.tracing.spans import QUEUED_MAX, OpenSpan, Spans
from tests.unit.span_sink import Sink

TRACE, CALLER = "ab" * 16, "cd" * 8


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Sink:
    return Sink(monkeypatch)


def opened(ratio: float = 1.0) -> tuple[Spans, list[int]]:
    lost: list[int] = []
    return Spans("http://collector", "router", "default", lost.append, ratio=ratio), lost


def test_spans_stand_in_their_callers_trace(sink: Sink) -> None:
    spans, _ = opened()
    root = spans.begin({"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"})
    assert root is not None
    assert (root.trace_id, root.traceparent[:36]) == (TRACE, f"00-{TRACE}-")
    child = spans.write(root, "child", 2.0, 3.0, {"fact": 1}, error="broken", events=[("half", 2.5)])
    spans.write(child, "grandchild", 2.0, 1.0, {})
    spans.end(root, "root", 1.0, 4.0, {}, is_server=True)
    sink.go.set()
    spans.close()
    by_name = {span.name: span for span in sink.spans}
    assert {span.context.trace_id for span in sink.spans} == {int(TRACE, 16)}
    assert by_name["root"].parent.span_id == int(CALLER, 16)
    assert by_name["child"].parent.span_id == by_name["root"].context.span_id
    assert by_name["grandchild"].parent.span_id == by_name["child"].context.span_id
    assert by_name["root"].context.trace_state.get("vendor") == "1"
    assert (by_name["child"].start_time, by_name["child"].end_time) == (2_000_000_000, 3_000_000_000)
    assert by_name["child"].status.description == "broken"
    assert [event.name for event in by_name["child"].events] == ["half"]
    assert by_name["grandchild"].start_time == by_name["grandchild"].end_time  # none ends before it began
    assert by_name["root"].resource.attributes["service.name"] == "elasticmoe-router"


def test_the_caller_decides_and_else_the_ratio(sink: Sink) -> None:
    none, _ = opened(ratio=0.0)
    assert none.begin({}) is None
    assert none.begin({"traceparent": "nonsense"}) is None
    assert none.begin({"traceparent": f"00-{TRACE}-{CALLER}-01"}) is not None
    some, _ = opened(ratio=0.5)
    assert some.begin({"traceparent": f"00-{TRACE}-{CALLER}-00"}) is None
    num = sum(some.begin({}) is not None for _ in range(1_000))
    assert 400 < num < 600
    sink.go.set()
    none.close()
    some.close()


def test_whoever_goes_on_with_an_operation_goes_on_with_its_trace(sink: Sink) -> None:
    first, _ = opened()
    second, _ = opened()
    roots = [named(first, "op-1"), named(second, "op-1")]
    assert roots[0].traceparent == roots[1].traceparent != named(first, "op-2").traceparent
    first.write(roots[0], "prepare", 1.0, 2.0, {})
    second.end(roots[1], "scale_up", 1.0, 3.0, {})
    sink.go.set()
    first.close()
    second.close()
    phase, operation = sorted(sink.spans, key=lambda span: span.name)
    assert phase.parent.span_id == operation.context.span_id
    assert phase.context.trace_id == operation.context.trace_id
    assert operation.parent is None


def test_what_is_named_is_within_its_caller_s_trace(sink: Sink) -> None:
    spans, _ = opened()
    asked = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}
    within, again, alone = named(spans, "op-1", asked), named(spans, "op-1", asked), named(spans, "op-1")
    assert within == again
    assert (within.trace_id, within.place.span_id) == (TRACE, alone.place.span_id)
    assert within.parent is not None
    assert f"{within.parent.span_id:016x}" == CALLER
    assert within.place.trace_state.get("vendor") == "1"
    assert named(spans, "op-1", {"traceparent": "00-nonsense-01"}) == alone
    assert spans.named("op-1", {"traceparent": f"00-{TRACE}-{CALLER}-00"}) is None
    sink.go.set()
    spans.close()


def named(spans: Spans, name: str, carrier: Mapping[str, str] | None = None) -> OpenSpan:
    span = spans.named(name, carrier or {})
    assert span is not None
    return span


def test_what_finds_no_room_is_counted_and_nobody_waits(sink: Sink) -> None:
    spans, lost = opened()
    root = named(spans, "root")
    for _ in range(QUEUED_MAX + 10):
        spans.write(root, "child", 1.0, 2.0, {})
    assert sum(lost) == 10
    sink.go.set()
    spans.close()
    assert len(sink.spans) == QUEUED_MAX


def test_what_is_not_taken_is_counted(sink: Sink) -> None:
    spans, lost = opened()
    sink.fails = True
    sink.go.set()
    for _ in range(100):
        spans.write(named(spans, "root"), "child", 1.0, 2.0, {})
    spans.close()
    assert sum(lost) == 100


def test_a_missing_extra_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[otel\]'") as raised:
        open_spans("http://127.0.0.1:4318", "router", "default", print)
    assert raised.value.code == "no_opentelemetry"
    assert open_spans("", "router", "default", print) is None
