"""The trace of one HTTP request: its span, that of the reading of its texts, and those of its streams (trail.py)."""

from __future__ import annotations

import time
from collections.abc import MutableMapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from elasticmoe.common.http import ids
from elasticmoe.common.http.body import ClientLeft
from elasticmoe.common.http.door import Scope, Send, headers_of
from elasticmoe.common.http.errors import status_of
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.rank import Origin
from elasticmoe.common.telemetry import log_also
from elasticmoe.services.router.dispatch.trail import Trail

if TYPE_CHECKING:
    from elasticmoe.common.tracing.spans import OpenSpan, Spans

_HEADERS = ("traceparent", "tracestate")


class RequestTrace:
    """For `with`, around all that answers the request: at its end the span is written."""

    def __init__(self, spans: Spans, span: OpenSpan, scope: Scope, model: str) -> None:
        self._spans = spans
        self._span = span
        self._scope = scope
        self._model = model
        self._began = time.monotonic()
        self._to_unix = time.time() - self._began  # read once: from here on monotonic time counts
        self._status = 0
        self._error = ""
        self._num_streams = 0
        log_also(trace_id=span.trace_id)

    @property
    def traceparent(self) -> str:
        """By which others name it."""
        return self._span.traceparent

    def tokenized(self, num_tokens: int) -> None:
        """Its body has come and was read, and its prompts, of so many tokens, are about to be submitted."""
        facts = {"gen_ai.usage.input_tokens": num_tokens}
        self._spans.write(self._span, "tokenize", self._began + self._to_unix, self._now_unix(), facts)

    def trail(self) -> Trail:
        """Of the next stream."""
        self._num_streams += 1
        return Trail(self._spans, self._span, self._to_unix, self._num_streams - 1)

    def watching(self, send: Send) -> Send:
        """`send`, which notes the answer's status."""

        async def watched(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            await send(message)

        return watched

    def _now_unix(self) -> float:
        return time.monotonic() + self._to_unix

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        facts: dict[str, str | int] = {
            "http.request.method": self._scope["method"],
            "url.path": self._scope["path"],
            "elasticmoe.request_id": ids.of(self._scope),
            "gen_ai.request.model": self._model,
        }
        if isinstance(error, ElasticMoEError):
            self._status = self._status or status_of(error)
            facts["error.type"] = error.code
        elif error is not None:
            facts["error.type"] = "client_left" if isinstance(error, ClientLeft) else type(error).__name__
        elif self._status >= 400:
            facts["error.type"] = str(self._status)
        if self._status:
            facts["http.response.status_code"] = self._status
        name = f"{self._scope['method']} {self._scope['path']}"
        # By OpenTelemetry's rules what the client did wrong is no error of the server's span.
        is_ours = self._status >= 500 or (error is not None and not isinstance(error, ElasticMoEError | ClientLeft))
        self._spans.end(
            self._span,
            name,
            self._began + self._to_unix,
            self._now_unix(),
            facts,
            error=str(facts.get("error.type", "")) if is_ours else "",
            is_server=True,
        )


def begin_trace(spans: Spans, scope: Scope, model: str) -> RequestTrace | None:
    """The trace of a request that has just come: its caller's, where its headers name one, else a new one. None where
    it is not to be recorded."""
    headers = headers_of(scope)
    found = ((name, headers.get(name.encode())) for name in _HEADERS)
    span = spans.begin({name: value.decode("latin-1") for name, value in found if value is not None})
    return None if span is None else RequestTrace(spans, span, scope, model)


class Caller(NamedTuple):
    """Whose request it is. `trace`: None where it is not recorded."""

    request_id: str
    trace: RequestTrace | None

    @property
    def origin(self) -> Origin:
        """What ranks are told of it."""
        return Origin(self.request_id, self.trace.traceparent if self.trace is not None else "")

    def tokenized(self, prompts: Sequence[Sequence[int]]) -> None:
        """See RequestTrace."""
        if self.trace is not None:
            self.trace.tokenized(sum(map(len, prompts)))

    def trail(self) -> Trail | None:
        """See RequestTrace."""
        return self.trace.trail() if self.trace is not None else None
