"""What a deployment at rest holds, counted from outside, process by process; and scale cycles after which it must be
the same (promise P17).

What can be counted must not change at all. Private memory may grow by PRIVATE_KIB_MAX per cycle, as fitted: Python and
the C library take memory from the kernel in arenas of about 1 MiB, and a single one in the midst of a hundred cycles
looks like 15 KiB per cycle (1.5 * 1024 KiB / 100). A leak of less than that cannot be told.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from elasticmoe.common.record import start_ticks
from elasticmoe.common.store import EVENTS_MAX, LAYOUTS_MAX, OPERATIONS_MAX
from elasticmoe.services.router.dispatch.dispatcher import LEAVE_S
from tests.procs.clients import Load
from tests.procs.deployment import Deployment
from tests.procs.faults import store_client
from tests.procs.waiting import processes_of, wait_until

REPLICAS = 2  # between two cycles
STANDBYS = 2
SETTINGS: dict[str, Any] = {"max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": STANDBYS}
QUIET_S = LEAVE_S + 1.0  # the router keeps what it has of a rank that left for a while
SETTLE_S = QUIET_S + 14.0
PAUSE_S = 0.05
EVENTS_SLACK = 200  # the store trims its stream of events by whole nodes of a hundred
OTHER = "other rank"  # than the one that is spared
PRIVATE_KIB_MAX = 16.0
CONTEXT_DESCRIPTORS, CONTEXT_THREADS = 6, 2  # of one ZeroMQ context, without the connections themselves
RANK_CONTEXTS_MAX = 2 + REPLICAS  # its own socket, one to the HMM, one to each other seat
RANK_SOCKETS_MAX = 8 * RANK_CONTEXTS_MAX
_SERIAL = re.compile(r":\[\d+\]$")  # of an inode


@dataclass(frozen=True)
class Sample:
    """`counts`: what must not change from one cycle to another, by name. `private_kib`: memory that each process has
    for itself; shared pages are counted where they live, as bytes of device files. `targets`: what the descriptors of
    each process are of, to explain a difference."""

    counts: dict[str, int]
    private_kib: dict[str, int]
    targets: dict[str, Counter[str]] = field(default_factory=dict)

    def differs(self, before: Sample) -> dict[str, tuple[int, int]]:
        """The counts that are not what they were: (before, now)."""
        names = sorted(before.counts.keys() | self.counts.keys())
        pairs = {name: (before.counts.get(name, 0), self.counts.get(name, 0)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def explain(self, before: Sample) -> str:
        """What differs, and which descriptors came and went; empty when nothing differs."""
        found = [f"{name}: {was}, now {now}" for name, (was, now) in self.differs(before).items()]
        for name in sorted({entry.partition(" of ")[2].partition(":")[0] for entry in found} & self.targets.keys()):
            was, now = before.targets.get(name, Counter()), self.targets[name]
            found.append(f"{name} has more: {dict(now - was)}, fewer: {dict(was - now)}")
        return "; ".join(found)


async def cycles(deployment: Deployment, count: int, *, seed: int, spare_from: int) -> AsyncIterator[int]:
    """Grow to one replica more and take an arbitrary one away, `count` times; each cycle's number when it is over.

    From the cycle `spare_from` on the replica with the lowest number is spared: its rank lives through all of them, so
    that what a rank leaks shows.
    """
    rng = random.Random(seed)
    for number in range(1, count + 1):
        grown = await asyncio.to_thread(deployment.scale, replicas=REPLICAS + 1)
        assert grown["phase"] == "done", grown
        present = sorted(rank["replica"] for rank in (await asyncio.to_thread(deployment.admin, "/v1/layout"))["ranks"])
        gone = rng.choice(present[1:] if number >= spare_from else present)
        shrunk = await asyncio.to_thread(deployment.scale, remove=[gone])
        assert shrunk["phase"] == "done", shrunk
        yield number


class LightLoad(Load):
    """As Load, with a pause after each request: the cores are for the cycles."""

    async def _client(self) -> None:
        while not self._stopping:
            prompt, max_tokens = self._rng.choice(self._prompts), self._rng.randint(*self._lengths)
            self.streams.append(await self._stream(prompt, max_tokens))
            await asyncio.sleep(PAUSE_S)


def settled_sample(deployment: Deployment) -> Sample:
    """What is held once nothing has come or gone for QUIET_S. Where something always does, the last sample."""
    last: list[Sample | None] = [None]
    since = [time.monotonic()]

    def is_quiet() -> bool:
        now = sample(deployment)
        if now is None or last[0] is None or now.differs(last[0]):
            since[0] = time.monotonic()
        last[0] = now or last[0]
        return time.monotonic() - since[0] >= QUIET_S

    try:
        wait_until(is_quiet, "at rest", SETTLE_S)
    except AssertionError:
        pass  # what keeps changing shows in the comparison
    assert last[0] is not None, "it did not come to rest"
    return last[0]


def sample(deployment: Deployment) -> Sample | None:
    """What is held now; None while ranks or standbys are still to come or to go."""
    try:
        layout, devices = deployment.admin("/v1/layout"), deployment.admin("/v1/devices")
    except httpx.HTTPError:
        return None
    ranks = sorted(layout["ranks"], key=lambda rank: rank["replica"])
    if layout["phase"] != "serving" or devices["standby_processes"] != STANDBYS:
        return None
    if len(ranks) != REPLICAS or not all(rank["ready"] for rank in ranks):
        return None
    counts: dict[str, int] = {}
    private: dict[str, int] = {}
    targets: dict[str, Counter[str]] = {}
    try:
        for name, pid in _named(deployment, [rank["pid"] for rank in ranks]).items():
            held = _of_process(pid, is_rank=name.endswith("rank"))
            counts |= {f"{what} of {name}": number for what, number in held.items()}
            private[name] = _private_kib(pid)
            targets[name] = Counter(_SERIAL.sub("", target) for target in _targets(pid))
    except OSError:
        return None  # one of them ended meanwhile
    counts["processes"] = len(processes_of(deployment.run_dir))
    counts |= {f"{name} files": len(list((deployment.run_dir / name).iterdir())) for name in ("sockets", "state")}
    # By devices together: which of them is used depends on the replica that was taken away.
    counts["device pages"] = sum(entry["pages"] for entry in devices["devices"])
    counts["devices attached"] = sum(bool(entry["attached"]) for entry in devices["devices"])
    return Sample(counts | _store_counts(deployment), private, targets)


def _named(deployment: Deployment, rank_pids: list[int]) -> dict[str, int]:
    """Every process but the standbys, which come and go."""
    pids = dict(deployment.pids) | {"launcher": deployment.launcher.pid}
    forked = [pid for pid in _children(pids["launcher"]) if _is_template(pid)]
    pids["template"] = min(forked, key=lambda pid: start_ticks(pid) or 0)  # the others were forked from it
    return pids | dict(zip(("spared rank", OTHER), rank_pids, strict=True))


def _of_process(pid: int, *, is_rank: bool) -> dict[str, int]:
    """Descriptors, threads, children, bytes of shared memory that are mapped.

    A rank keeps its connection to a peer for a minute after the last sequence that it handed over there, so how many it
    has says nothing: they are counted apart, and only whether they are too many goes in.
    """
    folder = Path(f"/proc/{pid}")
    threads = [(task / "comm").read_text().strip() for task in (folder / "task").iterdir()]
    targets = _targets(pid)
    found = {"descriptors": len(targets), "threads": len(threads)}
    if is_rank:
        contexts = sum(name.startswith("ZMQbg/IO") for name in threads)
        sockets = sum(target.startswith("socket:") for target in targets)
        found["descriptors"] -= sockets + contexts * CONTEXT_DESCRIPTORS
        found["threads"] -= contexts * CONTEXT_THREADS
        found["connections beyond their limit"] = int(contexts > RANK_CONTEXTS_MAX or sockets > RANK_SOCKETS_MAX)
    mapped = 0
    for line in (folder / "maps").read_text().splitlines():
        span, flags = line.split(maxsplit=2)[:2]
        if flags.endswith("s"):
            start, end = (int(part, 16) for part in span.split("-"))
            mapped += end - start
    return found | {"children": len(_children(pid)), "shared bytes mapped": mapped}


def _targets(pid: int) -> list[str]:
    return [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def _is_template(pid: int) -> bool:
    return b"elasticmoe.services.worker.pool.template" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _children(pid: int) -> list[int]:
    """Living children by number. Of the launcher: also the template, and what it forked."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


