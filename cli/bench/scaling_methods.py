"""The ways to change a deployment's size that `bench scaling` compares: ElasticMoE, with standbys and without, and four
baselines.

Each begins with one deployment that takes all requests and changes its size on command, up and down. Everything that a
method starts is in `Scene.deployments` until it is gone, so that the caller can end it whatever happens.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from elasticmoe.cli.bench.deployment import Deployment, first_of
from elasticmoe.cli.load.client import Load, Target

POLL_S = 0.1
FINISHED = ("done", "aborted")
_RECOMPUTED = "recomputed"  # in the names of counters of tokens
_RESUBMITTED = "requests_resubmitted"
_LAG_S = 2.0


@dataclass
class Scene:
    """Where a method acts. `settings`: of every deployment, fields of common.config by name; `timeout_s`: of each wait;
    `sizes`: the numbers of replicas that it changes between. `devices`: given to the benchmark; `tp`: of a replica.
    `deployments`: those that exist now."""

    model: str
    sizes: tuple[int, int]
    settings: dict[str, Any]
    timeout_s: float
    kv_bytes: int
    devices: str = ""
    tp: int = 1
    deployments: list[Deployment] = field(default_factory=list)
    ended: list[Deployment] = field(default_factory=list)

    async def deploy(self, replicas: int, most: int, *, port: int = 0, **settings: Any) -> Deployment:
        """Start one more, with the devices for as many replicas as `most` says, and wait until it serves. Raises
        ValueError."""
        where = first_of(self.devices, most * self.tp)
        deployment = Deployment(self.model, replicas, where, port=port, **{**self.settings, **settings, "tp": self.tp})
        self.deployments.append(deployment)
        return await deployment.ready(self.timeout_s)

    async def end(self, deployment: Deployment, *, at_once: bool = False) -> None:
        """Stop one; its logs stay until `clear`. Raises ValueError when it had to be killed."""
        try:
            await deployment.stop(self.timeout_s, at_once=at_once)
        finally:
            self.deployments.remove(deployment)
            self.ended.append(deployment)

    async def clear(self) -> None:
        """End all that is left and remove every folder. Raises ValueError when something had to be killed."""
        problems = []
        for deployment in list(self.deployments):
            try:
                await self.end(deployment, at_once=True)
            except ValueError as error:
                problems.append(str(error))
        for deployment in self.ended:
            deployment.remove()
        if problems:
            raise ValueError("; ".join(problems))


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a method knows of one change. `issued`: when the command was accepted; `done`: when all was over.

    What is new is told by `targets` (labels of deployments) or `ranks` (names) of `deployment`; both empty for nothing.
    """

    issued: float
    done: float
    bytes_moved: int
    kv_blocks_before: int
    kv_blocks_after: int
    targets: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    recomputed: int = 0
    resubmitted: int = 0
    operation: Any = None


class Method(ABC):
    """Base: one deployment, called `first`, at the size `sizes[0]`."""

    def __init__(self, scene: Scene, load: Load) -> None:
        self.scene = scene
        self.load = load
        self._current: Deployment
        self._label = "first"
        self._count = 0

    async def start(self) -> None:
        """Bring up the start configuration and point the load at it. Raises ValueError."""
        self._current = await self.scene.deploy(self.scene.sizes[0], self._devices())
        self.load.set_targets(Target(self._label, self._current.url))

    @abstractmethod
    async def scale(self, size: int) -> Outcome:
        """Change to `size` replicas while the load goes on; returns when all is over. Raises ValueError."""

    def _devices(self) -> int:
        return self.scene.sizes[0]

    def _next_label(self) -> str:
        self._count += 1
        return f"next-{self._count}"

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.scene.timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise ValueError(f"{what}: not within {self.scene.timeout_s:g} s")
            await asyncio.sleep(POLL_S)

    async def _drain(self, deployment: Deployment, label: str) -> None:
        """Wait until no request of ours is under way there, then end it."""
        await self._until(lambda: self.load.running_on(label) == 0, f"{label} drained")
        await self.scene.end(deployment)


