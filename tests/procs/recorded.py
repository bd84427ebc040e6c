"""What a version leaves in its run directory when it is cut off in the middle of an operation, or stopped in order with
its state, kept as a file.

`python -m tests.procs.recorded NAME [ELASTICMOE]` records it, with this checkout's version or with the program
ELASTICMOE of another one's virtual environment: `releases/NAME-POINT.tar.gz` for each of POINTS, in which the operation
is cut off, and for STOPPED. In each are `told.json` with what its admin listener said, and the run directory but for
what is secret or made anew. A release is recorded when it is made; test_upgrade.py lets the present version go on with
every recording.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from elasticmoe.cli.models import make_model
from elasticmoe.common.private import make_private
from tests.procs.deployment import Deployment
from tests.procs.elastic import SETTINGS
from tests.procs.failpoints import Failpoints

RELEASES = Path(__file__).parent / "releases"
POINTS = ("scaler.leg1.prepare.after", "scaler.leg1.commit.after")
STOPPED = "stopped"
REPLICAS, REPLICAS_THEN, REPLICAS_WANTED, DEVICES = 2, 3, 4, 4
_KEPT = ("deployment.json", "launcher.lock", "state", "store")
_TOLD = "told.json"
_MODEL_CHARS = 120  # of the checkpoint's path, which stands in the store's records: another one has to be as long
_MODEL = "/".ljust(_MODEL_CHARS, "m")  # in its place
_ENDED = ("op_id", "phase", "outcome", "kind")


def settled(model: Path, folder: Path) -> Path:
    """A copy of the checkpoint `model` in `folder`, at a path of _MODEL_CHARS."""
    path = folder / "m".ljust(_MODEL_CHARS - len(str(folder)) - 1, "m")
    shutil.copytree(model, path)
    return path


def deploy(model: Path, folder: Path, *flags: str, **settings: Any) -> Deployment:
    """The deployment that is recorded, and goes on in the run directory of `folder`. `flags`: further ones of `up`."""
    flags = ("--served-name", "oracle", *flags)
    return Deployment(model, replicas=REPLICAS, devices=DEVICES, folder=folder, flags=flags, **{**SETTINGS, **settings})


def unpack(recording: Path, run_dir: Path, model: Path) -> dict[str, Any]:
    """Make the run directory of a recording, whose deployment served `model` (`settled`); what the version told."""
    make_private(run_dir)
    with tarfile.open(recording) as archive:
        archive.extractall(run_dir, filter="tar")
    for folder in (run_dir, *(path for path in run_dir.rglob("*") if path.is_dir())):
        folder.chmod(0o700)
    _rename(run_dir, _MODEL, str(model))
    told = run_dir / _TOLD
    found: dict[str, Any] = json.loads(told.read_text())
    told.unlink()
    return found


def _rename(run_dir: Path, before: str, after: str) -> None:
    """Let all that was written of a model say another path of the same length."""
    assert len(before) == len(after) == _MODEL_CHARS
    for path in (run_dir / "deployment.json", *(run_dir / "store").rglob("*.aof")):
        raw = path.read_bytes()
        assert before.encode() in raw or path.suffix == ".aof", path
        path.write_bytes(raw.replace(before.encode(), after.encode()))


def _record(name: str, point: str, model: Path, program: Path | None) -> None:
    folder = Path(tempfile.mkdtemp(prefix="em-"))
    points = Failpoints(folder / "points")
    model = settled(model, folder)
    flags = ("--keep-state",) if point == STOPPED else ()
    deployment = deploy(model, folder, *flags, failpoint_dir=points.folder, program=program)
    try:
        deployment.wait_ready()
        policy = _set_policy(deployment)
        deployment.scale(replicas=REPLICAS_THEN)
        if point == STOPPED:
            operation = deployment.scale(replicas=REPLICAS_WANTED)["op_id"]
        else:
            points.arm(point)
            operation = deployment.order(replicas=REPLICAS_WANTED)
            points.wait_hit(point)
        told = _told(deployment) | {"name": name, "date": time.strftime("%Y-%m-%d"), "policy": policy}
        if point == STOPPED:
            deployment.stop_keeping()
        else:
            deployment.cut_off()
        _rename(deployment.run_dir, str(model), _MODEL)
        _write(RELEASES / f"{name}-{point}.tar.gz", deployment.run_dir, told | {"operation": operation})
    finally:
        deployment.discard()
        shutil.rmtree(folder, ignore_errors=True)


def _set_policy(deployment: Deployment) -> dict[str, Any] | None:
    """Objectives of an operator's; None where the version has none."""
    try:
        now = deployment.admin("/v1/policy")
    except httpx.HTTPStatusError:
        return None
    fields = {"mode": "advise", "itl_s": 0.123, "ttft_s": 4.5, "replicas_max": 7}
    status, answer = deployment.admin_call(
        "PUT", "/v1/policy", {"version": now["version"], "policy": now["policy"] | fields}
    )
    assert status == 200, answer
    return {"version": answer["version"]} | fields


def _told(deployment: Deployment) -> dict[str, Any]:
    layout, operations = deployment.admin("/v1/layout"), deployment.admin("/v1/operations")["operations"]
    ended = [one for one in operations if one["phase"] in ("done", "aborted")]
    return {
        "epoch": layout["epoch"],
        "fence": layout["fence"],
        "replicas": layout["replicas"],
        "ended": [{field: one.get(field) for field in _ENDED} for one in ended],
    }


def _write(path: Path, run_dir: Path, told: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    raw = json.dumps(told, indent=1).encode()
    with tarfile.open(path, "w:gz") as archive:
        about = tarfile.TarInfo(_TOLD)
        about.size = len(raw)
        archive.addfile(about, io.BytesIO(raw))
        for part in _KEPT:
            archive.add(run_dir / part, part, filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    """Record each of POINTS, and an orderly stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the recordings: the version, or its commit")
    parser.add_argument("program", nargs="?", type=Path, help="another version's `elasticmoe`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="em-") as folder:
        model = make_model("oracle", Path(folder) / "oracle")
        for point in (*POINTS, STOPPED):
            _record(args.name, point, model, args.program)


if __name__ == "__main__":
    main()
