"""A collector of traces, as OTLP over HTTP has it: decodes what it is sent, or is down, hangs or fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.procs.waiting import wait_until

Manner = Literal["takes", "fails", "hangs"]


@dataclass(frozen=True)
class Span:
    """One span, ids as hexadecimal digits, times in nanoseconds."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    began: int
    ended: int
    facts: dict[str, Any]
    events: tuple[str, ...]
    error: str
    is_server: bool


@dataclass
class Collector:
    """What it was sent. `manner`: how it answers."""

    url: str = ""
    manner: Manner = "takes"
    num_posts: int = 0
    spans: list[Span] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, condition: Callable[[Span], bool], what: str) -> Span:
        """The first span of a kind."""
        return wait_until(lambda: next((span for span in list(self.spans) if condition(span)), None), what) or _none()

    def request(self, request_id: str) -> Span:
        """The span of a request, with which its trace is complete: it is written last."""
        return self.wait_for(lambda span: span.facts.get("elasticmoe.request_id") == request_id, request_id)

    def operation(self, op_id: str) -> Span:
        """The span of an operation, with which its trace is complete."""
        return self.wait_for(lambda span: span.facts.get("elasticmoe.operation_id") == op_id, op_id)

    def within(self, root: Span) -> dict[str, list[Span]]:
        """All spans of the trace that are below `root`, by their names. Fails for one that is not, or has times outside
        of its parent's."""
        spans = {span.span_id: span for span in self.spans if span.trace_id == root.trace_id}
        found: dict[str, list[Span]] = {}
        for span in spans.values():
            if span is root:
                continue
            parent = spans[span.parent_id]
            assert parent.began - CLOCK_NS <= span.began <= span.ended <= parent.ended + CLOCK_NS, (span, parent)
            found.setdefault(span.name, []).append(span)
        return found


CLOCK_NS = 2_000_000  # two clocks were read, one after the other


def _none() -> Span:
    raise AssertionError("no span")


@contextmanager
def collecting(manner: Manner = "takes") -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector(manner=manner)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            collector.num_posts += 1
            if collector.manner == "hangs":
                collector.released.wait()
                return
            if collector.manner == "takes":
                assert self.path == "/v1/traces", self.path
                collector.spans += _decoded(raw)
            self.send_response(200 if collector.manner == "takes" else 500)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        collector.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _decoded(raw: bytes) -> Iterator[Span]:
    for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
        service = str(_facts(resource.resource.attributes)["service.name"])
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    service=service,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    began=span.start_time_unix_nano,
                    ended=span.end_time_unix_nano,
                    facts=_facts(span.attributes),
                    events=tuple(event.name for event in span.events),
                    error=span.status.message if span.status.code == 2 else "",
                    is_server=span.kind == 2,
                )


def _facts(attributes: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
