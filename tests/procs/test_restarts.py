"""Every process but the ranks is killed, stopped or made to refuse under load: requests do not notice, the epoch of the
layout never falls, and scaling works again afterwards (promises P4, P6, P7)."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import scaler as to_scaler
from elasticmoe.common.protocol.errors import ElasticMoEError, Fenced
from elasticmoe.common.protocol.hmm import SetMembership
from elasticmoe.common.protocol.rank import GetRankLoad
from elasticmoe.common.protocol.scaler import RankLoad, ToScaler
from elasticmoe.common.transport import Client, new_identity
from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.faults import another, roll_back, snapshot_of, store_client, wait_answers
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import ask, check_integrity, hmm_status, is_attached
from tests.procs.waiting import free_port, processes_of, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(300)]

Deploy = Callable[..., Deployment]

RECONCILED_S = 60.0  # P7 says ten seconds, of a machine without other work
SETTINGS: dict[str, Any] = {"max_sequences": 32, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 2}


def view(deployment: Deployment) -> tuple[str, int]:
    """Phase and epoch as the scaler shows them; ("", 0) while none answers."""
    try:
        layout = deployment.admin("/v1/layout")
    except httpx.HTTPError:
        return "", 0
    return layout["phase"], layout["epoch"] or 0


def epoch_in_store(deployment: Deployment) -> int:
    """The committed layout's epoch, as routers read it; 0 while there is none."""
    try:
        with store_client(deployment) as client:
            raw: Any = client.get("elasticmoe:default:epoch")
    except redis.ConnectionError:
        return 0
    return int(raw or 0)


def wait_reconciled(deployment: Deployment, epoch: int, timeout_s: float = RECONCILED_S) -> None:
    """Wait until the deployment serves, and the store says so, by a layout that is not older than `epoch`."""

    def is_reconciled() -> bool:
        phase, shown = view(deployment)
        assert shown == 0 or shown >= epoch, f"epoch fell from {epoch} to {shown}"
        if phase != "serving" or shown < epoch or epoch_in_store(deployment) != shown:
            return False
        return is_attached(hmm_status(deployment))

    wait_until(is_reconciled, "reconciled", timeout_s)


def resize(deployment: Deployment) -> None:
    """Scale between two and three replicas. The scaler may not have heard of a restarted HMM yet, and says so."""
    operation = deployment.scale(replicas=5 - len(deployment.rank_pids()))
    assert operation["phase"] == "done", operation


@asynccontextmanager
async def loaded(deployment: Deployment, clients: int = 16) -> AsyncIterator[TimedLoad]:
    """Load that is under way."""
    async with TimedLoad(deployment.base_url, clients=clients, seed=4) as load:
        await load.wait_streams(clients)
        yield load


async def settle(deployment: Deployment, load: TimedLoad, epoch: int) -> None:
    """After a fault: reconciled, sound, streaming, and able to scale."""
    await asyncio.to_thread(wait_reconciled, deployment, epoch)
    await asyncio.to_thread(check_integrity, deployment)
    await load.wait_streams(8)
    await asyncio.to_thread(resize, deployment)


@pytest.fixture
def oracle_folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("oracle")


async def test_the_control_plane_dies_piece_by_piece_and_no_request_notices(
    deploy: Deploy, oracle_folder: Path
) -> None:
    deployment = deploy("oracle", replicas=2, devices=3, **SETTINGS)
    async with loaded(deployment) as load:
        begin = load.now()
        await load.wait_streams(48)
        steady_s = load.p99_gap(begin, load.now())
        print(f"\nsteady: p99 of the pauses between tokens {steady_s * 1e3:.0f} ms")
        for name in ("hmm", "scaler", "store", "keeper"):
            epoch = view(deployment)[1]
            begin = load.now()
            old = await asyncio.to_thread(deployment.kill, name)
            await asyncio.to_thread(deployment.wait_restarted, name, old)
            await asyncio.to_thread(wait_reconciled, deployment, epoch)
            print(f"{name} killed: longest pause {load.longest_gap(begin) * 1e3:.0f} ms")
            await settle(deployment, load, epoch)
    assert load.broken == []
    assert check_load_against_oracle(load.streams, oracle_folder) > 2_000
    assert deployment.stop().count("error") == 0


