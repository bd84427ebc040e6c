"""What a deployment holds, for `elasticmoe chaos`: descriptors, processes, shared memory, device bytes; is it sound?"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elasticmoe.cli.bench.deployment import Deployment, processes_of
from elasticmoe.common.protocol import scaler
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.hmm import CheckIntegrity
from elasticmoe.common.protocol.rank import GetRankIntegrity
from elasticmoe.common.protocol.scaler import Integrity, ToScaler
from elasticmoe.common.transport import Client, new_identity
from elasticmoe.common.wording import counted

FDS_MORE_MAX = 16  # connections that come and go
BYTES_MORE_SHARE_MAX = 0.02  # KV comes in whole handles, which may fall differently on the devices
_ASK_MS = 10_000


@dataclass(frozen=True)
class Holdings:
    """At one moment, with nothing under way."""

    descriptors: dict[str, int]
    num_processes: int
    shared_memory: frozenset[str]
    device_bytes: int

    def leaks_since(self, before: Holdings) -> list[str]:
        """What is more than it was `before`, with the same number of replicas."""
        found = [
            f"{name} has {count} descriptors, {before.descriptors[name]} before"
            for name, count in self.descriptors.items()
            if name in before.descriptors and count > before.descriptors[name] + FDS_MORE_MAX
        ]
        if self.num_processes > before.num_processes:
            found.append(f"{counted(self.num_processes, 'process', 'processes')}, {before.num_processes} before")
        if more := self.shared_memory - before.shared_memory:
            found.append(f"/dev/shm has {', '.join(sorted(more))}")
        if self.device_bytes > before.device_bytes * (1 + BYTES_MORE_SHARE_MAX):
            found.append(f"{self.device_bytes} bytes on the devices, {before.device_bytes} before")
        return found


async def holdings_of(deployment: Deployment) -> Holdings:
    """Raises ValueError where the admin listener does not answer."""
    record = deployment.record
    descriptors = {process.name: _descriptors(process.pid) for process in record.processes} if record else {}
    devices: list[dict[str, Any]] = (await deployment.get("/v1/devices"))["devices"]
    used = sum(device["memory"]["weights"] + device["memory"]["kv"] for device in devices)
    living = [pid for pid in await asyncio.to_thread(processes_of, deployment.run_dir) if not _is_text_worker(pid)]
    return Holdings(descriptors, len(living), _shared_memory(), used)


def _shared_memory() -> frozenset[str]:
    """Names of what this user has there."""
    found = set()
    for entry in Path("/dev/shm").iterdir():
        with suppress(FileNotFoundError):  # somebody has just removed it
            if entry.stat().st_uid == os.geteuid():
                found.add(entry.name)
    return frozenset(found)


def _is_text_worker(pid: int) -> bool:
    """One of the router's, of which there are as many as there was work for: their number is bounded, not steady."""
    try:
        return b"elasticmoe.services.router.text" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # it has just ended


def _descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


async def rank_pids(deployment: Deployment) -> dict[str, int]:
    """Process ids of the ranks that are ready, by name. Raises ValueError."""
    ranks = (await deployment.get("/v1/layout"))["ranks"]
    return {f"r{rank['replica']}t{rank['tp']}": rank["pid"] for rank in ranks if rank["ready"]}


async def findings_of(deployment: Deployment) -> list[str]:
    """What `check_integrity` of the HMM and of each rank finds, or who does not answer."""
    questions: dict[str, Message] = {"hmm": CheckIntegrity()}
    questions |= {f"rank-{name}": GetRankIntegrity() for name in await rank_pids(deployment)}
    found = []
    for name, question in questions.items():
        try:
            answer = await asyncio.to_thread(_ask, deployment.run_dir, name, question)
        except ElasticMoEError as error:
            found.append(f"{name}: {error.message}")
            continue
        if isinstance(answer, Integrity):
            found += [f"{name}: {finding}" for finding in answer.findings]
    return found


def _ask(run_dir: Path, name: str, question: Message) -> ToScaler:
    client: Client[ToScaler] = Client(run_dir / "sockets" / f"{name}.sock", new_identity("chaos"), scaler.CODEC)
    try:
        return client.call(question, deadline_ms=_ASK_MS)[0]
    finally:
        client.close()
