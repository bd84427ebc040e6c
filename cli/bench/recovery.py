"""`elasticmoe bench recovery`: kill -9 a rank under load, and what its streams and the others' see of it.

Beside it, what the same fault costs where nobody keeps a rank's memory: the whole deployment is stopped and started
again, and its clients, whose requests are cut off, send them once more until they are served.

*gap*: the longest time between two tokens of one stream around the kill; of the killed rank's streams, and of the
others', which wait because all ranks step together. For the restart: from the last token before to the first one after.
Times of the first are the router's own (its history), those of the second the clients'.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from cli.bench.deployment import Deployment
from cli.bench.load import Shape
from cli.bench.report import provenance, table, write_raw
from cli.bench.scaling_load import Load, Target
from cli.bench.scaling_methods import Scene, counters
from cli.bench.scaling_run import SAFE_VOCAB
from cli.settings import parse_size

TURN_S = 0.02
AFTER_S = 2.0  # watched after all ranks step again


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One kill. Milliseconds; below 0 where no stream was there. `steady_ms`: the longest gap of any stream in the
    seconds before it, which is what steps take on this machine. `back_ms`: until all ranks stepped, or it served again.
    `discarded`: tokens that were computed for clients and thrown away; `recomputed`: as the ranks count them, with the
    other ranks' discarded step; `resubmitted`: streams that the router had to start anew."""

    method: str
    gap_ms: float
    others_gap_ms: float
    steady_ms: float
    back_ms: float
    streams: int
    failed: int
    discarded: int
    recomputed: int = 0
    resubmitted: int = 0


class _Event(msgspec.Struct):
    t: float
    event: str
    id: str = ""
    rank: str = ""


_decoder = msgspec.json.Decoder(_Event)


class Gaps(msgspec.Struct, frozen=True):
    """The longest gaps in seconds, -1 for none, and the number of streams on the rank."""

    of_rank: float
    of_others: float
    num_streams: int