def _private_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _store_counts(deployment: Deployment) -> dict[str, int]:
    """Keys, but for the lease, which comes and goes; and a 1 for each history that is longer than it may be."""
    with store_client(deployment) as client:
        keys = {key.decode().rpartition(":")[2]: key for key in client.scan_iter()}
        bounded = {
            "events": client.xlen(keys["events"]) > EVENTS_MAX + EVENTS_SLACK,
            "layouts": client.xlen(keys["layouts"]) > LAYOUTS_MAX,
            "operations": client.llen(keys["operations"]) > OPERATIONS_MAX,
        }
    found = {f"{name} beyond their limit": int(is_beyond) for name, is_beyond in bounded.items()}
    return found | {"keys": len(keys.keys() - {"lease", "operation"})}


def growing(samples: list[Sample], cycles_between: int) -> dict[str, float]:
    """What grows or shrinks, per cycle, beyond what it may: counts by one or more over all samples (a connection that
    is being made or closed when a sample is taken is no growth), private memory by more than PRIVATE_KIB_MAX."""
    names = {name for sample in samples for name in sample.counts}
    counted = {name: [float(sample.counts.get(name, 0)) for sample in samples] for name in names}
    slopes = {name: slope(values) for name, values in counted.items()}
    found = {name: each / cycles_between for name, each in slopes.items() if abs(each) * len(samples) >= 1.0}
    for name in samples[0].private_kib.keys() - {OTHER}:  # that one is a new process every few cycles
        kib = slope([float(sample.private_kib[name]) for sample in samples]) / cycles_between
        if kib > PRIVATE_KIB_MAX:
            found[f"KiB of {name}"] = kib
    return found


def slope(values: list[float]) -> float:
    """By how much they grow from one to the next: the slope of the line that fits them best."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    spread = sum((at - middle) ** 2 for at in range(len(values)))
    return sum((at - middle) * (value - mean) for at, value in enumerate(values)) / spread if spread else 0.0