async def test_the_store_is_emptied_rolled_back_hung_full_and_read_only(deploy: Deploy, oracle_folder: Path) -> None:
    deployment = deploy("oracle", replicas=2, devices=3, **SETTINGS)
    with store_client(deployment) as client:
        async with loaded(deployment) as load:
            old = await asyncio.to_thread(snapshot_of, client)
            await asyncio.to_thread(resize, deployment)
            epoch = view(deployment)[1]

            assert await asyncio.to_thread(roll_back, client, old) < epoch
            await settle(deployment, load, epoch)

            epoch = view(deployment)[1]
            await asyncio.to_thread(client.flushall)
            await settle(deployment, load, epoch)

            # Emptied while no scaler runs: the next one learns from the HMM what is in force.
            epoch = view(deployment)[1]
            scaler = await asyncio.to_thread(deployment.kill, "scaler")
            await asyncio.to_thread(client.flushall)
            await asyncio.to_thread(deployment.wait_restarted, "scaler", scaler)
            await settle(deployment, load, epoch)

            epoch = view(deployment)[1]
            await full_for_a_while(deployment, load, client)
            await settle(deployment, load, epoch)

            epoch = view(deployment)[1]
            await refused_for_a_while(deployment, load, client.execute_command, READ_ONLY, WRITABLE)
            await settle(deployment, load, epoch)

            epoch = view(deployment)[1]
            await hung_for_a_while(deployment, load)
            await settle(deployment, load, epoch)
    assert load.broken == []
    assert check_load_against_oracle(load.streams, oracle_folder) > 2_000
    assert deployment.stop().count("error") == 0


READ_ONLY = ("REPLICAOF", "127.0.0.1", "1")
WRITABLE = ("REPLICAOF", "NO", "ONE")


async def refused_for_a_while(
    deployment: Deployment, load: TimedLoad, call: Callable[..., Any], begin: tuple[Any, ...], end: tuple[Any, ...]
) -> None:
    """The store takes no writes: an operation waits, requests do not; then it does, and the operation is done."""
    await asyncio.to_thread(call, *begin)
    op_id = await asyncio.to_thread(start_operation, deployment)
    await load.wait_streams(24)
    assert not has_begun(deployment, op_id)
    await asyncio.to_thread(call, *end)
    assert (await asyncio.to_thread(deployment.wait_operation, op_id))["phase"] == "done"


def has_begun(deployment: Deployment, op_id: str) -> bool:
    """Whether the HMM was told anything of an operation. Nothing is staged that is not in the journal."""
    transition = hmm_status(deployment).transition
    return transition is not None and transition.id.op == op_id


async def full_for_a_while(deployment: Deployment, load: TimedLoad, client: redis.Redis) -> None:
    """The store has no room: operations are refused, requests are not."""
    num_logged = len(deployment.log("scaler"))
    await asyncio.to_thread(client.config_set, "maxmemory", 1)

    def refusal() -> str:
        if "lease could not be renewed" not in deployment.log("scaler")[num_logged:]:
            return ""
        status, answer = deployment.admin_call("POST", "/v1/scale", {"replicas": 5 - len(deployment.rank_pids())})
        return "" if answer["error"]["code"] == "not_ready" else f"{status} {answer['error']['code']}"

    assert await asyncio.to_thread(wait_until, refusal, "the scaler noticed", 60.0) == "503 storage_full"
    await load.wait_streams(24)
    await asyncio.to_thread(client.config_set, "maxmemory", 256 << 20)

    def accepted() -> str:
        body = {"replicas": 5 - len(deployment.rank_pids()), "op_id": "again"}
        return "again" if deployment.admin_call("POST", "/v1/scale", body)[0] == 202 else ""

    op_id = await asyncio.to_thread(wait_until, accepted, "operations are accepted again", 60.0)
    assert (await asyncio.to_thread(deployment.wait_operation, op_id))["phase"] == "done"


async def hung_for_a_while(deployment: Deployment, load: TimedLoad) -> None:
    """The store is stopped for longer than a lease lives."""
    pid = await asyncio.to_thread(deployment.kill, "store", signal.SIGSTOP)
    try:
        op_id = await asyncio.to_thread(start_operation, deployment)
        until = time.monotonic() + 6.0
        while time.monotonic() < until:
            await load.wait_streams(8)
        assert not has_begun(deployment, op_id)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await asyncio.to_thread(deployment.wait_operation, op_id))["phase"] == "done"


def start_operation(deployment: Deployment) -> str:
    """Ask for the other number of replicas; the operation's name."""
    return deployment.order(replicas=5 - len(deployment.rank_pids()))


def incarnations(deployment: Deployment) -> dict[int, tuple[int, str]]:
    """Process id and incarnation of each rank, by slot."""
    ranks = deployment.admin("/v1/layout")["ranks"]
    return {rank["slot"]: (rank["pid"], rank["incarnation"]) for rank in ranks}


