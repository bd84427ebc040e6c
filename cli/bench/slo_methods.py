"""Who gives the deployment its size in `bench slo`: nobody, the policy itself, or the policy's advice by other means.

The scaler's own policy decides in all of them. In `ours` it acts (mode `act`). The paper's baselines run it in the mode
`advise`: the method reads what it wants (`GET /v1/policy`) and does that by a cold restart, or by second copies. What a
restart makes a scaler forget is forgotten, as it would be for anybody; so the time that the policy waits between a
change and a shrink (`hold_s`) is kept here.
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import msgspec

from elasticmoe.cli.bench.deployment import Deployment
from elasticmoe.cli.bench.scaling_methods import Scene
from elasticmoe.cli.bench.slo_figures import Held

LOOK_S = 0.2

Route = Callable[[tuple[str, ...]], None]


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What all methods have in common. `sizes`: the fewest and the most replicas, of one device each. `policy`: fields
    of the settings by name, but mode and bounds. `fields`: others of the policy, which no setting names. `load_s`:
    added to each start of a baseline, in seconds, in the place of what it takes to load a large model."""

    sizes: tuple[int, int]
    policy: dict[str, Any]
    fields: dict[str, float] = {}
    load_s: float = 0.0

    def settings(self, mode: str, least: int) -> dict[str, Any]:
        """Of a deployment whose policy has that mode and that bound below."""
        return {**self.policy, "policy": mode, "replicas_min": least, "replicas_max": self.sizes[1]}


class SloMethod(ABC):
    """Begins with the fewest replicas, but for the static maximum. `held` tells what it holds and changes. `route` is
    called with the URLs that new requests are to go to."""

    def __init__(self, scene: Scene, slo: Slo, route: Route) -> None:
        self.scene = scene
        self.slo = slo
        self.held = Held()
        self.is_over = False  # nothing new is begun any more
        self._route = route

    @abstractmethod
    async def start(self) -> Deployment:
        """Bring up what it begins with. Raises ValueError."""

    @abstractmethod
    async def look(self) -> None:
        """See what is wanted, and do it; returns when it is done. Raises ValueError."""

    async def follow(self) -> None:
        """Look until `is_over`; a change that has begun is ended. Raises ValueError."""
        while not self.is_over:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def notes(self) -> dict[str, Any]:
        """What the deployment itself tells of its decisions and operations, for the raw data."""
        return {}

    async def _deploy(self, replicas: int, devices: int, mode: str, least: int, *, port: int = 0) -> Deployment:
        deployment = await self.scene.deploy(replicas, devices, port=port, **self.slo.settings(mode, least))
        if self.slo.fields:
            found = await deployment.get("/v1/policy")
            changed = {"version": found["version"], "policy": {**found["policy"], **self.slo.fields}}
            await deployment.put("/v1/policy", changed)
        return deployment


class Static(SloMethod):
    """One size for ever: the fewest replicas."""

    _size = 0  # of `sizes`

    async def start(self) -> Deployment:
        """See SloMethod."""
        size = self.slo.sizes[self._size]
        deployment = await self._deploy(size, size, "off", size)
        self.held.hold(time.monotonic(), size)
        return deployment

    async def look(self) -> None:
        """Nothing is ever wanted."""


class StaticMost(Static):
    """The most replicas."""

    _size = 1


class Ours(SloMethod):
    """The policy acts. Devices are held from when an operation is accepted that brings them, until one that takes them
    away has ended; by looks every LOOK_S."""

    async def start(self) -> Deployment:
        """See SloMethod."""
        least, most = self.slo.sizes
        self._deployment = await self._deploy(least, most, "act", least)
        self._wanted = least
        self.held.hold(time.monotonic(), least)
        return self._deployment

    async def look(self) -> None:
        """See SloMethod: only looks, since the policy acts."""
        try:
            size = await self._deployment.get("/v1/scale")
        except ValueError:
            return  # a scaler that is being replaced; what is held stays as it was
        now, effective, pending = time.monotonic(), int(size["effective_size"]), size["pending_target"]
        wanted = effective if pending is None else int(pending)
        if wanted != self._wanted:
            self.held.order(now, self._wanted, wanted)
            self._wanted = wanted
        self.held.hold(now, max(effective, wanted))

    async def notes(self) -> dict[str, Any]:
        """See SloMethod."""
        decisions = (await self._deployment.get("/v1/decisions"))["decisions"]
        operations = (await self._deployment.get("/v1/operations"))["operations"]
        return {"decisions": [one for one in decisions if one["acts"]], "operations": operations}


