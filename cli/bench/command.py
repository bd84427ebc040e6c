"""`elasticmoe bench NAME`: run one benchmark."""

from __future__ import annotations

import argparse

from elasticmoe.cli.bench import (
    accel,
    attach,
    idle,
    load,
    overload,
    plan,
    policy,
    recovery,
    replicas,
    scaling,
    serve,
    slo,
)
from elasticmoe.cli.endings import ends_as_by_ctrl_c
from elasticmoe.common.protocol.errors import ElasticMoEError

HELP = "measure this machine: prints a table, writes raw data and a plot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, module, text in (
        ("serve", serve, "steady state: tokens per second, TTFT, TPOT at several concurrencies"),
        ("scaling", scaling, "grow and shrink under load, without standbys too, beside the paper's baselines"),
        ("replicas", replicas, "what a second replica brings, each pinned to a core"),
        ("attach", attach, "kill -9 of ranks: how long a standby takes to map their memory"),
        ("load", load, "loading a checkpoint beside plain reading of its files, and the peak memory"),
        ("recovery", recovery, "kill -9 of ranks under load: gaps, failures, recomputed tokens, beside a restart"),
        ("overload", overload, "0.5 to 3 times the peak and back: what is served in time, what is refused"),
        ("slo", slo, "a trace on real deployments: objectives kept, and devices held for it, beside the paper's means"),
        ("idle", idle, "what waiting costs: context switches, processor time and memory of each process"),
        ("plan", plan, "planning for 384 devices, and its transitions simulated"),
        ("accel", accel, "accelerators: their memory, parity, the oracle, and attach, scaling and decode there"),
        ("policy", policy, "what a turn of the autoscaling policy costs with 384 devices"),
    ):
        command = benchmarks.add_parser(name, help=text)
        module.add_arguments(command)
        command.set_defaults(bench=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark. Raises ElasticMoEError when nothing could be measured."""
    try:
        with ends_as_by_ctrl_c():
            return int(args.bench(args))
    except ValueError as error:
        raise ElasticMoEError(str(error), code="nothing_measured") from None
