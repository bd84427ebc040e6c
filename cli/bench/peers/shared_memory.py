"""What engines leave in /dev/shm: segments of Python's shared memory, whose makers ended before they removed them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

FOLDER: Final = Path("/dev/shm")
_MAPPED: Final = re.compile(rf"(\d+)\s+{FOLDER}/(psm_\w+)$", re.MULTILINE)  # of a process's maps: inode and path
_Segment = tuple[str, int]  # name and inode: a name may come again


class Segments:
    """Those that one engine's processes make, from now on."""

    def __init__(self) -> None:
        self._before = {(path.name, inode) for path in FOLDER.glob("psm_*") if (inode := _inode(path)) is not None}
        self._made: set[_Segment] = set()

    def look(self, processes: Iterable[psutil.Process]) -> None:
        """Note what these have mapped that was not there before. Call it before they end."""
        for process in processes:
            self._made |= _mapped(process.pid) - self._before

    def remove(self) -> None:
        """Remove what was noted and nobody has mapped. Call it once the processes have ended."""
        left = {(name, inode) for name, inode in self._made if _inode(FOLDER / name) == inode}
        if left:
            for pid in psutil.pids():
                left -= _mapped(pid)
        for name, _ in left:
            with suppress(OSError):  # it has just gone
                (FOLDER / name).unlink()


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def _mapped(pid: int) -> set[_Segment]:
    """Of a process; none of one that has ended, or whose mappings this user may not see."""
    try:
        text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()
    return {(name, int(inode)) for inode, name in _MAPPED.findall(text)}
