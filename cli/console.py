"""What the user sees while something takes time: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import select
import sys
from types import TracebackType
from typing import IO, Protocol, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from elasticmoe.cli.terminal import clean, clean_lines, table_console
from elasticmoe.common.telemetry import json_line
from elasticmoe.common.wording import size as size

_PLAIN_STEP_PERCENT = 25
_FINISH_SECONDS_MAX = 5.0


class Console(Protocol):
    """Where progress and lines go. One at a time per process."""

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""

    def private_line(self, text: str, otherwise: str) -> None:
        """Print `text`, which has a secret in it, for eyes alone: where the output may be kept, `otherwise`."""

    def progress(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Show `phase`; with `total` > 0 as a share of bytes."""

    def close(self) -> None:
        """Take the bar away. Idempotent; a later `progress` shows a new one."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class _Closing:
    def close(self) -> None:
        """Nothing to take away."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class TerminalConsole(_Closing):
    """A bar with phase, bytes and seconds.

    Drawn only from the caller's thread: the launcher must not have a second one when it starts children.
    """

    def __init__(self, file: IO[str]) -> None:
        self._terminal = table_console(file)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""

    def line(self, text: str) -> None:
        """Print one line."""
        try:
            self._terminal.print(clean_lines(text))
        except OSError:
            pass  # the terminal is gone, which may not stop a deployment

    def private_line(self, text: str, otherwise: str) -> None:  # noqa: ARG002
        """A terminal is for eyes. In one line, however narrow it is: it is there to be copied."""
        try:
            self._terminal.print(clean_lines(text), soft_wrap=True)
        except OSError:
            pass  # as above

    def progress(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Draw the bar; one without a total pulses."""
        try:
            self._draw(clean(phase), done, total)
        except OSError:
            pass  # as above

    def _draw(self, phase: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[share]}", markup=False),
                TimeElapsedColumn(),
                console=self._terminal,
                transient=True,
                auto_refresh=False,
            )
            self._bar.start()
            self._task, self._phase = None, ""
        if self._task is None or phase != self._phase:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._phase = self._bar.add_task(phase, total=None, share=""), phase
        share = f"{size(done)} of {size(total)}" if total else ""
        self._bar.update(self._task, completed=done, total=total or None, share=share)
        self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        bar, self._bar = self._bar, None
        if bar is not None:
            try:
                bar.stop()
            except OSError:
                pass  # as above


class PlainConsole(_Closing):
    """Lines for files and pipes: one per phase and per quarter of it."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._shown: tuple[str, int] = ("", -1)

    def line(self, text: str) -> None:
        """Print one line."""
        try:
            print(clean_lines(text), file=self._file, flush=True)
        except OSError:
            pass  # the reader is gone or the disk is full; neither may stop a deployment

    def private_line(self, text: str, otherwise: str) -> None:  # noqa: ARG002
        """Files and pipes are kept."""
        self.line(otherwise)

    def progress(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Print the phase when it is new, and its share when it grew by a quarter."""
        step = done * 100 // total // _PLAIN_STEP_PERCENT if total else 0
        if (phase, step) == self._shown:
            return
        self._shown = (phase, step)
        self.line(f"{phase}: {size(done)} of {size(total)}" if total else f"{phase}…")


class JsonConsole(PlainConsole):
    """The same as one JSON object a line, as services log."""

    def line(self, text: str) -> None:
        """Print one line."""
        try:
            print(json_line("info", "launcher", "launcher", clean_lines(text).strip()), file=self._file, flush=True)
        except OSError:
            pass  # as above


class PipeConsole(_Closing):
    """For a detached launcher: everything goes to its log, and as JSON lines to the waiting parent until `finish`.

    A parent that left or does not read never holds the launcher up.
    """

    def __init__(self, report_fd: int, log: IO[str]) -> None:
        """Owns `report_fd`, a pipe's writing end, until `finish`."""
        os.set_blocking(report_fd, False)
        self._fd = report_fd
        self._log: Console = PlainConsole(log)
        self._sent = ""

    def log_to(self, log: Console) -> None:
        """Let the log have another form."""
        self._log = log

    def _send(self, wait_s: float = 0.0, **entry: object) -> None:
        text = json.dumps(entry) + "\n"
        if self._fd < 0 or text == self._sent:
            return
        self._sent = text
        try:
            select.select([], [self._fd], [], wait_s)
            os.write(self._fd, text.encode())
        except BlockingIOError:
            pass  # the parent is stopped and the pipe is full; what comes next is newer
        except OSError:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def line(self, text: str) -> None:
        """One line for both."""
        self._log.line(text)
        self._send(line=text)

    def private_line(self, text: str, otherwise: str) -> None:
        """The log gets `otherwise`; the parent decides by what it writes to."""
        self._log.line(otherwise)
        self._send(private=text, otherwise=otherwise)

    def progress(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Progress for both."""
        self._log.progress(phase, done, total)
        self._send(phase=phase, done=done, total=total)

    def finish(self, error: str | None = None) -> None:
        """Tell the parent that all is ready, or the error line that it shall end with. Idempotent."""
        self._send(_FINISH_SECONDS_MAX, ready=error is None, error=error)
        self._close()


def make_console(file: IO[str] | None = None, log_format: str = "text") -> Console:
    """A bar when `file` (default stdout) is a terminal, lines of `log_format` otherwise."""
    file = file or sys.stdout
    if file.isatty():
        return TerminalConsole(file)
    return JsonConsole(file) if log_format == "json" else PlainConsole(file)
