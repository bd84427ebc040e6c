"""Where nobody names the devices, `up` leaves room to grow, as far as memory allows."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from elasticmoe.cli import checks, settings, up
from elasticmoe.cli.main import main
from elasticmoe.cli.rundir import RunDir
from elasticmoe.common.capacity import load_of, sizes_of, weights_on
from elasticmoe.common.families import load_spec
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.private import make_private
from elasticmoe.common.record import write_record
from elasticmoe.common.seat_sizes import size_ledger
from tests.unit import forms
from tests.unit.deployment_records import record_of

pytestmark = pytest.mark.usefixtures("no_settings_of_the_caller")

PAGE = 4096
PAGE = 4096
GIB = 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return forms.write(tmp_path / "m", "mixtral", forms.base_tensors(tmp_path / "base", "mixtral"))


def resolved(tmp_path: Path, *argv: str) -> settings.Settings:
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    return settings.from_flags(parser.parse_args(["--run-dir", str(tmp_path / "run"), *argv]))


@pytest.mark.parametrize(
    ("argv", "devices"),
    [
        ((), "host:4"),
        (("--replicas", "1"), "host:2"),
        (("--replicas", "3"), "host:6"),
        (("--replicas", "40"), "host:64"),
    ],
)
def test_there_are_devices_for_twice_the_replicas(tmp_path: Path, argv: tuple[str, ...], devices: str) -> None:
    found = resolved(tmp_path, *argv)
    assert (found.scaler.devices, found.hmm.devices, found.is_roomy) == (devices, devices, True)
    assert settings.child_environment(found)["ELASTICMOE_DEVICES"] == devices


def test_named_devices_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (resolved(tmp_path, "--devices", "host:2").scaler.devices, resolved(tmp_path).scaler.devices) == (
        "host:2",
        "host:4",
    )
    file = tmp_path / "c.toml"
    file.write_text('devices = "host:5"\n')
    monkeypatch.setenv("ELASTICMOE_CONFIG", str(file))
    assert (resolved(tmp_path).scaler.devices, resolved(tmp_path).is_roomy) == ("host:5", False)
    monkeypatch.setenv("ELASTICMOE_DEVICES", "host:3")
    assert (resolved(tmp_path).scaler.devices, resolved(tmp_path).is_roomy) == ("host:3", False)


def test_each_device_has_room_for_the_whole_model(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolved(tmp_path, "--kv-memory", "256MiB")
    spec = load_spec(model, found.scaler.dtype)
    alone = initial_layout(spec.num_experts_by_layer, ["host:0"])
    load, weights = load_of(found.scaler, spec, alone), weights_on(sizes_of(spec, PAGE), alone)["host:0"]
    each = weights + size_ledger(load, PAGE).nbytes + (256 << 20)
    for number, expected in ((0, 2), (1, 2), (2, 2), (3, 3), (4, 4), (9, 4)):
        monkeypatch.setattr(checks, "available_bytes", lambda number=number: int(number * each / 0.8) + 64)
        assert checks.num_devices_that_fit(found, model) == expected
    monkeypatch.setattr(checks, "available_bytes", lambda: 10 * GIB)
    assert checks.num_devices_that_fit(resolved(tmp_path, "--device-memory", "2.5GiB"), model) == 3


def test_a_deployment_that_was_cut_off_gets_no_fewer_devices(tmp_path: Path, model: Path) -> None:
    found = resolved(tmp_path).replace(model=str(model))
    make_private(tmp_path / "run")
    record = record_of(model=str(model), dtype="bfloat16", devices="host:9")
    write_record(tmp_path / "run", record)
    assert up._devices(found, model) == "host:9"
    assert up._devices(resolved(tmp_path, "--replicas", "8").replace(model=str(model)), model) == "host:16"
    assert up._devices(found.replace(model="another"), model) == "host:4"


def test_what_is_in_use_is_told_of_the_replicas_that_serve(tmp_path: Path) -> None:
    scaler = resolved(tmp_path, "--devices", "host:5").scaler
    assert up._room(scaler, 3) == "host:5: 3 in use, 2 to grow into (`elasticmoe scale`)"
    told = up._room(scaler, 5)
    assert told == "host:5: 5 in use, none to grow into: start with more --devices for that"
    assert "scale" not in told


def test_a_deployment_that_runs_is_told_before_its_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = RunDir(tmp_path / "run")
    try:
        assert main(["up", "--run-dir", str(tmp_path / "run"), "--port", "1", "--admin-port", "1"]) == 1
    finally:
        running.release()
    assert capsys.readouterr().err.startswith("elasticmoe: already_running: ")


def test_an_empty_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--run-dir", str(tmp_path / "run"), "--model", ""]) == 1
    assert "--model is empty" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
