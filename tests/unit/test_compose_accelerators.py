"""What is packaged for accelerators: the overlays of compose.yaml, the images, and the versions that the pages name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from elasticmoe.cli import doctor
from elasticmoe.common.devices.names import DeviceCount
from tests.composing import compose_command

ROOT = Path(__file__).parent.parent.parent
KINDS = ("npu", "cuda")
WITH_DEVICES = {"hmm", "worker"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
# Whatever the overlays add, no container gets a right by it that compose.yaml takes away.
RIGHTS = {
    "privileged",
    "pid",
    "ipc",
    "cap_add",
    "cap_drop",
    "security_opt",
    "user",
    "read_only",
    "network_mode",
    "ports",
}


def compose(kind: str = "") -> dict[str, Any]:
    """The overlay of a kind, or compose.yaml."""
    path = ROOT / f"compose.{kind}.yaml" if kind else ROOT / "compose.yaml"
    made: dict[str, Any] = yaml.safe_load(path.read_text())
    return made


def extra(kind: str) -> Requirement:
    """What the extra of that name asks for."""
    (line,) = PROJECT["optional-dependencies"][kind]
    return Requirement(line)


def default_of(value: str) -> str:
    """What `${NAME:-default}` is without NAME."""
    match = re.fullmatch(r"\$\{[A-Z_]+:?-(.*)\}", value)
    assert match is not None, value
    return match[1]


def arguments(kind: str) -> dict[str, str]:
    """The image's, with their defaults."""
    return dict(re.findall(r"(?m)^ARG ([A-Z_]+)=(.*)$", (ROOT / f"Dockerfile.{kind}").read_text()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_has_the_image_and_only_two_have_devices(kind: str) -> None:
    services = compose(kind)["services"]
    ours = {name for name, service in compose()["services"].items() if "profiles" not in service}
    assert set(services) == ours, "without those that watch"
    for name, service in services.items():
        assert service["build"]["dockerfile"] == f"Dockerfile.{kind}"
        assert service["image"] == f"${{ELASTICMOE_IMAGE:-elasticmoe:{kind}}}"
        assert not set(service) & RIGHTS, name
        assert ("devices" in service or "deploy" in service) == (name in WITH_DEVICES)
        assert ("tmpfs" in service) == (name in WITH_DEVICES)
        for volume in service.get("volumes", ()):
            assert (volume["type"], volume["read_only"], volume["source"]) == ("bind", True, volume["target"])
    for name in WITH_DEVICES | {"keeper"}:  # a descriptor a handle
        assert services[name]["ulimits"]["nofile"]["hard"] >= 1 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_is_told_the_same_devices_and_must_be_told_their_memory(kind: str) -> None:
    services = compose(kind)["services"]
    told = {name: service["environment"] for name, service in services.items() if name != "init"}
    assert len({one["ELASTICMOE_DEVICES"] for one in told.values()}) == 1
    devices = DeviceCount.parse(default_of(told["hmm"]["ELASTICMOE_DEVICES"]))
    assert devices.backend == kind
    assert {default_of(one["ELASTICMOE_DEVICE_BYTES"]) for one in told.values()} == {"0"}  # what the driver says
    if kind == "npu":
        nodes = {f"/dev/davinci{number}" for number in devices.indices}
        managers = {"/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"}
        assert set(services["hmm"]["devices"]) == set(services["worker"]["devices"]) == nodes | managers
    else:
        (reserved,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
        assert reserved == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_overlay_builds_what_the_image_builds_without_it(kind: str) -> None:
    written = arguments(kind)
    for name, value in compose(kind)["services"]["hmm"]["build"]["args"].items():
        assert default_of(value) == written[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_has_the_folders_and_the_user_of_the_one_without_accelerators(kind: str) -> None:
    ours, theirs = ((ROOT / name).read_text() for name in (f"Dockerfile.{kind}", "Dockerfile"))
    begin, end = "RUN groupadd --gid 10001", "COPY --from=dependencies"
    assert ours[ours.index(begin) : ours.index(end)] == theirs[theirs.index(begin) : theirs.index(end)]
    for line in ("USER 10001:10001", 'CMD ["elasticmoe", "--help"]', "PYTHONSAFEPATH=1", "ELASTICMOE_RUN_DIR="):
        assert line in ours
    copied = set(re.findall(r"(?m)^COPY ([a-z][\w./-]*) ", ours))
    wanted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied | {"CMakeLists.txt", "LICENSE"} <= wanted | {"pyproject.toml"}


@pytest.mark.parametrize("kind", KINDS)
def test_compose_takes_both_files_together(kind: str) -> None:
    settings = {
        "PATH": os.environ["PATH"],
        "ELASTICMOE_MODEL_DIR": "/models/some",
        "ELASTICMOE_DEVICE_BYTES": "1000000",
    }
    command = [*compose_command(), "--file", "compose.yaml", "--file", f"compose.{kind}.yaml", "config"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    merged = yaml.safe_load(done.stdout)["services"]
    for name, service in merged.items():
        assert service["cap_drop"] == ["ALL"], name
        if "profiles" in service:
            continue
        assert (service["user"], service["read_only"]) == ("10001:10001", True)
        if name != "init":
            assert service["environment"]["ELASTICMOE_DEVICE_BYTES"] == "1000000"
            assert service["environment"]["ELASTICMOE_MODEL"] == "/models/model"
    text = json.dumps(merged["worker"])
    assert "/cache" in text
    assert "/run/elasticmoe/sockets" in text
    assert ("davinci7" in text) == (kind == "npu")


# ---- versions --------------------------------------------------------------------------------------------------------


def pairs() -> list[tuple[str, str, str]]:
    """Lines of the page's table: torch-npu, torch, CANN; one for each version of torch-npu."""
    found = re.findall(
        r"(?m)^\| ([\d.post, ]+) \| (\d+\.\d+\.\d+) \| ([^|]+) \|", (ROOT / "docs/ascend.md").read_text()
    )
    return [(npu, torch, cann.strip()) for npus, torch, cann in found for npu in npus.split(", ")]


def test_the_page_names_pairs_that_can_be_installed_and_one_is_of_cann_9_1() -> None:
    assert len(pairs()) >= 3
    for npu, torch, cann in pairs():
        assert npu.startswith(torch), "torch-npu is of the torch of its number"
        assert NEEDED["torch"].specifier.contains(torch)
        assert extra("npu").specifier.contains(npu) == ("9.1" in cann), "pip takes none of another CANN by itself"
    assert any("9.1" in cann for _, _, cann in pairs())
    bounds = {spec.operator: Version(spec.version) for spec in NEEDED["torch"].specifier}
    assert min(Version(torch) for _, torch, _ in pairs()).release[:2] == bounds[">="].release
    assert (bounds[">="].release, bounds["<"].release) == (doctor._TORCH_MIN, doctor._TORCH_BELOW)


def test_the_images_take_versions_that_go_together() -> None:
    npu = arguments("npu")
    cann = re.search(r":(\d+\.\d+)", npu["CANN_IMAGE"])
    assert cann is not None
    assert [line for line in pairs() if line[:2] == (npu["TORCH_NPU"], npu["TORCH"]) and cann[1] in line[2]]
    assert NEEDED["torch"].specifier.contains(arguments("cuda")["TORCH"])


def test_the_development_build_is_of_the_range() -> None:
    pinned = re.search(r"(?m)^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text())
    assert pinned is not None
    assert NEEDED["torch"].specifier.contains(pinned[1])


def test_the_entry_point_finds_the_drivers_libraries_and_becomes_the_command() -> None:
    command = ["bash", str(ROOT / "deploy/with-cann.sh"), "sh", "-c", "echo $LD_LIBRARY_PATH; exit 7"]
    done = subprocess.run(command, env={"LD_LIBRARY_PATH": "/mine"}, capture_output=True, text=True, check=False)
    driver = "/usr/local/Ascend/driver/lib64"
    assert (done.returncode, done.stdout) == (7, f"{driver}:{driver}/driver:{driver}/common:/mine\n")
    assert os.access(ROOT / "deploy/with-cann.sh", os.X_OK), "COPY keeps its mode"
    assert 'ENTRYPOINT ["with-cann"]' in (ROOT / "Dockerfile.npu").read_text()


def test_both_images_build_the_wheel_by_the_same_steps() -> None:
    begin, end = "# ---- The project's wheel", "# ---- The runtime."
    made = {kind: (ROOT / f"Dockerfile.{kind}").read_text() for kind in KINDS}
    stages = {kind: text[text.index(begin) : text.index(end)] for kind, text in made.items()}
    assert stages["npu"].replace("CANN_IMAGE", "PYTHON_IMAGE") == stages["cuda"]
