"""A process that a command has use a device (doctor_child.py), from the side of that command."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from elasticmoe.cli.children import tied_to_us
from elasticmoe.cli.doctor_child import PACKET_BYTES_MAX
from elasticmoe.common.protocol.errors import DeadlineExceeded, DeviceError, Unavailable

_START_S = 120.0  # the first answer comes after the imports, on a busy machine too
_END_S = 5.0  # until a process that fails has said so
_LAST_WORDS_BYTES = 4096
_LAST_WORDS_CHARS = 300
_HANDED = 3  # the number of the one descriptor that child.py hands on


class TestProcess:
    """One of them. Owns the process, which is killed at the end of the `with` block."""

    def __init__(self, device: str) -> None:
        """Raises Unavailable `no_process` where it cannot be started; nothing stays open then."""
        argv = [sys.executable, "-P", "-m", "elasticmoe.cli.doctor_child", device, str(_HANDED)]
        with ExitStack() as opened:
            try:
                self._said = opened.enter_context(tempfile.TemporaryFile())
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._socket = opened.enter_context(ours)
                with theirs:
                    self._process = subprocess.Popen(
                        tied_to_us(argv, [theirs.fileno()]),
                        stdin=subprocess.DEVNULL,
                        stdout=self._said,
                        stderr=self._said,
                        pass_fds=[theirs.fileno()],
                    )
            except OSError as error:  # no descriptors, no room for a file, no memory, too many processes
                text = f"no process can be started to use {device}: {error.strerror}"
                raise Unavailable(text, code="no_process") from None
            self._opened = opened.pop_all()

    def __enter__(self) -> TestProcess:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.kill()
        self._opened.close()

    def ask(self, order: str, *args: Any, fd: int | None = None, seconds: float = _START_S) -> Any:
        """The answer to an order. Raises DeviceError with the code that it gave, driver_failed where it has ended;
        DeadlineExceeded where it does not answer: it is killed then."""
        return self.ask_for_descriptor(order, *args, fd=fd, seconds=seconds)[0]

    def ask_for_descriptor(
        self, order: str, *args: Any, fd: int | None = None, seconds: float = _START_S
    ) -> tuple[Any, int | None]:
        """The answer, and the descriptor that came with it, which is the caller's."""
        self._socket.settimeout(seconds)
        try:
            socket.send_fds(self._socket, [json.dumps([order, *args]).encode()], [] if fd is None else [fd])
            packet, fds, _, _ = socket.recv_fds(self._socket, PACKET_BYTES_MAX, 1)
        except TimeoutError:
            self.kill()
            raise DeadlineExceeded(f"no answer to `{order}` in {seconds:g} s: the process was killed") from None
        except OSError:
            packet, fds = b"", []
        if not packet:
            self._end()
            text = f"the process has ended at `{order}`, with status {self._process.returncode}: {self._last_words()}"
            raise DeviceError(text, code="driver_failed")
        answer = json.loads(packet)
        if "code" in answer:
            raise DeviceError(answer["message"], code=answer["code"])
        return answer["value"], fds[0] if fds else None

    def kill(self) -> None:
        """With SIGKILL, and wait until it is gone. Idempotent."""
        self._process.kill()
        self._process.wait()

    def _end(self) -> None:
        """Let a process that has closed its socket say why."""
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _last_words(self) -> str:
        end = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, end - _LAST_WORDS_BYTES))
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")[:_LAST_WORDS_CHARS]
