"""Whose end ends a process, and who takes in a process whose parent has ended: prctl(2) of Linux.

The tie is to the thread that started the process, or that took it in: the main one, in a process that lets its main
thread live for as long as itself.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, however it does, also while this one is stopped. Does not
    return where the parent is not `parent`: it has ended already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


def take_in_orphans() -> None:
    """Become the parent of every descendant whose own parent ends from now on. It is this process's to reap them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")