class Elastic(Method):
    """POST /v1/scale on the running deployment, which has the devices for the larger size from the start."""

    def _devices(self) -> int:
        return max(self.scene.sizes)

    async def scale(self, size: int) -> Outcome:
        """See Method. The command counts from the answer 202 to it; how long it took is what the scaler says."""
        deployment = self._current
        before = await deployment.get("/v1/layout")
        counted = await deployment.metrics()
        accepted = await deployment.post("/v1/scale", {"replicas": size, "deadline_s": self.scene.timeout_s})
        issued = time.monotonic()
        operation = await self._watch(deployment, str(accepted["op_id"]))
        done = min(time.monotonic(), issued + float(operation["elapsed_s"]))
        if operation["phase"] != "done":
            raise ValueError(f"the operation ended as {operation['phase']}: {operation.get('error')}")
        after = await deployment.get("/v1/layout")
        counted_after = await deployment.metrics()
        return Outcome(
            issued=issued,
            done=done,
            bytes_moved=int(operation["figures"]["bytes_copied"]),
            kv_blocks_before=kv_blocks(before),
            kv_blocks_after=kv_blocks(after),
            ranks=tuple(sorted(rank_names(after) - rank_names(before))),
            recomputed=counters(counted_after, _RECOMPUTED) - counters(counted, _RECOMPUTED),
            resubmitted=counters(counted_after, _RESUBMITTED) - counters(counted, _RESUBMITTED),
            operation=operation,
        )

    async def _watch(self, deployment: Deployment, op_id: str) -> dict[str, Any]:
        started = time.monotonic()
        while True:
            try:
                operation: dict[str, Any] = await deployment.get(f"/v1/operations/{op_id}")
            except ValueError as error:  # what the scaler shows may lag behind what it answers
                if "unknown_operation" not in str(error) or time.monotonic() - started > _LAG_S:
                    raise
            else:
                if operation["phase"] in FINISHED:
                    return operation
                if time.monotonic() - started > self.scene.timeout_s:
                    raise ValueError(f"the operation is in {operation['phase']} after {self.scene.timeout_s:g} s")
            await asyncio.sleep(POLL_S)


class ColdRestart(Method):
    """Stop at once, start with the new size at the same address; clients come back until they are served."""

    async def scale(self, size: int) -> Outcome:
        """See Method."""
        old, port = self._current, self._current.port
        before = await capacity_of([old])
        issued = time.monotonic()
        await self.scene.end(old, at_once=True)
        self._label = self._next_label()
        url = old_url(port)
        self.load.set_targets(Target(self._label, url))  # the same address: the label tells who answers
        self._current = await self.scene.deploy(size, size, port=port)
        done = time.monotonic()
        return Outcome(
            issued=issued,
            done=done,
            bytes_moved=await bytes_read(self._current),
            kv_blocks_before=before,
            kv_blocks_after=await capacity_of([self._current]),
            targets=(self._label,),
        )


class Horizontal(Method):
    """A second full deployment of the original configuration, on devices of its own; requests go to both in turn."""

    def __init__(self, scene: Scene, load: Load) -> None:
        super().__init__(scene, load)
        self._second: tuple[Deployment, str] | None = None

    async def scale(self, size: int) -> Outcome:
        """See Method. The larger size stands for two deployments, whatever its number is."""
        if size > self.scene.sizes[0]:
            return await self._add()
        return await self._remove()

    async def _add(self) -> Outcome:
        before = await capacity_of([self._current])
        issued = time.monotonic()
        second, label = await self.scene.deploy(self.scene.sizes[0], self._devices()), self._next_label()
        self.load.set_targets(Target(self._label, self._current.url), Target(label, second.url))
        done = time.monotonic()
        self._second = second, label
        return Outcome(
            issued=issued,
            done=done,
            bytes_moved=await bytes_read(second),
            kv_blocks_before=before,
            kv_blocks_after=await capacity_of([self._current, second]),
            targets=(label,),
        )

    async def _remove(self) -> Outcome:
        if self._second is None:
            raise ValueError("there is no second deployment to remove")
        second, label = self._second
        before = await capacity_of([self._current, second])
        issued = time.monotonic()
        self.load.set_targets(Target(self._label, self._current.url))
        await self._drain(second, label)
        return Outcome(
            issued=issued,
            done=time.monotonic(),
            bytes_moved=0,
            kv_blocks_before=before,
            kv_blocks_after=await capacity_of([self._current]),
        )


