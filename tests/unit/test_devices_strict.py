"""The second backend does what it is there for: it fails whoever does not go by the interface."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elasticmoe.common.devices.base import Device, ProcessRules, Range
from elasticmoe.common.devices.factory import open_device
from tests.devices import strict

PAGE = strict.GRANULARITY
strict.install()


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setenv(strict.FOLDER, str(tmp_path))
    made = open_device("strict:0", PAGE, 16 * PAGE, rules=ProcessRules())
    yield made
    made.close()


def mapped(device: Device) -> Range:
    range_ = device.reserve(PAGE)
    device.map(range_, 0, device.create(PAGE, "kv"), True)
    return range_


def test_a_copy_is_done_when_somebody_waits_for_it(device: Device) -> None:
    src, dst = mapped(device), mapped(device)
    device.write_bytes(src.base, b"copy")
    completion = device.copy_async([(dst.base, src.base, 4)])
    assert not completion.is_done()
    assert device.read_bytes(dst.address(4), 4) == bytes(4)  # beside it
    for act in (
        lambda: device.read_bytes(dst.address(3), 2),
        lambda: device.write_bytes(src.base, b"new"),
        lambda: device.checksum(dst.base, PAGE),
    ):
        with pytest.raises(strict.InFlight):
            act()
    completion.wait()
    assert completion.is_done()
    assert device.read_bytes(dst.base, 4) == b"copy"


def test_unmap_waits_for_what_is_in_flight_of_any_device(device: Device) -> None:
    other = open_device("strict:1", PAGE, PAGE, rules=device._rules)
    src, dst = mapped(device), mapped(other)
    device.write_bytes(src.base, b"copy")
    completion = other.copy_async([(dst.base, src.base, 4)])
    device.unmap(src, 0)
    assert completion.is_done()
    assert other.read_bytes(dst.base, 4) == b"copy"
    other.close()


def test_tensors_are_what_computes_on_the_memory(device: Device) -> None:
    range_ = mapped(device)
    tensor = device.wrap(range_, 256, (4,), None, "float32")
    tensor.copy_(torch.arange(4))
    assert torch.frombuffer(bytearray(device.read_bytes(range_.address(256), 16)), dtype=torch.float32).tolist() == [
        0.0,
        1.0,
        2.0,
        3.0,
    ]
    assert tensor.data_ptr() != range_.address(256)


def test_the_cpu_cannot_touch_an_address(tmp_path: Path) -> None:
    program = (
        "import ctypes, os\n"
        "from tests.devices import strict\n"
        "device = strict.StrictDevice('strict:0', strict.GRANULARITY, strict.GRANULARITY)\n"
        "range_ = device.reserve(strict.GRANULARITY)\n"
        "device.map(range_, 0, device.create(strict.GRANULARITY, 'kv'), True)\n"
        "assert device.read_bytes(range_.base, 1) == bytes(1)\n"
        "print('mapped', flush=True)\n"
        "ctypes.string_at(range_.base, 1)\n"
    )
    root = Path(__file__).parent.parent.parent
    environment = {strict.FOLDER: str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-11, b"mapped\n"), done.stderr
