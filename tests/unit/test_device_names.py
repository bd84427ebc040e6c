"""Names of devices: one for each device, read and written in one place, with the host that it is in."""

from __future__ import annotations

import ast
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.common.config import HmmConfig, load
from elasticmoe.common.devices.names import (
    HOST_PATTERN,
    LOCAL_HOST,
    DeviceCount,
    DeviceId,
    DeviceName,
    hardware_of,
)
from elasticmoe.common.layout import Layout, RankId, Seat, initial_layout, lacking
from elasticmoe.common.protocol.errors import ConfigError

ROOT = Path(__file__).parents[2]
HOSTS = st.from_regex(HOST_PATTERN, fullmatch=True).filter(lambda host: len(host) <= 63)
BACKENDS = st.from_regex("[a-z][a-z0-9_-]{0,31}", fullmatch=True)


@given(HOSTS, BACKENDS, st.integers(0, 999_999_999), st.integers(-1, 99))
def test_what_is_written_is_read_back(host: str, backend: str, index: int, part: int) -> None:
    device = DeviceId(host, backend, index, part)
    assert DeviceId.parse(str(device)) == device
    assert hardware_of(str(device)) == str(device.whole) == str(DeviceId(host, backend, index))


@given(st.text(max_size=20) | st.from_regex(r"\A[a-z/:0-9.-]{1,12}\Z"))
def test_a_name_that_is_read_is_the_only_one_of_its_device(name: str) -> None:
    try:
        device = DeviceId.parse(name)
    except ValueError:
        return
    assert str(device) == name


def test_the_only_host_is_left_out() -> None:
    assert str(DeviceId(LOCAL_HOST, "host", 0)) == "host:0"
    assert DeviceId.parse("host:3") == DeviceId(LOCAL_HOST, "host", 3)


def test_a_host_is_not_taken_for_a_backend() -> None:
    assert DeviceId.parse("host/host:0") == DeviceId("host", "host", 0)
    assert DeviceId.parse("cuda/host:0") != DeviceId.parse("host/cuda:0")
    assert DeviceId.parse("node-a.example/cuda:7") == DeviceId("node-a.example", "cuda", 7)


@pytest.mark.parametrize(
    "name",
    [
        *("", "host", "host:", ":0", "host:01", "host:-1", "host:٣", "host:0\n"),
        *("cuda:0.", "cuda:0.01", "cuda:0.100", "cuda:0.1.2", "cuda:0.-1", "cuda:.1", "cuda:0/1"),
        *("/host:0", "a/b/host:0", "Node/host:0"),
        *("local/host:0", "a..b/host:0", "a.-b/host:0", "-a/host:0", "a-/host:0", "a./host:0", "x" * 64 + "/host:0"),
    ],
)
def test_what_names_no_device_is_refused(name: str) -> None:
    """By whoever reads a name, and in messages and records as well, where nobody is left to read it in vain."""
    with pytest.raises(ValueError, match="names no device"):
        DeviceId.parse(name)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(name, DeviceName)


def test_a_count_names_the_devices_of_a_host() -> None:
    count = DeviceCount.parse("host:2")
    assert (str(count), count.names(), count.names("b")) == ("host:2", ("host:0", "host:1"), ("b/host:0", "b/host:1"))
    for setting in (
        *("host", "host:", "host:0", ":2", "host:x", "host:03", "host:٣", "a/host:3", "host:" + "9" * 5_000),
        *(
            "npu",
            "npu:",
            "npu:-1",
            "npu:0-",
            "npu:0,",
            "npu:0,1",
            "npu:00",
            "npu:1000",
            "cuda:0\n",
            "a/cuda:0",
            "host:0-3",
        ),
        *("npu:0 ,npu:1", "NPU:0", "host:2,cuda:0", "," * 9),
        *(
            "cuda:0/1",
            "cuda:0/0",
            "cuda:0/02",
            "cuda:0/100",
            "cuda:0/",
            "cuda:/4",
            "cuda:0/2/2",
            "host:4/2",
            "cuda:0.1",
        ),
    ):
        with pytest.raises(ValueError, match="names no devices"):
            DeviceCount.parse(setting)


@pytest.mark.parametrize(
    ("setting", "written", "numbers"),
    [
        ("npu:0-7", "npu:0-7", tuple(range(8))),
        ("cuda:0,cuda:1", "cuda:0-1", (0, 1)),
        ("npu:6,npu:0-3", "npu:0-3,npu:6", (0, 1, 2, 3, 6)),
        ("cuda:2", "cuda:2", (2,)),
        ("npu:4-4,npu:999", "npu:4,npu:999", (4, 999)),
    ],
)
def test_accelerators_are_named_by_their_numbers(setting: str, written: str, numbers: tuple[int, ...]) -> None:
    devices = DeviceCount.parse(setting)
    assert (str(devices), devices.indices, devices.count) == (written, numbers, len(numbers))
    assert DeviceCount.parse(written) == devices
    assert devices.names("b") == tuple(f"b/{setting[: setting.index(':')]}:{number}" for number in numbers)