class Extravagant(Method):
    """A deployment of the new size beside the old one, which ends when its requests have."""

    kv_share = 1.0  # of the KV memory that a deployment has otherwise

    async def start(self) -> None:
        """See Method."""
        self._current = await self._deploy(self.scene.sizes[0])
        self.load.set_targets(Target(self._label, self._current.url))

    async def scale(self, size: int) -> Outcome:
        """See Method."""
        old, old_label = self._current, self._label
        before = await capacity_of([old])
        issued = time.monotonic()
        self._current, self._label = await self._deploy(size), self._next_label()
        self.load.set_targets(Target(self._label, self._current.url))
        await self._drain(old, old_label)
        return Outcome(
            issued=issued,
            done=time.monotonic(),
            bytes_moved=await bytes_read(self._current),
            kv_blocks_before=before,
            kv_blocks_after=await capacity_of([self._current]),
            targets=(self._label,),
        )

    async def _deploy(self, size: int) -> Deployment:
        return await self.scene.deploy(size, size, kv_bytes=int(self.scene.kv_bytes * self.kv_share))


class Colocated(Extravagant):
    """The same on the same devices: both copies' weights, and the KV memory of one deployment shared by the two."""

    kv_share = 0.5


def old_url(port: int) -> str:
    """Where a deployment on this machine is reached."""
    return f"http://127.0.0.1:{port}"


def rank_names(layout: dict[str, Any]) -> set[str]:
    """Names of the ranks in an answer of /v1/layout, as the router's history writes them."""
    return {f"r{rank['replica']}t{rank['tp']}" for rank in layout["ranks"]}


def kv_blocks(layout: dict[str, Any]) -> int:
    """KV blocks of all replicas in an answer of /v1/layout: those of their leaders."""
    return sum(int(rank["kv_blocks"]) for rank in layout["ranks"] if rank["tp"] == 0)


async def capacity_of(deployments: Iterable[Deployment]) -> int:
    """KV blocks over all of them. Raises ValueError."""
    return sum([kv_blocks(await deployment.get("/v1/layout")) for deployment in deployments])


async def bytes_read(deployment: Deployment) -> int:
    """Bytes that it read from its checkpoint. Raises ValueError."""
    return int((await deployment.get("/ready"))["bytes_done"])


def counters(text: str, part: str) -> int:
    """The sum of the counters in Prometheus text whose names contain `part`; 0 for none."""
    total = 0.0
    for line in text.split("\n"):
        name = line.partition("{")[0].partition(" ")[0]
        if not line.startswith("#") and name.endswith("_total") and part in name:
            total += float(line.rpartition(" ")[2])
    return int(total)


class MethodKind(msgspec.Struct, frozen=True):
    """A method by name: how it acts, and settings of its own."""

    make: Callable[[Scene, Load], Method]
    settings: dict[str, Any] = {}


KINDS: dict[str, MethodKind] = {
    "elastic": MethodKind(Elastic),
    "no-standby": MethodKind(Elastic, {"standbys": 0}),
    "cold-restart": MethodKind(ColdRestart),
    "horizontal": MethodKind(Horizontal),
    "extravagant": MethodKind(Extravagant),
    "colocated": MethodKind(Colocated),
}
