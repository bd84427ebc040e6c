"""`bench serve --peers`: what is printed and kept of a comparison."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from elasticmoe.cli.bench.peers.compare import Failure, Plan, Visit, compare, load_rows, server_rows
from elasticmoe.cli.bench.recipes import sized
from elasticmoe.cli.bench.report import provenance, table, write_raw
from elasticmoe.cli.console import make_console
from elasticmoe.cli.paths import home_dir
from elasticmoe.cli.resolve import resolve_model
from elasticmoe.cli.terminal import say


def run(args: argparse.Namespace) -> int:
    """Compare on each model and print the tables; the exit status (1: some request or engine failed). Raw data is
    written after each visit, so that nothing is lost where a later one takes too long. Raises ValueError."""
    with _ended_by_interrupt():
        return _compare(args)


@contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """SIGTERM and a hang-up end it as Ctrl-C does: with all servers."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _compare(args: argparse.Namespace) -> int:
    plan = Plan(args.concurrency, args.prompt_tokens, args.output_tokens, args.requests_per_client, args.rounds)
    results: list[dict[str, Any]] = []
    data = {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]])), "results": results}
    sizes = [sized(replicas, tp) for tp in sorted({1, args.tp}) for replicas in args.replicas]
    path, num_failed = args.output, 0
    for name in args.models.split(","):
        with make_console() as console:
            model = resolve_model(name, console)
        visits: list[Visit] = []
        failures: list[Failure] = []
        results.append({"model": model.name, "visits": visits, "failures": failures})
        for found in compare(model.path, args.peers, args.recipes or sizes, plan, home_dir() / "peers"):
            if isinstance(found, Failure):
                failures.append(found)
            else:
                visits.append(found)
            path = write_raw(args.output, "peers", msgspec.to_builtins(data))
        num_failed += len(failures)
        if visits:
            rows = load_rows(visits)
            num_failed += sum(row["failed"] for row in rows)
            say(f"{model.name}:\n{table(rows)}\n\n{table(server_rows(visits))}")
    say(f"raw data: {path}")
    return 1 if num_failed else 0