class Advised(SloMethod):
    """Base of the baselines: does what the policy advises, one change at a time, with a shrink `hold_s` after the last
    change at the earliest."""

    def __init__(self, scene: Scene, slo: Slo, route: Route) -> None:
        super().__init__(scene, slo, route)
        self._changed = -math.inf

    async def look(self) -> None:
        """See SloMethod."""
        try:
            found = [await each.get("/v1/policy") for each in self._deployments()]
        except ValueError:
            return  # nothing is known yet
        wanted, size = self.wanted([int(each["target"]) for each in found]), self._size()
        is_held = time.monotonic() - self._changed < float(found[0]["policy"]["hold_s"])
        if wanted == size or (wanted < size and is_held):
            return
        self.held.order(time.monotonic(), size, wanted)
        await self._change(wanted)
        self._changed = time.monotonic()

    @abstractmethod
    def wanted(self, targets: list[int]) -> int:
        """The size, in replicas, that comes of the targets of all deployments."""

    @abstractmethod
    def _deployments(self) -> list[Deployment]: ...

    @abstractmethod
    def _size(self) -> int: ...

    @abstractmethod
    async def _change(self, wanted: int) -> None: ...


class SloColdRestart(Advised):
    """Stop at once, and start with the new size at the same address; requests that were taken are cut off."""

    async def start(self) -> Deployment:
        """See SloMethod."""
        self._replicas = self.slo.sizes[0]
        self._current = await self._up(0)
        self.held.hold(time.monotonic(), self._replicas)
        return self._current

    async def _up(self, port: int) -> Deployment:
        least, most = self.slo.sizes
        return await self._deploy(self._replicas, most, "advise", least, port=port)

    def wanted(self, targets: list[int]) -> int:
        """See Advised."""
        least, most = self.slo.sizes
        return max(least, min(most, targets[0]))

    def _deployments(self) -> list[Deployment]:
        return [self._current]

    def _size(self) -> int:
        return self._replicas

    async def _change(self, wanted: int) -> None:
        port = self._current.port
        self.held.hold(time.monotonic(), max(wanted, self._replicas))
        await self.scene.end(self._current, at_once=True)
        self._replicas = wanted
        self.held.hold(time.monotonic(), wanted)
        await asyncio.sleep(self.slo.load_s)
        self._current = await self._up(port)


class SloHorizontal(Advised):
    """Whole copies of the smallest deployment, each with its own policy, which sees its share of the load; requests go
    to all in turn. A copy that is not needed any more gets no new requests, and ends when its last has."""

    async def start(self) -> Deployment:
        """See SloMethod."""
        self._copies = [await self._up()]
        self._tell()
        return self._copies[0]

    async def _up(self) -> Deployment:
        return await self._deploy(self.slo.sizes[0], self.slo.sizes[1], "advise", 1)

    def wanted(self, targets: list[int]) -> int:
        """See Advised: as many whole copies as have the replicas that all policies want together."""
        least, most = self.slo.sizes
        return least * max(1, min(most // least, math.ceil(sum(targets) / least)))

    def _deployments(self) -> list[Deployment]:
        return self._copies

    def _size(self) -> int:
        return len(self._copies) * self.slo.sizes[0]

    async def _change(self, wanted: int) -> None:
        num = wanted // self.slo.sizes[0]
        while len(self._copies) < num:
            self.held.hold(time.monotonic(), self._size() + self.slo.sizes[0])
            await asyncio.sleep(self.slo.load_s)
            self._copies.append(await self._up())
            self._route_to_all()
        while len(self._copies) > num:
            leaving = self._copies.pop()
            self._route_to_all()
            await self.scene.end(leaving)
            self._tell()

    def _tell(self) -> None:
        self.held.hold(time.monotonic(), self._size())

    def _route_to_all(self) -> None:
        self._route(tuple(copy.url for copy in self._copies))


STATIC_MOST, OURS, COLD_RESTART, HORIZONTAL = "static-max", "ours", "cold-restart", "horizontal"
METHODS: dict[str, Callable[[Scene, Slo, Route], SloMethod]] = {
    "static-min": Static,
    STATIC_MOST: StaticMost,
    OURS: Ours,
    COLD_RESTART: SloColdRestart,
    HORIZONTAL: SloHorizontal,
}
LOADED = "+load"  # after the name of a baseline whose starts take `load_s` longer
