"""A disk that fills up at every stage of an operation (promise P12): it is refused, done, undone or waits, each time at
once and with the reason. Room for its records is reserved, so one that has begun ends; where somebody takes that too,
it is undone before the commit is durable, and waits afterwards. Streams notice nothing."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import ROOT, Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.faults import store_client
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import check_integrity
from tests.procs.small_disk import Full
from tests.procs.waiting import processes_of, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(300)]

AT_ONCE_S = 60.0  # beside other work; what it must not be are the 600 s of an operation's deadline
SETTINGS: dict[str, Any] = {"max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 2}


class Scene:
    """A deployment on a small disk, with failpoints that are elsewhere."""

    def __init__(self, deployment: Deployment, disk: Path, failpoints: Failpoints, client: redis.Redis) -> None:
        self.deployment, self.disk, self.failpoints, self.client = deployment, disk, failpoints, client
        self.reserve = deployment.run_dir / "store" / "reserve"

    def order(self, **body: Any) -> tuple[int, str]:
        """Status and error code of POST /v1/scale; 0 where nobody answers."""
        try:
            status, answer = self.deployment.admin_call("POST", "/v1/scale", body)
        except httpx.HTTPError:
            return 0, ""
        return status, answer.get("error", {}).get("code", "") if status >= 400 else ""

    def begin(self, op_id: str, **body: Any) -> None:
        """Start an operation, as soon as there is seen to be room again."""
        wait_until(lambda: self.order(op_id=op_id, **body)[0] == 202, f"{op_id} is accepted", 60.0)

    def show(self, op_id: str) -> dict[str, Any]:
        """The operation, as it is now."""
        shown: dict[str, Any] = self.deployment.admin_call("GET", f"/v1/operations/{op_id}")[1]
        return shown

    def wait_noticed(self) -> None:
        """Until the store has found that it has no room: it takes one write before."""

        def is_refused() -> bool:
            try:
                self.client.set("noise", bytes(5_000))
            except redis.ResponseError as error:
                return str(error).startswith("MISCONF")
            return False

        wait_until(is_refused, "the store has noticed", 60.0)

    def begin_and_fill(self, place: str, op_id: str, *, is_greedy: bool, **body: Any) -> Full:
        """Start an operation; fill the disk while its journal is at `place`, and let it go on."""
        self.failpoints.arm(place)
        self.begin(op_id, **body)
        self.failpoints.wait_hit(place)
        full = Full(self.disk, is_greedy=is_greedy, held=[self.reserve] if is_greedy else []).__enter__()
        self.wait_noticed()
        self.failpoints.release(place)
        return full


def test_a_disk_that_fills_up_at_any_stage(
    model_folder: Callable[[str], Path], small_disk: Path, deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    failpoints = Failpoints(tmp_path / "failpoints")
    settings = SETTINGS | {"failpoint_dir": str(failpoints.folder), "history": "false"}
    deployment = deploy("oracle", replicas=2, devices=3, **settings)
    with store_client(deployment) as client:
        scene = Scene(deployment, small_disk, failpoints, client)
        asyncio.run(_beside_streams(scene, model_folder("oracle")))
    check_integrity(deployment)
    assert not (deployment.run_dir / "store" / "reserve").exists()
    # Not `stop`, which reads the history: that ends where the disk is full.
    deployment.launcher.send_signal(signal.SIGTERM)
    assert deployment.launcher.wait(60) == 0
    assert not processes_of(deployment.run_dir)


async def _beside_streams(scene: Scene, model: Path) -> None:
    async with TimedLoad(scene.deployment.base_url, clients=8, seed=6) as load:
        await load.wait_streams(8)
        for stage in (before_the_order, in_what_is_reserved, cancelled, undone, after_the_commit, in_the_second_leg):
            begun = time.monotonic()
            await asyncio.to_thread(stage, scene)
            print(f"{stage.__name__}: {time.monotonic() - begun:.1f} s")
            await load.wait_streams(8)
    assert load.broken == []
    check_load_against_oracle(load.streams, model)


def before_the_order(scene: Scene) -> None:
    """Refused at once, though the store has noticed nothing yet; and nothing is held."""
    with Full(scene.disk):
        assert scene.order(replicas=3) == (503, "storage_full")
        assert not scene.reserve.exists()
        scene.wait_noticed()
        assert scene.order(replicas=3) == (503, "storage_full")
    assert scene.deployment.admin("/v1/operations") == {"operations": []}


def in_what_is_reserved(scene: Scene) -> None:
    """Between the order and the commit: it is done, and the next one is refused."""
    full = scene.begin_and_fill("scaler.leg1.commit.before", "grow", is_greedy=False, replicas=3)
    try:
        ended = scene.deployment.wait_operation("grow")
        assert ended["phase"] == "done", f"{ended}\n{scene.deployment.explain()}"
        full.take()  # of what was reserved, what was not needed
        wait_until(lambda: not scene.reserve.exists(), "nothing is reserved")
        assert scene.order(replicas=2) == (503, "storage_full")
    finally:
        full.__exit__()


def cancelled(scene: Scene) -> None:
    """A cancel is taken while the commit is not in the store."""
    place = "scaler.leg1.commit.before"
    scene.failpoints.arm(place)
    scene.begin("cancelled", replicas=2)
    scene.failpoints.wait_hit(place)
    wait_until(lambda: scene.show("cancelled")["phase"] == "commit", "the commit waits for the store")
    status, answer = scene.deployment.admin_call("DELETE", "/v1/operations/cancelled")
    assert status in (200, 202), answer
    assert scene.deployment.wait_operation("cancelled")["outcome"] == "cancelled"
    scene.failpoints.release(place)


def undone(scene: Scene) -> None:
    """Between the order and the commit, and what was reserved is taken too: undone, and who waits is told why."""
    place = "scaler.leg1.commit.before"
    scene.failpoints.arm(place)
    command = [sys.executable, "-m", "elasticmoe.cli.main", "scale", "--replicas", "2", "--wait", "--op-id", "undone"]
    command += ["--run-dir", str(scene.deployment.run_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        scene.failpoints.wait_hit(place)
        with Full(scene.disk, is_greedy=True, held=[scene.reserve]):
            scene.wait_noticed()
            scene.failpoints.release(place)
            begun = time.monotonic()
            out, err = waiting.communicate(timeout=60)
            assert time.monotonic() - begun < AT_ONCE_S
    assert (waiting.returncode, err.count("\n")) == (1, 1), out + err
    assert err.startswith("elasticmoe: storage_full: operation undone was undone: the operation's records find no room")
    assert len(scene.deployment.rank_pids()) == 3


def after_the_commit(scene: Scene) -> None:
    """Forward, without a record; a scaler that begins with the older one comes to the same end."""
    full = scene.begin_and_fill("scaler.leg1.migrate.before", "shrink", is_greedy=True, replicas=2)
    try:
        assert scene.deployment.wait_operation("shrink", AT_ONCE_S)["phase"] == "done"
        old = scene.deployment.kill("scaler")
    finally:
        full.__exit__()
    scene.deployment.wait_restarted("scaler", old)
    wait_until(lambda: scene.order(op_id="shrink", replicas=2)[0] == 202, "the next scaler has read the journal", 60.0)
    assert scene.deployment.wait_operation("shrink")["phase"] == "done"
    assert len(scene.deployment.rank_pids()) == 2


def in_the_second_leg(scene: Scene) -> None:
    """There is no way back: it waits, says for what, and is done when there is room."""
    full = scene.begin_and_fill("scaler.leg2.prepare.before", "again", is_greedy=True, replicas=3)
    try:
        wait_until(lambda: "out of memory or disk" in scene.show("again")["reason"], "the reason is told", AT_ONCE_S)
        status, answer = scene.deployment.admin_call("DELETE", "/v1/operations/again")
        assert (status, answer["error"]["code"]) == (409, "committed")
    finally:
        full.__exit__()
    assert scene.deployment.wait_operation("again")["phase"] == "done"
    assert len(scene.deployment.rank_pids()) == 3
