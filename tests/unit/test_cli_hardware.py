"""What `up` says of accelerators that cannot serve: before it makes, starts or leaves anything."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from elasticmoe.cli.main import main
from elasticmoe.common.devices import factory
from elasticmoe.common.layout import Compute, ExchangeKind
from elasticmoe.common.settings import ScalerConfig
from tests.devices import standins

pytestmark = pytest.mark.usefixtures("no_settings_of_the_caller")


def told(tmp_path: Path, capsys: pytest.CaptureFixture[str], devices: str, *flags: str) -> str:
    """By `up`, which fails."""
    assert main(["up", "--devices", devices, "--run-dir", str(tmp_path / "run"), *flags]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "hint"), [("npu:0-7", "install CANN"), ("cuda:0,cuda:1", "install NVIDIA's driver")]
)
def test_a_driver_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, devices: str, hint: str
) -> None:
    kind = devices[: devices.index(":")]
    monkeypatch.setitem(factory._BACKENDS, kind, standins.device_class(kind, tmp_path / "lib.so"))
    error = told(tmp_path, capsys, devices)
    assert "lib.so cannot be loaded" in error
    assert hint in error
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_device_that_is_missing_and_what_does_not_compute_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("STANDIN_DEVICES", "2")
    with standins.memory(monkeypatch) as folder:
        monkeypatch.setitem(factory._BACKENDS, kind, standins.process(kind, folder))
        assert f"there is no {kind}:2: the driver shows 2 devices" in told(tmp_path, capsys, f"{kind}:0-2")
        told_of = told(tmp_path, capsys, f"{kind}:0-1", "--compute", "host")
        assert f"host does not compute on {kind}:0-1: --compute has to be auto or torch" in told_of


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("npu", "npu:{index}", "torch knows no npu without the package torch_npu, which is not installed"),
        ("cuda", "cuda:{index}", "was built without CUDA: install one of the builds for it"),
    ],
)
def test_a_torch_that_does_not_know_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str, name: str, hint: str
) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    with standins.memory(monkeypatch) as folder:
        driver = standins.process(kind, folder)
        driver.torch_device = name
        monkeypatch.setitem(factory._BACKENDS, kind, driver)
        assert hint in told(tmp_path, capsys, f"{kind}:0-1")


def test_a_backend_that_nobody_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(tmp_path, capsys, "tpu:0-1")
    assert "bad_config: --devices: has to be host:N" in text
    assert text.endswith('or numbers of accelerators such as npu:0-7, cuda:0,cuda:2 or cuda:0/4; it is "tpu:0-1"\n')


def test_activations_that_are_not_rounded_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["up", "--model", "oracle", "--run-dir", str(tmp_path / "run")]
    assert main([*words, "--devices", "cuda:0-1", "--compute", "triton", "--activations", "bfloat16"]) == 1
    error = "no_compute: --compute triton does not follow --activations bfloat16: leave it at float32"
    assert error in capsys.readouterr().err
    monkeypatch.setenv("ELASTICMOE_ACTIVATIONS", "half")
    assert main(words) == 1
    assert "ELASTICMOE_ACTIVATIONS" in capsys.readouterr().err


def test_a_wrong_setting_of_the_pool_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTICMOE_THREADS_MAX", "abc")
    assert main(["up", "--model", "oracle", "--run-dir", str(tmp_path / "run")]) == 1
    error = 'bad_config: ELASTICMOE_THREADS_MAX: has to be a whole number; it is "abc"'
    assert capsys.readouterr().err == f"elasticmoe: {error}\n"
    assert not (tmp_path / "run").exists()


def test_a_setting_that_names_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "or numbers of accelerators such as npu:0-7" in told(tmp_path, capsys, "npu:x")


@pytest.mark.parametrize(
    ("flag", "kinds", "devices"),
    [
        ("compute", Compute, {"triton": "cuda:0", "torch_npu": "npu:0"}),
        ("exchange", ExchangeKind, {"mailbox": "cuda:0"}),
    ],
)
def test_every_kind_can_be_asked_for_by_flag_and_by_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, kinds: object, devices: dict[str, str]
) -> None:
    for name in ("auto", *get_args(kinds)):
        given = {"run_dir": str(tmp_path), "devices": devices.get(name, "host:1"), flag: name}
        assert getattr(msgspec.convert(given, ScalerConfig), flag) == name
        words = ["up", "--model", "oracle", f"--{flag}", name, "--run-dir", str(tmp_path / "run"), "--devices", "npu:0"]
        assert main(words) == 1  # there is no driver here, or nothing computes so there
        assert "is none of" not in capsys.readouterr().err
