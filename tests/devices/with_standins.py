"""Run a command with stand-ins of accelerators:

    python -m tests.devices.with_standins npu elasticmoe up --devices npu:0-3

Every Python process that the command starts has four devices of the kind, in a memory of their own that is there for as
long as the command runs. At its end this says how much of it somebody still held.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.devices import standins


def main() -> int:
    """The command's exit status."""
    kind, *command = sys.argv[1:]
    if kind not in standins.KINDS or not command:
        print(f"usage: python -m tests.devices.with_standins {'|'.join(standins.KINDS)} COMMAND...", file=sys.stderr)
        return 2
    with pytest.MonkeyPatch.context() as monkeypatch, standins.memory(monkeypatch) as folder:
        standins.install(kind, monkeypatch, operators="torch_npu" in " ".join(command))
        process = subprocess.Popen(command)
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:  # the terminal has told the command, too
                continue
        print(f"bytes of each {kind} that are still held: {standins.used(kind, folder)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
