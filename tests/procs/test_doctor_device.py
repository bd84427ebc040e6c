"""`elasticmoe doctor --device` on the stand-ins of drivers: what it tests, what it says of a driver that is not there
or does not answer, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from elasticmoe.cli.doctor_process import TestProcess as Process  # pytest would collect the name
from elasticmoe.cli.doctor_selftest import SelfTest
from elasticmoe.cli.main import main
from elasticmoe.common.protocol.errors import DeadlineExceeded, DeviceError
from tests.devices import standins
from tests.procs.hmm_harness import ROOT

pytestmark = pytest.mark.procs
CHAIN = (
    "open",
    "access to other devices",
    "create, export, map, unmap",
    "copy",
    "a stranger imports",
    "import and share",
    "importer killed",
    "exporter killed",
    "import after that",
    "memory given back",
    "remap under a captured graph",
)


@pytest.fixture(params=standins.KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of accelerators that processes of ours have on the stand-in, until which nobody has any of their memory, no
    process of ours is there, and no descriptor of this one."""
    with standins.memory(monkeypatch) as folder:
        standins.install(request.param, monkeypatch)
        monkeypatch.setenv("STANDIN_BYTES", str(48 << 20))
        standins.used(request.param, folder)  # loads the library, which has descriptors of its own
        before = psutil.Process().num_fds()
        yield request.param
        assert psutil.Process().children() == []
        assert psutil.Process().num_fds() == before
        assert not any(standins.used(request.param, folder))


def levels(findings: list[dict[str, Any]]) -> dict[str, str]:
    return {finding["name"]: finding["level"] for finding in findings}


def test_the_report_tells_of_the_installation_and_of_the_memory(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_PASSWORD", "do-not-tell")
    path = tmp_path / "report.json"
    assert main(["doctor", "--device", f"{kind}:0/4", "--json", "--report", str(path)]) == 0
    report = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (report["format"], report["device"]) == (1, f"{kind}:0")
    assert "do-not-tell" not in path.read_text()
    assert set(report["machine"]) == {"system", "architecture", "python", "cores", "available_bytes"}
    assert tuple(finding["name"] for finding in report["self_test"]) == CHAIN
    expected = dict.fromkeys(CHAIN, "ok") | {"remap under a captured graph": "not run"}
    if kind == "cuda":
        expected["a stranger imports"] = "not run"
    assert levels(report["self_test"]) == expected
    by_name = {finding["name"]: finding for finding in report["self_test"]}
    assert set(by_name["create, export, map, unmap"]["figures"]) >= {"create_us", "export_us", "map_us", "unmap_us"}
    assert by_name["copy"]["figures"]["copy_bytes"] == 16 << 20  # what there was room for, twice
    assert by_name["copy"]["figures"]["copy_bytes_per_s"] > 0
    given = by_name["memory given back"]["figures"]
    assert by_name["exporter killed"]["figures"]["free_bytes"] < given["free_bytes"] == given["free_before_bytes"]
    assert by_name["import after that"]["text"] == (
        "it is refused with not_admitted" if kind == "npu" else "it has the memory"
    )
    opened = by_name["open"]
    assert (opened["figures"]["total_bytes"], opened["figures"]["budget_bytes"]) == (48 << 20, 8 << 20)
    assert "48.0 MiB of 48.0 MiB are free; the budget of each of 4 parts is 8.00 MiB, 80% of all" in opened["text"]
    assert "version 1.17.0" in by_name["open"]["text"] or "version 13." in by_name["open"]["text"]
    assert by_name["remap under a captured graph"]["text"].startswith(
        "torch_npu cannot be imported" if kind == "npu" else f"torch {torch.__version__} has no cuda device here"
    )


@pytest.mark.parametrize(
    ("settings", "level", "text"),
    [
        ({}, "ok", "it can access the memory of {0}:1, {0}:2, {0}:3"),
        ({"STANDIN_NO_PEERS": "0-2"}, "warn", "{0}:0 cannot access the memory of {0}:2: a deployment on both needs "),
        ({"STANDIN_DEVICES": "1"}, "not run", "the driver shows no other device"),
    ],
)
def test_devices_whose_memory_it_cannot_access_are_named(
    kind: str, settings: dict[str, str], level: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = next(finding for finding in SelfTest(f"{kind}:0").run() if finding.name == "access to other devices")
    assert found.level == level
    assert found.text.startswith(text.format(kind))


def test_a_step_that_fails_is_told_and_what_needed_it_is_not_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tested = SelfTest(f"{kind}:0")
    monkeypatch.setattr(tested, "_admits", kind == "cuda")  # as if the other vendor's rule were this one's
    found = {finding.name: finding for finding in tested.run()}
    if kind == "cuda":
        assert (found["a stranger imports"].level, found["import and share"].level) == ("fail", "not run")
        assert found["a stranger imports"].text == "a process that was not admitted: has the memory"
        assert found["import and share"].text == "`a stranger imports` has failed"
    else:
        assert (found["import and share"].level, found["importer killed"].level) == ("fail", "not run")
        assert found["import and share"].text.startswith("not_admitted: ")


def test_a_driver_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["from pathlib import Path", "from elasticmoe.common.devices.factory import register"]
    lines += ["from tests.devices.standins import device_class"]
    lines += [f"register('npu', device_class('npu', Path({str(tmp_path / 'lib.so')!r})))"]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    path = tmp_path / "report.json"
    assert main(["doctor", "--device", "npu", "--report", str(path)]) == 1
    assert f"report: {path}" in capsys.readouterr().out
    tested = json.loads(path.read_text())["self_test"]
    assert tested[0]["text"].startswith("no_driver: the driver's library")
    assert "install CANN" in tested[0]["text"]
    assert levels(tested) == dict.fromkeys(CHAIN, "not run") | {"open": "fail"}
    assert psutil.Process().children() == []


@pytest.mark.parametrize("limit", ["RLIMIT_NOFILE", "RLIMIT_NPROC"])
def test_a_process_that_cannot_be_started_is_told(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole self-test the first step fails, and nothing stays open."""
    before = psutil.Process().num_fds()
    if limit == "RLIMIT_NOFILE":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 1, hard))
        try:
            found = SelfTest("npu:0").run()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    else:  # root has no limit of processes

        def fork(*_: object, **__: object) -> None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        monkeypatch.setattr(subprocess, "Popen", fork)
        found = SelfTest("npu:0").run()
    text = "Too many open files" if limit == "RLIMIT_NOFILE" else "Resource temporarily unavailable"
    assert (found[0].level, found[0].text) == (
        "fail",
        f"no_process: no process can be started to use npu:0: {text}",
    )
    assert {finding.level for finding in found[1:]} == {"not run"}
    assert psutil.Process().num_fds() == before


def test_a_driver_that_does_not_answer_costs_its_process(kind: str) -> None:
    with Process(f"{kind}:0") as process:
        process.ask("open")
        with pytest.raises(DeadlineExceeded, match=r"no answer to `calls` in 0\.2 s: the process was killed"):
            process.ask("calls", 10**9, seconds=0.2)
        with pytest.raises(DeviceError, match="has ended at `free`, with status -9: it said nothing") as caught:
            process.ask("free")
        assert caught.value.code == "driver_failed"
    with Process(f"{kind}:0") as process, pytest.raises(DeviceError, match="status 1: AssertionError: `open` was the"):
        process.ask("make", ["text"])
