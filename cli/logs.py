"""Log files with a bound. The processes hold their files open, so a full one is copied aside and emptied in place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

OLD = ".1"  # behind a file's name: what it held when it was full, one file of it
LOOK_S = 1.0  # between two looks; what a process writes in that time is what a file may exceed its bound by


class Logs:
    """The log files of a run directory, each of `bytes_max` at most, and one full one of each beside it."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max

    def look(self) -> None:
        """Rotate what is full. Never raises: a log may not stop a deployment. What is written between the end of the
        copy and the emptying, some microseconds, is lost."""
        for path in self._folder.glob("*.log"):
            try:
                if path.stat().st_size >= self._bytes_max:
                    _rotate(path)
            except OSError:
                pass  # gone meanwhile, or on a disk that fails; looked at again


def _rotate(path: Path) -> None:
    """Copy `path` to its old file and empty it. Where the copy finds no room, what is in the file is lost: it has to
    end somewhere, and on a full disk all others go before it does. Raises OSError when it cannot be emptied."""
    old = path.with_name(path.name + OLD)
    old.unlink(missing_ok=True)  # first, so that its room is free
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        try:
            with open(old, "xb", opener=_private) as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
        except OSError:
            old.unlink(missing_ok=True)
        os.ftruncate(fd, 0)  # whoever writes to it does so at its end


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
