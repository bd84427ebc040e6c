"""`elasticmoe bench overload`: an open loop from 0.5 to 3 times the peak and back: what is served, what is refused.

The peak is what a closed loop of `--clients` clients is served. Then requests arrive by a Poisson process, whatever
becomes of those before, at a rate that is another multiple of the peak in each step. A request that is refused (429,
503) is not sent again. *In time*: ended, the first token within its bound, and the mean time of the others within
theirs. *goodput*: the part of the tokens per second that belongs to requests that are in time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from elasticmoe.cli.arguments import number, whole
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.bench.scaling_figures import Window, arrivals_of, throughput
from elasticmoe.cli.bench.scaling_methods import Scene
from elasticmoe.cli.bench.scaling_run import check_steady
from elasticmoe.cli.load.client import Load, Target
from elasticmoe.cli.load.endpoint import Shape
from elasticmoe.cli.load.sample import REFUSED, Sample, percentile
from elasticmoe.cli.settings import parse_size
from elasticmoe.cli.terminal import say

FACTORS = "0.5,1,1.5,2,2.5,3,2,1,0.5"
FACTOR_MAX = 100.0
AIM_FACTOR, AIM_SHARE = 2.0, 0.9


class Bounds(msgspec.Struct, frozen=True):
    """Of a request that is in time, in seconds: its first token, and the mean from one token to the next (TPOT)."""

    ttft_s: float
    tpot_s: float


class Step(msgspec.Struct, frozen=True):
    """`factor` times the peak arrived: `rate` requests per second, for `window` and a moment before it."""

    factor: float
    rate: float
    window: Window


class Figures(msgspec.Struct, frozen=True):
    """Of one step's window. Requests are counted where they were asked for: those that were refused, were in time, were
    late, failed (taken, and ended without a finish reason, or not reached at all). Tokens are counted where they came.
    Times in milliseconds, -1 where there is none."""

    factor: float
    rate: float
    requests: int
    in_time: int
    late: int
    refused: int
    failed: int
    tokens_per_s: float
    goodput: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    refusal_p50_ms: float
    refusal_p99_ms: float


def parse_factors(text: str) -> list[float]:
    """The multiples of the peak, in order. Raises ValueError."""
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--factors: {text!r} is not a list of numbers") from None
    for factor in factors:
        if not 0 < factor <= FACTOR_MAX:
            raise ValueError(f"--factors: {factor:g} is not above 0 and at most {FACTOR_MAX:g}")
    return factors


def is_refused(request: Sample) -> bool:
    """Whether it was turned away before it was taken."""
    return request.status in REFUSED


def is_in_time(request: Sample, bounds: Bounds) -> bool:
    """Whether it ended and kept its bounds. The first token counts from when it was asked for."""
    if request.error != "" or not request.arrivals or request.arrivals[0] - request.asked > bounds.ttft_s:
        return False
    return request.arrivals[-1] - request.arrivals[0] <= bounds.tpot_s * max(1, request.tokens - 1)


def figures_of(requests: Sequence[Sample], step: Step, bounds: Bounds) -> Figures:
    """The figures of one step. A request that has not ended counts as late."""
    window = step.window
    asked = [request for request in requests if window.start <= request.asked < window.end]
    refused = [request for request in asked if is_refused(request)]
    failed = [request for request in asked if request.error and not is_refused(request)]
    in_time = sum(is_in_time(request, bounds) for request in asked)
    firsts = sorted((request.arrivals[0] - request.asked) * 1e3 for request in asked if request.arrivals)
    refusals = sorted((request.ended - request.asked) * 1e3 for request in refused)
    return Figures(
        factor=step.factor,
        rate=step.rate,
        requests=len(asked),
        in_time=in_time,
        late=len(asked) - in_time - len(refused) - len(failed),
        refused=len(refused),
        failed=len(failed),
        tokens_per_s=throughput(arrivals_of(requests), window),
        goodput=throughput(arrivals_of(request for request in requests if is_in_time(request, bounds)), window),
        first_token_p50_ms=_percentile(firsts, 50),
        first_token_p99_ms=_percentile(firsts, 99),
        refusal_p50_ms=_percentile(refusals, 50),
        refusal_p99_ms=_percentile(refusals, 99),
    )


def _percentile(ordered: Sequence[float], percent: float) -> float:
    return percentile(ordered, percent) if ordered else -1.0


def summary_of(steps: Sequence[Figures]) -> str:
    """What goodput is left at AIM_FACTOR times the peak, in one line; empty where no step has that."""
    best = max((one.goodput for one in steps), default=0.0)
    shares = [f"{one.goodput / best * 100:.0f} %" for one in steps if one.factor == AIM_FACTOR and best]
    if not shares:
        return ""
    return (
        f"goodput at {AIM_FACTOR:g} times the peak: {', '.join(shares)} of the highest ({best:.1f} tokens/s); "
        f"aim {AIM_SHARE * 100:.0f} %"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench overload`."""
    add = parser.add_argument
    add("--model", default="demo", help="name or path")
    add("--replicas", type=whole(1), default=2, help="replicas of the deployment")
    add("--clients", type=whole(1), default=16, help="of the closed loop that measures the peak")
    add("--requests-max", type=whole(0), default=0, help="setting of the router; 0: as many as --clients")
    add("--factors", default=FACTORS, help="multiples of the peak, comma-separated, in order")
    add("--step-s", type=number(), default=10.0, help="length of each")
    add("--settle-s", type=number(), default=2.0, help="at the beginning of each, not counted")
    add("--prompt-tokens", type=whole(1), default=32, help="tokens of each prompt")
    add("--output-tokens", type=whole(1), default=32, help="on average")
    add("--ttft-ms", type=number(), default=5_000, help="bound of the first token")
    add("--tpot-ms", type=number(), default=500, help="bound of the mean time from one token to the next")
    add("--timeout-s", type=number(), default=180.0, help="give up waiting for a start or an answer after that")
    add("--kv-memory", type=parse_size, default=256 << 20, metavar="SIZE", help="of each device")
    add("--seed", type=whole(0), default=1, help="of the requests that are drawn")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data; the exit status (1: some request failed). Raises ValueError."""
    factors = parse_factors(args.factors)
    if not 0 <= args.settle_s < args.step_s:
        raise ValueError(f"--settle-s is {args.settle_s:g}; it has to be less than --step-s, {args.step_s:g}")
    peak, steps = asyncio.run(_run(args, factors))
    say(f"peak: {peak:.1f} tokens/s, closed loop of {args.clients} clients\n")
    say(table([_row(one) for one in steps]))
    say(f"\n{summary_of(steps)}")
    facts = provenance(" ".join(["elasticmoe", *sys.argv[1:]]))
    data = {"provenance": facts, "peak": peak, "steps": [msgspec.to_builtins(one) for one in steps]}
    say(f"raw data: {write_raw(args.output, 'overload', data)}")
    return 1 if any(one.failed for one in steps) else 0


def _row(one: Figures) -> dict[str, Any]:
    return {
        "x of peak": f"{one.factor:g}",
        "requests/s": one.rate,
        "requests": one.requests,
        "tokens/s": one.tokens_per_s,
        "goodput": one.goodput,
        "in time": one.in_time,
        "late": one.late,
        "refused": one.refused,
        "failed": one.failed,
        "TTFT p50 ms": one.first_token_p50_ms,
        "TTFT p99 ms": one.first_token_p99_ms,
        "refusal p50 ms": one.refusal_p50_ms,
        "refusal p99 ms": one.refusal_p99_ms,
    }


async def _run(args: argparse.Namespace, factors: list[float]) -> tuple[float, list[Figures]]:
    settings = {"requests_max": args.requests_max or args.clients, "kv_bytes": args.kv_memory}
    scene = Scene(args.model, (args.replicas, args.replicas), settings, args.timeout_s, args.kv_memory)
    shape = Shape("", args.prompt_tokens, args.output_tokens, is_counted=True)
    gc.disable()  # a collection in our loop would be a pause of every stream
    try:
        deployment = await scene.deploy(args.replicas, args.replicas)
        shape = msgspec.structs.replace(shape, model=await deployment.served_name())
        peak = await _peak(args, shape, deployment.url)
        load = Load(shape, args.seed, is_patient=False)
        load.set_targets(Target("it", deployment.url))
        steps = []
        try:
            for factor in factors:
                rate = factor * peak / args.output_tokens
                begun = time.monotonic()
                await load.arrive(rate, args.step_s)
                steps.append(Step(factor, rate, Window(begun + args.settle_s, begun + args.step_s)))
        finally:
            await load.drain(args.timeout_s)
        bounds = Bounds(args.ttft_ms / 1e3, args.tpot_ms / 1e3)
        return peak, [figures_of(load.requests, step, bounds) for step in steps]
    finally:
        gc.enable()
        await scene.clear()


async def _peak(args: argparse.Namespace, shape: Shape, url: str) -> float:
    """Tokens per second of the closed loop. Raises ValueError when nothing is served."""
    load = Load(shape, args.seed)
    load.set_targets(Target("peak", url))
    load.start_closed(args.clients)
    try:
        await asyncio.sleep(args.settle_s + args.step_s / 2)  # the first requests have ended
        begun = time.monotonic()
        await asyncio.sleep(args.step_s)
        check_steady(load.requests)
        return throughput(arrivals_of(load.requests), Window(begun, time.monotonic()))
    finally:
        await load.stop()
