"""Keys as they are pressed, and signals as they come, for a command that fills the terminal.

The terminal's mode is put back whenever the command leaves it: at its end, before it is stopped by Ctrl-Z, and when it
is told to end. Signals are only noted, so that none arrives in the middle of a drawing.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
_READ_BYTES = 256


class Pressed(NamedTuple):
    """What came: characters from the keyboard, signals, descriptors that can be read, whether the keyboard is gone."""

    keys: str
    signals: frozenset[int]
    others: frozenset[int]
    is_gone: bool = False


class Keys:
    """Owns the terminal's mode and the handlers of signals between `__enter__` and `__exit__`. The main thread's."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._saved: list[Any] | None = None

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self.take_mode()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.give_mode_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def take_mode(self) -> None:
        """Let keys come without Enter and without an echo. Nothing happens where there is no keyboard."""
        if self._fd is not None:
            if self._saved is None:
                self._saved = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd, termios.TCSADRAIN)  # what has been pressed already is kept

    def give_mode_back(self) -> None:
        """The mode that was found. Idempotent."""
        if self._fd is not None and self._saved is not None:
            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            except termios.error:
                pass  # the terminal is gone
            self._saved = None

    def stop(self) -> None:
        """Be stopped, as Ctrl-Z asks; returns when the process is continued."""
        self.give_mode_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.take_mode()

    def wait(self, others: Sequence[int] = ()) -> Pressed:
        """What comes next, `others` being descriptors to be read."""
        keyboard = [self._fd] if self._fd is not None else []
        ready, _, _ = select.select([self._reader, *keyboard, *others], [], [])
        signals = frozenset(self._reader.recv(_READ_BYTES) if self._reader in ready else b"")
        readable = frozenset(fd for fd in others if fd in ready)
        if self._fd is None or self._fd not in ready:
            return Pressed("", signals, readable)
        try:
            typed = os.read(self._fd, _READ_BYTES)
        except OSError:  # the terminal has hung up
            typed = b""
        return Pressed(typed.decode(errors="replace"), signals, readable, is_gone=not typed)
