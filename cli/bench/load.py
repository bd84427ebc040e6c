"""`elasticmoe bench load`: how long a checkpoint takes to load beside plain reading of its files, and the peak memory.

A *load* is what the HMM does: files are verified, memory is made, tensors are read, converted and put in their places.
A *read* passes the same files through one small buffer. Each runs in a process of its own, in turns; *cold* ones begin
with files that are not in the page cache, *warm* ones with files that are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.arguments import whole
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.children import tied_to_us
from elasticmoe.cli.console import make_console
from elasticmoe.cli.resolve import resolve_model
from elasticmoe.cli.settings import importing_environment
from elasticmoe.cli.terminal import say

_TURN_SECONDS_MAX = 900.0
_READ_BYTES = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench load`."""
    parser.add_argument("--models", default="qwen3-moe-1b-fp8,qwen3-moe-1b", help="names or paths, comma-separated")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="what is served")
    parser.add_argument("--rounds", type=whole(1), default=5, help="loads of each kind")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data. Raises ValueError when a load fails."""
    rows, raw = [], []
    for name in args.models.split(","):
        with make_console() as console:
            model = resolve_model(name, console)
        for is_cold in (True, False):
            turns = [_turn(model.path, args.dtype, is_cold) for _ in range(args.rounds)]
            raw.append({"model": model.name, "cache": "cold" if is_cold else "warm", "turns": turns})
            rows.append(_row(raw[-1]))
    say(table(rows))
    command = " ".join(["elasticmoe", *sys.argv[1:]])
    say(f"raw data: {write_raw(args.output, 'load', {'provenance': provenance(command), 'rows': rows, 'runs': raw})}")
    return 0


def _turn(model: Path, dtype: str, is_cold: bool) -> dict[str, Any]:
    """A read and a load, each from the same state of the page cache."""
    _prepare(model, is_cold)
    read = _child("read", str(model), dtype)
    _prepare(model, is_cold)
    return {"read_s": read["seconds"], **_child("load", str(model), dtype)}


def _prepare(model: Path, is_cold: bool) -> None:
    for path in model.glob("*.safetensors"):
        if not is_cold:
            read_through(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: Path) -> None:
    """Read a file from its beginning to its end, and keep nothing."""
    buffer = bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass


def _child(*words: str) -> dict[str, Any]:
    argv = tied_to_us([sys.executable, "-P", "-m", "elasticmoe.cli.bench.load_child", *words])
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, env=importing_environment(), timeout=_TURN_SECONDS_MAX, check=False
    )
    if done.returncode:
        raise ValueError(f"{words[0]} of {words[1]} ended with status {done.returncode}")
    result: dict[str, Any] = msgspec.json.decode(done.stdout)
    return result


def _row(run: dict[str, Any]) -> dict[str, Any]:
    turns = run["turns"]
    nbytes = turns[0]["bytes_read"]
    read, load = (statistics.median(turn[key] for turn in turns) for key in ("read_s", "seconds"))
    return {
        "model": run["model"],
        "cache": run["cache"],
        "read MB": nbytes / 1e6,
        "memory MB": turns[0]["result_bytes"] / 1e6,
        "read ms": read * 1e3,
        "load ms": load * 1e3,
        "load / read": f"{statistics.median(turn['seconds'] / turn['read_s'] for turn in turns):.2f}",
        "load GB/s of memory": f"{turns[0]['result_bytes'] / load / 1e9:.2f}",
        "peak / memory": f"{max(turn['peak_bytes'] / turn['result_bytes'] for turn in turns):.3f}",
    }
