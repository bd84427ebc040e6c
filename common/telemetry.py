"""Logging and metrics, set up the same way in every process.

Logs are one line per event on stderr: time, level, process name, text, and key=value facts; or JSON. Secrets never
reach a log: no caller passes one. Metrics are prometheus-client objects owned by their service.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any


class Logger:
    """A named logger whose facts are keywords: `log.info("rank ready", rank="r0t0", attach_ms=12.5)`."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, text: str, **facts: Any) -> None:
        """For developers."""
        self._logger.debug(text, extra={"facts": facts})

    def info(self, text: str, **facts: Any) -> None:
        """A state changed as intended."""
        self._logger.info(text, extra={"facts": facts})

    def warning(self, text: str, **facts: Any) -> None:
        """Something unexpected was handled."""
        self._logger.warning(text, extra={"facts": facts})

    def error(self, text: str, **facts: Any) -> None:
        """Something failed and somebody should look."""
        self._logger.error(text, extra={"facts": facts})

    def exception(self, text: str, **facts: Any) -> None:
        """An error with the stack of the exception that is being handled."""
        self._logger.error(text, extra={"facts": facts}, exc_info=True)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        line = f"{stamp} {record.levelname[0]} {record.name}: {record.getMessage()}"
        if facts:
            line += " " + " ".join(f"{key}={_short(value)}" for key, value in facts.items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": record.created, "level": record.levelname.lower(), "name": record.name}
        entry |= {"text": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            entry["stack"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return json.dumps(text) if " " in text else text


def setup_logging(name: str, *, level: str = "info", as_json: bool = False) -> Logger:
    """Configure this process's root logger once and return the logger called `name`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    return Logger(logging.getLogger(name))


def get_logger(name: str) -> Logger:
    """The logger called `name`; silent below warnings until `setup_logging` was called."""
    return Logger(logging.getLogger(name))
