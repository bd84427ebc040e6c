"""Failpoints do what their files say, once, and nothing where none is armed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.common import failpoint
from elasticmoe.common.protocol.errors import DoesNotFit, ElasticMoEError
from tests.procs.failpoints import Failpoints
from tests.procs.waiting import wait_until


@pytest.fixture
def points(tmp_path: Path) -> Iterator[Failpoints]:
    failpoint.enable(str(tmp_path), "r1t0")
    yield Failpoints(tmp_path)
    failpoint.enable("")


def test_unarmed_and_off_do_nothing(points: Failpoints, tmp_path: Path) -> None:
    failpoint.failpoint("a.b")
    points.arm("a.b", "raise does_not_fit", is_optional=True)
    failpoint.enable("")
    failpoint.failpoint("a.b")
    assert (tmp_path / "a.b.arm").exists()


def test_raises_the_error_of_the_code_once(points: Failpoints) -> None:
    points.arm("a.b", "raise does_not_fit")
    with pytest.raises(DoesNotFit, match=r"failpoint a\.b"):
        failpoint.failpoint("a.b")
    failpoint.failpoint("a.b")
    assert points.wait_hit("a.b") == os.getpid()
    points.arm("a.b", "raise some_code")
    with pytest.raises(ElasticMoEError) as raised:
        failpoint.failpoint("a.b")
    assert raised.value.code == "some_code"


def test_starves_one_allocation(points: Failpoints) -> None:
    testing = pytest.importorskip("_testcapi")
    points.arm("a", "starve 50")

    def allocate() -> int:
        failpoint.failpoint("a")
        return len([[number] for number in range(100)])

    try:
        with pytest.raises(MemoryError):
            allocate()
        assert allocate() == 100
    finally:
        testing.remove_mem_hooks()


def test_only_the_named_process_stops(points: Failpoints) -> None:
    points.arm("a@r0t0", "raise x", is_optional=True)
    failpoint.failpoint("a")
    points.arm("a@r1t0", "raise x")
    with pytest.raises(ElasticMoEError):
        failpoint.failpoint("a")
    points.clear()


def test_waits_for_the_release(points: Failpoints) -> None:
    points.arm("a")
    thread = threading.Thread(target=failpoint.failpoint, args=("a",))
    thread.start()
    points.wait_hit("a")
    assert thread.is_alive()
    points.release("a")
    thread.join(60)
    assert not thread.is_alive()


def test_one_of_many_threads_takes_it(points: Failpoints, tmp_path: Path) -> None:
    points.arm("a", "raise x")
    raised = []

    def run() -> None:
        try:
            failpoint.failpoint("a")
        except ElasticMoEError:
            raised.append(1)

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.hit"]


def test_die_is_sigkill(tmp_path: Path) -> None:
    points = Failpoints(tmp_path)
    points.arm("a", "die")
    code = f"from elasticmoe.common import failpoint as f; f.enable({str(tmp_path)!r}); f.failpoint('a')"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == -signal.SIGKILL
    assert points.wait_hit("a") > 0


def test_hold_gil_stops_every_thread(points: Failpoints) -> None:
    points.arm("a", "hold_gil 0.3")
    thread = threading.Thread(target=failpoint.failpoint, args=("a",))
    last, longest = time.monotonic(), 0.0
    thread.start()
    while thread.is_alive():  # this thread would go on at once, if it could
        now = time.monotonic()
        last, longest = now, max(longest, now - last)
    assert max(longest, time.monotonic() - last) >= 0.3
    points.clear()


def test_a_mistaken_action_is_an_error(points: Failpoints) -> None:
    points.arm("a", "explode")
    with pytest.raises(ValueError, match="explode"):
        failpoint.failpoint("a")


def test_a_fault_that_did_not_fire_fails_the_test(points: Failpoints) -> None:
    points.arm("a", "sleep 0")
    with pytest.raises(AssertionError, match="never reached"):
        points.clear()
    points.arm("a", "sleep 0")
    failpoint.failpoint("a")
    wait_until((points.folder / "a.hit").exists, "hit", 1.0)
    points.clear()