@pytest.mark.parametrize(
    ("setting", "written", "names"),
    [
        ("cuda:0/4", "cuda:0/4", "cuda:0.0 cuda:0.1 cuda:0.2 cuda:0.3"),
        ("npu:1/2,npu:0/2", "npu:0-1/2", "npu:0.0 npu:1.0 npu:0.1 npu:1.1"),  # the first few use all of the hardware
        ("cuda:0-1,cuda:2/2,cuda:3/2,cuda:5/3", "cuda:0-1,cuda:2-3/2,cuda:5/3", None),
        ("cuda:3,cuda:2/2", "cuda:2/2,cuda:3", "cuda:2.0 cuda:3 cuda:2.1"),
    ],
)
def test_an_accelerator_is_divided_into_several_devices(setting: str, written: str, names: str | None) -> None:
    devices = DeviceCount.parse(setting)
    assert (str(devices), DeviceCount.parse(written)) == (written, devices)
    assert devices.count == len(devices.names())
    assert {DeviceId.parse(name).index for name in devices.names()} == set(devices.indices)
    assert names is None or devices.names() == tuple(names.split())
    assert devices.names("b")[0].startswith(f"b/{devices.backend}:")


@given(
    st.dictionaries(st.integers(0, 999), st.sampled_from([1, 1, 2, 3, 64]), min_size=1, max_size=12), st.integers(1, 80)
)
def test_divided_devices_that_are_written_are_read_back(parts_of: dict[int, int], num: int) -> None:
    text = ",".join(f"npu:{index}" + (f"/{parts}" if parts > 1 else "") for index, parts in parts_of.items())
    devices = DeviceCount.parse(text)
    assert DeviceCount.parse(str(devices)) == devices
    assert devices.count == sum(parts_of.values()) == len(set(devices.names()))
    first = devices.first(num)
    assert min(num, devices.count) <= first.count
    assert set(first.names()) <= set(devices.names())
    assert DeviceCount.with_all(map(DeviceId.parse, devices.names())) == devices


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("cuda:0,npu:1", "two backends"),
        ("npu:0-3,npu:3", "twice"),
        ("cuda:0/2,cuda:0", "twice"),
        ("npu:7-0", "7-0, whose end comes before"),
    ],
)
def test_a_setting_that_contradicts_itself_is_refused(setting: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        DeviceCount.parse(setting)
    with pytest.raises(ConfigError, match=rf"devices: .*{why}") as caught:
        load(HmmConfig, {"devices": setting, "run_dir": "/nowhere"})
    assert caught.value.code == "bad_devices"


@given(st.sampled_from(["npu", "cuda"]), st.sets(st.integers(0, 999), min_size=1, max_size=20))
def test_numbers_that_are_written_are_read_back(backend: str, numbers: set[int]) -> None:
    devices = DeviceCount.of(backend, numbers)
    assert devices.indices == tuple(sorted(numbers))
    assert DeviceCount.parse(str(devices)) == devices


def test_a_seat_says_its_host() -> None:
    assert [Seat(RankId(0, 0), 0, name).host for name in ("host:0", "b/host:0")] == [LOCAL_HOST, "b"]


def test_a_layout_of_other_devices_is_not_gone_on_with() -> None:
    def of(*devices: str) -> Layout:
        return initial_layout([4], devices)

    two = DeviceCount("host", 2)
    assert lacking(of("host:0", "host:1"), two) == ""
    assert "has to be host:5 or more; it is host:2 now" in lacking(of("host:0", "host:4"), two)
    assert "use b/host:0, and this deployment has only this machine's host:2" in lacking(of("host:0", "b/host:0"), two)
    assert "use cuda:1, and" in lacking(of("host:0", "cuda:1"), two)
    some = DeviceCount.parse("npu:2-3")
    assert lacking(of("npu:2", "npu:3"), some) == ""
    divided = DeviceCount.parse("cuda:0/4")
    assert lacking(of("cuda:0.0", "cuda:0.3"), divided) == ""
    assert "lie on cuda:0/2, so --devices (ELASTICMOE_DEVICES) has to be cuda:0/2 or more; it is cuda:0 now" in lacking(
        of("cuda:0.0", "cuda:0.1"), DeviceCount.parse("cuda:0")
    )
    assert "has to be cuda:0 or more; it is cuda:0/4 now" in lacking(of("cuda:0"), divided)
    assert "lie on npu:2,npu:5, so --devices (ELASTICMOE_DEVICES) has to be npu:2,npu:5" in lacking(
        of("npu:2", "npu:5"), some
    )


def test_a_layout_of_the_release_before_is_read_and_one_of_no_devices_is_refused() -> None:
    """As the store and the HMM's catalog hold it."""
    stored = {"epoch": 3, "tp": 1, "seats": [{"rank": [0, 0], "slot": 0, "device": "host:0"}], "homes": [[[0], [0]]]}
    layout = msgspec.msgpack.decode(msgspec.msgpack.encode(stored), type=Layout)
    assert (layout.seats, layout.seats[0].host) == ((Seat(RankId(0, 0), 0, "host:0"),), LOCAL_HOST)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout)) == stored
    with pytest.raises(msgspec.ValidationError, match="device"):
        msgspec.convert({**stored, "seats": [{"rank": [0, 0], "slot": 0, "device": "host"}]}, Layout)


def test_no_other_module_writes_names() -> None:
    """An f-string with a value behind a colon behind nothing but letters, such as f"host:{i}"."""
    found = []
    for path in (path for part in ("common", "services", "cli") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            texts = [part.value for part in parts[:1] if isinstance(part, ast.Constant) and len(parts) > 1]
            if any(str(text) in ("host:", "device:") for text in texts):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
