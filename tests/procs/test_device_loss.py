"""A device whose memory is gone: the deployment goes on without it, and every stream gets every token."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.devices import standins
from tests.procs.clients import Load, check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

WEIGHT_BYTES = 70_000  # of a rank's share, at least; what it has of KV and ledger depends on the load
SETTINGS: dict[str, Any] = {"max_sequences": 48, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 3}


def ranks_of(deployment: Deployment) -> dict[str, dict[str, Any]]:
    """Those of the layout, by device."""
    return {rank["device"]: rank for rank in deployment.admin("/v1/layout")["ranks"]}


def overwrite(deployment: Deployment, device: str) -> int:
    """Fill what a device holds with garbage; the number of bytes."""
    total = 0
    for entry in _memory_of(deployment, device):
        file = os.open(entry, os.O_RDWR)
        try:
            total += _overwrite_file(file)
        finally:
            os.close(file)
    return total


def _memory_of(deployment: Deployment, device: str) -> list[Path]:
    """Files: of the host's devices the HMM has them open, of stand-in accelerators they have names."""
    if "STANDIN_FOLDER" in os.environ:
        return list(Path(os.environ["STANDIN_FOLDER"]).glob(f"memory.{device.partition(':')[2]}.*"))
    files = Path(f"/proc/{deployment.pids['hmm']}/fd").iterdir()
    return [file for file in files if os.readlink(file).startswith(f"/memfd:{device}.")]


def _overwrite_file(file: int) -> int:
    end = 0
    total = 0
    while True:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # no page lies behind the last one
            return total
        end = os.lseek(file, begin, os.SEEK_HOLE)
        total += os.pwrite(file, b"\xa5" * (end - begin), begin)


async def wait_tokens(load: Load) -> None:
    """Until every client has had some."""
    await asyncio.to_thread(wait_until, lambda: len(load.streams) > 16, "streams", 30.0)


async def wait_more(load: Load, num: int) -> None:
    """Until so many more streams have ended."""
    wanted = len(load.streams) + num
    await asyncio.to_thread(wait_until, lambda: len(load.streams) > wanted, "streams afterwards", 30.0)


