"""Devices as torch has them: a vendor's package is imported where its device is opened, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from elasticmoe.cli.settings import child_environment, resolve
from elasticmoe.common.devices import torch_devices
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.devices.torch_devices import open_torch, prepare_torch
from elasticmoe.common.layout import COMPUTES
from elasticmoe.common.protocol.errors import ConfigError, DeviceError
from elasticmoe.services.worker.backends.factory import BACKENDS, open_backend
from tests.devices import npu_operators

# What a fork must not inherit: torch's own state of a device, and a vendor's package, which may have one.
_TEMPLATE = """
import sys
import elasticmoe.services.worker.rank.assembly
import elasticmoe.services.worker.pool.standby
import torch
print(torch.cuda.is_initialized(), sorted({"torch_npu", "triton"} & set(sys.modules)))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a vendor, as torch's entry point finds it: it tells that it was imported. Its module's file."""
    module = tmp_path / "torch_npu" / "__init__.py"
    module.parent.mkdir()
    module.write_text("print('imported')\n")
    described = tmp_path / "torch_npu-2.13.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13\n")
    (described / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:load\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield module
    sys.modules.pop("torch_npu", None)


def test_what_standbys_are_forked_from_has_touched_no_accelerator(package: Path, tmp_path: Path) -> None:
    environment = child_environment(resolve({"run_dir": str(tmp_path / "run"), "devices": "npu:0-1"}))
    environment["PYTHONPATH"] += f":{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", _TEMPLATE], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False []\n"


def test_an_npu_is_asked_for_where_its_package_is(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_torch("npu:{index}")
    assert capsys.readouterr().out == "imported\n"
    with pytest.raises(DeviceError, match="torch cannot use npu:3: ") as caught:  # what is imported is no torch_npu
        open_torch("npu:3")
    assert caught.value.code == "no_torch"


def test_a_package_that_cannot_be_imported(package: Path) -> None:
    package.write_text("raise OSError('libhccl.so: cannot open shared object file')\n")
    with pytest.raises(DeviceError, match=r"torch_npu cannot be imported: libhccl\.so") as caught:
        prepare_torch("npu:{index}")
    assert caught.value.code == "no_torch"


def test_a_storage_is_made_by_the_vendors_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Calls:
        _C = type("C", (), {"_construct_storage_from_data_pointer": staticmethod(lambda *args: made.append(args))})

    monkeypatch.setitem(sys.modules, "torch_npu", Calls)
    device = type("Device", (), {"type": "npu"})()
    torch_devices.storage_at(4096, device, 64)
    assert made == [(4096, device, 64)]


@pytest.mark.parametrize("devices", ["host:2", "npu:0-1", "cuda:0,cuda:1"])
def test_each_kind_of_device_has_what_computes_there(devices: str, tmp_path: Path) -> None:
    kind = DeviceCount.parse(devices).backend
    scaler = resolve({"run_dir": str(tmp_path / "run"), "devices": devices}).scaler
    assert scaler.compute_backend == COMPUTES[kind][0]
    # Copies between accelerators take no core from whoever computes: the first GPU that was tried took 46 s for 9 GB.
    assert scaler.copy_limit == (200 << 20 if kind == "host" else 0)
    for given in (0, 5 << 20):
        assert msgspec.structs.replace(scaler, copy_bytes_per_s=given).copy_limit == given
    assert set(COMPUTES[kind]) <= set(BACKENDS)
    with npu_operators.defined():
        for name in COMPUTES[kind]:
            assert open_backend(name).device == torch.device("cpu")


def test_a_backend_off_the_cpu_is_waited_for() -> None:
    backend = open_backend("torch", None, torch.device("meta"))
    assert backend.device.type == "meta"
    assert not backend.is_synchronous
    assert backend.mirror(2).host.device.type == "cpu"


def test_a_package_of_kernels_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if ".triton_kernels" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="--compute triton needs triton, and triton cannot be imported") as caught:
        open_backend("triton")
    assert caught.value.code == "no_compute"
