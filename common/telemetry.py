"""Logging, set up the same way in every process.

Logs are one line per event on stderr: time, level, process name, text, and key=value facts; or one JSON object. Secrets
never reach a log: no caller passes one. What names a request or an operation has the same key in every process:
`request_id`, `stream`, `trace_id`, `operation_id` (docs/observability.md).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

_about: ContextVar[Mapping[str, str] | None] = ContextVar("about", default=None)


def log_about(**names: str) -> None:
    """Let every line of the running asyncio task, from now on, have these facts and no others of this kind: the
    `request_id` of the request that it answers. Tasks that it starts have them as well."""
    _about.set(names)


def log_also(**names: str) -> None:
    """As `log_about`, beside what there is."""
    _about.set({**(_about.get() or {}), **names})


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
        facts = _facts_of(record)
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        line = f"{stamp} {record.levelname[0]} {record.name}: {record.getMessage()}"
        if facts:
            line += " " + " ".join(f"{key}={_short(value)}" for key, value in facts.items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonFormatter(logging.Formatter):
    """`service`: the process."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        facts = _facts_of(record)
        if record.exc_info:
            facts["stack"] = self.formatException(record.exc_info)
        message = record.getMessage()
        return json_line(record.levelname.lower(), self._service, record.name, message, facts, record.created)


def json_line(
    level: str,
    service: str,
    logger: str,
    message: str,
    facts: Mapping[str, Any] | None = None,
    at_unix: float | None = None,
) -> str:
    """One line of a log in JSON. `service`: the process; `at_unix`: when, by default now. No fact takes the place of
    what every line has."""
    at = datetime.fromtimestamp(time.time() if at_unix is None else at_unix, UTC).isoformat(timespec="milliseconds")
    entry = {"ts": at, "level": level, "service": service, "logger": logger, "message": message}
    return json.dumps(entry | {key: _plain(value) for key, value in (facts or {}).items() if key not in entry})


def _facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was said with the line, and what its task is about."""
    return {**(_about.get() or {}), **getattr(record, "facts", {})}


def _plain(value: Any) -> Any:
    """A fact as JSON has it: numbers, truths and lists of texts as they are, everything else as its text."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    is_number = isinstance(value, int) or (isinstance(value, float) and abs(value) < float("inf"))
    return value if value is None or is_number else str(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return json.dumps(text) if " " in text else text


def setup_logging(name: str, *, level: str = "info", log_format: str = "text") -> Logger:
    """Configure the root logger of this process, called `name`, and return the logger of that name. `log_format`:
    `text` or `json`; in JSON what ends a thread without being caught is a line, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(name) if log_format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    if log_format == "json":
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    return Logger(logging.getLogger(name))


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    logging.getLogger().critical("uncaught", exc_info=(kind, error or kind(), traceback))


def get_logger(name: str) -> Logger:
    """The logger called `name`; silent below warnings until `setup_logging` was called."""
    return Logger(logging.getLogger(name))