def gaps_around(lines: Iterable[bytes], rank: str, killed: float, until: float) -> Gaps:
    """From a router's history: the longest gaps that ended between `killed` and `until`, of the streams that had begun
    on `rank` by the time `killed`, and of those on other ranks. A stream that never went on counts up to `until`."""
    rank_of: dict[str, str] = {}
    last: dict[str, float] = {}
    there: dict[str, str] = {}  # streams with a token at the kill -> their rank then
    longest: dict[str, float] = {}
    is_after = False
    for line in lines:
        try:
            event = _decoder.decode(line)
        except msgspec.DecodeError:
            continue  # half a line, that is being written
        if event.t > until:
            break
        if event.t > killed and not is_after:
            is_after = True
            there = {name: rank_of[name] for name in last}
        if event.event == "chunk":
            if name_is_watched := event.id in there:
                longest[event.id] = max(longest.get(event.id, 0.0), event.t - last[event.id])
            if name_is_watched or not is_after:
                last[event.id] = event.t
        elif event.event == "terminal":
            longest.setdefault(event.id, 0.0)
            if not is_after:
                last.pop(event.id, None)
        elif event.rank:
            rank_of[event.id] = event.rank
    if not is_after:  # nothing has come since
        there = {name: rank_of[name] for name in last}
    gaps = {name: longest.get(name, until - last[name]) for name in there}
    own = [gaps[name] for name, place in there.items() if place == rank]
    others = [gaps[name] for name, place in there.items() if place != rank]
    return Gaps(max(own, default=-1.0), max(others, default=-1.0), len(own))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench recovery`."""
    add = parser.add_argument
    add("--model", default="demo", help="name or path")
    add("--replicas", type=int, default=2)
    add("--clients", type=int, default=16, help="of the closed loop")
    add("--prompt-tokens", type=int, default=64)
    add("--output-tokens", type=int, default=64, help="on average")
    add("--rounds", type=int, default=5, help="kills")
    add("--restarts", type=int, default=2, help="restarts of the whole deployment, for comparison")
    add("--settle-s", type=float, default=4.0, help="between two kills")
    add("--timeout-s", type=float, default=180.0)
    add("--kv-memory", type=parse_size, default=256 << 20, metavar="SIZE", help="of each device")
    add("--seed", type=int, default=1)
    add("--output", type=Path, default=Path("benchmarks/results"))


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data. Raises ValueError when nothing could be measured."""
    rounds = asyncio.run(_run(args))
    print(table([_row(method, rounds) for method in dict.fromkeys(one.method for one in rounds)]))
    facts = provenance(" ".join(["elasticmoe", *sys.argv[1:]]))
    path = write_raw(args.output, "recovery", {"provenance": facts, "rounds": [msgspec.to_builtins(r) for r in rounds]})
    print(f"raw data: {path}")
    return 0


def _row(method: str, rounds: list[Round]) -> dict[str, Any]:
    ours = [one for one in rounds if one.method == method]
    return {
        "method": method,
        "kills": len(ours),
        "gap ms median": statistics.median(one.gap_ms for one in ours),
        "gap ms max": max(one.gap_ms for one in ours),
        "others' gap ms max": max(one.others_gap_ms for one in ours),
        "gap before ms median": statistics.median(one.steady_ms for one in ours),
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
    scene = Scene(args.model, (args.replicas, args.replicas), settings, args.timeout_s, args.kv_memory)
    load = Load(Shape("", args.prompt_tokens, args.output_tokens, SAFE_VOCAB, is_counted=False), args.seed)
    rounds: list[Round] = []
    try:
        deployment = await scene.deploy(args.replicas, args.replicas)
        load.set_model(await deployment.served_name())
        load.set_targets(Target("it", deployment.url))
        load.start_closed(args.clients)
        await asyncio.sleep(2 * args.settle_s)
        for number in range(args.rounds):
            await _wait_tokens(load, args.timeout_s)
            rounds.append(await _kill(deployment, load, number, args))
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


async def _kill(deployment: Deployment, load: Load, number: int, args: argparse.Namespace) -> Round:
    ranks = (await deployment.get("/v1/layout"))["ranks"]
    victim = ranks[number % len(ranks)]
    name = f"r{victim['replica']}t{victim['tp']}"
    before = await deployment.metrics()
    failed = _num_failed(load)
    killed = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    back = await _wait_back(deployment, number % len(ranks), victim["incarnation"], args.timeout_s)
    await asyncio.sleep(AFTER_S)
    until = time.monotonic()
    await asyncio.sleep(0.5)  # the router writes its history ten times a second
    after = await deployment.metrics()
    lines = deployment.history_path.read_bytes().splitlines()
    gaps = gaps_around(lines, name, killed, until)
    steady = gaps_around(lines, name, killed - args.settle_s, killed)
    return Round(
        method="kill -9 of a rank",
        gap_ms=gaps.of_rank * 1e3,
        others_gap_ms=gaps.of_others * 1e3,
        steady_ms=max(steady.of_rank, steady.of_others) * 1e3,
        back_ms=(back - killed) * 1e3,
        streams=gaps.num_streams,
        failed=_num_failed(load) - failed,
        discarded=0,
        recomputed=counters(after, "recomputed") - counters(before, "recomputed"),
        resubmitted=counters(after, "requests_resubmitted") - counters(before, "requests_resubmitted"),
    )


async def _wait_back(deployment: Deployment, index: int, old: str, timeout_s: float) -> float:
    """When all ranks stepped again. Raises ValueError when they do not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        layout = await deployment.get("/v1/layout")
        if layout["phase"] == "serving" and layout["ranks"][index]["incarnation"] not in (None, old):
            return time.monotonic()
        await asyncio.sleep(TURN_S)
    raise ValueError(f"no standby took the seat within {timeout_s:g} s")


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
    one = Round(
        method="restart of the deployment",
        gap_ms=gap_ms,
        others_gap_ms=gap_ms,
        steady_ms=max([b - a for r in running for a, b in zip(r.arrivals, r.arrivals[1:], strict=False)], default=0)
        * 1e3,
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
