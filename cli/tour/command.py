"""`elasticmoe tour`: what this deployment can do, shown on this machine in about a minute, in plain sentences."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

import msgspec

from elasticmoe.cli.arguments import duration, whole
from elasticmoe.cli.bench.deployment import Deployment, settings_of
from elasticmoe.cli.console import Console, make_console
from elasticmoe.cli.resolve import DEFAULT, resolve_model
from elasticmoe.cli.terminal import say_json
from elasticmoe.cli.tour.acts import REPLICAS_MAX, Tour
from elasticmoe.cli.tour.figures import TourFigures
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.private import read_secret
from elasticmoe.common.protocol.errors import ElasticMoEError

HELP = "see it on this machine: it grows by itself, loses a rank and shrinks while streams go on"

_STOP_S_MAX = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `tour`."""
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT,
        metavar="MODEL",
        help=f"a model as `up` takes it ({DEFAULT}; oracle-paced: no download)",
    )
    add("--seed", type=whole(0), default=1, metavar="S", help="what the prompts are drawn from (1)")
    add("--timeout", type=duration, default=120.0, metavar="TIME", help="give up when a thing takes longer (2m)")
    add("--json", action="store_true", help="one JSON object at the end instead of sentences")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when all of it happened, and no stream was lost or wrong. Raises ElasticMoEError (`tour_failed`)
    with what did not happen, KeyboardInterrupt when it was interrupted; nothing is left then either."""
    with make_console(sys.stderr if args.json else None) as console:
        resolve_model(args.model, console)  # here, where its progress is seen
        console.close()
        try:
            figures = asyncio.run(_interruptible(args, console))
        except ValueError as error:
            raise ElasticMoEError(str(error), code="tour_failed") from None
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        if args.json:
            say_json(msgspec.to_builtins(figures))
        else:
            console.line(f"All of it took {figures.elapsed_s:.0f} s; the deployment is stopped, and nothing is left.")
    streams = figures.streams
    if streams.lost or streams.wrong:
        lost, of = sum(streams.lost.values()), streams.whole + sum(streams.lost.values())
        text = f"of {of} streams {lost} were lost and {streams.wrong} had a wrong text; none of either was to be"
        raise ElasticMoEError(text, code="tour_failed")
    return 0


async def _interruptible(args: argparse.Namespace, console: Console) -> TourFigures:
    """The tour, which SIGINT, SIGTERM and SIGHUP cancel once; what stops the deployment is not interrupted again."""
    loop, work = asyncio.get_running_loop(), asyncio.create_task(_tour(args, console))
    is_asked = False

    def interrupt() -> None:
        nonlocal is_asked
        if not is_asked:
            work.cancel()
        is_asked = True

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(each, interrupt)
    return await work


async def _tour(args: argparse.Namespace, console: Console) -> TourFigures:
    def tell(text: str) -> None:
        if not args.json:
            console.line(text)

    def introduce() -> None:
        record = deployment.record
        if record is not None and not args.json:
            page, token = f"{record.admin_url}/", deployment.run_dir / "secrets" / "admin.token"
            private = f"Watch it in a browser: {page}#token={read_secret(token)}"
            console.private_line(private, f"Watch it in a browser: {page} (token in {token})")

    tell(f"A deployment of {args.model} is started in a folder of its own.")
    deployment = Deployment(args.model, 1, str(DeviceCount("host", REPLICAS_MAX)), **settings_of(args.model))
    try:
        figures = await Tour(deployment, args.seed, args.timeout, tell).run(introduce)
        await deployment.stop(_STOP_S_MAX)
        return figures
    finally:
        try:
            await deployment.stop(_STOP_S_MAX, at_once=True)
        finally:
            deployment.remove()
