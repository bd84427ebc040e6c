"""What an accelerator has by its driver bounds a deployment: `up` asks in a process of its own, and refuses what cannot
be had before it starts anything."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elasticmoe.cli import checks, settings, up
from elasticmoe.cli.doctor_process import TestProcess as Process  # pytest would collect the name
from elasticmoe.common.devices.base import ProcessRules
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit
from tests.devices import standins

pytestmark = pytest.mark.procs
MIB = 1 << 20


@pytest.fixture(params=standins.KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with standins.memory(monkeypatch):
        standins.install(request.param, monkeypatch)
        monkeypatch.setenv("STANDIN_BYTES", str(64 * MIB))
        yield request.param
        assert psutil.Process().children() == []


def resolved(kind: str, model: Path, *argv: str) -> settings.Settings:
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    flags = ["--model", str(model), "--run-dir", str(model.parent / "run"), "--devices", f"{kind}:0-1"]
    flags += ["--max-model-len", "256", "--max-sequences", "16"]
    return settings.from_flags(parser.parse_args([*flags, *argv]))


def test_a_model_fits_into_its_share_of_what_the_driver_says(
    kind: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "available_bytes", lambda: 1 * MIB)  # the machine's memory is not asked for
    checks.check_memory(resolved(kind, model), model)
    monkeypatch.setenv("STANDIN_BYTES", str(16 * MIB))
    with pytest.raises(DoesNotFit, match=rf"the 12\.8 MiB that are 80% of the 16\.0 MiB {kind}:0 has; take more") as no:
        checks.check_memory(resolved(kind, model, "--replicas", "1"), model)
    assert no.value.code == "out_of_memory"
    with pytest.raises(DoesNotFit, match=r"more than the 4\.00 MiB of --device-memory; raise it"):
        checks.check_memory(resolved(kind, model, "--device-memory", "4MiB"), model)


def test_devices_that_one_is_divided_into_share_what_it_has(
    kind: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_BYTES", str(128 * MIB))
    parts = ("--devices", f"{kind}:1/4")
    checks.check_memory(resolved(kind, model, *parts), model)
    checks.check_memory(resolved(kind, model, *parts, "--device-memory", "32MiB"), model)
    text = rf"all budgets of {kind}:1, 136 MiB, would be more than the 128 MiB that are free of its 128 MiB"
    monkeypatch.setattr(checks, "_GIVEN_BACK_S", 0.0)
    with pytest.raises(DoesNotFit, match=text):
        checks.check_memory(resolved(kind, model, *parts, "--device-memory", "34MiB"), model)


def test_a_dead_device_is_told_of_and_refused_only_where_the_first_replicas_need_it(kind: str, model: Path) -> None:
    folder = Path(os.environ["STANDIN_FOLDER"])
    one, two = (resolved(kind, model, "--replicas", number) for number in ("1", "2"))
    assert checks.check_memory(one, model) == []
    standins.lose(folder, 1)
    (warning,) = checks.check_memory(one, model)
    assert warning.startswith(f"{kind}:1 cannot be used, and is left out: ")
    words = "LOST_HEARTBEAT" if kind == "npu" else "answers 709"
    assert words in warning
    with pytest.raises(DeviceError, match=f"^{kind}:1 cannot be used: .*{words}") as refused:
        checks.check_memory(two, model)
    assert refused.value.code == "driver_failed"
    standins.lose(folder, 0)
    with pytest.raises(DeviceError, match=f"^{kind}:0 cannot be used: "):
        checks.check_memory(one, model)


def test_a_process_that_ends_as_it_is_asked_for_a_spare_device_stops_the_start(
    kind: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HMM's would, too."""
    real = Process.ask

    def ask_and_end(process: Process, order: str, *args: object) -> object:
        if args == ([f"{kind}:1"],):
            process.kill()
        return real(process, order, *args)

    monkeypatch.setattr(Process, "ask", ask_and_end)
    with pytest.raises(DeviceError, match="the process has ended at `memory`"):
        checks.check_memory(resolved(kind, model, "--replicas", "1"), model)


def test_what_others_have_is_told_once_it_is_not_given_back(
    kind: str, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = standins.process(kind, Path(tmp_path))(f"{kind}:1", 2 * MIB, 64 * MIB, rules=ProcessRules())
    other.create(32 * MIB, "kv")
    monkeypatch.setattr(checks, "_GIVEN_BACK_S", 0.3)
    text = (
        rf"the budget of {kind}:1, 50\.0 MiB, would be more than the 32\.0 MiB that are free of its 64\.0 MiB: end what"
    )
    with pytest.raises(DoesNotFit, match=text) as refused:
        checks.check_memory(resolved(kind, model), model)
    assert refused.value.code == "out_of_memory"
    checks.check_memory(resolved(kind, model, "--device-memory", "32MiB"), model)
    monkeypatch.setattr(checks, "_GIVEN_BACK_S", 60.0)
    real = Process.ask

    def ask_and_end(process: Process, order: str, *args: object) -> object:
        told = real(process, order, *args)
        other.close()  # a driver that has tidied up after a dead process meanwhile
        return told

    monkeypatch.setattr(Process, "ask", ask_and_end)
    checks.check_memory(resolved(kind, model), model)
