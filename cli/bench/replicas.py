"""`elasticmoe bench replicas`: what a second replica brings, each pinned to a core of its own.

Two deployments, of one and of two replicas, stand side by side and are measured in turn: the idle one sleeps, and
what drifts on a shared machine drifts for both. Clients and router share the cores with the ranks: with one replica
they have the other core, so the ratio is lower than that of the ranks alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from typing import Any

import msgspec

from elasticmoe.cli.arguments import whole
from elasticmoe.cli.bench.deployment import running
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.bench.steady import Figures, figures
from elasticmoe.cli.chat import first_model
from elasticmoe.cli.http import client as http_client
from elasticmoe.cli.load.client import run_clients
from elasticmoe.cli.load.endpoint import Shape
from elasticmoe.cli.terminal import say

SIZES = (1, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench replicas`."""
    parser.add_argument("--model", default="qwen3-moe-1b", help="name or path")
    parser.add_argument("--concurrency", type=whole(1), default=32, help="clients at once")
    parser.add_argument("--requests-per-client", type=whole(1), default=1, help="requests of a client in a round")
    parser.add_argument("--prompt-tokens", type=whole(1), default=128, help="tokens of each prompt")
    parser.add_argument("--output-tokens", type=whole(1), default=128, help="tokens of each answer")
    parser.add_argument("--rounds", type=whole(1), default=3, help="rounds of each, of which the best is told")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and the ratio, write raw data; the exit status (1: some request failed)."""
    rounds: dict[int, list[Figures]] = {size: [] for size in SIZES}
    with running(args.model, 1, pin_cores="true") as one, running(args.model, 2, pin_cores="true") as two:
        urls = {1: one.url, 2: two.url}
        with http_client(one.url, timeout=10) as client:
            name = first_model(client)
        shape = Shape(name, args.prompt_tokens, args.output_tokens)
        for size in SIZES:
            asyncio.run(run_clients(urls[size], shape, 2, 2, seed=0))
        num = args.concurrency * args.requests_per_client
        for turn in range(args.rounds):
            for size in SIZES:
                samples = asyncio.run(run_clients(urls[size], shape, args.concurrency, num, seed=1 + turn))
                rounds[size].append(figures(samples, args.concurrency))
    rows = [_row(size, found) for size, found in rounds.items()]
    ratios = [b.tokens_per_s / a.tokens_per_s for a, b in zip(*(rounds[size] for size in SIZES), strict=True)]
    say(table(rows))
    say(f"a second replica brings {statistics.median(ratios):.2f} x tokens/s (median of {len(ratios)} rounds)")
    data = {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]])), "rows": rows, "ratios": ratios}
    data["rounds"] = {str(size): msgspec.to_builtins(found) for size, found in rounds.items()}
    say(f"raw data: {write_raw(args.output, 'replicas', data)}")
    return 1 if any(row["failed"] for row in rows) else 0


def _row(size: int, found: list[Figures]) -> dict[str, Any]:
    return {
        "replicas": size,
        "concurrency": found[0].concurrency,
        "tokens/s best": max(item.tokens_per_s for item in found),
        "tokens/s median": statistics.median(item.tokens_per_s for item in found),
        "TPOT p50 ms": statistics.median(item.tpot_p50_ms for item in found),
        "failed": sum(item.failed for item in found),
    }
