"""`python -m elasticmoe.cli.maker NAME DIR`: make a named model for another process, which reads our JSON lines.

A process of its own, so that the launcher neither loads torch nor keeps what the making allocated. Lines:
`{"done": bytes, "total": bytes}`, and at the end `{"error": text or null}`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from elasticmoe.cli.children import tied_to_us
from elasticmoe.cli.settings import importing_environment
from elasticmoe.common.protocol.errors import CheckpointError


def make_elsewhere(name: str, directory: Path, progress: Callable[[int, int], None]) -> None:
    """Make the model in a process of its own, which ends with this one; the user's interrupt reaches it as well. Raises
    CheckpointError."""
    argv = tied_to_us([sys.executable, "-P", "-m", "elasticmoe.cli.maker", name, str(directory)])
    error: object = "its process ended without a word"
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=importing_environment()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            entry = json.loads(line)
            if "error" in entry:
                error = entry["error"]
            else:
                progress(int(entry["done"]), int(entry["total"]))
    if error is not None:
        raise CheckpointError(f"model {name} cannot be made: {error}", code="model_failed")


def main(name: str, directory: Path) -> None:
    """Make the model and report."""
    from elasticmoe.cli.models import make_model

    error = None
    try:
        make_model(name, directory, progress=lambda done, total: report(done=done, total=total))
    except OSError as reason:
        error = f"{reason.filename or directory}: {reason.strerror}"
    except ValueError as reason:
        error = " ".join(str(reason).split())[:300]
    report(error=error)


def report(**entry: object) -> None:
    """Write one line."""
    print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)  # the parent was interrupted too, and says so
