"""`elasticmoe bench NAME`: run one benchmark."""

from __future__ import annotations

import argparse

from cli.bench import serve
from common.protocol.errors import ElasticMoEError

HELP = "measure this machine: prints a table, writes raw data and a plot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    command = benchmarks.add_parser(
        "serve", help="steady state: tokens per second, TTFT, TPOT at several concurrencies"
    )
    serve.add_arguments(command)
    command.set_defaults(bench=serve.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark. Raises ElasticMoEError when nothing could be measured."""
    try:
        return int(args.bench(args))
    except ValueError as error:
        raise ElasticMoEError(str(error), code="nothing_measured") from None
