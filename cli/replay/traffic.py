"""The traffic that a replay's flags ask for."""

from __future__ import annotations

import argparse
import math
import random

from elasticmoe.cli.arguments import WrongUsage, duration, number, refuse_beside, whole
from elasticmoe.cli.paths import absolute
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.cli.traces.profiles import PROFILES, STEP_BEGIN_S, STEP_S
from elasticmoe.cli.traces.readers import read_trace
from elasticmoe.cli.traces.scale import fit_lengths, speed_up, window

TOKENS_MAX = 32_768
SEEDS_MAX = 100
STEPS_MAX = 1_000


def add_arguments(parser: argparse.ArgumentParser, *, tokens_max: int = TOKENS_MAX) -> None:
    """Flags that say which traffic. `tokens_max`: of a sequence where nobody says."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("trace", nargs="?", metavar="TRACE", help="a file of the Azure, BurstGPT or Mooncake form")
    what.add_argument("--generate", choices=list(PROFILES), help="traffic of this shape, drawn from the seed")
    what.add_argument(
        "--journal", metavar="FILE", help="no traffic: decisions of a real deployment again, as --save kept"
    )
    what.add_argument("--run-dir", metavar="DIR", help="the same from the store of a deployment that runs")
    add("--seed", type=whole(0), metavar="N", help="of the first traffic that is drawn (1)")
    add("--seeds", type=whole(1, SEEDS_MAX), metavar="N", help="draw N traffics, and tell the mean (1)")
    add("--start", type=duration, metavar="TIME", help="begin so far into the trace, such as 20m")
    add("--duration", type=duration, metavar="TIME", help="so much of the trace, in its own time")
    add(
        "--share",
        type=number(1e-6, 1.0),
        default=1.0,
        metavar="F",
        help="keep this share of the requests, drawn at random: for a trace without bursts, which lose their shape (1)",
    )
    add("--time-scale", type=number(1e-6, 1e6), default=1.0, metavar="F", help="play it F times as fast (1)")
    add(
        "--tokens-max",
        type=whole(2),
        default=tokens_max,
        metavar="N",
        help=f"scale lengths to sequences of N tokens ({tokens_max})",
    )


def seeds_of(args: argparse.Namespace) -> list[int]:
    """Of each traffic; a recorded one has none, and is one. Raises WrongUsage."""
    if not args.generate:
        refuse_beside(args, "seed", "TRACE")
        refuse_beside(args, "seeds", "TRACE")
        return [0]
    first = 1 if args.seed is None else args.seed
    return [first + at for at in range(args.seeds or 1)]


def steps(args: argparse.Namespace, seconds: float) -> tuple[list[float], float]:
    """When the load of `--generate step` rises in the first `seconds` of what is played, and for how long it is up; all
    in seconds as they pass."""
    if args.generate != "step":
        return [], 0.0
    period, start = PROFILES["step"], args.start or 0.0
    first = math.floor(start / period)
    rises = [(at * period + STEP_BEGIN_S - start) / args.time_scale for at in range(first, first + STEPS_MAX)]
    return [at for at in rises if 0.0 <= at < seconds], STEP_S / args.time_scale


def traffic(args: argparse.Namespace, seed: int) -> tuple[list[Arrival], float]:
    """The arrivals, and how long they last in seconds. Raises ConfigError for a bad trace, WrongUsage for flags that
    leave nothing of it."""
    start, length = args.start or 0.0, args.duration or math.inf
    try:
        if args.generate:
            from elasticmoe.cli.traces.generate import generate  # loads numpy

            until = PROFILES[args.generate] if args.duration is None else start + args.duration
            arrivals = generate(args.generate, seed, until)
        else:
            arrivals = read_trace(absolute(args.trace, "TRACE")).arrivals
            until = arrivals[-1].at_s
        arrivals = window(arrivals, start, length)
        if args.share < 1.0:
            rng = random.Random(f"share {seed}")
            arrivals = [one for one in arrivals if rng.random() < args.share]
        seconds = min(length, until - start) / args.time_scale
        return fit_lengths(speed_up(arrivals, args.time_scale), args.tokens_max).arrivals, max(1.0, seconds)
    except ValueError as error:
        raise WrongUsage(str(error)) from None
