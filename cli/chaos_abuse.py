"""The hostile client of `elasticmoe chaos --abuse`, and what it costs others.

The client is a process of its own (chaos_abuser.py), so that its work delays no honest client here. It says what it
begins and what came of it, a line each. Meanwhile another one (chaos_prober.py) asks for /health, as an orchestrator
would, and the resident memory of the processes that strangers reach is looked at.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from elasticmoe.cli.bench.deployment import Deployment
from elasticmoe.cli.settings import importing_environment

WATCHED = {"router": 512, "scaler": 256}  # MiB that each may hold at any time
GIVEN_BACK_MIB = 64  # more than before the abuse, at most, once it is over
GIVEN_BACK_S_MAX = 30.0
GAP_FACTOR_MAX = 3.0  # an honest stream's longest pause, beside that of a run without abuse
HEALTH_S_MAX = 0.2
_LOOK_S = 0.1
_END_S_MAX = 60.0
_PAGES_PER_MIB = 256


@dataclass
class Abuse:
    """What was tried and seen. `answers`: (attack, status or word) -> count. Memory in MiB, resident.

    `before` and `after`: at rest; `peaks`: at any look. `health`: of each probe (attacks under way, when it began on
    the monotonic clock, seconds until its answer).
    """

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    health: list[tuple[tuple[str, ...], float, float]] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Attacks that were answered with an internal error."""
        return sorted(f"{name}: {word} {count}x" for (name, word), count in self.answers.items() if word == "500")

    def without(self, windows: Sequence[tuple[float, float]]) -> Abuse:
        """As if no probe had been under way in `windows` of (begin, end): while the router was away, for instance."""
        health = [
            (names, begun, seconds)
            for names, begun, seconds in self.health
            if not any(begun <= end and begun + seconds >= begin for begin, end in windows)
        ]
        return replace(self, health=health)

    def health_percentile(self, percent: float) -> float:
        """Of the times that probes waited, in seconds."""
        return _percentile([seconds for *_, seconds in self.health], percent)

    def health_beside(self, percent: float) -> dict[str, float]:
        """The same of the probes beside each attack, slowest first."""
        names = {name for under_way, *_ in self.health for name in under_way}
        beside = {name: [seconds for under_way, _, seconds in self.health if name in under_way] for name in names}
        found = {name: _percentile(waited, percent) for name, waited in beside.items()}
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))

    def slowest_health(self) -> tuple[float, tuple[str, ...]]:
        """The longest time that a probe waited, in seconds, and what was under way."""
        under_way, _, seconds = max(self.health, key=lambda probe: probe[2], default=((), 0.0, 0.0))
        return seconds, under_way


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


@asynccontextmanager
async def abused(deployment: Deployment, model: str, seed: int) -> AsyncIterator[Abuse]:
    """A hostile client for the time of the context; what it yields is complete afterwards. Raises ValueError where the
    client's process fails, or the prober's."""
    seen, under_way = Abuse(before=_memory(deployment)), Counter[str]()
    url = urlsplit(deployment.url)
    looking = asyncio.create_task(_look(deployment, seen))
    try:
        async with (
            _child(
                "elasticmoe.cli.chaos_prober",
                [str(url.hostname), str(url.port)],
                lambda line: _probed(line, seen, under_way),
            ),
            _child(
                "elasticmoe.cli.chaos_abuser",
                [str(deployment.run_dir), model, str(seed)],
                lambda line: _attacked(line, seen, under_way),
            ),
        ):
            yield seen
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    await _wait_given_back(deployment, seen)


@asynccontextmanager
async def _child(module: str, arguments: list[str], on_line: Callable[[str], None]) -> AsyncIterator[None]:
    """A process that says what it does, until its standard input ends."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=pipe, stdout=pipe, env=importing_environment()
    )
    assert child.stdin is not None
    assert child.stdout is not None
    listening = asyncio.create_task(_listen(child.stdout, on_line))
    try:
        yield
        child.stdin.close()  # that is its end
        async with asyncio.timeout(_END_S_MAX):
            await listening
            if await child.wait():
                raise ValueError(f"{module} ended with status {child.returncode}")
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        if child.returncode is None:
            child.kill()
            await child.wait()


async def _listen(output: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    async for line in output:
        on_line(line.decode())


def _attacked(line: str, seen: Abuse, under_way: Counter[str]) -> None:
    """`> NAME` when an attack begins, `< NAME WORD` when it has ended."""
    sign, name, *word = line.split()
    under_way[name] += 1 if sign == ">" else -1
    if word:
        seen.answers[name, word[0]] += 1


def _probed(line: str, seen: Abuse, under_way: Counter[str]) -> None:
    begun, seconds = map(float, line.split())
    seen.health.append((tuple(+under_way), begun, seconds))


async def _look(deployment: Deployment, seen: Abuse) -> None:
    while True:
        for name, mib in _memory(deployment).items():
            seen.peaks[name] = max(mib, seen.peaks.get(name, 0.0))
        await asyncio.sleep(_LOOK_S)


async def _wait_given_back(deployment: Deployment, seen: Abuse) -> None:
    """Note what is held after the abuse, as soon as it is little enough, or after GIVEN_BACK_S_MAX."""
    deadline = time.monotonic() + GIVEN_BACK_S_MAX
    while True:
        seen.after = now = _memory(deployment)
        is_little = all(mib <= seen.before.get(name, 0.0) + GIVEN_BACK_MIB for name, mib in now.items())
        if is_little or time.monotonic() > deadline:
            return
        await asyncio.sleep(_LOOK_S)


def _memory(deployment: Deployment) -> dict[str, float]:
    """Resident MiB of each watched process that runs."""
    pids = {name: deployment.pid(name) for name in WATCHED}
    pages = {name: _resident_pages(pid) for name, pid in pids.items() if pid is not None}
    return {name: count / _PAGES_PER_MIB for name, count in pages.items() if count is not None}


def _resident_pages(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1])
    except OSError:
        return None  # it has just ended
