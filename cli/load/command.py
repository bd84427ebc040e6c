"""`elasticmoe load`: send requests to a deployment as a recorded or drawn trace says, and tell what came of them."""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import time

import httpx

from elasticmoe.cli.arguments import WrongUsage, duration, number, refuse_beside, whole
from elasticmoe.cli.chat import base_url, headers_of, listed_models
from elasticmoe.cli.http import client as http_client
from elasticmoe.cli.load.endpoint import Endpoint, endpoint_of
from elasticmoe.cli.load.player import Player
from elasticmoe.cli.load.prompts import Prompts
from elasticmoe.cli.load.report import Report, progress_line
from elasticmoe.cli.load.result import Objectives, Result, Totals
from elasticmoe.cli.load.results_file import ResultsFile
from elasticmoe.cli.paths import absolute
from elasticmoe.cli.terminal import say, say_json
from elasticmoe.cli.traces.arrival import PREFIX_BLOCK_TOKENS, Arrival
from elasticmoe.cli.traces.profiles import PROFILES
from elasticmoe.cli.traces.readers import read_trace
from elasticmoe.cli.traces.scale import Fitted, cut, figures_of, fit_lengths, speed_up, window
from elasticmoe.common.protocol.errors import ConfigError

HELP = "send requests as a recorded or drawn trace says, and tell what came of them"
_TIMEOUT_S = 10.0
_PROGRESS_S = 10.0
_FDS_BESIDE = 64  # of the process, besides its connections
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `load`."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("trace", nargs="?", metavar="TRACE", help="a file of the Azure, BurstGPT or Mooncake form")
    what.add_argument("--generate", choices=list(PROFILES), help="traffic of this shape, drawn from the seed")
    add("--seed", type=whole(0), default=1, help="of what is drawn: traffic and prompts (1)")
    add("--start", type=duration, metavar="TIME", help="begin so far into the trace, such as 20m")
    add("--duration", type=duration, metavar="TIME", help="so much of the trace, in its own time")
    add("--time-scale", type=number(1e-6, 1e6), default=1.0, metavar="F", help="play it F times as fast (1)")
    add("--input-max", type=whole(1), metavar="N", help="cut prompts at N tokens")
    add("--output-max", type=whole(1), metavar="N", help="cut outputs at N tokens")
    add("--tokens-max", type=whole(2), metavar="N", help="scale lengths to sequences of N tokens (the server's most)")
    add("--figures", action="store_true", help="only print the trace's figures; sends nothing")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="the server (default: the deployment that runs here)")
    where.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
    add("--model", metavar="NAME", help="the model (default: the server's first)")
    add("--api-key-file", metavar="FILE", help="a file that holds the server's API key")
    add("--ca-file", metavar="FILE", help="certificates to trust beside the usual ones, for an https URL")
    add("--ttft", type=duration, metavar="TIME", help="objective: first token after the request was due, such as 2s")
    add("--itl", type=duration, metavar="TIME", help="objective: 95 of 100 gaps of a stream, such as 100ms")
    add("--connections-max", type=whole(1, 60_000), default=1024, metavar="N", help="requests under way at once (1024)")
    add("--silence", type=duration, default=300.0, metavar="TIME", help="a request without a byte for so long failed")
    add("--results", metavar="FILE", help="write each request as a line of JSON")
    add("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 where a request failed or could not be sent, 130 when interrupted, with what there is by then.
    Raises ElasticMoEError, WrongUsage."""
    arrivals, report = _trace(args)
    if args.figures:
        fitted = fit_lengths(arrivals, args.tokens_max) if args.tokens_max else _unfitted(arrivals)
        report.set_trace(fitted, figures_of(fitted.arrivals))
        say_json(report.trace_json()) if args.json else say(report.trace_text())
        return 0
    make_room(args.connections_max)
    endpoint, model, tokens_max = _server(args)
    tokens_max = args.tokens_max or tokens_max
    fitted = fit_lengths(arrivals, tokens_max) if tokens_max else _unfitted(arrivals)
    report.set_trace(fitted, figures_of(fitted.arrivals))
    if not args.json:
        say(report.trace_text())
    with ResultsFile(absolute(args.results, "--results") if args.results else None) as results:
        is_whole = _play(args, endpoint, model, fitted, report, results)
    say_json(report.json()) if args.json else say(report.text())
    if not is_whole:
        return _INTERRUPTED
    return 1 if report.totals.outcomes["failed"] or report.totals.outcomes["not_sent"] else 0


def _trace(args: argparse.Namespace) -> tuple[list[Arrival], Report]:
    """The arrivals before their lengths are fitted, and a report that knows where they come from."""
    report = Report(Totals(Objectives(args.ttft, args.itl)))
    try:
        if args.generate:
            from elasticmoe.cli.traces.generate import generate  # loads numpy

            until = None if args.duration is None else (args.start or 0.0) + args.duration
            arrivals, report.source = generate(args.generate, args.seed, until), f"{args.generate}, seed {args.seed}"
        else:
            trace = read_trace(absolute(args.trace, "TRACE"))
            arrivals, report.source = trace.arrivals, f"{trace.form} trace {args.trace}"
            report.num_without_output = trace.num_without_output
        if args.start or args.duration:
            arrivals = window(arrivals, args.start or 0.0, args.duration or float("inf"))
        arrivals = cut(arrivals, args.input_max, args.output_max)
        return speed_up(arrivals, args.time_scale), report
    except ValueError as error:  # flags that leave nothing of it
        raise WrongUsage(str(error)) from None


def _unfitted(arrivals: list[Arrival]) -> Fitted:
    return Fitted(arrivals, 1.0, PREFIX_BLOCK_TOKENS, 0)


def _server(args: argparse.Namespace) -> tuple[Endpoint, str, int | None]:
    """Where to send, the model's name, and its longest sequence in tokens where the server tells it."""
    url, headers = base_url(args), headers_of(args)
    if not url.startswith("https:"):
        refuse_beside(args, "ca_file", f"{url}, which is not https")
    with http_client(url, ca_file=args.ca_file, timeout=httpx.Timeout(_TIMEOUT_S), headers=headers) as client:
        models = listed_models(client)
    model = next((each for each in models if args.model in (None, each["id"])), {})
    length = model.get("max_model_len")
    key = headers.get("Authorization", "").removeprefix("Bearer ")
    endpoint = endpoint_of(url, api_key=key, ca_file=args.ca_file)
    return endpoint, args.model or model["id"], length if isinstance(length, int) and length > 1 else None


def make_room(connections_max: int) -> None:
    """Let this process have a descriptor for each of a load's connections. Raises ConfigError."""
    needed = connections_max + _FDS_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        text = f"{connections_max} connections need {needed} open files; this user may have {hard} at most"
        raise ConfigError(text)
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _play(
    args: argparse.Namespace, endpoint: Endpoint, model: str, fitted: Fitted, report: Report, results: ResultsFile
) -> bool:
    """Play it; whether it was played to its end."""
    import uvloop  # a third of the processor time per token of asyncio's own loop

    def on_result(result: Result, gaps: list[float]) -> None:
        report.totals.add(result, gaps)
        results.write(result)

    async def play() -> bool:
        player = Player(
            endpoint,
            model,
            Prompts(args.seed, fitted.block_tokens),
            on_result,
            connections_max=args.connections_max,
            silence_s=args.silence,
        )
        is_interrupted = False

        def interrupt() -> None:
            nonlocal is_interrupted
            is_interrupted = True
            player.stop()

        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, interrupt)
        telling = None if args.json else asyncio.create_task(_tell(player, report.totals))
        begun, used = time.monotonic(), time.process_time()
        try:
            await player.play(fitted.arrivals)
        finally:
            if telling is not None:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
            report.elapsed_s = time.monotonic() - begun
            report.cpu_share = (time.process_time() - used) / max(report.elapsed_s, 1e-9)
        return not is_interrupted

    return uvloop.run(play())


async def _tell(player: Player, totals: Totals) -> None:
    begun = time.monotonic()
    while True:
        await asyncio.sleep(_PROGRESS_S)
        say(progress_line(time.monotonic() - begun, player.num_running, totals))
