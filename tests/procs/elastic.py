"""What tests of interrupted scale operations share: a deployment with failpoints, what it holds, and who may fail."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.oracle import Oracle
from tests.procs.clients import Load, Stream
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.waiting import wait_until

DEVICES = 4
STANDBYS = 2
SETTINGS: dict[str, Any] = {
    "max_sequences": 16,
    "kv_bytes": 4 << 20,
    "device_bytes": 64 << 20,
    "granularity": 1
    << 20,  # experts become large enough that KV grows where they leave, and is vacated where they come
    "standbys": STANDBYS,
    "rank_restarts_max": 1_000,
}


@dataclass
class Elastic:
    """A deployment of the oracle model and its failpoints."""

    deployment: Deployment
    points: Failpoints

    def scale(self, **body: Any) -> str:
        """Start an operation; its op_id."""
        return self.deployment.order(**body)

    def resize(self, **body: Any) -> None:
        """Carry a whole operation out."""
        operation = self.deployment.scale(**body)
        assert operation["phase"] == "done", operation

    def operation(self, op_id: str) -> dict[str, Any]:
        """As GET /v1/operations/{op_id} shows it."""
        status, shown = self.deployment.admin_call("GET", f"/v1/operations/{op_id}")
        assert status == 200, shown
        assert isinstance(shown, dict)
        return shown

    def replicas(self) -> list[int]:
        """Replica numbers of the layout in force."""
        layout = self.deployment.admin("/v1/layout")
        return sorted({rank["replica"] for rank in layout["ranks"] if rank["state"] == "used"})


@contextmanager
def start_elastic(model: Path, folder: Path, *, replicas: int, **settings: Any) -> Iterator[Elastic]:
    """A deployment with failpoints in `folder`; stopped, with all its checks, at the end."""
    points = Failpoints(folder)
    fixed = {**SETTINGS, "devices": DEVICES, "failpoint_dir": folder, **settings}
    deployment = Deployment(model, replicas=replicas, **fixed).wait_ready()
    try:
        yield Elastic(deployment, points)
        deployment.stop()
    finally:
        points.forget()
        deployment.discard()


@dataclass(frozen=True)
class Holding:
    """What a deployment holds at rest: everything that an aborted operation must leave as it was."""

    epoch: int
    ranks: dict[str, int]  # process ids
    pages: dict[str, int]  # real bytes of each device, as the HMM counts them
    files: dict[str, int]  # the same, as the kernel counts them: of each memory file of the HMM
    memory: dict[str, dict[str, int]]
    kv_blocks: dict[str, int]
    standby: int
    doorbells: int  # event descriptors that the keeper holds


def holding(elastic: Elastic) -> Holding:
    """What is held now."""
    deployment = elastic.deployment
    layout, devices = deployment.admin("/v1/layout"), deployment.admin("/v1/devices")
    pages = {entry["device"]: entry["pages"] for entry in devices["devices"]}
    files = _file_bytes(deployment.pids["hmm"])
    assert sum(files.values()) >= sum(pages.values()) > 0, (files, pages)
    return Holding(
        epoch=layout["epoch"],
        ranks={f"r{rank['replica']}t{rank['tp']}": rank["pid"] for rank in layout["ranks"]},
        pages=pages,
        files=files,
        memory={entry["device"]: entry["memory"] for entry in devices["devices"]},
        kv_blocks={rank["device"]: rank["kv_blocks"] for rank in layout["ranks"]},
        standby=devices["standby_processes"],
        doorbells=event_descriptors(deployment.pids["keeper"]),
    )


def wait_same(elastic: Elastic, before: Holding, timeout_s: float = 60.0) -> None:
    """Wait until everything is held again as it was. Fails with what differs."""

    def differs() -> list[str]:
        try:
            now = holding(elastic)
        except httpx.HTTPError as error:
            return [repr(error)]
        return [
            f"{name}: {getattr(before, name)} was {getattr(now, name)}"
            for name in Holding.__dataclass_fields__
            if getattr(before, name) != getattr(now, name)
        ]

    try:
        wait_until(lambda: not differs(), "held as before", timeout_s)
    except AssertionError:
        raise AssertionError("\n".join([*differs(), elastic.deployment.explain()])) from None


def _file_bytes(pid: int) -> dict[str, int]:
    """Real bytes of a process's device memory files by name; files without pages left out."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        try:
            name, blocks = os.readlink(path).removesuffix(" (deleted)"), os.stat(path).st_blocks
        except FileNotFoundError:
            continue  # closed meanwhile
        if name.startswith("/memfd:") and ":" in name.removeprefix("/memfd:") and blocks:
            found[name] = blocks * 512
    return found


def event_descriptors(pid: int) -> int:
    """How many event descriptors a process holds; the keeper: one per doorbell."""
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            count += "eventfd" in os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue  # closed meanwhile
    return count


async def in_thread(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call something that blocks while clients stream in the loop."""
    return await asyncio.to_thread(call, *arguments, **named)


class TolerantLoad(Load):
    """As Load; a connection that breaks is a stream's error `connection`, and not the test's end."""

    async def _client(self) -> None:
        while not self._stopping:
            prompt, max_tokens = self._rng.choice(self._prompts), self._rng.randint(*self._lengths)
            stream = Stream(prompt, max_tokens)
            try:
                stream = await self._stream(prompt, max_tokens)
            except httpx.HTTPError:
                stream.error = "connection"
            self.streams.append(stream)
            if stream.error is not None:
                await asyncio.sleep(0.05)  # its server is starting again


class Expected:
    """What the oracle says to the prompts of a load, each computed once."""

    def __init__(self, model: Path) -> None:
        self._oracle = Oracle(model)
        self._texts: dict[tuple[int, ...], str] = {}

    def check(self, streams: Iterable[Stream], may_fail: frozenset[str] = frozenset()) -> int:
        """All that came is right, and whole where no error that is allowed came. Returns the tokens compared."""
        num_tokens = 0
        for stream in streams:
            key = tuple(stream.prompt)
            if len(self._texts.get(key, "")) < stream.max_tokens:
                self._texts[key] = bytes(self._oracle.generate(key, stream.max_tokens)).decode("latin-1")
            text = self._texts[key][: stream.max_tokens]
            if stream.error is not None:
                assert stream.error in may_fail, f"a request failed with {stream.error}"
                assert text.startswith(stream.text), f"{stream.text!r} does not begin {text!r}"
            else:
                assert (stream.text, stream.finish) == (text, "length")
            num_tokens += len(stream.text)
        return num_tokens
