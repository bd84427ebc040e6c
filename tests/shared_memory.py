"""What lies in the machine's shared memory, as one test may judge it: others go on beside, of this run and others."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path("/dev/shm")


def shared_memory() -> set[str]:
    """Names in FOLDER, but for the memory of stand-in devices (tests/devices/standins.py) of other processes' tests."""
    return {entry.name for entry in FOLDER.iterdir() if not is_others_stand_in(entry.name)}


def is_others_stand_in(name: str) -> bool:
    """Whether a name in FOLDER is of stand-in devices that a test of another process has at this moment."""
    return name.startswith("standin-") and not name.startswith(f"standin-{os.getpid()}-")
