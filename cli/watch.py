"""`elasticmoe status --watch`: the status again and again, as large as the terminal is.

What is seen is asked for in a thread of its own: a service that does not answer holds up no key.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from rich.live import Live

from elasticmoe.cli.keys import Keys, Pressed
from elasticmoe.cli.status_view import Fitted
from elasticmoe.cli.terminal import Cleaned, table_console
from elasticmoe.common.protocol.errors import InvalidRequest

_LEAVING_KEYS = frozenset("qQ\x03\x04")  # the last two: Ctrl-C and Ctrl-D, where a terminal sends them as keys
_ENDS = frozenset((signal.SIGTERM, signal.SIGHUP))

Status = dict[str, Any]


class _Asking:
    """Asks again and again, `pause_s(status)` after the last answer. `reader`: a descriptor that can be read when there
    is a new `status`."""

    def __init__(self, ask: Callable[[], Status], pause_s: Callable[[Status], float]) -> None:
        self.status = ask()
        self.error: Exception | None = None
        self.reader, self._writer = os.pipe()
        self._ask, self._pause_s = ask, pause_s
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._ended.wait(self._pause_s(self.status)):
            try:
                self.status = self._ask()
            except Exception as error:  # whoever watches is told
                self.error = error
                self._ended.set()
            os.write(self._writer, b".")

    def take(self) -> None:
        """Note that there is a new status. Raises what asking raised."""
        os.read(self.reader, 64)
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """Ask no more. Its thread, which may wait for an answer, ends with the process."""
        self._ended.set()


def watch(ask: Callable[[], Status], pause_s: Callable[[Status], float]) -> int:
    """Show what `ask` tells until q or a signal. Returns the exit status: 0, or 128 and the signal that asked for the
    end. Raises what `ask` raises, InvalidRequest where the output is no terminal."""
    console = table_console()
    if not console.is_terminal:
        text = "--watch fills a terminal, and the output is none: leave it out, or take --json"
        raise InvalidRequest(text, code="no_terminal")
    asking = _Asking(ask, pause_s)
    try:
        with Keys() as keys, Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                live.update(Cleaned(Fitted(asking.status)), refresh=True)
                pressed = keys.wait([asking.reader])
                if (code := _ending(pressed)) is not None:
                    return code
                if signal.SIGTSTP in pressed.signals:
                    live.stop()
                    keys.stop()
                    live.start()
                elif signal.SIGCONT in pressed.signals:
                    keys.take_mode()  # whoever continued us may have changed it
                if asking.reader in pressed.others:
                    asking.take()
    finally:
        asking.end()


def _ending(pressed: Pressed) -> int | None:
    ends = pressed.signals & _ENDS
    if ends:
        return 128 + min(ends)
    leaves = signal.SIGINT in pressed.signals or _LEAVING_KEYS & set(pressed.keys) or pressed.is_gone
    return 0 if leaves else None
