"""Processes that run out of descriptors: limits that leave an exact number of them, whatever was inherited.

RLIMIT_NOFILE bounds the numbers, not how many there are: where those in use have holes, a limit of as many as are in
use leaves some of the holes.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# What a descriptor's numbers may look like in a process that somebody else started: none but its own, some in its way,
# and the numbers that it would take next, one by one.
SHAPES: dict[str, tuple[int, ...]] = {
    "none": (),
    "14 to 18": (14, 15, 16, 17, 18),
    "every second": tuple(range(4, 44, 2)),
    "high": (40, 63, 90, 200),
}

_WITH_NUMBERS = """
import os, sys
null = os.open(os.devnull, os.O_RDONLY)
numbers = [int(number) for number in sys.argv[1].split(",") if number]
for number in numbers:
    os.dup2(null, number)
if null not in numbers:
    os.close(null)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def with_numbers(numbers: Sequence[int], command: Sequence[str]) -> list[str]:
    """The command, run with these descriptors open."""
    return [sys.executable, "-c", _WITH_NUMBERS, ",".join(map(str, numbers)), *command] if numbers else [*command]


def numbers_of(pid: int) -> set[int]:
    """The descriptors of a process; for our own without the one that this takes."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
        found.add(int(name))
    return found


def limit_leaving(numbers: set[int], free: int) -> int:
    """The highest limit under which so many numbers are free. (A lower one may be less than what poll(2) looks at.)"""
    limit = 0
    while sum(number not in numbers for number in range(limit + 1)) <= free:
        limit += 1
    return limit


@contextmanager
def left_with(pid: int, free: int) -> Iterator[None]:
    """Until the end of the block the process finds so many descriptors that it does not have now, and no more."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    leave(pid, free)
    try:
        yield
    finally:
        if Path(f"/proc/{pid}").exists():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def leave(pid: int, free: int) -> None:
    """Let the process find so many more descriptors from now on."""
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit_leaving(numbers_of(pid), free), hard))
