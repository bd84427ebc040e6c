"""`elasticmoe bench scaling`: grow and shrink under load, with standbys and without, beside the paper's baselines.

Every method runs alone, under the same loads from the same seeds, once up and once down, in interleaved rounds. The
closed loop keeps both sizes saturated and gives throughput and time to capacity; the open loop (Poisson arrivals at a
share of what the start configuration serves) gives pauses and SLO attainment. See benchmarks/scaling.md.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.arguments import number, whole
from elasticmoe.cli.bench.deployment import add_devices, add_tp
from elasticmoe.cli.bench.report import NO_PLOT, add_output, provenance, table, write_raw
from elasticmoe.cli.bench.scaling_figures import Bounds, Series
from elasticmoe.cli.bench.scaling_methods import KINDS
from elasticmoe.cli.bench.scaling_plot import plot
from elasticmoe.cli.bench.scaling_run import DIRECTIONS, Recipe, Run, capacity_of, run_once
from elasticmoe.cli.bench.scaling_table import Result, tables
from elasticmoe.cli.settings import parse_size
from elasticmoe.cli.terminal import say

LOADS = ("closed", "open")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench scaling`."""
    add = parser.add_argument
    add("--model", default="demo", help="name or path")
    add("--from", dest="small", type=whole(1), default=2, metavar="N", help="replicas at the start, and at the end")
    add("--to", dest="large", type=whole(1), default=3, metavar="N", help="replicas in between")
    add("--methods", default="all", help=f"comma-separated, of {', '.join(KINDS)}")
    add("--loads", default=",".join(LOADS), help="closed (saturated: throughput) and open (Poisson arrivals: SLO)")
    add("--closed", type=whole(1), default=32, metavar="C", help="clients of the closed loop")
    add("--rate", type=number(), default=0.0, metavar="R", help="requests/s of the open loop (default: --rate-share)")
    add("--rate-share", type=number(), default=0.7, help="of the start configuration's measured capacity")
    add("--prompt-tokens", type=whole(1), default=64, help="tokens of each prompt")
    add(
        "--output-tokens",
        type=whole(1),
        default=64,
        help="on average; from half to one and a half times this",
    )
    add("--rounds", type=whole(1), default=2, help="rounds of each, of which the best is told")
    add("--steady-s", type=number(), default=20.0, help="each steady window, before, between and after")
    add("--settle-s", type=number(), default=8.0, help="before each steady window")
    add("--window-s", type=number(), default=3.0, help="over which throughput is taken while it changes")
    add("--ttft-ms", type=number(), default=5000.0, help="SLO: first token, from the first attempt")
    add("--gap-ms", type=number(), default=1000.0, help="SLO: every gap between tokens")
    add("--timeout-s", type=number(), default=180.0, help="give up waiting for a start, a change or a stop")
    add("--kv-memory", type=parse_size, default=256 << 20, metavar="SIZE", help="of each device")
    add("--pin-cores", action="store_true", help="the rank of device i runs on core i only")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every deployment")
    add("--seed", type=whole(0), default=1, help="of the requests that are drawn")
    add_devices(parser)
    add_tp(parser)
    add_output(parser)
    add("--name", default="scaling", help="of the raw data and the plots")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write raw data and plots; the exit status (1: some method failed)."""
    _check(args)
    return asyncio.run(_run(args))


def _check(args: argparse.Namespace) -> None:
    unknown = [name for name in _methods(args) if name not in KINDS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(KINDS)}")
    unknown = [name for name in args.loads.split(",") if name not in LOADS]
    if unknown:
        raise ValueError(f"unknown load {unknown[0]!r}; known: {', '.join(LOADS)}")
    if not 1 <= args.small < args.large:
        raise ValueError(
            f"--from {args.small} has to be at least 1 and below --to {args.large}; both ways are measured"
        )
    if any("=" not in item for item in args.set):
        raise ValueError(f"--set takes NAME=VALUE, got {args.set}")
    if args.window_s > args.steady_s:
        raise ValueError(f"--window-s {args.window_s:g} exceeds --steady-s {args.steady_s:g}")


def _methods(args: argparse.Namespace) -> list[str]:
    return list(KINDS) if args.methods == "all" else args.methods.split(",")


def _recipe(args: argparse.Namespace) -> Recipe:
    settings: dict[str, Any] = dict(item.split("=", 1) for item in args.set)
    if args.pin_cores:
        settings["pin_cores"] = "true"
    return Recipe(
        model=args.model,
        sizes=(args.small, args.large),
        clients=args.closed,
        rate=0.0,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        steady_s=args.steady_s,
        settle_s=args.settle_s,
        window_s=args.window_s,
        bounds=Bounds(args.ttft_ms / 1e3, args.gap_ms / 1e3),
        timeout_s=args.timeout_s,
        kv_bytes=args.kv_memory,
        settings=settings,
        devices=args.devices,
        tp=args.tp,
    )


async def _run(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    loads = args.loads.split(",")
    data: dict[str, Any] = {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]])), "recipe": recipe}
    recipes = {"closed": recipe}
    if "open" in loads:
        rate = args.rate or args.rate_share * await capacity_of(recipe, args.seed)
        recipes["open"] = msgspec.structs.replace(recipe, rate=rate)
        data["requests_per_s"] = round(rate, 3)
        say(f"open loop: {rate:.2f} requests/s")
    results: list[Result] = []
    for turn in range(args.rounds):
        for load in loads:
            for method in _methods(args):
                say(f"round {turn + 1}, {load} loop, {method}: ", end="")
                result = await _try(recipes[load], method, load, turn, args.seed + turn)
                say(result.error or "done")
                results.append(result)
                data["runs"] = results  # what has been measured survives whatever comes next
                path = write_raw(args.output, args.name, data)
    for title, rows in tables(results):
        say(f"\n{title}\n\n{table(rows)}")
    for load in loads:
        title = f"{Path(args.model).name} {args.small}–{args.large}, {load} loop"
        lines = _lines(results, load)
        path_of = args.output / f"{args.name}-{load}.png"
        if lines and not plot(path_of, title, lines, with_slo=load == "open"):
            say(NO_PLOT)
    say(f"\nraw data: {path}")
    return 1 if any(result.error for result in results) else 0


async def _try(recipe: Recipe, method: str, load: str, turn: int, seed: int) -> Result:
    """Run one method; a failure is a result too, because the others still have to run."""
    try:
        outcome = await run_once(recipe, KINDS[method], seed)
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Result(method=method, load=load, turn=turn, error=" ".join(reason.split()) or type(error).__name__)
    return Result(method=method, load=load, turn=turn, run=outcome)


def _lines(results: list[Result], load: str) -> dict[str, dict[str, Series]]:
    """For each direction the series of each method's first round that came through; empty where none did."""
    first: dict[str, Run] = {}
    for result in results:
        if result.load == load and result.run is not None:
            first.setdefault(result.method, result.run)
    if not first:
        return {}
    return {
        direction: {method: run.series[index] for method, run in first.items()}
        for index, direction in enumerate(DIRECTIONS)
    }
