"""How much of the GPU's memory is used, as the driver's own tool says: no context is made for the question."""

from __future__ import annotations

import subprocess

import pytest


def used_bytes() -> int:
    """Of the machine's first GPU, by all processes. Raises UsageError."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise pytest.UsageError(f"nvidia-smi does not say how much of the GPU is used: {error}") from None
