"""The record of what happened to every accepted request, one JSON object per line, for the checker in the tests.

Events: `start` and `stop` of a router; `accepted`, `chunk` (index of its first token, the token ids), `moved` (another
rank goes on), `resubmitted` (another try, behind the tokens that have come) and `terminal` (`finish`, `error` or
`cancelled`) of a generation. Written only where the configuration asks for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.common.config import defaults
from elasticmoe.common.telemetry import get_logger

log = get_logger("router")

BYTES_MAX = defaults()["history_bytes_max"]
_LINES_HELD_MAX = 256
_LINES_KEPT_MAX = 16 * _LINES_HELD_MAX  # where they cannot be written


class History:
    """Appends to one file, in pieces. A full disk ends the recording, not the serving.

    A file that has reached `bytes_max` is kept as `<name>.1`, in place of the one before it, and another is begun.
    """

    def __init__(self, path: Path | None, router: str, bytes_max: int = BYTES_MAX) -> None:
        """`path` None: record nothing. Raises OSError when the file cannot be opened."""
        self._fd = -1
        self._lines: list[bytes] = []
        self._bytes_max = bytes_max
        if path is not None:
            self._path = path
            self._open()
            self._lines.append(b"\n")  # a router that was killed may have left half a line
            self._write({"event": "start", "router": router})
            self.flush()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        self._num_bytes = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
        os.close(self._fd)
        self._fd = -1
        self._open()

    def accepted(self, name: str, *, prompt_tokens: int, max_tokens: int, rank: str) -> None:
        """A generation begins."""
        self._write({"event": "accepted", "id": name, "prompt": prompt_tokens, "max_tokens": max_tokens, "rank": rank})

    def chunk(self, name: str, index: int, ids: Sequence[int]) -> None:
        """New tokens; `index` is the number of those before."""
        self._write({"event": "chunk", "id": name, "index": index, "ids": ids})

    def moved(self, name: str, rank: str) -> None:
        """Another rank goes on with it."""
        self._write({"event": "moved", "id": name, "rank": rank})

    def resubmitted(self, name: str, rank: str) -> None:
        """Another try goes on with it, at that rank or at the same one."""
        self._write({"event": "resubmitted", "id": name, "rank": rank})

    def terminal(self, name: str, kind: str, reason: str, *, retryable: bool = False, tokens: int = 0) -> None:
        """The end: `reason` is the finish reason or the error's code."""
        facts = {"kind": kind, "reason": reason, "retryable": retryable, "tokens": tokens}
        self._write({"event": "terminal", "id": name, **facts})

    def _write(self, event: dict[str, Any]) -> None:
        if self._fd >= 0:
            self._lines.append(msgspec.json.encode({"t": time.monotonic(), **event}) + b"\n")
            if len(self._lines) >= _LINES_HELD_MAX:
                self.flush()

    def flush(self) -> None:
        """Hand what was recorded to the operating system."""
        if self._fd < 0 or not self._lines:
            return
        try:
            self._num_bytes += os.write(self._fd, b"".join(self._lines))
            self._lines.clear()  # not before: where there is no memory for the whole, it is written later
            if self._num_bytes >= self._bytes_max:
                self._rotate()
        except MemoryError:
            if len(self._lines) > _LINES_KEPT_MAX:
                self._lines.clear()
        except OSError as error:
            log.error("history is no longer recorded", error=error.strerror)
            self._close()

    def close(self) -> None:
        """Write the last event and close. Idempotent."""
        self._write({"event": "stop"})
        self.flush()
        self._close()

    def _close(self) -> None:
        self._lines.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
