"""What a text process may use."""

from __future__ import annotations

import ctypes
import math
import resource
import time
from pathlib import Path

_OOM_SCORE_MAX = 1_000  # where memory runs out, the kernel takes this process first

_libc = ctypes.CDLL(None)


def confine(memory_bytes: int) -> None:
    """Allow `memory_bytes` of memory beyond what the process has now, and no core dump."""
    address_space = _statm(0) + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_cpu(seconds: int) -> None:
    """Be killed after so many more seconds of CPU. Time on the clock would count what others take of the machine."""
    most = math.ceil(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def be_first_to_go() -> None:
    """Let the kernel choose this process where the machine's or the container's memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_MAX))
    except OSError:
        pass  # a sandbox without it: then the kernel chooses by size


def resident_bytes() -> int:
    """Memory that the process has in RAM, shared pages included."""
    return _statm(1)


def give_memory_back() -> None:
    """Return what the allocator holds and does not use."""
    _libc.malloc_trim(0)


def _statm(field: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()
