"""`elasticmoe bench slo`: the same trace on real deployments of one size, on one that follows its load, and on the same
policy with the paper's means (cold restart, horizontal). See benchmarks/slo.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.arguments import duration, number, whole
from elasticmoe.cli.bench.report import NO_PLOT, add_output, provenance, table, write_raw
from elasticmoe.cli.bench.slo_figures import Comparison, Objectives, SloFigures, compare, reactions
from elasticmoe.cli.bench.slo_methods import COLD_RESTART, HORIZONTAL, LOADED, METHODS, OURS, STATIC_MOST, Slo
from elasticmoe.cli.bench.slo_run import SloRecipe, SloRun, run_once
from elasticmoe.cli.console import make_console
from elasticmoe.cli.replay import traffic
from elasticmoe.cli.replay.plot import plot
from elasticmoe.cli.resolve import resolve_model
from elasticmoe.cli.settings import parse_size
from elasticmoe.cli.terminal import say
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.cli.traces.scale import figures_of as trace_figures
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.wording import counted
from elasticmoe.services.scaler.policy.config import policy_config

AIMS = {COLD_RESTART: 1 / 5, HORIZONTAL: 1 / 2}  # violations of ours over the baseline's, at the most
STATIC_MOST_MIN = 0.99  # below it the machine, or the largest size, is too small for the trace
TOKENS_MAX = 2048  # of a sequence, for the paced model's speed
_PACE = ("oracle_step_us", "oracle_token_us", "oracle_sequence_us", "oracle_kv_ns", "oracle_row_us")


class SloResult(msgspec.Struct, frozen=True):
    """One method in one round: a run, or why there is none."""

    method: str
    seed: int
    run: SloRun | None
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench slo`."""
    traffic.add_arguments(parser, tokens_max=TOKENS_MAX)
    add = parser.add_argument
    add("--model", default="oracle-paced", help="name or path (oracle-paced)")
    add("--methods", default="all", help=f"comma-separated, of {', '.join(METHODS)}")
    add("--replicas-min", type=whole(1, 64), default=2, metavar="N", help="the fewest replicas, and the first (2)")
    add("--replicas-max", type=whole(1, 64), default=4, metavar="N", help="the most replicas (4)")
    add("--ttft", type=duration, default=2.0, metavar="TIME", help="objective: time to a first token (2s)")
    add("--itl", type=duration, default=0.1, metavar="TIME", help="objective: mean time between tokens (100ms)")
    add(
        "--policy",
        type=policy_fields,
        default={},
        metavar="FIELD=VALUE,...",
        help="numbers of the policy, the same for all methods, such as hold_s=20,flap_s=20: a trace that is played "
        "faster takes a policy that waits for less (the policy's defaults)",
    )
    add(
        "--load-s",
        type=number(0.0, 600.0),
        default=0.0,
        metavar="S",
        help="run the baselines a second time, with starts that take so much longer: a stand-in for loading a large "
        "model (0)",
    )
    add("--drain-s", type=number(0.0, 3600.0), default=30.0, metavar="S", help="what has not ended by then failed (30)")
    add("--timeout-s", type=number(1.0), default=180.0, help="give up waiting for a start, a stop or an answer")
    add("--kv-memory", type=parse_size, default=64 << 20, metavar="SIZE", help="of each device")
    add("--pin-cores", action="store_true", help="the rank of device i runs on core i only")
    add_output(parser)
    add("--name", default="slo", help="of the raw data and the plot")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data and a plot; the exit status (1: some method failed). Raises
    ValueError."""
    import uvloop  # a third of the processor time per token of asyncio's own loop

    methods = methods_of(args)
    checkpoint = resolve_model(args.model, make_console()).path
    pace = pace_of(msgspec.json.decode((checkpoint / "config.json").read_bytes()))
    say(pace or "the model is not paced: steps take what they take")
    data: dict[str, Any] = {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]])), "pace": pace}
    recipe, results = _recipe(args), []
    data["recipe"] = msgspec.to_builtins(recipe)
    seeds = traffic.seeds_of(args)
    drawn = {seed: traffic.traffic(args, seed) for seed in seeds}
    rises, length_s = traffic.steps(args, drawn[seeds[0]][1])
    for seed, (arrivals, seconds) in drawn.items():
        data.setdefault("traces", []).append({"seed": seed, "seconds": seconds, **_told(arrivals)})
    for seed, (arrivals, seconds) in drawn.items():
        for method in methods:
            say(f"seed {seed}, {counted(len(arrivals), 'request')} in {seconds:g} s, {method}: ", end="")
            try:
                found = SloResult(method, seed, uvloop.run(run_once(recipe, method, arrivals, seconds, seed)))
            except ValueError as error:
                found = SloResult(method, seed, None, " ".join(str(error).split()))
            say(found.error or "done")
            results.append(found)
            data["runs"] = msgspec.to_builtins(results)  # what has been measured survives whatever comes next
            path = write_raw(args.output, args.name, data)
    data["comparisons"] = msgspec.to_builtins(comparisons(results))
    path = write_raw(args.output, args.name, data)
    say("\n".join(["", *report(results, pace), *told_reactions(results, rises, length_s)]))
    _draw(args, results, *drawn[seeds[0]])
    say(f"raw data: {path}")
    return 1 if any(result.error for result in results) else 0


def policy_fields(text: str) -> dict[str, float]:
    """The type of a flag: numbers of the policy, by field."""
    fields = dict[str, float]()
    for part in text.split(","):
        name, _, value = part.partition("=")
        fields[name] = number()(value)
    try:
        policy_config(fields)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    return fields


def methods_of(args: argparse.Namespace) -> list[str]:
    """The methods to run, in order. Raises ValueError for one that there is not, and for sizes without sense."""
    names = list(METHODS) if args.methods == "all" else args.methods.split(",")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    least, most = args.replicas_min, args.replicas_max
    if least >= most:
        raise ValueError(f"--replicas-min {least} has to be below --replicas-max {most}")
    if HORIZONTAL in names and (least < 2 or most % least):
        raise ValueError(
            f"{HORIZONTAL}: its copies have --replicas-min {least}; that has to be 2 at least, for less than "
            f"1 is never advised, and a divisor of --replicas-max {most}"
        )
    loaded = [name + LOADED for name in (COLD_RESTART, HORIZONTAL) if name in names and args.load_s]
    return [*names, *loaded]


def pace_of(config: Mapping[str, Any]) -> str:
    """What a model's own config.json makes of its steps' time, as a label; empty for one that has no pace."""
    pace = {name: config[name] for name in _PACE if config.get(name)}
    if not pace:
        return ""
    told = ", ".join(f"{name.removeprefix('oracle_')} {value}" for name, value in pace.items())
    return f"paced model: a step takes what its config.json says ({told}), a stand-in for an accelerator's time"


def _recipe(args: argparse.Namespace) -> SloRecipe:
    policy = {"ttft_s": args.ttft, "itl_s": args.itl}
    return SloRecipe(
        model=args.model,
        slo=Slo(sizes=(args.replicas_min, args.replicas_max), policy=policy, fields=args.policy, load_s=args.load_s),
        objectives=Objectives(args.ttft, args.itl),
        settings={"pin_cores": "true"} if args.pin_cores else {},
        timeout_s=args.timeout_s,
        kv_bytes=args.kv_memory,
        drain_s=args.drain_s,
    )


def _told(arrivals: Sequence[Arrival]) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(trace_figures(arrivals))
    return told


def runs_by_method(results: Sequence[SloResult]) -> dict[str, list[SloFigures]]:
    """The figures of the runs of each method that came to an end."""
    found: dict[str, list[SloFigures]] = {}
    for result in results:
        if result.run is not None:
            found.setdefault(result.method, []).append(result.run.figures)
    return found


def comparisons(results: Sequence[SloResult]) -> list[Comparison]:
    """Ours beside each baseline that ran."""
    runs = runs_by_method(results)
    return [
        compare(runs[OURS], runs[name], name, share)
        for kind, share in AIMS.items()
        for name in (kind, kind + LOADED)
        if OURS in runs and name in runs
    ]


def report(results: Sequence[SloResult], pace: str) -> list[str]:
    """Tables and sentences."""
    lines = [pace] if pace else []
    rows = [_row(result, result.run) for result in results if result.run is not None]
    if rows:
        lines += ["", table(rows), ""]
    for found in comparisons(results):
        share = "none has violations" if found.violations is None else f"{found.violations:.2f} times its violations"
        lines.append(
            f"ours beside {found.baseline}: {share} (aim {found.violations_max:.2f}), {found.device_seconds:.3f} times "
            f"its device-seconds (aim below 1): {'met' if found.is_met else 'not met'}"
        )
    low = [one for one in runs_by_method(results).get(STATIC_MOST, []) if one.attainment < STATIC_MOST_MIN]
    if low:
        lines.append(
            f"warning: the largest size itself attains {low[0].attainment:.2%}, below {STATIC_MOST_MIN:.0%}: the "
            f"machine, or that size, is too small for this trace"
        )
    return lines


def told_reactions(results: Sequence[SloResult], rises: Sequence[float], length_s: float) -> list[str]:
    """How long each method took from a step of load to its order to grow, in all rounds."""
    lines = []
    for method in dict.fromkeys(result.method for result in results):
        runs = [result.run for result in results if result.method == method and result.run is not None]
        found = [one for run in runs for one in reactions(run.changes, rises, length_s)]
        told = sorted(one for one in found if one is not None)
        if told:
            lines.append(
                f"{method}: from a step of load to the order to grow {told[len(told) // 2]:.1f} s in the median, "
                f"{told[-1]:.1f} s at the most, in {len(told)} of {len(found)} steps"
            )
    return lines


def _row(result: SloResult, run: SloRun) -> dict[str, Any]:
    found = run.figures
    return {
        "method": result.method,
        "seed": result.seed,
        "attained": f"{found.attainment:.2%}",
        "TTFT kept": f"{found.ttft_kept:.2%}",
        "ITL kept": f"{found.itl_kept:.2%}",
        "violations": found.violations,
        "failed": found.failed,
        "device-seconds": f"{found.device_seconds:.0f}",
        "devices": f"{found.mean_devices:.2f}",
        "operations": found.operations,
        "flaps": found.flaps,
        "TTFT p50 s": _seconds(found.ttft_p50_s),
        "p95": _seconds(found.ttft_p95_s),
        "p99": _seconds(found.ttft_p99_s),
        "retries": found.retries,
        "machine busy": f"{run.machine_share:.0%}",
    }


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _draw(args: argparse.Namespace, results: Sequence[SloResult], arrivals: Sequence[Arrival], seconds: float) -> None:
    first = {result.method: result.run.line for result in reversed(results) if result.run is not None}
    lines = {name: first[name] for name in dict.fromkeys(result.method for result in results) if name in first}
    if not lines:
        return
    title = f"{Path(args.model).name}, {args.generate or Path(args.trace).name}: devices held"
    try:
        plot(args.output / f"{args.name}.png", title, arrivals, seconds, lines)
    except ImportError:
        say(NO_PLOT)
