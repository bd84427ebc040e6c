"""A command in a terminal of its own, of a given size, and what it draws there."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_COMMANDS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_READ_S = 20.0
# What a shell does for a job in its foreground. Without it the kernel would not stop the job at Ctrl-Z: a session's
# first process group has no parent in it.
_SHELL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])
code = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
sys.exit(code if code >= 0 else 128 - code)
"""


class Terminal:
    """Owns the terminal and the process in it, which leads a session as a shell's foreground job does."""

    def __init__(self, argv: Sequence[str], columns: int, rows: int) -> None:
        self._ours, self._theirs = pty.openpty()
        self.resize(columns, rows)
        self.mode = termios.tcgetattr(self._theirs)
        self.output = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # ^C drops what the terminal has not sent yet
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SHELL, *argv],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env=environment | {"TERM": "xterm-256color"},
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._ours)  # a terminal that hangs up ends its session
        os.close(self._theirs)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def job(self) -> int:
        """The command's process, which leads the group in the foreground."""
        shell = self.process.pid
        return int(Path(f"/proc/{shell}/task/{shell}/children").read_text())

    def resize(self, columns: int, rows: int) -> None:
        """Another size."""
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        """Press keys, without Enter unless it is one of them."""
        os.write(self._ours, keys.encode())

    def read_until(self, condition: Callable[[str], Any], what: str) -> None:
        """Read until `condition` of all that was written holds. Fails the test when it does not in time."""
        deadline = time.monotonic() + _READ_S
        while not condition(self.output):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {_READ_S:g} s\n{self.output[-2000:]!r}")
            if select.select([self._ours], [], [], 0.1)[0]:
                self.output += self._decoder.decode(os.read(self._ours, 65536))

    def end(self) -> int:
        """The exit status, when it has ended by itself."""
        self.read_until(lambda _: self.process.poll() is not None, "the command ended")
        while select.select([self._ours], [], [], 0)[0]:
            self.output += self._decoder.decode(os.read(self._ours, 65536))
        return int(self.process.returncode)

    @property
    def is_as_it_was(self) -> bool:
        """Whether the terminal's mode is the one that the command found, the cursor is there and the first screen."""
        last = [self.output.rfind(code) for code in ("\x1b[?25h", "\x1b[?25l", "\x1b[?1049l", "\x1b[?1049h")]
        return termios.tcgetattr(self._theirs) == self.mode and last[0] >= last[1] and last[2] >= last[3]

    @property
    def screen(self) -> list[str]:
        """The lines of the last frame that was drawn whole: another one has begun since."""
        frame = self.output.split("\x1b[H")[-2]
        return [line.rstrip() for line in _COMMANDS.sub("", frame).replace("\r", "").split("\n")]
