"""Spans of OpenTelemetry: how they are written and sent. The one module that imports it.

A span is written when it is over, with the times that its owner has measured, so that nothing is held open meanwhile;
until then it is an OpenSpan, which others can be written within. So it is made as the SDK's processor takes it, and not
by the SDK's tracer, whose spans are made to be open for a while, and cost several times as much.

Nobody waits for the collector: a thread sends what was written, in batches, and what finds no room on the way to it, or
is not taken, is counted and gone.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.version import version

log = get_logger("traces")

QUEUED_MAX: Final = 4_096  # spans on their way, a few MB
BATCH_MAX: Final = 64  # small: while a batch is encoded, nothing else runs in this process
EVERY_S: Final = 1.0
EXPORT_S: Final = 5.0  # of one batch, with what is tried again
CLOSE_S: Final = 2.0

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status()

Attributes = Mapping[str, str | bool | int | float | Sequence[str]]


class OpenSpan(NamedTuple):
    """A span that has begun, and is written when it is over. `parent`: what it is within itself."""

    place: SpanContext
    parent: SpanContext | None

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self.place.trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """How W3C's trace context names it."""
        return f"00-{self.trace_id}-{self.place.span_id:016x}-01"


class Spans:
    """Writes the spans of one process. For one thread."""

    def __init__(
        self, endpoint: str, service: str, deployment: str, lost: Callable[[int], None], *, ratio: float = 1.0
    ) -> None:
        """See `open_spans`."""
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it would say of each batch what is told once
        facts = {
            "service.namespace": "elasticmoe",
            "service.name": f"elasticmoe-{service}",
            "service.version": version(),
            "elasticmoe.deployment": deployment,
        }
        self._resource = Resource.create(facts)
        self._scope = InstrumentationScope("elasticmoe", version())
        self._ids = RandomIdGenerator()
        self._sampler = ParentBased(TraceIdRatioBased(ratio))
        self._propagator = TraceContextTextMapPropagator()
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_S)
        self._processor = _Processor(_Exporter(exporter, endpoint, lost))

    def begin(self, carrier: Mapping[str, str]) -> OpenSpan | None:
        """The first span here of a trace: its caller's, as far as `carrier` has a `traceparent` (and a `tracestate`)
        that is one, else a new one. None where the caller does not record it, or `ratio` leaves it out."""
        return self._first(carrier, self._ids.generate_trace_id(), self._ids.generate_span_id())

    def named(self, name: str, carrier: Mapping[str, str]) -> OpenSpan | None:
        """Like `begin`, but its ids follow from `name`, as far as they are not the caller's: whoever goes on with the
        work goes on with them."""
        digest = hashlib.sha256(name.encode()).digest()
        return self._first(carrier, int.from_bytes(digest[:16]), int.from_bytes(digest[16:24]))

    def _first(self, carrier: Mapping[str, str], trace_id: int, span_id: int) -> OpenSpan | None:
        outside = self._propagator.extract(carrier, Context())
        caller = get_current_span(outside).get_span_context()
        parent = caller if caller.is_valid else None
        trace_id = parent.trace_id if parent is not None else trace_id
        if not self._sampler.should_sample(outside, trace_id, "").decision.is_sampled():
            return None
        return OpenSpan(_place(trace_id, span_id, parent), parent)

    def write(
        self,
        within: OpenSpan,
        name: str,
        began_unix: float,
        ended_unix: float,
        attributes: Attributes,
        *,
        error: str = "",
        events: Iterable[tuple[str, float]] = (),
    ) -> OpenSpan:
        """A span that is over. `error`: why it did not end well; `events`: names and times."""
        place = _place(within.place.trace_id, self._ids.generate_span_id(), within.place)
        span = OpenSpan(place, within.place)
        self.end(span, name, began_unix, ended_unix, attributes, error=error, events=events)
        return span

    def end(
        self,
        span: OpenSpan,
        name: str,
        began_unix: float,
        ended_unix: float,
        attributes: Attributes,
        *,
        error: str = "",
        events: Iterable[tuple[str, float]] = (),
        is_server: bool = False,
    ) -> None:
        """Write `span`. Never waits. `is_server`: it answers somebody's request."""
        self._processor.on_end(
            ReadableSpan(
                name=name,
                context=span.place,
                parent=span.parent,
                resource=self._resource,
                attributes=attributes,
                events=[Event(event, timestamp=_ns(at_unix)) for event, at_unix in events],
                kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
                status=Status(StatusCode.ERROR, error) if error else _UNSET,
                start_time=_ns(began_unix),
                end_time=_ns(max(began_unix, ended_unix)),
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> None:
        """Send what was written, for CLOSE_S at most."""
        closing = threading.Thread(target=self._processor.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _ns(at_unix: float) -> int:
    return int(at_unix * 1e9)


def _place(trace_id: int, span_id: int, parent: SpanContext | None = None) -> SpanContext:
    """Of a span of ours, in its parent's trace state."""
    return SpanContext(trace_id, span_id, False, _SAMPLED, parent.trace_state if parent is not None else None)


class _Exporter(SpanExporter):
    """Sends batches by `inner`, and counts. In the processor's thread, but for `has_room`."""

    def __init__(self, inner: SpanExporter, endpoint: str, lost: Callable[[int], None]) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._is_failing = False
        self._num_in = 0  # changed by who writes spans alone
        self._num_out = 0  # by the processor's thread alone
        self.lost = lost

    def has_room(self) -> bool:
        """Whether one more may come, and then it is counted in."""
        if self._num_in - self._num_out >= QUEUED_MAX:
            self.lost(1)
            return False
        self._num_in += 1
        return True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Try for EXPORT_S. Says once that nobody takes them, and once that somebody does again."""
        result = SpanExportResult.FAILURE
        try:
            result = self._inner.export(spans)
        finally:
            self._num_out += len(spans)
            is_failing = result is not SpanExportResult.SUCCESS
            if is_failing:
                self.lost(len(spans))
            if is_failing != self._is_failing:
                self._is_failing = is_failing
                say = log.warning if is_failing else log.info
                say("traces are not taken" if is_failing else "traces are taken again", endpoint=self._endpoint)
        return result

    def shutdown(self) -> None:
        """Send no more."""
        self._inner.shutdown()


class _Processor(BatchSpanProcessor):
    """The SDK's, in front of which it is known what was dropped."""

    def __init__(self, exporter: _Exporter) -> None:
        super().__init__(
            exporter, max_queue_size=QUEUED_MAX, schedule_delay_millis=EVERY_S * 1e3, max_export_batch_size=BATCH_MAX
        )
        self._counting = exporter

    def on_end(self, span: ReadableSpan) -> None:
        """Send it soon, or drop it. Never waits."""
        if self._counting.has_room():
            super().on_end(span)
