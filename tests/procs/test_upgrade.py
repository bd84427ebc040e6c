"""A deployment that another version has left, cut off in the middle of an operation or stopped in order: the present
one goes on with its store and its run directory, and so does the next after an orderly stop. What was left is recorded
(recorded.py)."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from elasticmoe.cli.resume import store_name
from elasticmoe.common.record import STATE_FORMAT, read_record, write_record
from tests.procs.clients import check_load_against_oracle, closed_loop
from tests.procs.deployment import Deployment, in_force
from tests.procs.recorded import RELEASES, REPLICAS_WANTED, STOPPED, deploy, settled, unpack
from tests.procs.waiting import wait_until
from tests.unit.stores import Server

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(300)]

OWN, SHARED = "default", "recorded"  # names of a deployment in a store of its own, and in one that may have others
RECORDINGS = sorted(RELEASES.glob("*.tar.gz"))
ARE_STOPPED = [path for path in RECORDINGS if path.name.endswith(f"-{STOPPED}.tar.gz")]
ARE_CUT_OFF = [path for path in RECORDINGS if path not in ARE_STOPPED]
_ONE_OF_EACH = list({path.name.partition("-")[0]: path for path in ARE_CUT_OFF}.values())


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="em-"))  # short: socket paths have a limit
    yield made
    shutil.rmtree(made, ignore_errors=True)


@contextmanager
def own_store(folder: Path) -> Iterator[dict[str, Any]]:
    """The embedded one, as it was."""
    assert (folder / "run/store").is_dir()
    yield {}


@contextmanager
def other_store(folder: Path) -> Iterator[dict[str, Any]]:
    """What the embedded store of a recording has written down, in a server that the deployment does not start: the
    settings that name it."""
    server = Server(folder, folder / "run/store")
    try:
        left = read_record(folder / "run")
        assert left is not None
        write_record(folder / "run", msgspec.structs.replace(left, store=store_name(server.url)))
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            keys = list(client.scan_iter(f"elasticmoe:{OWN}:*"))
            assert keys
            for key in keys:
                client.rename(key, key.replace(f":{OWN}:", f":{SHARED}:", 1))
        yield {"store_url": server.url, "deployment": SHARED}
    finally:
        server.stop()


@pytest.mark.parametrize("store", [own_store, other_store], ids=["embedded", "external"])
@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.name.removesuffix(".tar.gz"))
def test_what_another_version_has_left_goes_on(
    recording: Path,
    store: Callable[[Path], AbstractContextManager[dict[str, Any]]],
    folder: Path,
    model_folder: Callable[[str], Path],
) -> None:
    model = settled(model_folder("oracle"), folder)
    told = unpack(recording, folder / "run", model)
    left = read_record(folder / "run")
    assert left is not None
    assert left.state_format == STATE_FORMAT, "else `up` refuses it: tests/procs/test_launcher.py"
    with store(folder) as settings:
        check_it_goes_on(deploy(model, folder, **settings), model, told, is_stopped=recording in ARE_STOPPED)


@pytest.mark.parametrize("recording", _ONE_OF_EACH, ids=lambda path: path.name.removesuffix(".tar.gz"))
def test_what_another_version_has_left_is_stopped_in_order_and_gone_on_with(
    recording: Path, folder: Path, model_folder: Callable[[str], Path]
) -> None:
    model = settled(model_folder("oracle"), folder)
    told = unpack(recording, folder / "run", model)
    first = deploy(model, folder, "--keep-state")
    try:
        first.wait_ready()
        check_same(first, told)
        before = in_force(first)
        first.stop_keeping()
        second = deploy(model, folder)
    except BaseException:
        first.discard()
        raise
    try:
        second.wait_ready()
        wait_until(lambda: "is served at" in second.output(), "`up` says where it serves")
        assert f"resuming the deployment that was stopped in {second.run_dir}" in second.output()
        assert in_force(second) == before
        streams = asyncio.run(closed_loop(second.base_url, clients=4, requests=12, seed=1))
        assert check_load_against_oracle(streams, model) > 0
        second.stop()
    finally:
        second.discard()


def check_it_goes_on(deployment: Deployment, model: Path, told: dict[str, Any], *, is_stopped: bool) -> None:
    try:
        deployment.wait_ready()
        wait_until(lambda: "is served at" in deployment.output(), "`up` says where it serves")
        output = deployment.output()
        how = "stopped" if is_stopped else "cut off"
        assert f"resuming the deployment that was {how} in {deployment.run_dir}" in output
        goes_on = f"operation {told['operation']}, which was in progress, goes on"
        assert (goes_on in output) is not is_stopped
        check_same(deployment, told, is_settled=is_stopped)
        streams = asyncio.run(closed_loop(deployment.base_url, clients=4, requests=12, seed=1))
        assert check_load_against_oracle(streams, model) > 0
        epoch = deployment.admin("/v1/layout")["epoch"]
        assert deployment.scale(replicas=1)["outcome"] == "done"
        assert deployment.admin("/v1/layout")["epoch"] > epoch
        deployment.stop()
    finally:
        deployment.discard()


def check_same(deployment: Deployment, told: dict[str, Any], *, is_settled: bool = False) -> None:
    """The operation that was in progress comes to its end; all else is what the version told. `is_settled`: it had come
    to its end before."""
    assert deployment.wait_operation(told["operation"])["outcome"] == "done"
    layout = deployment.admin("/v1/layout")
    assert layout["replicas"] == REPLICAS_WANTED
    assert layout["fence"] > told["fence"]
    assert layout["epoch"] >= told["epoch"] if is_settled else layout["epoch"] > told["epoch"]
    known = {one["op_id"]: one for one in deployment.admin("/v1/operations")["operations"]}
    assert told["ended"], "an operation had ended"
    for ended in told["ended"]:
        assert ended == {field: known[ended["op_id"]][field] for field in ended}
    if told["policy"] is not None:
        policy = deployment.admin("/v1/policy")
        now = {"version": policy["version"]} | policy["policy"]
        assert told["policy"] == {field: now[field] for field in told["policy"]}


def test_there_are_recordings_of_other_versions() -> None:
    assert len({path.name.partition("-")[0] for path in ARE_CUT_OFF}) >= 2
    assert ARE_STOPPED
