"""Ranks that live and do not get on: noticed by their progress within 3 s, killed, replaced, without losing a request
(promise P9)."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

EJECTED_S = 3.0
LOOK_S = 0.3  # the test looks whether it is dead
ALONE_S = 4 * 2.4
GAP_S = 4.0
TRIALS = 4  # of which one keeps the limits; where none does, it is not for other work of the machine
SLOW_S = 2.0  # how long a rank may be stopped that is sure to stay
SETTINGS: dict[str, Any] = {
    "max_sequences": 32,
    "kv_bytes": 4 << 20,
    "device_bytes": 64 << 20,
    "standbys": 2,
    "rank_stall_s": 2.4,
    "rank_restarts_max": 1_000,
}


def is_alive(pid: int) -> bool:
    """Whether the process runs or is stopped; one that was killed and awaits its parent counts as dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def stop_rank(deployment: Deployment, name: str) -> tuple[int, float]:
    """Stop one rank, and wait until it is dead and another serves in its seat. Returns the old process id, and the
    seconds until it was dead."""
    begun = time.monotonic()
    pid = deployment.kill(name, signal.SIGSTOP)
    wait_until(lambda: not is_alive(pid), f"{name} ejected", 60.0)
    took_s = time.monotonic() - begun
    print(f"{name} ejected {took_s:.2f} s after it was stopped")
    wait_until(lambda: deployment.rank_pids().get(name) not in (None, pid), f"{name} replaced", 60.0)
    deployment.wait_serving()
    return pid, took_s


def wait_held_rank_ejected(points: Failpoints, name: str) -> int:
    """Wait until a rank has come to the failpoint, and until it is dead, sooner than if nobody waited for it. Returns
    its process id. EJECTED_S is for `stop_rank` to prove: the scaler does not count time in which it had no core."""
    pid = points.wait_hit(name)
    begun = time.monotonic()
    wait_until(lambda: not is_alive(pid), f"the rank at {name} ejected", ALONE_S)
    print(f"{name} ejected {time.monotonic() - begun:.2f} s after it was held")
    return pid


async def slow_down(deployment: Deployment, load: TimedLoad, name: str) -> dict[str, int]:
    """Stop one rank for a second, three times: slow, but it gets on, so it stays. The process ids of all ranks.
    Where this process itself was late to let it go on, it may have been ejected, and rightly so: that proves nothing,
    and is done again."""
    before = deployment.rank_pids()
    names, times = before.keys(), 0
    while times < 3:
        begun = time.monotonic()
        os.kill(before[name], signal.SIGSTOP)
        await asyncio.sleep(1.0)  # the fault's length, not a wait for something
        with suppress(ProcessLookupError):
            os.kill(before[name], signal.SIGCONT)
        stopped_s = time.monotonic() - begun
        await load.wait_streams(8)
        if stopped_s <= SLOW_S:
            assert deployment.rank_pids() == before
            times += 1
        else:
            print(f"{name} was stopped for {stopped_s:.2f} s, not for one: once more")
            await asyncio.to_thread(wait_until, lambda: names <= deployment.rank_pids().keys(), "all ranks there")
            before = deployment.rank_pids()
    return before


async def test_a_stopped_rank_is_ejected_a_slow_one_is_not_and_no_request_notices(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    points = Failpoints(tmp_path / "failpoints")
    deployment = deploy("oracle", replicas=3, devices=4, failpoint_dir=str(points.folder), **SETTINGS)
    async with TimedLoad(deployment.base_url, clients=16, seed=9) as load:
        await load.wait_streams(20)
        before = await slow_down(deployment, load, "r0t0")
        for _ in range(TRIALS):
            begin = load.now()
            old, took_s = await asyncio.to_thread(stop_rank, deployment, "r1t0")
            await load.wait_streams(40)
            longest_s = load.longest_gap(begin)
            print(f"longest gap of a stream around the ejection: {longest_s:.2f} s")
            if took_s <= EJECTED_S + LOOK_S and longest_s <= GAP_S:
                break
        else:
            raise AssertionError(f"never ejected within {EJECTED_S} s with gaps of {GAP_S} s at most")
        # A late SIGCONT finds nobody: what was ejected is dead, and its number is no rank's any more.
        assert old not in deployment.rank_pids().values()
        assert not is_alive(old)
        # A call in the work loop that does not return, in the midst of a resize: the seat's next rank does its part.
        points.arm("rank.apply@r0t0", "sleep 60")
        operation = await asyncio.to_thread(deployment.scale, replicas=4)
        assert operation["phase"] == "done", operation
        points.clear()
        assert deployment.rank_pids()["r0t0"] != before["r0t0"]
        # A C call that never gives the interpreter's lock back: no thread of that process could say that it lives.
        points.arm("rank.apply@r2t0", "hold_gil 60")
        resize = asyncio.create_task(asyncio.to_thread(deployment.scale, remove=[3]))
        held = await asyncio.to_thread(wait_held_rank_ejected, points, "rank.apply@r2t0")
        operation = await resize
        assert operation["phase"] == "done", operation
        assert held == before["r2t0"] != deployment.rank_pids()["r2t0"]
        await load.wait_streams(16)
    check_load_against_oracle(load.streams, model_folder("oracle"))
    assert "rank ejected" in deployment.log("scaler")
    check_integrity(deployment)
    assert deployment.stop().count("error") == 0


def test_a_rank_alone_that_is_stopped_is_ejected_too(deploy: Callable[..., Deployment]) -> None:
    """Nobody waits for it, but it is in no long step: it does not run."""
    deployment = deploy("oracle", replicas=1, **SETTINGS)
    assert any(stop_rank(deployment, "r0t0")[1] <= EJECTED_S + LOOK_S for _ in range(TRIALS))
    assert "the limit is 2.4 s" in deployment.log("scaler")
    deployment.wait_serving()
    check_integrity(deployment)
    deployment.stop()
