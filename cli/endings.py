"""How a command that has started others is ended: by whichever signal, it ends them first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    for each in _ENDS:  # a terminal that closes tells twice; what cleans up is not interrupted by that
        signal.signal(each, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
