"""What every benchmark's page states: hardware, commit, recipe; and the raw data beside it."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.paths import absolute, home_dir, package_root

NO_PLOT = "no plot: matplotlib is not installed; `pip install matplotlib` into this environment"


def add_output(parser: argparse.ArgumentParser) -> None:
    """The flag that says where results go: never to wherever the command happens to be called."""
    text = "folder of the raw data and plots (default: benchmarks/results of the checkout, else in the cache)"
    parser.add_argument("--output", type=_folder, metavar="DIR", default="", help=text)


def _folder(text: str) -> Path:
    if text:
        return absolute(text, "--output")
    checkout = package_root() / "benchmarks"
    return checkout / "results" if checkout.is_dir() else home_dir() / "benchmarks"


# Of the environment: what changes what is measured, and names no place of the machine.
SETTINGS_TOLD = frozenset(
    f"ELASTICMOE_{name}"
    for name in (
        "ACTIVATIONS",
        "BLOCK_SIZE",
        "COMPUTE",
        "DEVICES",
        "DTYPE",
        "EXCHANGE",
        "KV_BYTES",
        "LARGE_PAGES",
        "MAX_MODEL_LEN",
        "MAX_SEQUENCES",
        "MAX_TOKENS_PER_STEP",
        "PIN_CORES",
        "REPLICAS",
        "STANDBYS",
        "TP",
    )
)


def provenance(command: str) -> dict[str, Any]:
    """Where, when and from what a result comes."""
    return {
        "command": command,
        "settings": {name: value for name, value in sorted(os.environ.items()) if name in SETTINGS_TOLD},
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split()) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    return f"{facts.get('model name', platform.machine())} ({' '.join(sorted(flags))})"


def write_raw(directory: Path, name: str, data: dict[str, Any]) -> Path:
    """Write `data` as indented JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=1) + b"\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with the keys of the rows as heads."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [[_cell(row.get(head, "")) for head in heads] for row in rows]
    widths = [max(len(head), *(len(row[i]) for row in cells)) for i, head in enumerate(heads)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in [heads, ["-" * width for width in widths], *cells]
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