def costs(deployment: Deployment) -> tuple[float, float]:
    """Tokens that were computed again, and requests that the router had to start anew."""
    names = ("elasticmoe:recomputed_tokens_total", "elasticmoe:requests_resubmitted_total")
    return deployment.metric(names[0]), deployment.metric(names[1])


async def kill_with_pool(deployment: Deployment, load: TimedLoad, *others: str) -> dict[str, int]:
    """kill -9 of the pool and these at once; wait until all is as before. Their process ids."""
    pids = {name: deployment.pids.get(name) or deployment.rank_pids()[name] for name in ("pool", *others)}
    children = pids.keys() & deployment.pids.keys()
    epoch, begin = view(deployment)[1], load.now()
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    for name in children:
        await asyncio.to_thread(deployment.wait_restarted, name, pids[name])
    await asyncio.to_thread(wait_until, lambda: has_standbys(deployment), "the next pool", 60.0)
    await asyncio.to_thread(wait_reconciled, deployment, epoch)
    await load.wait_streams(8)
    await asyncio.to_thread(check_integrity, deployment)
    print(f"{', '.join(pids)} killed: longest pause {load.longest_gap(begin) * 1e3:.0f} ms")
    return pids


def has_standbys(deployment: Deployment) -> bool:
    """Whether a pool that was started again has said that it is whole."""
    try:
        return bool(deployment.admin("/v1/devices")["standby_processes"] == SETTINGS["standbys"])
    except httpx.HTTPError:
        return False  # the scaler is not there


def workers(deployment: Deployment) -> int:
    """Processes of the pool, and of ranks and standbys."""
    return sum("elasticmoe.services.worker" in command for command in processes_of(deployment.run_dir).values())


async def test_the_pool_dies_again_and_again_and_no_request_notices(deploy: Deploy, oracle_folder: Path) -> None:
    """Alone, and together with others: its ranks serve on, each of them, and no step is computed again for it."""
    deployment = deploy("oracle", replicas=2, devices=3, rank_stall_s=6.0, **SETTINGS)

    async def wait_as_before(ranks: dict[int, tuple[int, str]]) -> None:
        """A scaler that has not heard the new pool yet knows of no process; a rank that was replaced never is again."""
        await asyncio.to_thread(
            wait_until, lambda: ranks.items() <= incarnations(deployment).items(), f"the ranks are {ranks}"
        )

    async with loaded(deployment) as load:
        await asyncio.to_thread(wait_until, lambda: has_standbys(deployment), "standbys")
        before, spent = incarnations(deployment), costs(deployment)
        num_workers = workers(deployment)
        for _ in range(2):
            await kill_with_pool(deployment, load)
            await wait_as_before(before)
            assert costs(deployment) == spent
        if deployment.takes_over:  # else the ranks lose their memory with it: the kill matrix has that
            await kill_with_pool(deployment, load, "hmm")
        await kill_with_pool(deployment, load, "scaler")
        await wait_as_before(before)
        assert costs(deployment) == spent
        pids = await kill_with_pool(deployment, load, "r1t0")
        await wait_as_before({0: before[0]})
        assert pids["r1t0"] == before[1][0] != incarnations(deployment)[1][0]
        # A rank that came from an earlier pool is watched as any other.
        os.kill(before[0][0], signal.SIGSTOP)
        await asyncio.to_thread(
            wait_until, lambda: before[0] not in incarnations(deployment).values(), "the stopped rank is replaced", 60.0
        )
        await settle(deployment, load, view(deployment)[1])
        await asyncio.to_thread(resize, deployment)
        await asyncio.to_thread(
            wait_until,
            lambda: workers(deployment) == num_workers,
            f"{num_workers} processes of pool, ranks and standbys again",
        )
    assert (load.broken, load.errors) == ([], {})
    assert check_load_against_oracle(load.streams, oracle_folder) > 2_000
    assert deployment.stop().count("error") == 0


def loads(deployment: Deployment) -> list[RankLoad]:
    answers = [ask(deployment, f"rank-{name}", GetRankLoad()) for name in deployment.rank_pids()]
    return [answer for answer in answers if isinstance(answer, RankLoad)]


