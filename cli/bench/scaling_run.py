"""One run of `bench scaling`: a method under a load, once up and once down."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import msgspec

from elasticmoe.cli.bench.deployment import Deployment
from elasticmoe.cli.bench.scaling_figures import (
    Bounds,
    Change,
    Figures,
    Series,
    Window,
    arrivals_of,
    measure,
    series_of,
    throughput,
)
from elasticmoe.cli.bench.scaling_history import first_token
from elasticmoe.cli.bench.scaling_memory import MemorySampler
from elasticmoe.cli.bench.scaling_methods import MethodKind, Outcome, Scene
from elasticmoe.cli.load.client import Load, Target
from elasticmoe.cli.load.endpoint import Shape
from elasticmoe.cli.load.sample import Sample
from elasticmoe.common.wording import counted

DIRECTIONS = ("up", "down")  # of the two commands of a run


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all methods of a measurement. Times in seconds.

    `sizes`: replicas before and after the first command, ascending. `clients`: of a closed loop; `rate`: requests per
    second of an open one, which is run where it is not 0. `steady_s`: each steady window; `settle_s`: before each of
    them; `window_s`: over which throughput is taken while it changes. `settings` of the deployments by name.
    """

    model: str
    sizes: tuple[int, int]
    clients: int
    rate: float
    prompt_tokens: int
    output_tokens: int
    steady_s: float
    settle_s: float
    window_s: float
    bounds: Bounds
    timeout_s: float
    kv_bytes: int
    settings: dict[str, Any]
    devices: str = ""
    tp: int = 1


class Run(msgspec.Struct, frozen=True):
    """What one run gave: figures, series and the scaler's own account, in order of the commands (up, down)."""

    figures: tuple[Figures, ...]
    series: tuple[Series, ...]
    operations: tuple[Any, ...]


async def run_once(recipe: Recipe, kind: MethodKind, seed: int) -> Run:
    """Run one method; everything it started is gone afterwards. Raises ValueError with the reason when it failed."""
    scene = make_scene(recipe, kind.settings)
    sampler = MemorySampler(scene.deployments)
    load = make_load(recipe, seed)
    gc.disable()  # a collection in our loop would be a pause of every stream
    try:
        method = kind.make(scene, load)
        sampler.start()
        await method.start()
        load.set_model(await scene.deployments[0].served_name())
        begin(load, recipe)
        windows = [await _steady(recipe)]
        check_steady(load.requests)
        outcomes: list[Outcome] = []
        for size in (recipe.sizes[1], recipe.sizes[0]):
            outcomes.append(await method.scale(size))
            windows.append(await _steady(recipe))
        await asyncio.sleep(recipe.settle_s)  # requests of the last window reach their verdict
        await load.stop()
        await sampler.stop()
        deployments = [*scene.deployments, *scene.ended]
        changes = [
            _change(direction, outcome, before, after, load.requests, deployments)
            for direction, outcome, before, after in zip(DIRECTIONS, outcomes, windows, windows[1:], strict=False)
        ]
        return _sum_up(recipe, changes, load.requests, sampler.samples)
    finally:
        await _end(scene, load, sampler)
        gc.enable()


async def _end(scene: Scene, load: Load, sampler: MemorySampler | None = None) -> None:
    try:
        await load.stop()
    finally:
        if sampler is not None:
            await sampler.stop()
        await scene.clear()


def make_load(recipe: Recipe, seed: int) -> Load:
    """The load, which does not know the model's name yet."""
    shape = Shape("", recipe.prompt_tokens, recipe.output_tokens, is_counted=True)
    return Load(shape, seed)


def make_scene(recipe: Recipe, settings: dict[str, Any]) -> Scene:
    """The scene of one run. The router's history is always on, so that it costs every method the same."""
    fixed = {"history": "true", "kv_bytes": recipe.kv_bytes}
    made = {**fixed, **recipe.settings, **settings}
    return Scene(recipe.model, recipe.sizes, made, recipe.timeout_s, recipe.kv_bytes, recipe.devices, recipe.tp)


async def capacity_of(recipe: Recipe, seed: int) -> float:
    """Requests per second that the start configuration serves to a closed loop. Raises ValueError."""
    scene = make_scene(recipe, {})
    load = make_load(recipe, seed)
    try:
        deployment = await scene.deploy(recipe.sizes[0], recipe.sizes[0])
        load.set_model(await deployment.served_name())
        load.set_targets(Target("first", deployment.url))
        load.start_closed(recipe.clients)
        window = await _steady(recipe)
        check_steady(load.requests)
        return throughput(arrivals_of(load.requests), window) / recipe.output_tokens
    finally:
        await _end(scene, load)


def begin(load: Load, recipe: Recipe) -> None:
    """Start the recipe's load."""
    if recipe.rate:
        load.start_open(recipe.rate)
    else:
        load.start_closed(recipe.clients)


async def _steady(recipe: Recipe) -> Window:
    await asyncio.sleep(recipe.settle_s)
    start = time.monotonic()
    await asyncio.sleep(recipe.steady_s)
    return Window(start, time.monotonic())


def check_steady(requests: list[Sample]) -> None:
    """Raises ValueError when requests fail, or none is served, before anything has been changed."""
    failed = [request.error for request in requests if request.error]
    if failed:
        raise ValueError(f"{counted(len(failed), 'request')} failed before the first command; one with: {failed[0]}")
    if not any(request.arrivals for request in requests):
        raise ValueError("no token came before the first command")


def _change(
    direction: str,
    outcome: Outcome,
    before: Window,
    after: Window,
    requests: list[Sample],
    deployments: list[Deployment],
) -> Change:
    """The change with the time of the first token of what is new."""
    serving: float | None = None
    if outcome.targets:
        firsts = [request.arrivals[0] for request in requests if request.target in outcome.targets and request.arrivals]
        serving = min(firsts, default=None)
    elif outcome.ranks:
        for deployment in deployments:
            if deployment.history_path.is_file():
                with open(deployment.history_path, "rb") as lines:
                    serving = first_token(lines, outcome.ranks, outcome.issued, after.end)
    return Change(
        direction=direction,
        issued=outcome.issued,
        done=outcome.done,
        before=before,
        after=after,
        serving=serving,
        bytes_moved=outcome.bytes_moved,
        kv_blocks_before=outcome.kv_blocks_before,
        kv_blocks_after=outcome.kv_blocks_after,
        recomputed=outcome.recomputed,
        resubmitted=outcome.resubmitted,
        operation=outcome.operation,
    )


def _sum_up(recipe: Recipe, changes: list[Change], requests: list[Sample], memory: list[tuple[float, int]]) -> Run:
    return Run(
        tuple(
            measure(requests, memory, change, recipe.bounds, recipe.prompt_tokens, recipe.window_s)
            for change in changes
        ),
        tuple(series_of(requests, memory, change, recipe.bounds) for change in changes),
        tuple(change.operation for change in changes),
    )
