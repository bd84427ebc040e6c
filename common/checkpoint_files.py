"""How every small file of a checkpoint is read: regular files only, within a bound, with one clear error.

A checkpoint comes from strangers. A FIFO in the place of a file would hang the reader, a link to an endless device
would eat the memory, and a Git LFS pointer is what a clone without LFS leaves in place of a file.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from elasticmoe.common.protocol.errors import CheckpointError
from elasticmoe.common.wording import broken_json

LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"


def read_file(path: Path, bytes_max: int) -> bytes | None:
    """The whole file at `path`; None where there is none. Never reads more than `bytes_max` and one more byte.

    Symbolic links are followed (a hub's cache consists of them). Raises CheckpointError for anything but a regular
    file, a file beyond the bound, a Git LFS pointer, or what the system refuses.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckpointError(f"{path.name} is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            raw = file.read(bytes_max + 1)
        size = max(len(raw), os.fstat(fd).st_size)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)
    if size > bytes_max:
        raise CheckpointError(f"{path.name} has {size} bytes; the limit is {bytes_max}")
    check_no_pointer(path.name, raw)
    return raw


def check_no_pointer(name: str, beginning: bytes) -> None:
    """Raise CheckpointError where a file's `beginning` is that of a Git LFS pointer instead of its content."""
    if beginning.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{name} is a Git LFS pointer, not the file itself: fetch the contents with `git lfs pull`",
            code="lfs_pointer",
        )


def read_json(path: Path, bytes_max: int) -> dict[str, Any] | None:
    """The JSON object in the file at `path`; None where there is none. Raises CheckpointError, see `read_file`."""
    raw = read_file(path, bytes_max)
    if raw is None:
        return None
    try:
        fields = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON {broken_json(error)}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return fields
