"""Takes spans in the place of the exporter that a process has."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from elasticmoe.common.tracing import spans as tracing


class Sink:
    """Holds batches up until `go` is set. `fails`: it takes none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans: list[Any] = []
        self.go = threading.Event()
        self.fails = False
        monkeypatch.setattr(tracing, "OTLPSpanExporter", lambda **_: self)

    def export(self, batch: Sequence[Any]) -> Any:
        """See SpanExporter."""
        self.go.wait()
        if self.fails:
            raise OSError("no collector")
        self.spans += batch
        return tracing.SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """See SpanExporter."""
        self.go.set()
