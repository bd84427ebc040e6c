"""How much of the GPU's memory is used, as the driver's own tool says: no context is made for the question."""

from __future__ import annotations

import subprocess


def used_bytes() -> int:
    """Of the first GPU, by all processes."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20
