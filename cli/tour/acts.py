"""The acts of a tour on a deployment of its own, each with a deadline on what it waits for."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from elasticmoe.cli.bench.deployment import Deployment
from elasticmoe.cli.bench.scaling_methods import counters
from elasticmoe.cli.chaos_act import PACE
from elasticmoe.cli.chaos_load import Clients, Tally
from elasticmoe.cli.policy import sentence
from elasticmoe.cli.tour.figures import QuietRun, RankKill, SizeChange, StreamCount, TourFigures
from elasticmoe.services.scaler.policy.words import REASONS

T = TypeVar("T")

REPLICAS_MAX = 2  # as many as two cores have use for
STREAMS = 24  # of the high load, on one replica several times a lone stream's step
OUTPUT_TOKENS = (48, 128)
TTFT_S = 30.0  # no objective of the tour
CALM_S = 4.0  # of one stream alone
BEFORE_KILL_S = 3.0  # streams spread over both replicas
AFTER_S = 1.0  # watched after all is as before, as a pause may begin late
LOOK_S = 0.1


class Tour:
    """One tour; the deployment is the caller's. `tell`: is given each sentence as it becomes true; `wait_s`: how long
    each thing may take to happen."""

    def __init__(self, deployment: Deployment, seed: int, wait_s: float, tell: Callable[[str], None]) -> None:
        self._deployment = deployment
        self._seed = seed
        self._wait_s = wait_s
        self._tell = tell

    async def run(self, introduce: Callable[[], None]) -> TourFigures:
        """All acts. `introduce`: tells where it is to be seen, once it serves. Raises ValueError with one sentence for
        what did not happen."""
        begun = time.monotonic()
        await self._deployment.ready(self._wait_s)
        up_s, model = time.monotonic() - begun, await self._deployment.served_name()
        self._tell(f"{model} serves after {up_s:.1f} s: one replica, and a second device that waits.")
        introduce()
        clients = Clients(
            self._deployment.url,
            model,
            STREAMS,
            self._seed,
            num_prompts=STREAMS,
            output_tokens=OUTPUT_TOKENS,
            is_counted=True,
        )
        self._tell(f"{STREAMS} prompts are answered while nothing happens; later answers are compared with these.")
        together = await clients.learn(STREAMS)
        clients.let(1)
        load = asyncio.create_task(clients.run())
        try:
            quiet = await self._quiet(clients, together)
            await self._let_act(quiet.objective_ms / 1e3)
            self._tell(f"The load rises from 1 stream to {STREAMS}.")
            growth = await self._change(clients, STREAMS, REPLICAS_MAX)
            kill = await self._kill(clients)
            self._tell("The load falls to 1 stream.")
            shrink = await self._change(clients, 1, 1)
            clients.stop()
            await self._within(load, "the last streams did not end")
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        tally = clients.tally
        streams = StreamCount(
            whole=tally.good + tally.wrong, tokens=tally.tokens, lost=dict(tally.by_code()), wrong=tally.wrong
        )
        self._tell(streams.told())
        return TourFigures(
            model=model,
            up_s=up_s,
            quiet=quiet,
            growth=growth,
            kill=kill,
            shrink=shrink,
            streams=streams,
            elapsed_s=time.monotonic() - begun,
        )

    # ---- acts

    async def _quiet(self, clients: Clients, together: Tally) -> QuietRun:
        """One stream for CALM_S. The objective is between what it has and what STREAMS had, nearer to that: these break
        it on one replica, and one stream keeps it by so much that a shrink is safe."""
        await asyncio.sleep(CALM_S)

        async def has_gaps() -> bool:
            return bool(clients.tally.gaps)

        await self._until(has_gaps, "a stream alone had no second token")
        together_s, alone_s = _mean_gap(together), _mean_gap(clients.tally)
        quiet = QuietRun(
            streams=STREAMS,
            together_ms=together_s * 1e3,
            alone_ms=alone_s * 1e3,
            objective_ms=together_s ** (2 / 3) * alone_s ** (1 / 3) * 1e3,
        )
        self._tell(quiet.told())
        return quiet

    async def _let_act(self, itl_s: float) -> None:
        """The policy, with the pace of a short run."""
        policy = await self._deployment.get("/v1/policy")
        objectives = {"itl_s": max(0.001, itl_s), "ttft_s": TTFT_S, "replicas_min": 1, "replicas_max": REPLICAS_MAX}
        body = {"version": policy["version"], "policy": policy["policy"] | objectives | PACE | {"mode": "act"}}
        await self._deployment.put("/v1/policy", body)

    async def _change(self, clients: Clients, streams: int, size: int) -> SizeChange:
        """Another load, and what the policy makes of it."""
        before, known = await self._recomputed(), {one["op_id"] for one in await self._operations()}
        clients.let(streams)
        changed = time.monotonic()
        word = "grow" if size > 1 else "shrink"

        async def ordered() -> dict[str, Any] | None:
            found = [one for one in await self._operations() if one["op_id"] not in known]
            return next((one for one in found if one["request"]["replicas"] == size), None)

        operation = await self._until(ordered, f"the deployment was not told to {word}", self._why)
        seen, op_id = time.monotonic(), operation["op_id"]

        async def ended() -> dict[str, Any] | None:
            one: dict[str, Any] = await self._deployment.get(f"/v1/operations/{op_id}")
            return one if one["phase"] in ("done", "aborted") else None

        operation = await self._until(ended, f"the deployment did not {word}")
        if operation["phase"] == "aborted":
            raise ValueError(f"the deployment did not {word}: {(operation['error'] or {}).get('message')}")
        gap_s = await self._gap(clients, seen)
        figures, reason = operation["figures"], operation["request"]["reason"].removeprefix("policy: ")
        change = SizeChange(
            replicas_before=1 + REPLICAS_MAX - size,
            replicas_after=size,
            reason=REASONS.get(reason, reason),
            ordered_s=seen - changed,
            took_s=operation["elapsed_s"] if figures["capacity_s"] is None else figures["capacity_s"],
            gap_ms=gap_s * 1e3,
            recomputed=await self._recomputed() - before,
            moved=figures["sequences_moved"],
        )
        self._tell(change.told())
        return change

    async def _kill(self, clients: Clients) -> RankKill:
        """`kill -9` of a rank that has streams."""
        await asyncio.sleep(BEFORE_KILL_S)
        victim = (await self._ranks())[-1]
        name, metrics = f"r{victim['replica']}t{victim['tp']}", await self._deployment.metrics()
        before = (counters(metrics, "recomputed"), counters(metrics, "requests_resubmitted"))
        self._tell(f"Rank {name}, process {victim['pid']}, is killed with kill -9.")
        killed = time.monotonic()
        os.kill(victim["pid"], signal.SIGKILL)

        async def replaced() -> float | None:
            layout = await self._deployment.get("/v1/layout")
            now = {(rank["replica"], rank["tp"]): rank["incarnation"] for rank in layout["ranks"]}
            new = now.get((victim["replica"], victim["tp"]))
            is_back = layout["phase"] == "serving" and new not in (None, victim["incarnation"])
            return time.monotonic() if is_back else None

        back = await self._until(replaced, f"no standby took the seat of rank {name}")
        gap_s = await self._gap(clients, killed)
        metrics = await self._deployment.metrics()
        kill = RankKill(
            rank=name,
            back_s=back - killed,
            gap_ms=gap_s * 1e3,
            recomputed=counters(metrics, "recomputed") - before[0],
            resubmitted=counters(metrics, "requests_resubmitted") - before[1],
        )
        self._tell(kill.told())
        return kill

    # ---- what it looks at

    async def _operations(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self._deployment.get("/v1/operations"))["operations"]
        return found

    async def _ranks(self) -> list[dict[str, Any]]:
        ranks = (await self._deployment.get("/v1/layout"))["ranks"]
        return sorted((rank for rank in ranks if rank["pid"]), key=lambda rank: (rank["replica"], rank["tp"]))

    async def _recomputed(self) -> int:
        return counters(await self._deployment.metrics(), "recomputed")

    async def _gap(self, clients: Clients, begin: float) -> float:
        """The longest pause of a stream that lasted at some moment from `begin` until AFTER_S from now, whole."""
        until = time.monotonic() + AFTER_S
        await asyncio.sleep(AFTER_S)

        async def is_over() -> bool:
            return not clients.tally.lasts(until)

        await self._until(is_over, "a stream did not go on")
        return clients.tally.longest_gap(begin, until, time.monotonic())

    async def _why(self) -> str:
        """What the policy says of itself."""
        decision = (await self._deployment.get("/v1/policy"))["decision"]
        return "nothing" if decision is None else sentence(decision)

    # ---- deadlines

    async def _until(
        self, look: Callable[[], Awaitable[T | None]], what: str, why: Callable[[], Awaitable[str]] | None = None
    ) -> T:
        """The first of what `look` finds. Raises ValueError, with what `why` says, when there is none in time."""
        deadline = time.monotonic() + self._wait_s
        while not (found := await look()):
            if time.monotonic() > deadline:
                told = "" if why is None else f"; the policy says: {await why()}"
                raise ValueError(f"{what} within {self._wait_s:g} s{told}")
            await asyncio.sleep(LOOK_S)
        return found

    async def _within(self, work: Awaitable[None], what: str) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                await work
        except TimeoutError:
            raise ValueError(f"{what} within {self._wait_s:g} s") from None


def _mean_gap(tally: Tally) -> float:
    """Seconds between two tokens of a stream. Raises ValueError."""
    if not tally.gaps:
        raise ValueError("no stream had a second token")
    return statistics.fmean(gap for _, gap in tally.gaps)