async def test_a_lost_device_is_left_out_and_what_it_held_is_read_or_computed_again(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=3, **SETTINGS)
    async with Load(deployment.base_url, clients=16, seed=5) as load:
        await wait_tokens(load)
        victim = (await asyncio.to_thread(ranks_of, deployment))[deployment.device(1)]
        os.kill(victim["pid"], signal.SIGSTOP)  # it computes nothing with what it will find
        assert await asyncio.to_thread(overwrite, deployment, deployment.device(1)) > WEIGHT_BYTES
        operation = await asyncio.to_thread(deployment.scale, remove=["r1"], lost=True)
        assert (operation["phase"], operation["error"]) == ("done", None), operation
        assert operation["figures"]["bytes_copied"] == operation["planned"]["bytes_copied"] > 0
        await wait_more(load, 32)
        await asyncio.to_thread(check_integrity, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 1_000
    assert set(ranks_of(deployment)) == {deployment.device(0), deployment.device(2)}

    def refusal() -> str:
        return str(deployment.admin_call("POST", "/v1/scale", {"replicas": 3})[1]["error"]["code"])

    code = wait_until(lambda: (found := refusal()) != "not_ready" and found, "the order is looked at", 60.0)
    assert code == "too_few_devices"  # unless it is named
    assert (
        deployment.scale(devices=[deployment.device(0), deployment.device(1), deployment.device(2)])["phase"] == "done"
    )
    assert set(ranks_of(deployment)) == {deployment.device(0), deployment.device(1), deployment.device(2)}
    check_integrity(deployment)
    report = deployment.stop()
    assert report.count("error") == 0


async def test_a_lost_device_takes_the_others_of_its_replica_along(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    """Of two; the one that is left has nothing that is read again."""
    deployment = deploy("oracle", replicas=2, devices=4, tp=2, **SETTINGS)
    devices = [deployment.device(number) for number in range(4)]
    async with Load(deployment.base_url, clients=8, seed=5) as load:
        await wait_tokens(load)
        victim = (await asyncio.to_thread(ranks_of, deployment))[devices[1]]
        os.kill(victim["pid"], signal.SIGSTOP)  # a follower, which computes nothing with what it will find
        assert await asyncio.to_thread(overwrite, deployment, devices[1]) > WEIGHT_BYTES
        operation = await asyncio.to_thread(deployment.scale, remove=["r0"], lost=True)
        assert (operation["phase"], operation["error"]) == ("done", None), operation
        await wait_more(load, 16)
        await asyncio.to_thread(check_integrity, deployment)
        assert set(await asyncio.to_thread(ranks_of, deployment)) == set(devices[2:])
        assert (await asyncio.to_thread(deployment.scale, devices=devices))["phase"] == "done"
        await asyncio.to_thread(check_integrity, deployment)
    assert set(ranks_of(deployment)) == set(devices)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 500
    assert deployment.stop().count("error") == 0


async def test_a_deployment_that_failed_because_ranks_do_not_live_on_a_device_goes_on_without_it(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=3, rank_restarts_max=2, **SETTINGS)

    def kill_until_it_fails() -> None:
        killed: set[int] = set()

        def has_failed() -> bool:
            rank = ranks_of(deployment)[deployment.device(1)]
            if rank["pid"] and rank["pid"] not in killed:
                killed.add(rank["pid"])
                os.kill(rank["pid"], signal.SIGKILL)
            return bool(deployment.admin("/v1/layout")["phase"] == "failed")

        wait_until(has_failed, "the deployment gives up", 40.0)
        assert len(killed) == 3

    async with Load(deployment.base_url, clients=16, seed=6) as load:
        await wait_tokens(load)
        await asyncio.to_thread(kill_until_it_fails)
        operation = await asyncio.to_thread(deployment.scale, remove=["r1"], lost=True)
        assert (operation["phase"], operation["error"]) == ("done", None), operation
        await wait_more(load, 32)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 1_000
    assert deployment.admin("/v1/layout")["phase"] == "serving"
    assert deployment.stop().count("error") == 0


async def test_a_loss_is_not_forgotten_where_the_scaler_dies_before_it_has_begun_what_follows(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    points = Failpoints(tmp_path / "points")
    slow = {"copy_bytes_per_s": 100_000, "failpoint_dir": tmp_path / "points"}
    deployment = deploy("oracle", replicas=3, devices=4, **SETTINGS, **slow)
    async with Load(deployment.base_url, clients=16, seed=8) as load:
        await wait_tokens(load)
        begun, ended = "scaler.leg2.prepare.after", "scaler.aborted.after"
        points.arm(begun)
        await asyncio.to_thread(deployment.order, replicas=4)
        await asyncio.to_thread(points.wait_hit, begun)
        os.kill((await asyncio.to_thread(ranks_of, deployment))[deployment.device(1)]["pid"], signal.SIGSTOP)
        assert await asyncio.to_thread(overwrite, deployment, deployment.device(1)) > WEIGHT_BYTES
        points.release(begun)
        points.arm(ended, "die")
        order = {"remove": ["r1"], "lost": True}
        with suppress(httpx.HTTPError):  # it dies before it answers, or just after
            assert (await asyncio.to_thread(deployment.admin_call, "POST", "/v1/scale", order))[0] == 202
        await asyncio.to_thread(points.wait_hit, ended)

        def has_been_left_out() -> bool:
            try:
                found = deployment.admin("/v1/operations")["operations"]
                is_left_out = deployment.device(1) not in ranks_of(deployment)
                return bool(found) and is_left_out and found[0]["outcome"] == "done"
            except httpx.HTTPError:
                return False

        await asyncio.to_thread(wait_until, has_been_left_out, "the deployment goes on without the device", 60.0)
        await wait_more(load, 32)
        await asyncio.to_thread(check_integrity, deployment)
    points.clear()
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 1_000
    assert deployment.stop().count("error") == 0


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("scaler.leg1.prepare.after", marks=pytest.mark.soak),
        pytest.param("scaler.send_commit.before", marks=pytest.mark.soak),  # the ranks cannot flip then
        "scaler.leg2.prepare.after",
    ],
)
async def test_a_device_that_is_lost_in_the_midst_of_growing_ends_that_and_is_left_out(
    point: str, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    points = Failpoints(tmp_path / "points")
    slow = {"copy_bytes_per_s": 100_000, "failpoint_dir": tmp_path / "points"}  # the second leg would take a minute
    deployment = deploy("oracle", replicas=3, devices=4, **SETTINGS, **slow)
    async with Load(deployment.base_url, clients=16, seed=7) as load:
        await wait_tokens(load)
        points.arm(point)
        growing = await asyncio.to_thread(deployment.order, replicas=4)
        await asyncio.to_thread(points.wait_hit, point)
        victim = (await asyncio.to_thread(ranks_of, deployment))[deployment.device(1)]
        os.kill(victim["pid"], signal.SIGSTOP)
        assert await asyncio.to_thread(overwrite, deployment, deployment.device(1)) > WEIGHT_BYTES
        points.release(point)
        lost = await asyncio.to_thread(deployment.scale, remove=["r1"], lost=True)
        assert (lost["phase"], lost["error"]) == ("done", None), lost
        await wait_more(load, 32)
        await asyncio.to_thread(check_integrity, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 1_000
    _, ended = deployment.admin_call("GET", f"/v1/operations/{growing}")
    assert (ended["outcome"], ended["error"]["code"]) == ("aborted", "device_lost")
    assert deployment.device(1) not in ranks_of(deployment)
    assert deployment.stop().count("error") == 0


@pytest.fixture(params=standins.KINDS)
def drivers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Accelerators of a kind for the processes that the test starts, on stand-ins of their driver, whose memory is in
    this folder."""
    with standins.memory(monkeypatch) as folder:
        standins.install(request.param, monkeypatch)
        yield folder


async def test_a_device_whose_driver_gives_it_up_costs_nothing_but_itself(
    drivers: Path, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    """The HMM takes back what it had there, and goes on; the next one starts without it."""
    deployment = deploy("oracle", replicas=3, **SETTINGS)
    async with Load(deployment.base_url, clients=8, seed=9) as load:
        await wait_tokens(load)
        hmm = deployment.pids["hmm"]
        os.kill((await asyncio.to_thread(ranks_of, deployment))[deployment.device(1)]["pid"], signal.SIGSTOP)
        standins.lose(drivers, 1)
        operation = await asyncio.to_thread(deployment.scale, remove=["r1"], lost=True)
        assert (operation["phase"], operation["error"]) == ("done", None), operation
        await wait_more(load, 16)
        await asyncio.to_thread(check_integrity, deployment)
        assert deployment.pids["hmm"] == hmm
        await asyncio.to_thread(deployment.kill, "hmm")
        await asyncio.to_thread(deployment.wait_restarted, "hmm", hmm)
        await asyncio.to_thread(deployment.wait_serving)
        await wait_more(load, 16)
        await asyncio.to_thread(check_integrity, deployment)
        assert set(await asyncio.to_thread(ranks_of, deployment)) == {deployment.device(0), deployment.device(2)}
        named = [deployment.device(number) for number in range(3)]
        status, again = await asyncio.to_thread(deployment.admin_call, "POST", "/v1/scale", {"devices": named})
        assert (status, again["error"]["code"]) == (422, "driver_failed"), again
        assert f"{deployment.device(1)} cannot be used: " in again["error"]["message"]
        await wait_more(load, 8)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 500
    assert deployment.log("hmm").count("device cannot be used") == 2  # each HMM says it once
    assert deployment.stop().count("error") == 0


def failed_devices(deployment: Deployment) -> list[str]:
    """Those of which it is said why they cannot be used."""
    return [device["device"] for device in deployment.admin("/v1/devices")["devices"] if device["failure"]]


def test_a_spare_device_that_is_dead_from_the_start_is_warned_of_and_not_planned_with(
    drivers: Path, deploy: Callable[..., Deployment]
) -> None:
    standins.lose(drivers, 2)
    deployment = deploy("oracle", replicas=2, devices=4, **SETTINGS)
    devices = [deployment.device(number) for number in range(4)]
    assert deployment.output_path.read_text().count(f"warning: {devices[2]} cannot be used, and is left out: ") == 1
    assert failed_devices(deployment) == [devices[2]]
    check_growth_without(deployment, devices)
    check_integrity(deployment)
    assert deployment.stop().count("error") == 0


def check_growth_without(deployment: Deployment, devices: list[str]) -> None:
    """The third device is passed over; with it nothing more can be had."""
    assert deployment.scale(replicas=3)["phase"] == "done"
    assert set(ranks_of(deployment)) == {devices[0], devices[1], devices[3]}
    status, refused = deployment.admin_call("POST", "/v1/scale", {"replicas": 4})
    assert (status, refused["error"]["code"]) == (422, "too_few_devices")
    assert f"{devices[2]} cannot be used" in refused["error"]["message"]
    assert deployment.log("scaler").count("device cannot be used") == 1


def test_growth_takes_the_next_device_where_a_spare_one_has_failed(
    drivers: Path, deploy: Callable[..., Deployment]
) -> None:
    """It is dead when an HMM begins anew, and nobody has needed it."""
    deployment = deploy("oracle", replicas=2, devices=4, **SETTINGS)
    hmm = deployment.pids["hmm"]
    standins.lose(drivers, 2)
    deployment.kill("hmm")
    deployment.wait_restarted("hmm", hmm)
    devices = [deployment.device(number) for number in range(4)]
    wait_until(lambda: failed_devices(deployment) == [devices[2]], "the HMM tells of it", 60.0)
    deployment.wait_serving()
    check_growth_without(deployment, devices)
    check_integrity(deployment)
    assert deployment.stop().count("error") == 0


async def test_an_hmm_that_takes_nothing_over_loads_what_was_there_without_a_failed_device(
    drivers: Path, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    """Of NPUs any HMM takes nothing over, of GPUs one whose keeper has ended as well."""
    deployment = deploy("oracle", replicas=3, **SETTINGS)
    async with Load(deployment.base_url, clients=8, seed=10) as load:
        await wait_tokens(load)
        hmm, keeper = deployment.pids["hmm"], deployment.pids["keeper"]
        standins.lose(drivers, 1)
        for name in ("keeper", "hmm"):
            await asyncio.to_thread(deployment.kill, name)
        await asyncio.to_thread(deployment.wait_restarted, "keeper", keeper)
        await asyncio.to_thread(deployment.wait_restarted, "hmm", hmm)
        left = {deployment.device(0), deployment.device(2)}
        await asyncio.to_thread(wait_until, lambda: set(ranks_of(deployment)) == left, "it is left out", 60.0)
        await asyncio.to_thread(deployment.wait_serving)
        await wait_more(load, 16)
        await asyncio.to_thread(check_integrity, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 100
    assert failed_devices(deployment) == [deployment.device(1)]
    assert "loaded without it" in deployment.log("scaler")
    assert deployment.stop().count("error") == 0
