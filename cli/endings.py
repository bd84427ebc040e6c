"""How a command that has started others is ended: by whichever signal, it ends them first."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def ends_as_by_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP do what Ctrl-C does, so that whatever cleans up after that does so after them. One
    that is ignored from the start, as `nohup` has it, stays so. For the main thread."""
    before = {number: signal.getsignal(number) for number in _ENDS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(argv: Sequence[str], *, timeout_s: float | None = None, **options: Any) -> tuple[int, str]:
    """Run another command of ours, in a session of its own; its status, and what it wrote to stderr where `options` (of
    subprocess.Popen) make that a pipe of text. Where this command is ended meanwhile, or the time is over
    (subprocess.TimeoutExpired), it is interrupted and waited for, so that it ends what it has started itself."""
    with subprocess.Popen(argv, start_new_session=True, **options) as command:
        try:
            said = command.communicate(timeout=timeout_s)[1]
        except BaseException:
            command.send_signal(signal.SIGINT)
            command.communicate()
            raise
    return command.returncode, said or ""


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    for each in _ENDS:  # a terminal that closes tells twice; what cleans up is not interrupted by that
        signal.signal(each, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
