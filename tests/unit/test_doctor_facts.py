"""What `doctor --device` reads of a machine: what nobody says is unknown, and what it does not know is not read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticmoe.cli import doctor_facts
from elasticmoe.cli.doctor_device import device_named
from elasticmoe.cli.doctor_facts import VENDORS, check_pair, facts
from elasticmoe.cli.doctor_graph import captured, remap_under_graph
from elasticmoe.cli.finding import Finding
from elasticmoe.cli.main import main
from elasticmoe.common.devices.base import Device
from elasticmoe.common.devices.rules import ProcessRules
from elasticmoe.common.devices.telling import CALLS
from elasticmoe.common.protocol.errors import InvalidRequest
from tests.devices import standins, vendor
from tests.devices.breaches import check_declared

FILES = {
    "npu": {
        "usr/local/Ascend/driver/version.info": ("driver", "Version=25.5.0\nascendhal_version=7.35\n", "25.5.0"),
        "usr/local/Ascend/firmware/version.info": ("firmware", "Version=7.8.0.3.220\n", "7.8.0.3.220"),
        "usr/local/Ascend/cann/x86_64-linux/ascend_toolkit_install.info": (
            "CANN",
            "package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100\n",
            "9.1.0",
        ),
    },
    "cuda": {
        "proc/driver/nvidia/version": (
            "driver",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12\n",
            "570.86.15",
        ),
        "usr/local/cuda/version.json": ("toolkit", '{"cuda" : {"name" : "SDK", "version" : "13.0.1"}}', "13.0.1"),
    },
}


def found(kind: str, root: Path, environment: dict[str, str] | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in facts(kind, 0, environment or {}, root)}


@pytest.mark.parametrize("kind", VENDORS)
def test_an_empty_machine_is_not_called_ok(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    all_ = found(kind, tmp_path)
    assert all_["driver"].level == all_[VENDORS[kind].smi[0]].level == all_["/dev/shm"].level == "unknown"
    assert all_["device nodes"].level == "warn"
    assert f"/dev/{VENDORS[kind].nodes[0]}" in all_["device nodes"].text
    assert all_["torch"].text == torch.__version__


@pytest.mark.parametrize("kind", VENDORS)
def test_versions_are_read_from_the_vendors_files(kind: str, tmp_path: Path) -> None:
    for place, (_, text, _) in FILES[kind].items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    all_ = found(kind, tmp_path)
    assert {name: all_[name].text for name, _, _ in FILES[kind].values()} == {
        name: version for name, _, version in FILES[kind].values()
    }


@pytest.mark.parametrize("kind", VENDORS)
def test_nodes_that_are_there_and_shut_ones(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = (*VENDORS[kind].nodes, {"npu": "davinci0", "cuda": "nvidia0"}[kind])
    (tmp_path / "dev").mkdir()
    for name in (*nodes, "nvidia-caps", "davinci_other"):
        (tmp_path / "dev" / name).touch(0o600)
    node = found(kind, tmp_path)["device nodes"]
    assert node.level == "ok"
    assert [part.split()[:2] for part in node.text.split(", ")] == [[name, "0600"] for name in nodes]
    monkeypatch.setattr(doctor_facts, "_is_open", lambda path: path.name != nodes[-1])
    node = found(kind, tmp_path)["device nodes"]
    assert node.level == "fail"
    assert node.text.startswith(f"no right to read and write {nodes[-1]} (")
    (tmp_path / "dev" / nodes[-1]).unlink()
    assert "missing: a node of a device" in found(kind, tmp_path)["device nodes"].text


def test_only_variables_that_have_a_name_here_are_told(tmp_path: Path) -> None:
    all_ = found("npu", tmp_path, {"ASCEND_RT_VISIBLE_DEVICES": "0,1", "TOKEN": "secret", "LD_LIBRARY_PATH": "x" * 999})
    assert all_["ASCEND_RT_VISIBLE_DEVICES"].text == "0,1"
    assert all_["ASCEND_HOME_PATH"].text == "not set"
    assert all_["LD_LIBRARY_PATH"].text == "x" * 200
    assert "secret" not in repr(all_)


@pytest.mark.parametrize(
    ("script", "level", "text"),
    [
        ("echo ' Product Name : IT21\n Serial Number : 0123\n Firmware Version : 7.8'", "ok", "Product Name IT21"),
        ("echo nothing", "warn", "it ends with status 0 and shows no device"),
        ("exit 3", "warn", "it ends with status 3 and shows no device"),
        ("exec sleep 60", "fail", "no answer in 0.3 s"),
    ],
)
def test_the_vendors_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, level: str, text: str) -> None:
    (tmp_path / "npu-smi").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    (tmp_path / "npu-smi").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    if level == "fail":
        monkeypatch.setattr(doctor_facts, "_SMI_S", 0.3)
    tool = found("npu", tmp_path)["npu-smi"]
    assert (tool.level, tool.text.startswith(text)) == (level, True), tool
    assert "0123" not in tool.text  # serial numbers are nobody's affair


@pytest.mark.parametrize("kind", VENDORS)
@pytest.mark.parametrize(
    ("index", "visible", "asked"), [(3, None, "3"), (1, "6, 4", "4"), (2, "6,4", None), (0, "GPU-8f2c", None)]
)
def test_the_vendors_tool_is_asked_for_the_device_in_question(
    kind: str, index: int, visible: str | None, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its number in the machine, where a variable hides others."""
    tool = tmp_path / VENDORS[kind].smi[0]
    tool.write_text('#!/bin/sh\necho " Model : $*"\n')
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    variable = VENDORS[kind].visible
    (finding,) = (
        one
        for one in facts(kind, index, {} if visible is None else {variable: visible}, tmp_path)
        if one.name == tool.name
    )
    if asked is None:
        assert (finding.level, f"{variable}={visible} does not say" in finding.text) == ("unknown", True), finding
    else:
        assert f"-i {asked}" in finding.text or f"--id={asked} " in finding.text, finding


