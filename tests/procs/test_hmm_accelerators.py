"""The HMM and its keeper as real processes on accelerators, which are stand-ins of their drivers: ranks attach, die and
come again, and the HMM dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.common.devices import factory
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.replies import Ack
from tests.devices import standins
from tests.procs.hmm_harness import Deployment, Rank, load_message

pytestmark = pytest.mark.procs


@pytest.fixture(params=standins.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def deployment(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """Its `host:N` are devices of the kind, and this process, which its ranks are in, has a driver of its own. At the
    end nobody has any of their memory."""
    with standins.memory(monkeypatch) as folder:
        standins.install(kind, monkeypatch)
        monkeypatch.setenv("STANDIN_NAME", "host")
        driver = standins.process(kind, folder)
        monkeypatch.setitem(factory._BACKENDS, "host", driver)
        made = Deployment(**getattr(request, "param", {"device_bytes": 256 << 20}))
        try:
            made.start_keeper()
            made.start_hmm()
            yield made
        finally:
            made.close()
        assert [standins.loaded(driver).standin_used(device) for device in range(4)] == [0] * 4


@pytest.mark.parametrize("deployment", [{"device_bytes": 0}], indirect=True)
def test_budgets_are_of_what_the_driver_says_that_there_is(kind: str, deployment: Deployment, model: Path) -> None:
    """Also of a successor, where ranks still have memory that it cannot take over."""
    attached(deployment, model)
    before = [(device.total, device.budget) for device in deployment.status().devices]
    assert before == [(1 << 30, 818 << 20)] * 2  # 80 %, in whole pages
    deployment.kill_hmm()
    deployment.start_hmm()
    assert [(device.total, device.budget) for device in deployment.status().devices] == before
    assert deployment.status().phase == ("empty" if kind == "npu" else "ready")


def attached(deployment: Deployment, model: Path, exchange: str = "shm") -> tuple[Rank, Rank]:
    deployment.load(model, exchange=exchange)
    ranks = Rank(deployment, 0), Rank(deployment, 1)
    deployment.members(0, 1)
    return ranks


def test_ranks_have_what_the_hmm_has_and_one_that_starts_anew_is_let_in(deployment: Deployment, model: Path) -> None:
    first, second = attached(deployment, model)
    held = standins.loaded(standins.process(os.environ["STANDIN_KIND"], Path(os.environ["STANDIN_FOLDER"])))
    assert [held.standin_used(device) > 0 for device in range(4)] == [True, True, False, False]
    answer = deployment.integrity(checksums=True)
    assert answer.findings == ()
    assert answer.checksums == first.checksums() | second.checksums()
    first.device.write_bytes(first.kv[0].base, b"alive")
    mine = first.checksums()
    first.close()
    again = Rank(deployment, 0)
    assert again.device.read_bytes(again.kv[0].base, 5) == b"alive"
    assert again.checksums() == mine
    again.close()
    second.close()
    assert deployment.stop(deployment.hmm) == 0


def test_a_killed_hmm_has_all_again_where_its_driver_lets_it(kind: str, deployment: Deployment, model: Path) -> None:
    first, second = attached(deployment, model)
    before, mine = deployment.integrity(checksums=True).checksums, first.checksums()
    first.device.write_bytes(first.kv[0].base, b"alive")
    deployment.kill_hmm()
    assert first.checksums() == mine  # ranks go on
    deployment.start_hmm()
    if kind == "npu":  # only who made an NPU's memory can share it: the successor begins anew, and says so
        assert deployment.status().phase == "empty"
        assert deployment.hmm is not None
        assert "cannot be taken over" in deployment.log_of(deployment.hmm)
        assert first.device.read_bytes(first.kv[0].base, 5) == b"alive"
        return
    assert deployment.status().phase == "ready"
    first.resume(deployment)
    second.resume(deployment)
    answer = deployment.integrity(checksums=True)
    assert (answer.findings, answer.checksums) == ((), before)
    assert first.device.read_bytes(first.kv[0].base, 5) == b"alive"
    first.close()
    assert Rank(deployment, 0).checksums() == mine


def test_a_rank_resumes_where_the_hmm_alone_has_lost_its_device(deployment: Deployment, model: Path) -> None:
    """Its own driver has it still. One that comes anew is refused."""
    first, second = attached(deployment, model, "mailbox")
    gone = Path(os.environ["STANDIN_FOLDER"]) / "lost.1"
    standins.lose(gone.parent, 1)
    with pytest.raises(ElasticMoEError, match=r"LOST_HEARTBEAT|answers 709"):
        deployment.integrity(checksums=True)
    gone.unlink()
    for rank in (second, first):
        rank.resume(deployment)
    deployment.members(0, 1)
    assert [len(rank.seat.mailboxes) for rank in (first, second)] == [2, 2]
    second.close()
    with pytest.raises(ElasticMoEError, match="host:1 cannot be used"):
        Rank(deployment, 1)


@pytest.mark.parametrize("kind", ["cuda"], indirect=True)
def test_an_hmm_whose_contexts_are_lost_gives_up_its_devices_and_the_next_one_has_them(
    deployment: Deployment, model: Path
) -> None:
    """A sticky error of a GPU is its process's alone: ranks go on in contexts of their own."""
    first, second = attached(deployment, model)
    before, mine = deployment.integrity(checksums=True).checksums, first.checksums()
    assert deployment.hmm is not None
    standins.fault(Path(os.environ["STANDIN_FOLDER"]), deployment.hmm.pid)
    for number in range(2):  # it hears of one device after the other
        with pytest.raises(ElasticMoEError, match="answers 700, CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
            deployment.integrity(checksums=True)
        assert caught.value.code == "driver_failed"
        failed = [device.device for device in deployment.status().devices if device.failure]
        assert failed == ["host:0", "host:1"][: number + 1]
    assert deployment.integrity(checksums=True).checksums == {}, "of what can be used"
    assert deployment.log_of(deployment.hmm).count("device cannot be used") == 2
    assert first.checksums() == mine
    deployment.kill_hmm()
    deployment.start_hmm()
    assert [device.failure for device in deployment.status().devices] == ["", ""]
    for rank in (first, second):
        rank.resume(deployment)
    answer = deployment.integrity(checksums=True)
    assert (answer.findings, answer.checksums) == ((), before)
    assert deployment.stop(deployment.hmm) == 0


def test_a_successor_goes_on_with_the_devices_that_its_driver_has(
    kind: str, deployment: Deployment, model: Path
) -> None:
    """One is lost while its memory is in the layout. A GPU's rank goes on where the HMM has its memory."""
    first, second = attached(deployment, model)
    before, gone = deployment.integrity(checksums=True).checksums, Path(os.environ["STANDIN_FOLDER"]) / "lost.1"
    deployment.kill_hmm()
    standins.lose(gone.parent, 1)
    deployment.start_hmm()
    assert deployment.hmm is not None
    assert deployment.log_of(deployment.hmm).count("device cannot be used") == 1
    told = [(device.device, device.failure) for device in deployment.status().devices]
    assert told == [("host:0", ""), ("host:1", told[1][1])]
    assert told[1][1], "why it cannot be used"
    if kind == "npu":
        assert deployment.status().phase == "empty"
        assert isinstance(deployment.call(load_message(model)), Ack)
        error = deployment.wait_phase("failed").error
        assert error is not None
        assert error.code == "driver_failed"
        assert "host:1 cannot be used" in error.message
    else:
        assert deployment.status().phase == "ready"
        for rank in (first, second):
            rank.resume(deployment)  # also where this HMM never had the device
        second.channel.close()
        deployment.members(0)
        answer = deployment.integrity(checksums=True)
        assert answer.findings == ()
        assert answer.checksums == {name: value for name, value in before.items() if name.startswith("host:0/")}
        with pytest.raises(ElasticMoEError, match="host:1 cannot be used"):
            Rank(deployment, 1)
    gone.unlink()  # the ranks of this process give their memory back
