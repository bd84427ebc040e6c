"""One run of `elasticmoe chaos`: load, faults and resizes side by side, and what was seen of the promises."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from elasticmoe.cli.bench.deployment import Deployment
from elasticmoe.cli.bench.http import ask
from elasticmoe.cli.chaos_act import Acted, Acting
from elasticmoe.cli.chaos_faults import KILL, LOSE, Fault, Resize
from elasticmoe.cli.chaos_load import Clients
from elasticmoe.cli.chaos_state import findings_of, holdings_of, rank_pids
from elasticmoe.common.wording import counted

RECOVERED_S_MAX = 30.0  # after the end of a fault
OPERATION_S_MAX = 180.0
QUIET_S_MAX = 30.0
LOOK_S = 0.25
AFTER_S = 2.0  # what a fault costs is watched for so long after all is as before: processes start, peers return
PAUSE_S_MAX = 10.0  # a pause that began by then is waited for, as it counts until it ends
REFUSED = "refused"
BLAMELESS_S = 5.0  # connections that break within this time of a router's end are its clients' to repeat


@dataclass
class Seen:
    """What happened. Times of the monotonic clock, in seconds. `faults`: (begin, end of its effects, fault)."""

    begun: float
    faults: list[tuple[float, float, Fault]] = field(default_factory=list)
    not_recovered: list[str] = field(default_factory=list)
    operations: list[dict[str, Any]] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    acted: Acted | None = None  # where the policy decided the size


class Run:
    """Owns nothing but the tasks of one run; the deployment and the clients are the caller's. `tell` prints a line."""

    def __init__(self, deployment: Deployment, clients: Clients, tell: Callable[[str], None]) -> None:
        self._deployment = deployment
        self._clients = clients
        self._tell = tell
        self._resizing = asyncio.Lock()
        self._end = 0.0
        self.seen = Seen(time.monotonic())

    async def run(
        self,
        faults: list[Fault],
        resizes: list[Resize],
        seconds: float,
        replicas: int,
        acting: Acting | None = None,
    ) -> Seen:
        """Load for `seconds` with these faults and resizes, or the policy's; back to `replicas`; then what must hold at
        rest.

        Raises ValueError where the deployment ended."""
        before = await holdings_of(self._deployment)
        watching = [asyncio.create_task(self._watch_epoch())]
        load = asyncio.create_task(self._clients.run())
        self.seen.begun = time.monotonic()
        self._end = self.seen.begun + seconds
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._do_faults(faults))
                group.create_task(self._do_resizes(resizes))
                if acting is not None:
                    watching.append(asyncio.create_task(acting.watch()))
                    group.create_task(acting.play(self._end))
                group.create_task(asyncio.sleep(seconds))
            await self._recovered("the last fault")
            if acting is not None:
                self.seen.acted = acting.seen
                await acting.settle()
            if len(await self._present()) != replicas:
                await self._scale({"replicas": replicas})
            if len(await self._present()) != replicas:
                self.seen.stuck.append(f"{counted(len(await self._present()), 'replica')} at the end, not {replicas}")
            self._clients.stop()
            await load
        finally:
            for task in (*watching, load):
                task.cancel()
            await asyncio.gather(*watching, load, return_exceptions=True)
        await self._at_rest(before)
        return self.seen

    async def _at_rest(self, before: Any) -> None:
        """Whatever is held or wrong now will stay so; what takes a moment to go gets it."""
        deadline = time.monotonic() + QUIET_S_MAX
        while True:
            try:
                self.seen.findings = await findings_of(self._deployment)
                self.seen.leaks = (await holdings_of(self._deployment)).leaks_since(before)
            except ValueError as error:
                self.seen.findings = [str(error)]
            if not (self.seen.findings or self.seen.leaks) or time.monotonic() > deadline:
                return
            await asyncio.sleep(LOOK_S)

    async def _watch_epoch(self) -> None:
        while True:
            try:
                epoch = (await self._deployment.get("/v1/layout"))["epoch"]
                if epoch and (not self.seen.epochs or self.seen.epochs[-1] != epoch):
                    self.seen.epochs.append(epoch)
            except (ValueError, KeyError):
                pass  # the scaler is down
            await asyncio.sleep(LOOK_S)

    # ---- faults

    async def _do_faults(self, faults: list[Fault]) -> None:
        due = self.seen.begun
        for fault in faults:
            due = await self._wait_due(due + fault.after_s)
            if due < self._end:
                await self._do_fault(fault)

    async def _wait_due(self, due: float) -> float:
        """Wait until `due`; what took longer before takes it from the pause. Returns when it is then."""
        await asyncio.sleep(max(0.0, min(due, self._end) - time.monotonic()))
        return max(due, time.monotonic())

    async def _do_fault(self, fault: Fault) -> None:
        if fault.kind == LOSE:
            await self._lose(fault)
            return
        name, pid = await self._victim(fault)
        if pid is None:
            self._tell(f"{fault}: it does not run just now")
            return
        begun = time.monotonic()
        self._tell(f"{fault} ({name}, process {pid})")
        try:
            os.kill(pid, signal.SIGKILL if fault.kind == KILL else signal.SIGSTOP)
            if fault.kind != KILL:
                await asyncio.sleep(fault.seconds)
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass  # a rank that was ejected meanwhile
        await self._note(fault, name, begun, time.monotonic(), killed=pid if fault.kind == KILL else None)

    async def _note(self, fault: Fault, name: str, begun: float, ended: float, *, killed: int | None = None) -> None:
        """Wait until its effects are over, and keep what it was. `killed`: a process that another one replaces."""

        def is_replaced() -> bool:
            return killed is None or fault.target == "rank" or self._deployment.pid(name) not in (killed, None)

        await self._recovered(f"{fault} ({name})", is_replaced)
        recovered = time.monotonic()
        self.seen.faults.append((begun, recovered, fault))
        await asyncio.sleep(AFTER_S)
        tally, until = self._clients.tally, recovered + AFTER_S
        while tally.lasts(until) and time.monotonic() < until + PAUSE_S_MAX:
            await asyncio.sleep(LOOK_S)
        gap = tally.longest_gap(begun, until, time.monotonic())
        self._tell(f"  recovered {recovered - ended:.1f} s later; longest pause of a stream {gap * 1e3:.0f} ms")

    async def _lose(self, fault: Fault) -> None:
        """Stop a rank, and say that its device is lost, whatever operation is in progress; then take it again."""
        ranks = await self._ranks()
        if len({rank["replica"] for rank in ranks}) < 2:
            self._tell(f"{fault}: there is no other replica just now")
            return
        rank = ranks[int(fault.choice * len(ranks))]
        lost = {entry["device"] for entry in ranks if entry["replica"] == rank["replica"]}
        begun = time.monotonic()
        self._tell(f"{fault} ({rank['device']}, r{rank['replica']})")
        try:
            os.kill(rank["pid"], signal.SIGSTOP)
        except ProcessLookupError:
            pass  # it has left, or is about to be replaced
        outcome = await self._carry_out({"remove": [rank["replica"]], "lost": True})
        if outcome == REFUSED:  # it has left, or was left out
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank["pid"], signal.SIGCONT)
        elif outcome != "done":
            self.seen.stuck.append(f"{rank['device']} was not left out: {outcome or 'stuck'}")
        await self._note(fault, rank["device"], begun, time.monotonic())
        async with self._resizing:
            devices = {entry["device"] for entry in await self._ranks()}
            if not lost & devices:
                await self._carry_out({"devices": sorted(lost | devices)})

    async def _victim(self, fault: Fault) -> tuple[str, int | None]:
        if fault.target != "rank":
            return fault.target, self._deployment.pid(fault.target)
        try:
            ranks = sorted((await rank_pids(self._deployment)).items())
        except ValueError:
            return "rank", None
        return ranks[int(fault.choice * len(ranks))] if ranks else ("rank", None)

    async def _recovered(self, what: str, is_replaced: Callable[[], bool] = lambda: True) -> None:
        """Wait until who was killed is there again, both listeners are ready, and all members attached and sound."""
        deadline = time.monotonic() + RECOVERED_S_MAX
        while time.monotonic() < deadline:
            try:
                statuses = [(await ask("GET", url))[0] for url in self._ready_urls()]
                if statuses == [200, 200] and is_replaced() and not await findings_of(self._deployment):
                    return
            except ValueError:
                if self._deployment.record is None:
                    raise
            await asyncio.sleep(LOOK_S)
        self.seen.not_recovered.append(what)
        self._tell(f"  NOT recovered within {RECOVERED_S_MAX:g} s: {what}")

    def _ready_urls(self) -> tuple[str, str]:
        record = self._deployment.record
        if record is None:
            raise ValueError("the deployment has ended")
        return f"{record.admin_url}/ready", f"{record.url}/ready"

    # ---- resizes

    async def _do_resizes(self, resizes: list[Resize]) -> None:
        due = self.seen.begun
        for resize in resizes:
            due = await self._wait_due(due + resize.after_s)
            body = resize.body(await self._present()) if due < self._end else None
            if body is not None:
                await self._scale(body)

    async def _present(self) -> list[int]:
        return sorted({rank["replica"] for rank in await self._ranks()})

    async def _ranks(self) -> list[dict[str, Any]]:
        while True:
            try:
                ranks = (await self._deployment.get("/v1/layout"))["ranks"]
                return sorted((rank for rank in ranks if rank["pid"]), key=lambda rank: int(rank["replica"]))
            except ValueError:
                if self._deployment.record is None:
                    raise
                await asyncio.sleep(LOOK_S)

    async def _scale(self, body: dict[str, Any]) -> None:
        async with self._resizing:
            await self._carry_out(body)

    async def _carry_out(self, body: dict[str, Any]) -> str:
        """One operation to its end, through restarts of the scaler: the same name starts it once. The phase that it
        ended in, REFUSED, or nothing where it did not end."""
        op_id, deadline = f"chaos-{uuid.uuid4().hex[:8]}", time.monotonic() + OPERATION_S_MAX
        self._tell(f"scale {body}")
        operation: dict[str, Any] = {}
        while operation.get("phase") not in ("done", "aborted"):
            if time.monotonic() > deadline:
                self.seen.stuck.append(f"{body}: {operation.get('phase', 'not accepted')}")
                self._tell(f"  STUCK for {OPERATION_S_MAX:g} s: {body} in {operation.get('phase')}")
                return ""
            try:
                if operation:
                    operation = await self._deployment.get(f"/v1/operations/{op_id}")
                else:
                    operation = await self._deployment.post("/v1/scale", body | {"op_id": op_id})
            except ValueError as error:
                if "HTTP 422" in str(error):  # what was to be removed has gone
                    self._tell(f"  refused: {error}")
                    return REFUSED
                operation = {} if "HTTP 404" in str(error) else operation
            await asyncio.sleep(LOOK_S)
        self.seen.operations.append(operation)
        why = "" if operation["phase"] == "done" else f": {(operation.get('error') or {}).get('message')}"
        self._tell(f"  {operation['phase']}{why} after {operation['elapsed_s']:.1f} s")
        return str(operation["phase"])