@pytest.mark.parametrize(
    ("torch_version", "npu_version", "level"),
    [
        ("2.12.0+cpu", "2.12.0.post3", "ok"),
        ("2.13.0", "2.12.0.post3", "fail"),
        ("2.12.1", "2.12.0", "fail"),
        ("2.13.0", "", "unknown"),
        ("nightly", "2.12.0", "unknown"),
    ],
)
def test_torch_and_torch_npu_have_to_be_a_pair(torch_version: str, npu_version: str, level: str) -> None:
    assert check_pair(torch_version, npu_version).level == level


def test_devices_and_files_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [device_named(text) for text in ("npu", "cuda:3", "cuda:1/4")] == [
        ("npu:0", 1),
        ("cuda:3", 1),
        ("cuda:1", 4),
    ]
    for text in ("host", "host:0", "tpu", "npu:x", "npu:", "node-a/npu:0", "npu:0-7", "", "a/b", "npu:0.1", "host:4"):
        with pytest.raises(InvalidRequest, match="has to be cuda or npu, or one of them"):
            device_named(text)
    assert main(["doctor", "--report", str(tmp_path / "r.json")]) == 1
    assert "--report: it is of an accelerator" in capsys.readouterr().err
    assert main(["doctor", "--device", "npu", "--report", str(tmp_path / "none/r.json")]) == 1
    assert f"--report: {tmp_path}/none/r.json: No such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", VENDORS)
def test_what_is_asked_of_drivers_is_declared_by_their_vendors(kind: str) -> None:
    headers = {"cuda": vendor.CUDA, "npu": vendor.ASCEND}[kind]
    name = {"cuda": "cuda.h", "npu": "acl/acl_rt.h"}[kind]
    text = next(path for folder in vendor.headers(headers) if (path := folder / name).exists()).read_text()
    calls = {call.removesuffix("_v2"): types for call, types in CALLS[kind].items()}
    check_declared(text, {"cuda": "CUresult", "npu": "aclError"}[kind], calls)


# ---- a captured graph over an address where memory is mapped anew ----------------------------------------------------


@pytest.fixture(params=standins.KINDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with standins.memory(monkeypatch) as folder:
        made = standins.process(request.param, folder)(f"{request.param}:0", 2 << 20, 16 << 20, rules=ProcessRules())
        yield made
        made.close()


def test_a_graph_that_follows_the_address_gives_twice_as_much(device: Device) -> None:
    before, after = remap_under_graph(device, lambda work: work)
    assert after == 2 * before > 0


class Accelerator:
    """Of `torch.cuda`, what the capture uses; its graph replays what it was captured with."""

    def __getattr__(self, name: str) -> Any:
        return {"NPUGraph": lambda: self, "CUDAGraph": None}.get(name) or (lambda *_: self)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_the_capture_warms_up_on_a_stream_and_replays_the_graph() -> None:
    calls: list[str] = []
    accelerator = Accelerator()
    accelerator.replay = lambda: calls.append("replay")  # type: ignore[attr-defined]
    accelerator.synchronize = lambda: calls.append("synchronize")  # type: ignore[attr-defined]
    captured(accelerator)(lambda: calls.append("work"))()
    assert calls == ["work"] * 3 + ["synchronize", "work", "replay", "synchronize"]
