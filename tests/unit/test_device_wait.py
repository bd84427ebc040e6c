"""A rank whose thread is blocked until its device has computed: what others see of it, up to the watchdog's verdict."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.scaler import DeviceStatus, HmmStatus, PoolRank, PoolStatus
from elasticmoe.native.bus import Bus
from elasticmoe.services.scaler.control.watchdog import ALONE_FACTOR, Watched, pulses_of, watch
from elasticmoe.services.worker.exchange.shm_barrier import ShmBarrier
from elasticmoe.services.worker.model.batch import BatchPart
from tests.unit.backends import ON_CPU, QueuedBackend
from tests.unit.ranks import Ranks
from tests.unit.transitions import cluster_of

STALL_S, TURN_S = 2.4, 0.05
SECONDS_MAX = 30.0
WORK = [[BatchPart([5, 6, 7], 0, [3], 1)]]


class SlowDevice(QueuedBackend):
    """Computes when it is let."""

    def __init__(self, tell_waiting: Callable[[bool], None]) -> None:
        super().__init__(tell_waiting)
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.fails = False

    def _synchronize(self) -> None:
        self.has_begun.set()
        assert self.may_end.wait(SECONDS_MAX)
        if self.fails:
            raise RuntimeError("the device is lost")
        super()._synchronize()


class World:
    """One rank with a slow device, and what HMM and pool say of it."""

    def __init__(self, directory: Path) -> None:
        self.barrier: ShmBarrier | None = None
        self.device = SlowDevice(self._tell)
        self.ranks = Ranks(directory, 1, backend=lambda: self.device)
        self.bus: Bus = self.ranks.exchanges[0]._bus
        self.barrier = ShmBarrier(self.bus, {}, 0)

    def _tell(self, is_waiting: bool) -> None:
        assert self.barrier is not None
        self.barrier.tell_waiting(is_waiting)

    def ejected_after(self) -> float:
        """When the watchdog ejects the rank, if nothing changes; its thread is seen asleep at every look."""
        watched, bus = Watched(), self.bus
        progress, is_waiting = bus.progress(0), bus.is_waiting_for_device(0)
        device = DeviceStatus("host:0", 9, 3, 3, 3, 0, 4, 8, "rank:a", progress=progress, is_waiting=is_waiting)
        hmm = HmmStatus("ready", 0, 0, None, (device,), 1, (0,), True)
        pool = PoolStatus(0, (PoolRank(RankId(0, 0), 0, "host:0", "rank:a", 7, True, is_asleep=True),))
        for turn in range(1_000):
            watched, ejected, _ = watch(watched, STALL_S, turn * TURN_S, pulses_of(cluster_of(hmm, pool)))
            if ejected:
                return turn * TURN_S
        raise AssertionError("never")


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_that_waits_for_its_device_is_not_asleep(directory: Path, fails: bool) -> None:
    world = World(directory)
    world.device.fails = fails
    errors: list[BaseException] = []

    def step() -> None:
        try:
            world.ranks.step(WORK)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    try:
        assert world.device.has_begun.wait(SECONDS_MAX)
        assert world.bus.is_waiting_for_device(0)
        assert world.ejected_after() == pytest.approx(STALL_S * ALONE_FACTOR, abs=2 * TURN_S)
    finally:
        world.device.may_end.set()
        thread.join()
    assert len(errors) == fails
    # It goes on, or has failed: what blocks it now is not the device.
    assert not world.bus.is_waiting_for_device(0)
    assert world.ejected_after() == pytest.approx(STALL_S, abs=2 * TURN_S)


@pytest.mark.parametrize("name", ON_CPU)
def test_backends_that_compute_at_once_never_wait(name: str, directory: Path) -> None:
    told: list[bool] = []
    Ranks(directory, 1, backend=lambda: ON_CPU[name](told.append)).step(WORK)
    assert told == []
