"""How much of the machine others took while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection

import msgspec
import psutil


class Interference(msgspec.Struct, frozen=True):
    """Cores that were busy for others, and those that the host took away (steal), on average; of those cores that this
    process may use."""

    others_cores: float
    stolen_cores: float


class Meter:
    """Measures from its making until `read`. `own`: the processes that are measured, or measure. The processor time of
    one that ends meanwhile counts as others'."""

    def __init__(self, own: Callable[[], Collection[psutil.Process]]) -> None:
        self._own = own
        self._began = time.monotonic()
        self._busy_s, self._stolen_s = _machine()
        self._own_s = _sum(own())

    def read(self) -> Interference:
        """The averages so far."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        busy_s, stolen_s = _machine()
        others_s = busy_s - self._busy_s - (_sum(self._own()) - self._own_s)
        return Interference(max(0.0, others_s) / seconds, (stolen_s - self._stolen_s) / seconds)


def _machine() -> tuple[float, float]:
    """Seconds for which cores were busy, and for which the host took them away, since the machine's start."""
    cores = psutil.cpu_times(percpu=True)
    mine = [cores[number] for number in os.sched_getaffinity(0)]
    busy_s = sum(core.user + core.nice + core.system + core.irq + core.softirq for core in mine)
    return busy_s, sum(core.steal for core in mine)


def _sum(processes: Collection[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it has ended
        total += times.user + times.system
    return total
