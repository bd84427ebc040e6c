"""The HMM and its keeper as real processes: load, attach, deaths, restarts, fences, refusals.

All of it shares one set of fixtures: an HMM with a model, and two attached ranks.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from elasticmoe.common.families import records
from elasticmoe.common.layout import Layout, RankId, initial_layout
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.hmm import CheckIntegrity, GetHmmStatus, SetMembership
from elasticmoe.common.protocol.keeper import Keep
from elasticmoe.common.protocol.replies import Ack
from tests.procs.hmm_harness import (
    Deployment,
    Rank,
    hollow_checkpoint,
    keeper_channel,
    kept_bytes,
    load_message,
    peak_bytes,
)
from tests.procs.waiting import processes_of, wait_until
from tests.unit.specs import TINY_MIXTRAL

pytestmark = pytest.mark.procs

PAGE = 4096
LARGE = TINY_MIXTRAL | {"vocab_size": 400_000, "hidden_size": 256, "num_attention_heads": 4}  # 800 MB in float32


@pytest.fixture
def make() -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def deployment(**settings: object) -> Deployment:
        made.append(Deployment(**settings))
        made[-1].start_keeper()
        made[-1].start_hmm()
        return made[-1]

    yield deployment
    for one in made:
        one.close()
        assert processes_of(one.run_dir) == {}


@pytest.fixture
def deployment(make: Callable[..., Deployment]) -> Deployment:
    return make()


@pytest.fixture
def pair(deployment: Deployment, model: Path) -> Iterator[tuple[Deployment, Rank, Rank]]:
    """A loaded deployment with both ranks attached and running."""
    deployment.load(model)
    ranks = Rank(deployment, 0), Rank(deployment, 1)
    deployment.members(0, 1)
    for rank in ranks:
        assert rank.is_rung()
    yield deployment, *ranks
    for rank in ranks:
        rank.close()


# ---- Loading and attaching


def test_what_a_rank_maps_is_what_the_checkpoint_holds(deployment: Deployment, model: Path) -> None:
    assert deployment.status().phase == "empty"
    deployment.load(model)
    source = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    homes = 0
    for slot in (0, 1):
        rank = Rank(deployment, slot)
        for record in records(rank.reply.spec):
            if record.key not in rank.records:
                assert record.key.kind == "expert"
                continue
            homes += record.key.kind == "expert"
            for tensor in record.tensors:
                wanted = torch.cat([source[part.name] for part in tensor.sources])
                raw = bytearray(rank.bytes_of(record.key, tensor.offset, tensor.nbytes))
                assert torch.equal(torch.frombuffer(raw, dtype=torch.float32).reshape(tensor.shape), wanted)
        assert all(rank.device.read_bytes(kv.base, kv.nbytes) == bytes(kv.nbytes) for kv in rank.kv)
        assert (rank.ledger.num_rows, rank.ledger.rows()) == (4, [])
        assert rank.seat.slots == (0, 1)
        assert [[len(owners) for owners in one.owners] for one in rank.seat.routings] == [[5, 5]]
        assert rank.reply.kv_bytes_reserved >= len(rank.kv) * rank.reply.kv_geometry.handle_bytes
        rank.close()
    assert homes == 10  # 5 experts in each of 2 layers, each on one device


def test_weights_cannot_be_written_by_a_rank(pair: tuple[Deployment, Rank, Rank]) -> None:
    _, rank, _ = pair
    weights, kv = rank.handle(rank.seat.records[0].handle), rank.handle(rank.seat.kv[0])
    assert (weights.writable, kv.writable) == (False, True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(weights.backing.fd, b"x", weights.backing.offset)
    os.pwrite(kv.backing.fd, b"x", kv.backing.offset)


def test_status_gives_the_figures(pair: tuple[Deployment, Rank, Rank]) -> None:
    deployment, first, second = pair
    status = deployment.status()
    assert (status.phase, status.op_id, status.error) == ("ready", "load-1", None)
    assert status.layout == initial_layout((5, 5), ["host:0", "host:1"])
    assert 0 < status.bytes_done == status.bytes_total
    assert (status.generation, status.members, status.running) == (1, (0, 1), True)
    assert [device.attached for device in status.devices] == [first.request.incarnation, second.request.incarnation]
    assert sum(device.num_experts for device in status.devices) == 10
    for rank, device in zip((first, second), status.devices, strict=True):
        assert device.weights == sum(range_.nbytes for range_ in rank.records.values())
        assert device.kv == sum(range_.nbytes for range_ in rank.kv)
        assert device.kv_blocks == len(rank.kv) * rank.reply.kv_geometry.blocks_per_handle


def test_integrity_and_checksums_agree_with_the_ranks(pair: tuple[Deployment, Rank, Rank]) -> None:
    deployment, first, second = pair
    answer = deployment.integrity(checksums=True)
    assert answer.findings == ()
    assert answer.checksums == first.checksums() | second.checksums()
    assert "host:0/base" in answer.checksums
    assert answer.checksums["host:0/layer.1"] == answer.checksums["host:1/layer.1"]
    assert deployment.integrity().checksums == {}


def test_loading_again_is_acknowledged_or_refused(deployment: Deployment, model: Path) -> None:
    request = deployment.load(model)
    assert isinstance(deployment.call(request), Ack)
    assert deployment.refusal(msgspec.structs.replace(request, op_id="load-2")) == "conflict"
    assert deployment.status().op_id == "load-1"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"layout": initial_layout((5, 5), ["host:0", "host:7"])}, "not_found"),
        ({"layout": msgspec.structs.replace(initial_layout((5, 5), ["host:0"]), epoch=0)}, "invalid_request"),
        ({"layout": msgspec.structs.replace(initial_layout((5, 5), ["host:0"]), tp=1 << 62)}, "invalid_request"),
        ({"layout": Layout(1, 1, (), ())}, "invalid_request"),
        ({"layout": initial_layout((5, 5), [f"host:{number}" for number in range(9)], tp=9)}, "tp_unsupported"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_at_once(
    deployment: Deployment, model: Path, change: dict[str, object], code: str
) -> None:
    assert deployment.refusal(load_message(model, **change)) == code
    assert deployment.status().phase == "empty"


def test_a_failed_load_leaves_nothing_and_another_may_follow(
    deployment: Deployment, model: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in model.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    shard = max(bad.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    for number, (directory, code) in enumerate([(tmp_path / "absent", "bad_checkpoint"), (bad, "bad_checkpoint")]):
        request = load_message(model, model_path=str(directory), op_id=f"bad-{number}")
        deployment.call(request)
        status = deployment.wait_phase("failed")
        assert status.error is not None
        assert (status.error.code, status.op_id) == (code, request.op_id)
        assert all(device.free == device.budget for device in status.devices)
        assert isinstance(deployment.call(request), Ack)  # tried once more
        deployment.wait_phase("failed")
    deployment.call(load_message(model, op_id="huge", max_sequences=65_536))
    status = deployment.wait_phase("failed")
    assert status.error is not None
    assert status.error.code == "does_not_fit"
    assert deployment.integrity().findings == ()
    deployment.load(model)
    assert deployment.integrity().findings == ()


# ---- Attach


def test_attach_is_refused_without_a_model_or_a_seat(deployment: Deployment, model: Path) -> None:
    def code(slot: int, **changes: object) -> str:
        with pytest.raises(ElasticMoEError) as caught:
            Rank(deployment, slot, **changes)
        return caught.value.code

    assert code(0) == "not_ready"
    deployment.load(model)
    assert code(2) == "not_found"
    assert code(0, device="host:1") == "not_found"
    assert code(0, rank=RankId(1, 0)) == "not_found"
    rank = Rank(deployment, 0)
    assert code(0) == "conflict"
    assert code(0, resume=True) == "conflict"
    rank.close()
    Rank(deployment, 0).close()


def test_a_bad_peer_of_the_handle_socket_costs_nothing(deployment: Deployment, model: Path) -> None:
    deployment.load(model)
    for raw in (b"\x04\0\0\0junk", b"\xff\xff\xff\xff", b"\x01", b""):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(deployment.config.socket("handles")))
            peer.sendall(raw)
    rank = Rank(deployment, 0)
    with contextlib.suppress(Unavailable):  # the HMM may hang up before all of it is sent
        rank.channel.send(rank.request)  # a second request on a rank's connection breaks the protocol: it is its end
    wait_until(lambda: deployment.status().devices[0].attached is None, "the rank is detached")
    rank.close()


# ---- Deaths


def test_a_ranks_death_stops_the_others_at_once(pair: tuple[Deployment, Rank, Rank]) -> None:
    deployment, first, second = pair
    assert first.bus.membership() == (1, 3, True, 1)
    second.channel.close()
    wait_until(lambda: first.bus.membership() == (2, 3, False, 1), "the others are parked")
    wait_until(first.is_rung, "the doorbell")
    assert deployment.status().devices[1].attached is None
    assert deployment.refusal(SetMembership((0, 1), True)) == "not_attached"
    replacement = Rank(deployment, 1)
    deployment.members(0, 1)
    assert first.bus.membership() == (3, 3, True, 1)
    assert deployment.integrity().findings == ()
    replacement.close()


def test_the_death_of_a_rank_that_takes_no_part_stops_nobody(deployment: Deployment, model: Path) -> None:
    deployment.load(model)
    first, second = Rank(deployment, 0), Rank(deployment, 1)
    deployment.members(0)
    second.close()
    wait_until(lambda: deployment.status().devices[1].attached is None, "the rank is detached")
    assert first.bus.membership() == (1, 1, True, 1)
    first.close()


def test_membership_of_foreign_slots_is_refused(pair: tuple[Deployment, Rank, Rank]) -> None:
    deployment, first, _ = pair
    assert deployment.refusal(SetMembership((0, 5), True)) == "not_found"
    deployment.members(0, 1, running=False)
    assert first.bus.membership() == (2, 3, False, 1)


def test_membership_without_a_model_is_refused(deployment: Deployment) -> None:
    assert deployment.refusal(SetMembership((0,), True)) == "not_ready"


# ---- Restarts


def test_a_killed_hmm_comes_back_with_everything(pair: tuple[Deployment, Rank, Rank], model: Path) -> None:
    deployment, first, second = pair
    before = deployment.integrity(checksums=True).checksums
    mine = first.checksums()
    first.device.write_bytes(first.kv[0].base, b"alive")
    first.ledger.open_row(0, b"request", [1, 2, 3], [0])
    deployment.kill_hmm()
    assert first.checksums() == mine
    deployment.start_hmm()
    status = deployment.status()
    assert (status.phase, status.generation, status.members, status.running) == ("ready", 1, (0, 1), True)
    assert status.op_id == "load-1"
    assert [device.attached for device in status.devices] == [None, None]
    assert len(deployment.integrity().findings) == 2  # nobody has resumed yet
    first.resume(deployment)
    second.resume(deployment)
    answer = deployment.integrity(checksums=True)
    assert answer.findings == ()
    assert answer.checksums == before
    assert deployment.status().running
    assert isinstance(deployment.call(load_message(model)), Ack)  # idempotent across the restart

    first.channel.close()  # its death, and a standby that takes its seat
    replacement = Rank(deployment, 0)
    assert replacement.device.read_bytes(replacement.kv[0].base, 5) == b"alive"
    assert replacement.ledger.rows() == [0]
    assert replacement.checksums() == mine
    replacement.close()


def test_a_rank_that_died_while_the_hmm_was_away_is_noticed_when_its_seat_is_taken(
    pair: tuple[Deployment, Rank, Rank],
) -> None:
    deployment, first, second = pair
    deployment.kill_hmm()
    second.channel.close()
    deployment.start_hmm()
    first.resume(deployment)
    assert first.bus.membership() == (1, 3, True, 1)
    replacement = Rank(deployment, 1)
    wait_until(lambda: first.bus.membership() == (2, 3, False, 1), "the others are parked")
    replacement.close()


def begin_to_read(deployment: Deployment, large: Path) -> None:
    """Begin to load and wait until something has been read."""
    deployment.call(load_message(large, op_id="large", dtype="bfloat16"))
    wait_until(lambda: deployment.status().bytes_done > 0, "the load reads")


def killed_while_loading(make: Callable[..., Deployment], large: Path) -> Deployment:
    """A deployment whose HMM was killed while it read. Another one where a busy machine let the load end before."""
    for _ in range(5):
        deployment = make(device_bytes=600 << 20)
        hmm = deployment.hmm
        assert hmm is not None
        begin_to_read(deployment, large)
        status = deployment.status()
        deployment.kill_hmm()
        if "load done" not in deployment.log_of(hmm):
            assert status.phase == "loading"
            return deployment
        deployment.stop(deployment.keeper)  # it would keep what was loaded
    raise AssertionError("every load was over before the kill")


def test_an_hmm_killed_while_loading_starts_empty(make: Callable[..., Deployment], model: Path, tmp_path: Path) -> None:
    deployment = killed_while_loading(make, hollow_checkpoint(tmp_path / "large", LARGE))
    deployment.start_hmm()
    status = deployment.status()
    assert status.phase == "empty"
    assert all(device.free == device.budget == 600 << 20 for device in status.devices)
    assert deployment.integrity().findings == ()
    assert kept_bytes(deployment) < 1 << 16
    deployment.load(model)
    assert deployment.integrity().findings == ()


def test_a_load_takes_no_more_memory_than_the_checkpoint(make: Callable[..., Deployment], tmp_path: Path) -> None:
    deployment = make(device_bytes=900 << 20)
    large = hollow_checkpoint(tmp_path / "large", LARGE, stored="BF16")
    assert deployment.hmm is not None
    at_start = peak_bytes(deployment.hmm.pid)
    layout = initial_layout((5, 5), ["host:0"])
    deployment.call(load_message(large, dtype="bfloat16", layout=layout))
    status = deployment.wait_phase("ready")
    assert status.bytes_done > 390 << 20
    assert peak_bytes(deployment.hmm.pid) - at_start <= status.bytes_total * 1.15


@pytest.mark.parametrize("content", [b"", b"\1" * 4096])
def test_what_was_kept_without_a_valid_catalog_is_dropped(
    pair: tuple[Deployment, Rank, Rank], model: Path, content: bytes
) -> None:
    deployment, first, second = pair
    deployment.kill_hmm()
    for rank in (first, second):
        rank.close()
    channel, fd = keeper_channel(deployment), os.memfd_create("catalog")
    os.write(fd, content)
    channel.send(Keep(("catalog",)), (fd,))
    assert isinstance(channel.receive()[0].body, Ack)
    channel.close()
    os.close(fd)
    assert kept_bytes(deployment) > 1 << 20
    deployment.start_hmm()
    assert deployment.status().phase == "empty"
    assert kept_bytes(deployment) < 1 << 16
    deployment.load(model)
    assert deployment.integrity().findings == ()


def test_other_devices_than_the_kept_ones_are_refused_and_nothing_is_lost(
    pair: tuple[Deployment, Rank, Rank],
) -> None:
    deployment, first, _ = pair
    deployment.kill_hmm()
    process = deployment.spawn("elasticmoe.services.hmm", devices="host:3")
    assert process.wait(60) == 1
    assert "keeper_mismatch: the keeper holds the memory of 2 devices" in deployment.log_of(process)
    deployment.start_hmm()
    assert first.checksums().items() <= deployment.integrity(checksums=True).checksums.items()


def test_a_new_keeper_is_given_everything_again(pair: tuple[Deployment, Rank, Rank]) -> None:
    deployment, first, _ = pair
    assert deployment.keeper is not None
    assert deployment.hmm is not None
    deployment.keeper.kill()
    deployment.keeper.wait(60)
    deployment.start_keeper()
    hmm = deployment.hmm
    wait_until(lambda: "keeper is back" in deployment.log_of(hmm), "the keeper is used again")
    deployment.kill_hmm()
    deployment.start_hmm()
    assert deployment.status().phase == "ready"
    assert first.checksums().items() <= deployment.integrity(checksums=True).checksums.items()


def test_without_the_keeper_the_hmm_goes_on(pair: tuple[Deployment, Rank, Rank]) -> None:
    deployment, first, second = pair
    assert deployment.stop(deployment.keeper) == 0
    assert deployment.integrity().findings == ()
    second.channel.close()
    wait_until(lambda: first.bus.membership() == (2, 3, False, 1), "the others are parked")


# ---- Fencing


def test_a_superseded_scaler_is_refused_also_after_a_restart(pair: tuple[Deployment, Rank, Rank]) -> None:
    deployment, first, second = pair
    deployment.members(0, 1, epoch=7)
    generation = first.bus.membership()[0]
    assert deployment.refusal(SetMembership((0,), True), epoch=6) == "stale_epoch"
    assert deployment.refusal(load_message(Path("/nowhere")), epoch=6) == "stale_epoch"
    deployment.kill_hmm()
    deployment.start_hmm()
    first.resume(deployment)
    second.resume(deployment)
    assert deployment.refusal(SetMembership((0,), True), epoch=6) == "stale_epoch"
    assert first.bus.membership()[0] == generation
    deployment.members(0, 1, epoch=7)
    deployment.call(CheckIntegrity(), epoch=0)  # asking needs no authority
    deployment.call(GetHmmStatus(), epoch=8)  # a scaler that has taken over and has commanded nothing yet
    assert deployment.refusal(SetMembership((0,), True), epoch=7) == "stale_epoch"


# ---- Start and stop


def test_a_second_hmm_or_keeper_of_a_run_directory_is_refused(deployment: Deployment) -> None:
    for module, name in (("elasticmoe.services.hmm", "hmm"), ("elasticmoe.services.hmm.keeper", "keeper")):
        process = deployment.spawn(module)
        assert process.wait(60) == 1
        text = f"elasticmoe-{name}: already_running: socket {name}.sock is in use by another process\n"
        assert deployment.log_of(process) == text
    assert deployment.status().phase == "empty"


@pytest.mark.parametrize(("setting", "value"), [("device_bytes", "-1"), ("granularity", "5000"), ("devices", "gpu")])
def test_a_bad_configuration_stops_the_start_with_one_line(deployment: Deployment, setting: str, value: str) -> None:
    deployment.kill_hmm()
    process = deployment.spawn("elasticmoe.services.hmm", **{setting: value})
    assert process.wait(60) == 1
    lines = deployment.log_of(process).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(("elasticmoe-hmm: bad_config: ", "elasticmoe-hmm: keeper_mismatch: "))


@pytest.mark.slow
def test_without_a_keeper_the_start_ends_with_one_line() -> None:
    deployment = Deployment()
    process = deployment.spawn("elasticmoe.services.hmm")
    assert process.wait(30) == 1
    assert deployment.log_of(process) == "elasticmoe-hmm: unavailable: the keeper is not there after 10 s\n"
    deployment.close()


def test_the_default_budget_is_most_of_what_is_available(make: Callable[..., Deployment]) -> None:
    status = make(device_bytes=0, devices="host:4").status()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert len(status.devices) == 4
    assert 0 < sum(device.budget for device in status.devices) <= total * 0.8
    assert all(device.budget % PAGE == 0 for device in status.devices)


def test_stop_is_clean(pair: tuple[Deployment, Rank, Rank]) -> None:
    deployment, first, _ = pair
    mine = first.checksums()
    assert deployment.stop(deployment.hmm) == 0
    sockets = deployment.run_dir / "sockets"
    assert sorted(path.name for path in sockets.iterdir()) == ["keeper.sock", "keeper.sock.lock"]
    assert first.bus.membership() == (1, 3, True, 1)
    deployment.start_hmm()
    assert deployment.status().phase == "ready"
    assert deployment.stop(deployment.hmm) == 0
    assert deployment.stop(deployment.keeper) == 0
    assert list(sockets.iterdir()) == []
    assert first.checksums() == mine


def test_stop_while_loading_is_clean(make: Callable[..., Deployment], tmp_path: Path) -> None:
    deployment = make(device_bytes=600 << 20)
    begin_to_read(deployment, hollow_checkpoint(tmp_path / "large", LARGE))
    assert deployment.stop(deployment.hmm) == 0
