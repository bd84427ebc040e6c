"""One run of `bench slo`: a trace on one method's deployment."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.cli.bench.scaling_methods import Scene
from elasticmoe.cli.bench.slo_figures import Objectives, Sizes, SloFigures, figures_of, sizes_of
from elasticmoe.cli.bench.slo_methods import LOADED, METHODS, Slo, SloMethod
from elasticmoe.cli.load.command import make_room
from elasticmoe.cli.load.endpoint import endpoint_of
from elasticmoe.cli.load.player import Player
from elasticmoe.cli.load.prompts import Prompts
from elasticmoe.cli.load.result import Result
from elasticmoe.cli.traces.arrival import PREFIX_BLOCK_TOKENS, Arrival

RETRY_S = 0.25
CONNECTIONS_MAX = 2048  # under way at once, and as many does a router take: what waits, waits in the deployment


class SloRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all methods. `settings`: of every deployment, by name; `drain_s`: what has not ended so long
    after the trace has failed."""

    model: str
    slo: Slo
    objectives: Objectives
    settings: dict[str, Any]
    timeout_s: float
    kv_bytes: int
    drain_s: float


class SloRun(msgspec.Struct, frozen=True):
    """What one run gave. `lag_p99_ms`: how late the client itself was to send; `client_share`: of a core;
    `machine_share`: of all cores, by all processes of the machine."""

    figures: SloFigures
    line: Sizes
    changes: list[tuple[float, int, int]]
    lag_p99_ms: float
    client_share: float
    machine_share: float
    notes: dict[str, Any]


async def run_once(recipe: SloRecipe, name: str, arrivals: Sequence[Arrival], duration_s: float, seed: int) -> SloRun:
    """Play the trace on one method; everything it started is gone afterwards. Raises ValueError with the reason when it
    failed."""
    slo = recipe.slo if name.endswith(LOADED) else msgspec.structs.replace(recipe.slo, load_s=0.0)
    settings = {"kv_bytes": recipe.kv_bytes, "requests_max": CONNECTIONS_MAX, **recipe.settings}
    scene = Scene(recipe.model, slo.sizes, settings, recipe.timeout_s, recipe.kv_bytes)
    method = METHODS[name.removesuffix(LOADED)](scene, slo, lambda urls: player.set_endpoints(*map(endpoint_of, urls)))
    results: list[Result] = []
    make_room(CONNECTIONS_MAX)
    gc.disable()  # a collection in our loop would be a pause of every stream
    try:
        deployment = await method.start()
        player = Player(
            endpoint_of(deployment.url),
            await deployment.served_name(),
            Prompts(seed, PREFIX_BLOCK_TOKENS),
            lambda result, _: results.append(result),
            connections_max=CONNECTIONS_MAX,
            silence_s=recipe.timeout_s,
            retry_s=RETRY_S,
        )
        client, machine = time.process_time(), machine_times()
        await _play(player, method, arrivals, duration_s, recipe.drain_s)
        elapsed = time.monotonic() - player.begun
        client_share = (time.process_time() - client) / elapsed
        busy, all_cores = (after - before for after, before in zip(machine_times(), machine, strict=True))
        notes = await method.notes()
    finally:
        gc.enable()
        await scene.clear()
    held, begun = method.held, player.begun
    lags = sorted(result.lag_ms for result in results)
    return SloRun(
        figures_of(results, len(arrivals), held, begun, duration_s, recipe.objectives, player.num_retries),
        sizes_of(results, held, begun, duration_s, recipe.objectives),
        [(round(at - begun, 3), before, after) for at, before, after in held.changes],
        lags[len(lags) * 99 // 100],
        client_share,
        busy / all_cores,
        notes,
    )


async def _play(
    player: Player, method: SloMethod, arrivals: Sequence[Arrival], duration_s: float, drain_s: float
) -> None:
    """Play and follow. A change that has begun goes on after the trace, for its requests wait for it. Raises what goes
    wrong in either."""

    async def end() -> None:
        await asyncio.sleep(duration_s)
        method.is_over = True
        await asyncio.sleep(drain_s)
        player.stop()

    playing, following, ending = (asyncio.create_task(work) for work in (player.play(arrivals), method.follow(), end()))
    try:
        await asyncio.wait({playing, following}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (playing, following):
            if task.done():
                task.result()
    finally:
        tasks = (playing, following, ending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def machine_times() -> tuple[float, float]:
    """Seconds that all cores together have been busy, and have been there, since the machine started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    total, tick = sum(fields), os.sysconf("SC_CLK_TCK")
    return (total - fields[3] - fields[4]) / tick, total / tick  # idle, and waiting for a disk
