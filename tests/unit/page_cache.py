"""How much of a file the kernel has in its page cache."""

from __future__ import annotations

import ctypes
import mmap
import os

LIBC = ctypes.CDLL(None, use_errno=True)


def drop(fd: int) -> None:
    """Let the kernel forget what it can of the file."""
    os.fsync(fd)  # pages that are not written yet would stay
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(fd: int) -> int:
    """Of the whole file."""
    nbytes = os.fstat(fd).st_size
    pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    with mmap.mmap(fd, nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        status = LIBC.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), pages)
        del first
    if status:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
