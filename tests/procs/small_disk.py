"""A real file system that a test can fill to the last byte, and empty again."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_LOOK_S = 0.002


@contextmanager
def mounted(megabytes: int) -> Iterator[Path | None]:
    """A tmpfs of that size, gone afterwards; None where none can be mounted here."""
    folder = Path(tempfile.mkdtemp(prefix="em-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if not is_mounted or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        folder.rmdir()
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


class Full:
    """The file system of `folder` without room, from here to the end of the block. `is_greedy`: what others give back
    meanwhile is taken too, and what is in the files `held` stays taken when they are removed."""

    def __init__(self, folder: Path, *, is_greedy: bool = False, held: Sequence[Path] = ()) -> None:
        self._path = folder / "filler"
        self._is_greedy = is_greedy
        self._held = [os.open(path, os.O_RDONLY) for path in held]  # a file that is open keeps its blocks
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._file = open(self._path, "wb", buffering=0)
        self.take()
        if self._is_greedy:
            self._thread = threading.Thread(target=self._keep)
            self._thread.start()
        return self

    def take(self) -> None:
        """Whatever is free now."""
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    self._file.write(bytes(size))
            except OSError:
                continue

    def _keep(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.take()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for descriptor in self._held:
            os.close(descriptor)
        self._file.close()
        self._path.unlink()