async def test_a_router_dies_its_requests_are_cleaned_up_and_another_one_serves(
    deploy: Deploy, model_folder: Callable[[str], Path]
) -> None:
    """Of a model whose answers take five seconds: none comes to its end between two looks of a busy machine."""
    deployment = deploy("oracle-paced", replicas=2, devices=3, **SETTINGS)
    port = free_port()
    idle = sum(load.blocks_free for load in loads(deployment))
    with another(deployment, "router", port=port, history="false") as router:
        url = f"http://127.0.0.1:{port}"
        await asyncio.to_thread(wait_answers, url + "/ready", router)
        # So long that each client is in the midst of an answer: one that is between two may find its connection closed
        # and make another, which the launcher's socket keeps for the next router.
        long = TimedLoad(deployment.base_url, clients=8, seed=4, shortest=500, longest=600)
        async with TimedLoad(url, clients=8, seed=5) as second, long as first:
            await second.wait_streams(8)
            await first.wait_begun(8)
            old = deployment.kill("router")
            await second.wait_streams(16)
            await asyncio.to_thread(deployment.wait_restarted, "router", old)
            await asyncio.to_thread(deployment.wait_serving)
            await first.wait_streams(8)
    assert len(first.broken) == 8
    assert second.broken == []
    check_load_against_oracle(second.streams, model_folder("oracle-paced"))
    check_load_against_oracle(first.streams, model_folder("oracle-paced"))

    def is_empty() -> bool:
        now = loads(deployment)
        return all(load.running + load.waiting == 0 for load in now) and sum(load.blocks_free for load in now) == idle

    wait_until(is_empty, "orphans cleaned up", 60.0)
    check_integrity(deployment)
    deployment.stop()


def stale_command(deployment: Deployment, fence: int) -> None:
    """Park the ranks, as a scaler of an earlier fencing epoch would."""
    client: Client[ToScaler] = Client(deployment.run_dir / "sockets/hmm.sock", new_identity("scaler"), to_scaler.CODEC)
    client.epoch = fence
    try:
        with pytest.raises(ElasticMoEError) as caught:
            client.call(SetMembership((), False), deadline_ms=5_000)
        assert caught.value.code == Fenced.code
    finally:
        client.close()


async def test_a_scaler_that_slept_past_its_lease_is_fenced(
    deploy: Deploy, oracle_folder: Path, tmp_path: Path
) -> None:
    failpoints = Failpoints(tmp_path / "failpoints")
    settings = SETTINGS | {"lease_ms": 1_000, "failpoint_dir": str(failpoints.folder)}
    deployment = deploy("oracle", replicas=2, devices=3, **settings)
    port = free_port()
    fence = deployment.admin("/v1/layout")["fence"]
    async with loaded(deployment) as load:
        begun = "scaler.leg1.prepare.after"  # the store knows the operation
        failpoints.arm(begun)
        op_id = await asyncio.to_thread(start_operation, deployment)
        await asyncio.to_thread(failpoints.wait_hit, begun)
        sleeper = deployment.kill("scaler", signal.SIGSTOP)
        failpoints.release(begun)
        # (Stopping a deployment kills what is stopped, so nothing is left should this test fail.)
        with another(deployment, "scaler", admin_port=port) as successor:
            await asyncio.to_thread(wait_answers, f"http://127.0.0.1:{port}/ready", successor)
            headers = {"Authorization": f"Bearer {deployment.token}"}

            def told(path: str) -> Any:
                url = f"http://127.0.0.1:{port}/v1/{path}"
                answer = httpx.get(url, headers=headers, timeout=60, trust_env=False)
                return answer.json() if answer.status_code == 200 else {}

            def is_done() -> bool:
                return told(f"operations/{op_id}").get("phase") in ("done", "aborted")

            def hears_all() -> bool:  # though its predecessor has the connections of routers and ranks still
                load = told("policy").get("load")
                return load is not None and not load["silent"] and load["requests_per_s"] is not None

            await asyncio.to_thread(wait_until, is_done, "the operation resumed", 30.0)
            await asyncio.to_thread(wait_until, hears_all, "routers and ranks are heard", 30.0)
            before = hmm_status(deployment)
            await asyncio.to_thread(stale_command, deployment, fence)
            os.kill(sleeper, signal.SIGCONT)
            await asyncio.to_thread(deployment.wait_restarted, "scaler", sleeper)
            # By the lease or by a service that has seen its successor, whichever it asks first.
            log = deployment.log("scaler")
            assert "another scaler holds the lease" in log or "stale_epoch: " in log
            await load.wait_streams(16)
            after = hmm_status(deployment)
            assert (after.layout, after.generation) == (before.layout, before.generation)
            assert after.num_fenced >= 1
        # The successor is gone: the launcher's scaler, which waits for the lease, takes over.
        await asyncio.to_thread(deployment.wait_serving)
        assert after.layout is not None
        await settle(deployment, load, after.layout.epoch)
    assert load.broken == []
    check_load_against_oracle(load.streams, oracle_folder)
    assert RankId(0, 0) in {seat.rank for seat in after.layout.seats}
    assert deployment.stop().count("error") == 0
