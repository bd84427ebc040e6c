"""A deployment that another version has left, cut off in the middle of an operation: the present one goes on with its
store and its run directory. What was left is recorded (recorded.py)."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elasticmoe.common.record import STATE_FORMAT, read_record
from tests.procs.clients import check_load_against_oracle, closed_loop
from tests.procs.recorded import RELEASES, REPLICAS_WANTED, deploy, settled, unpack
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(300)]

RECORDINGS = sorted(RELEASES.glob("*.tar.gz"))


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="em-"))  # short: socket paths have a limit
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.name.removesuffix(".tar.gz"))
def test_what_another_version_has_left_goes_on(
    recording: Path, folder: Path, model_folder: Callable[[str], Path]
) -> None:
    model = settled(model_folder("oracle"), folder)
    told = unpack(recording, folder / "run", model)
    left = read_record(folder / "run")
    assert left is not None
    assert left.state_format == STATE_FORMAT, "else `up` refuses it: tests/procs/test_launcher.py"
    deployment = deploy(model, folder).wait_ready()
    try:
        wait_until(lambda: "is served at" in deployment.output(), "`up` says where it serves")
        output = deployment.output()
        assert f"resuming the deployment that was cut off in {deployment.run_dir}" in output
        assert f"operation {told['operation']}, which was in progress, goes on" in output
        assert deployment.wait_operation(told["operation"])["outcome"] == "done"
        layout = deployment.admin("/v1/layout")
        assert (layout["replicas"], layout["fence"]) == (REPLICAS_WANTED, told["fence"] + 1)
        assert layout["epoch"] > told["epoch"]
        known = {one["op_id"]: one for one in deployment.admin("/v1/operations")["operations"]}
        assert told["ended"], "an operation had ended"
        for ended in told["ended"]:
            assert ended == {field: known[ended["op_id"]][field] for field in ended}
        if told["policy"] is not None:
            policy = deployment.admin("/v1/policy")
            now = {"version": policy["version"]} | policy["policy"]
            assert told["policy"] == {field: now[field] for field in told["policy"]}
        streams = asyncio.run(closed_loop(deployment.base_url, clients=4, requests=12, seed=1))
        assert check_load_against_oracle(streams, model) > 0
        epoch = deployment.admin("/v1/layout")["epoch"]
        assert deployment.scale(replicas=1)["outcome"] == "done"
        assert deployment.admin("/v1/layout")["epoch"] > epoch
        deployment.stop()
    finally:
        deployment.discard()


def test_there_are_recordings_of_other_versions() -> None:
    assert len({path.name.partition("-")[0] for path in RECORDINGS}) >= 2
