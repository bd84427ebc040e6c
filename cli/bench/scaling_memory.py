"""Real memory of the devices of several deployments, sampled while a benchmark runs.

A host device's memory is a memfd per space in the HMM; `st_blocks` of it counts pages that exist, whoever made them and
whatever the bookkeeping says. Sampling costs a few system calls, so it hardly disturbs what is measured.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Sequence

from elasticmoe.cli.bench.deployment import Deployment
from elasticmoe.common.devices.names import DeviceId

_SAMPLE_S = 0.05
_LOOK_S = 0.5  # how often to look for new files
_MARK = "/memfd:"
_BLOCK_BYTES = 512


class MemorySampler:
    """`samples`: (monotonic seconds, bytes over all devices of `deployments`), until `stop`.

    `deployments` is the caller's list, which may change at any time.
    """

    def __init__(self, deployments: Sequence[Deployment]) -> None:
        self.samples: list[tuple[float, int]] = []
        self._deployments = deployments
        self._paths: list[str] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sample from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Sample no more. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        looked = 0.0
        while True:
            now = time.monotonic()
            if now - looked >= _LOOK_S:
                looked = now
                self._paths = device_files(self._pids())
            self.samples.append((now, bytes_of(self._paths)))
            await asyncio.sleep(_SAMPLE_S)

    def _pids(self) -> list[int]:
        pids: list[int] = []
        for deployment in self._deployments:
            if (hmm := deployment.pid("hmm")) is not None:
                pids.append(hmm)
        return pids


def device_files(pids: Iterable[int]) -> list[str]:
    """Paths in /proc of processes' files that hold device memory, each file once; none of processes that are gone."""
    found: dict[tuple[int, int], str] = {}
    for pid in pids:
        try:
            for entry in os.scandir(f"/proc/{pid}/fd"):
                if _is_of_device(os.readlink(entry.path)):
                    status = os.stat(entry.path)
                    found.setdefault((status.st_dev, status.st_ino), entry.path)
        except OSError:
            continue  # it has ended, or closed the file
    return list(found.values())


def _is_of_device(target: str) -> bool:
    """Whether a descriptor leads to the file of a device's space, by the name that the device gave it."""
    if not target.startswith(_MARK):
        return False
    try:
        DeviceId.parse(target.removeprefix(_MARK).rpartition(".")[0])
    except ValueError:
        return False
    return True


def bytes_of(paths: Iterable[str]) -> int:
    """Bytes of the pages that these files have; those that are gone have none."""
    total = 0
    for path in paths:
        try:
            total += os.stat(path).st_blocks * _BLOCK_BYTES
        except OSError:
            continue  # its process has ended
    return total
