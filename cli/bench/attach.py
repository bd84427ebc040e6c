"""`elasticmoe bench attach`: kill -9 a rank again and again; how long a standby takes to map its memory and to serve.

*attach* is the mapping alone: from asking the HMM to having every tensor. *serving again* runs from the kill until the
scaler reports that all ranks step together; the exponential pause between repeated replacements is part of it, so only
the first kill of each deployment counts there.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from elasticmoe.cli.admin import connect
from elasticmoe.cli.arguments import number, whole
from elasticmoe.cli.bench.deployment import add_devices, first_of, running
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.terminal import say

DEADLINE_S = 60.0
TURN_S = 0.005


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench attach`."""
    parser.add_argument("--models", default="demo,qwen3-moe-1b", help="names or paths, comma-separated")
    parser.add_argument("--replicas", type=whole(1), default=2, help="replicas of the deployment")
    parser.add_argument(
        "--deployments", type=whole(1), default=3, help="deployments to start per model, one first kill each"
    )
    parser.add_argument("--kills", type=whole(1), default=3, help="kills per deployment")
    parser.add_argument(
        "--rest-s",
        type=number(0.0, 600.0),
        default=0.0,
        metavar="S",
        help="before the first kill: in the first seconds the HMM may gather small pages, which takes a core (0)",
    )
    add_devices(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data. Raises ValueError when a rank did not come back."""
    rows: list[dict[str, Any]] = []
    for model in args.models.split(","):
        attach_ms: list[float] = []
        serving_ms: list[float] = []
        for _ in range(args.deployments):
            with running(model, args.replicas, devices=first_of(args.devices, args.replicas)) as deployment:
                time.sleep(args.rest_s)
                for turn in range(args.kills):
                    attached, served = _kill_and_wait(deployment.run_dir)
                    attach_ms.append(attached)
                    if turn == 0:
                        serving_ms.append(served)
        row = {"model": Path(model).name, "replicas": args.replicas, "kills": len(attach_ms)}
        row |= {"attach ms median": statistics.median(attach_ms), "attach ms max": max(attach_ms)}
        rows.append(row | {"serving again ms median": statistics.median(serving_ms)})
    say(table(rows))
    path = write_raw(
        args.output, "attach", {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]])), "rows": rows}
    )
    say(f"raw data: {path}")
    return 0


def _kill_and_wait(run_dir: Path) -> tuple[float, float]:
    """Kill the first rank; milliseconds its successor took to attach, and until all step again."""
    with connect(run_dir) as admin:
        victim = admin.call("GET", "/v1/layout")["ranks"][0]
        killed = time.perf_counter()
        os.kill(victim["pid"], signal.SIGKILL)
        while time.perf_counter() - killed < DEADLINE_S:
            layout = admin.call("GET", "/v1/layout")
            rank = layout["ranks"][0]
            if layout["phase"] == "serving" and rank["incarnation"] not in (None, victim["incarnation"]):
                return float(rank["attach_ms"]), (time.perf_counter() - killed) * 1e3
            time.sleep(TURN_S)
    raise ValueError(f"no standby took the seat within {DEADLINE_S:g} s")
