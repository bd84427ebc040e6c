"""`elasticmoe chaos --act`: the policy decides the size under a load that rises and falls, while things are killed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from elasticmoe.cli.bench.deployment import Deployment
from elasticmoe.cli.chaos_load import Clients
from elasticmoe.common.wording import counted

MODEL = "oracle-paced"  # what a step takes does not hang on how busy this machine's cores are
# A step of the paced model takes some 12 ms, and 30 ms with as many streams as the usual clients have: they break this
# on one device.
ITL_S = 0.02
# The policy's defaults wait for minutes. A run of minutes is to see it grow and shrink many times.
PACE: dict[str, Any] = {
    "hold_s": 4.0,
    "hold_max_s": 16.0,
    "down_over_s": 6.0,
    "flap_s": 8.0,
    "fall_s": 3.0,
    "horizon_s": 10.0,
    "price_factor": 0.1,
    "operations_max": 100,
}
BURST_S = (8.0, 20.0)
QUIET_SHARE = 0.1  # of the clients, between bursts
SETTLE_S_MAX = 120.0
LOOK_S = 0.25
# Without load, it is content with the size for one of these reasons, and will be later.
CONTENT = frozenset({"at_min", "smaller_has_no_room", "not_worth_its_price", "no_plan"})


class Burst(NamedTuple):
    """So many clients for so many seconds."""

    seconds: float
    clients: int


def draw_bursts(seed: int, seconds: float, clients: int) -> list[Burst]:
    """The load of a run of `seconds`: all clients and few of them in turns."""
    rng = random.Random(f"{seed}/bursts")
    bursts: list[Burst] = []
    at = 0.0
    while at < seconds:
        few = max(1, int(clients * QUIET_SHARE))
        bursts.append(Burst(rng.uniform(*BURST_S), few if len(bursts) % 2 else clients))
        at += bursts[-1].seconds
    return bursts


@dataclass
class Acted:
    """What was seen of the policy. `sizes`, `targets`: replicas in force and wanted, where they changed. `settled_s`:
    from the end of the load until it was content, None where it never was; `reason`: what it said last, at `size`."""

    least: int
    most: int
    sizes: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    operations: list[dict[str, Any]] = field(default_factory=list)
    settled_s: float | None = None
    reason: str = ""
    size: int = 0


class Acting:
    """The policy's part of a run; the deployment and the clients are the caller's."""

    def __init__(
        self, deployment: Deployment, clients: Clients, bursts: list[Burst], most: int, tell: Callable[[str], None]
    ) -> None:
        self._deployment = deployment
        self._clients = clients
        self._bursts = bursts
        self._tell = tell
        self.seen = Acted(1, most)

    async def begin(self) -> None:
        """Let the policy act, with the pace of a short run. Raises ValueError."""
        await self._set(mode="act", replicas_min=self.seen.least, replicas_max=self.seen.most, **PACE)

    async def _set(self, **fields: Any) -> None:
        """Change the policy, through restarts of the scaler. Raises ValueError where it does not answer for long."""
        deadline = time.monotonic() + SETTLE_S_MAX
        while True:
            try:
                policy = await self._deployment.get("/v1/policy")
                body = {"version": policy["version"], "policy": policy["policy"] | fields}
                await self._deployment.put("/v1/policy", body)
                return
            except ValueError:
                if self._deployment.record is None or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(LOOK_S)

    async def play(self, end: float) -> None:
        """The load until `end`, of the monotonic clock."""
        for burst in self._bursts:
            self._clients.let(burst.clients)
            await asyncio.sleep(max(0.0, min(burst.seconds, end - time.monotonic())))

    async def watch(self) -> None:
        """Note sizes and targets until it is cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> dict[str, Any] | None:
        try:
            policy: dict[str, Any] = await self._deployment.get("/v1/policy")
        except ValueError:
            return None  # the scaler is down
        for values, value in ((self.seen.sizes, policy["replicas"]), (self.seen.targets, policy["target"])):
            if value and (not values or values[-1] != value):
                values.append(value)
                if values is self.seen.sizes:
                    self._tell(counted(value, "replica"))
        return policy

    async def settle(self) -> None:
        """No load any more: wait until the policy is content with the size, and let it rest."""
        self._clients.let(0)
        begun, policy = time.monotonic(), None
        while (waited := time.monotonic() - begun) < SETTLE_S_MAX and self.seen.settled_s is None:
            policy = await self._look()
            if policy is not None and policy["decision"] is not None:
                self.seen.reason, self.seen.size = policy["decision"]["reason"], policy["replicas"]
                if self.seen.reason in CONTENT and policy["target"] == policy["replicas"]:
                    self.seen.settled_s = waited
            await asyncio.sleep(LOOK_S)
        self._tell(f"the policy says {self.seen.reason} at {counted(self.seen.size, 'replica')}")
        if self.seen.settled_s is None and policy is not None:
            self._tell(f"  decided by {policy['decision']}")
        await self._set(mode="off")
        known = (await self._deployment.get("/v1/operations"))["operations"]
        self.seen.operations = [one for one in known if one["by"] == "policy"]
