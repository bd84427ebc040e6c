"""Whether a process traces. OpenTelemetry is an extra of the package, imported only where traces are asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from elasticmoe.common.protocol.errors import ConfigError

if TYPE_CHECKING:
    from elasticmoe.common.tracing.spans import Spans

_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


def check_tracing(endpoint: str) -> None:
    """Raises ConfigError `no_opentelemetry` where traces are to be sent to `endpoint` and cannot be made."""
    if endpoint and not all(map(_is_there, _NEEDED)):
        text = f"otlp_endpoint is {endpoint}, and OpenTelemetry is not installed: `pip install '.[otel]'` in a checkout"
        raise ConfigError(text, code="no_opentelemetry")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def open_spans(
    endpoint: str, service: str, deployment: str, lost: Callable[[int], None], *, ratio: float = 1.0
) -> Spans | None:
    """What writes the spans of this process, called `service`; None where `endpoint` is empty. `lost`: called with the
    number of spans that nobody took. `ratio`: the share of traces that are begun here. Raises ConfigError."""
    check_tracing(endpoint)
    if not endpoint:
        return None
    from elasticmoe.common.tracing.spans import Spans

    return Spans(endpoint, service, deployment, lost, ratio=ratio)
