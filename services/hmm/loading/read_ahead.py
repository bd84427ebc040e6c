"""Asking the disk for a checkpoint's beginning while its memory is being made: a quarter of a second for a gigabyte, in
which the disk would do nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from elasticmoe.common.safetensors import TensorFile

_AHEAD_BYTES: Final = 512 << 20  # at most: what is read waits in the page cache
_ASKED_BYTES: Final = 128 << 10  # at once: of more the kernel takes what the disk reads ahead, often as little as this


@contextmanager
def read_ahead(files: Sequence[TensorFile]) -> Iterator[None]:
    """Let the kernel read the beginning of `files` into its page cache, in their order, until the block ends. Nothing
    depends on it: what it does not read is read later, and what cannot be read is told by whoever reads it."""
    stop = threading.Event()
    thread = threading.Thread(target=_ask, args=(files, stop), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _ask(files: Sequence[TensorFile], stop: threading.Event) -> None:
    left = _AHEAD_BYTES
    for file in files:
        for begin in range(0, min(left, os.fstat(file.fd).st_size), _ASKED_BYTES):
            if stop.is_set():
                return
            with suppress(OSError):
                os.posix_fadvise(file.fd, begin, _ASKED_BYTES, os.POSIX_FADV_WILLNEED)
            left -= _ASKED_BYTES
