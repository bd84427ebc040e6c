"""`elasticmoe bench recovery`: kill -9 of one process after the other under load, and what the streams see of it.

Each rank in its turn, and the services that serving can do without for a while. Beside them, what a rank's death costs
where nobody keeps its memory: the whole deployment is stopped and started again, and its clients, whose requests are
cut off, send them once more until they are served.

*gap*: the longest time between two tokens of one stream that falls into the time from the kill until all ranks step
again; of a killed rank's streams, and of the others', which wait because all ranks step together. Where no rank was
killed: of all streams, until AFTER_S after the service was there again. For the restart: from the last token before to
the first one after. Times are the router's own (its history), those of the restart the clients'.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.arguments import number, whole
from elasticmoe.cli.bench.deployment import Deployment, add_tp
from elasticmoe.cli.bench.recovery_gaps import gaps_around, gaps_within
from elasticmoe.cli.bench.report import add_output, provenance, table, write_raw
from elasticmoe.cli.bench.scaling_methods import Scene, counters
from elasticmoe.cli.load.client import Load, Target
from elasticmoe.cli.load.endpoint import Shape
from elasticmoe.cli.settings import parse_size
from elasticmoe.cli.terminal import say
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import scaler
from elasticmoe.common.protocol.errors import DeadlineExceeded, ElasticMoEError
from elasticmoe.common.protocol.pool import StopRank
from elasticmoe.common.protocol.scaler import ToScaler
from elasticmoe.common.transport import Client, new_identity

TURN_S = 0.02
SERVICE_TURN_S = 0.1
POOL_MS = 200
AFTER_S = 2.0  # watched after all is as before
RANK = "rank"
POOL = "pool"
SERVICES = ("hmm", "scaler", "store", "keeper", POOL)


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One kill. Milliseconds; below 0 where no stream was there. `p99_ms`: of the gaps of all streams in the seconds
    before it; `later_ms`: the longest of all until AFTER_S after all was as before, ordinary ones too; one that lasts
    then counts up to then.
    `back_ms`: until all was as before: the process is there again, the pool answers, and all ranks step.
    `discarded`: tokens that were computed for clients and thrown away; `recomputed`: as the ranks count them, with the
    other ranks' discarded step; `resubmitted`: streams that the router had to start anew."""

    fault: str
    gap_ms: float
    others_gap_ms: float
    p99_ms: float
    later_ms: float
    back_ms: float
    streams: int
    failed: int
    discarded: int
    recomputed: int = 0
    resubmitted: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench recovery`."""
    add = parser.add_argument
    add("--model", default="demo", help="name or path")
    add("--replicas", type=whole(1), default=2, help="replicas of the deployment")
    add("--clients", type=whole(1), default=16, help="of the closed loop")
    add("--prompt-tokens", type=whole(1), default=64, help="tokens of each prompt")
    add("--output-tokens", type=whole(1), default=64, help="on average")
    faults = ", ".join((RANK, *SERVICES))
    add("--faults", type=_faults, default=(RANK, *SERVICES), help=f"comma-separated, of {faults}")
    add("--rounds", type=whole(1), default=5, help="kills of each")
    add("--restarts", type=whole(0), default=2, help="restarts of the whole deployment, for comparison")
    add("--settle-s", type=number(), default=4.0, help="between two kills")
    add("--timeout-s", type=number(), default=180.0, help="give up waiting for a start or an answer after that")
    add("--kv-memory", type=parse_size, default=256 << 20, metavar="SIZE", help="of each device")
    add("--seed", type=whole(0), default=1, help="of the requests that are drawn")
    add_tp(parser)
    add_output(parser)


def _faults(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in (RANK, *SERVICES)]:
        raise argparse.ArgumentTypeError(f"nothing is called {unknown[0]!r}")
    return names


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data. Raises ValueError when nothing could be measured."""
    rounds = asyncio.run(_run(args))
    say(table([_row(fault, rounds) for fault in dict.fromkeys(one.fault for one in rounds)]))
    facts = provenance(" ".join(["elasticmoe", *sys.argv[1:]]))
    path = write_raw(args.output, "recovery", {"provenance": facts, "rounds": [msgspec.to_builtins(r) for r in rounds]})
    say(f"raw data: {path}")
    return 0


def _row(fault: str, rounds: list[Round]) -> dict[str, Any]:
    ours = [one for one in rounds if one.fault == fault]
    ratios = [max(one.gap_ms, one.others_gap_ms) / one.p99_ms for one in ours if one.p99_ms > 0]
    return {
        "fault": fault,
        "times": len(ours),
        "gap ms median": statistics.median(one.gap_ms for one in ours),
        "gap ms max": max(one.gap_ms for one in ours),
        "others' gap ms max": max(one.others_gap_ms for one in ours),
        "p99 gap before ms median": statistics.median(one.p99_ms for one in ours),
        "gap / p99 before, max": max(ratios, default=-1.0),
        f"any gap until {AFTER_S:g} s later ms max": max(one.later_ms for one in ours),
        "back ms median": statistics.median(one.back_ms for one in ours),
        "requests failed": sum(one.failed for one in ours),
        "tokens thrown away": sum(one.discarded for one in ours),
        "tokens recomputed": sum(one.recomputed for one in ours),
        "resubmitted": sum(one.resubmitted for one in ours),
    }


async def _run(args: argparse.Namespace) -> list[Round]:
    # Kills follow one another faster than the limit on crash loops is made for.
    limits = {"rank_restarts_max": 1_000, "rank_restarts_window_s": 0.5}
    settings = {"history": "true", "kv_bytes": args.kv_memory, "max_sequences": 64, **limits}
    scene = Scene(args.model, (args.replicas, args.replicas), settings, args.timeout_s, args.kv_memory, tp=args.tp)
    load = Load(Shape("", args.prompt_tokens, args.output_tokens), args.seed)
    rounds: list[Round] = []
    try:
        deployment = await scene.deploy(args.replicas, args.replicas)
        load.set_model(await deployment.served_name())
        load.set_targets(Target("it", deployment.url))
        load.start_closed(args.clients)
        await asyncio.sleep(2 * args.settle_s)
        for number in range(args.rounds):
            for fault in args.faults:
                await _wait_tokens(load, args.timeout_s)
                rounds.append(await _kill(deployment, load, fault, number, args))
                await asyncio.sleep(args.settle_s)
        for _ in range(args.restarts):
            one, deployment = await _restart(scene, deployment, load, args)
            rounds.append(one)
            await asyncio.sleep(args.settle_s)
    finally:
        try:
            await load.stop()
        finally:
            await scene.clear()
    return rounds


async def _wait_tokens(load: Load, timeout_s: float) -> None:
    """Until half of the requests under way have a token. Raises ValueError when they get none."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        running = [request for request in load.requests if request.error is None]
        if running and 2 * sum(bool(request.arrivals) for request in running) >= len(running):
            return
        await asyncio.sleep(TURN_S)
    raise ValueError(f"no token came within {timeout_s:g} s")


async def _kill(deployment: Deployment, load: Load, fault: str, number: int, args: argparse.Namespace) -> Round:
    ranks = (await deployment.get("/v1/layout"))["ranks"]
    victim = ranks[number % len(ranks)]
    name = f"r{victim['replica']}t0" if fault == RANK else ""  # streams are its leader's
    pid = victim["pid"] if fault == RANK else deployment.pid(fault)
    if pid is None:
        raise ValueError(f"no process {fault} runs")
    before = await deployment.metrics()
    failed = _num_failed(load)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    if fault == RANK:
        back = await _wait_rank(deployment, number % len(ranks), victim["incarnation"], args.timeout_s)
    else:
        back = await _wait_service(deployment, fault, pid, args.timeout_s)
    await asyncio.sleep(AFTER_S)
    until = time.monotonic()
    await asyncio.sleep(0.5)  # the router writes its history ten times a second
    after = await deployment.metrics()
    lines = deployment.history_path.read_bytes().splitlines()
    gaps = gaps_around(lines, name, killed, back if name else until, until)
    steady, later = (
        gaps_within(lines, killed - args.settle_s, killed),
        gaps_within(lines, killed, until, with_open=True),
    )
    return Round(
        fault=f"kill -9 of a {RANK}" if fault == RANK else f"kill -9 of the {fault}",
        gap_ms=(gaps.of_rank if name else gaps.of_others) * 1e3,
        others_gap_ms=gaps.of_others * 1e3 if name else -1.0,
        p99_ms=steady[int(0.99 * (len(steady) - 1))] * 1e3 if steady else -1.0,
        later_ms=later[-1] * 1e3 if later else -1.0,
        back_ms=(back - killed) * 1e3,
        streams=gaps.num_streams,
        failed=_num_failed(load) - failed,
        discarded=0,
        recomputed=counters(after, "recomputed") - counters(before, "recomputed"),
        resubmitted=counters(after, "requests_resubmitted") - counters(before, "requests_resubmitted"),
    )


async def _wait_rank(deployment: Deployment, index: int, old: str, timeout_s: float) -> float:
    """When all ranks stepped again. Raises ValueError when they do not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        layout = await deployment.get("/v1/layout")
        if layout["phase"] == "serving" and layout["ranks"][index]["incarnation"] not in (None, old):
            return time.monotonic()
        await asyncio.sleep(TURN_S)
    raise ValueError(f"no standby took the seat within {timeout_s:g} s")


async def _wait_service(deployment: Deployment, name: str, old: int, timeout_s: float) -> float:
    """When another process of the service was there and the scaler, which may have been killed, said that all ranks
    step. Asked rarely: it would take time from what it waits for. Raises ValueError."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        await asyncio.sleep(SERVICE_TURN_S)
        if deployment.pid(name) in (None, old):
            continue
        try:
            if name == POOL and not await asyncio.to_thread(_is_answering, deployment.run_dir):
                continue  # the scaler shows for a moment what the last one has said
            if (await deployment.get("/v1/layout"))["phase"] == "serving":
                return time.monotonic()
        except (OSError, ValueError):
            continue  # the scaler is not there yet
    raise ValueError(f"after the {name} was killed the deployment did not serve again within {timeout_s:g} s")


def _is_answering(run_dir: Path) -> bool:
    """Whether the pool does: it refuses a command of nobody."""
    client: Client[ToScaler] = Client(run_dir / "sockets" / f"{POOL}.sock", new_identity("bench"), scaler.CODEC)
    try:
        client.call(StopRank(RankId(0, 0), "nobody:0"), deadline_ms=POOL_MS)
    except DeadlineExceeded:
        return False
    except ElasticMoEError:
        pass  # that is its answer
    finally:
        client.close()
    return True


async def _restart(
    scene: Scene, deployment: Deployment, load: Load, args: argparse.Namespace
) -> tuple[Round, Deployment]:
    """The same deployment stopped and started at the same port; its clients try again."""
    failed, port = _num_failed(load), deployment.port
    running = [request for request in load.requests if request.error is None and request.arrivals]
    killed = time.monotonic()
    await scene.end(deployment, at_once=True)
    ended = time.monotonic()
    deployment = await scene.deploy(args.replicas, args.replicas, port=port)
    back = time.monotonic()
    while (first := min((at for at in _arrivals(load) if at > ended), default=None)) is None:
        if time.monotonic() - back > args.timeout_s:
            raise ValueError(f"no request was served within {args.timeout_s:g} s of the restart")
        await asyncio.sleep(TURN_S)
    last = max((at for at in _arrivals(load) if at <= ended), default=killed)
    cut = [request for request in running if request.error]
    gap_ms = (first - last) * 1e3
    pairs = [pair for request in running for pair in zip(request.arrivals, request.arrivals[1:], strict=False)]
    steady = sorted(after - before for before, after in pairs)
    one = Round(
        fault="restart of the deployment",
        gap_ms=gap_ms,
        others_gap_ms=gap_ms,
        p99_ms=steady[int(0.99 * (len(steady) - 1))] * 1e3 if steady else -1.0,
        later_ms=gap_ms,
        back_ms=(back - killed) * 1e3,
        streams=len(running),
        failed=_num_failed(load) - failed,
        discarded=sum(len(request.arrivals) for request in cut),
    )
    return one, deployment


def _arrivals(load: Load) -> Iterator[float]:
    """When tokens came, of all requests."""
    return (at for request in load.requests for at in request.arrivals)


def _num_failed(load: Load) -> int:
    """Requests that ended with an error, cut off ones among them."""
    return sum(bool(request.error) for request in load.requests)
