"""Which flags contradict a deployment that was cut off, and what is said of one that is resumed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from elasticmoe.cli import checks, settings
from elasticmoe.cli.resume import Resumed, check_devices, check_resumable, differences, explain, store_name
from elasticmoe.common.layout import Layout
from elasticmoe.common.protocol.errors import Conflict, Unavailable
from elasticmoe.common.record import STATE_FORMAT
from tests.unit.deployment_records import record_of
from tests.unit.transitions import layout_of

pytestmark = pytest.mark.usefixtures("no_settings_of_the_caller")

RECORD = record_of()


def resolved(tmp_path: Path, **values: object) -> settings.Settings:
    return settings.resolve({"run_dir": str(tmp_path), "model": "/m", "dtype": "float32", **values})


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model": "/n"}, "--model was /m, and is /n now"),
        ({"dtype": "bfloat16"}, "--dtype was float32, and is bfloat16 now"),
        ({"compute": "torch"}, "--compute was host, and is torch now"),
        ({"activations": "bfloat16"}, "--activations was float32, and is bfloat16 now"),
        ({"store_url": "redis://u:secret@h:1/0"}, "--store was the embedded one, and is redis://h:1/0 now"),
    ],
)
def test_each_setting_that_cannot_change_is_named_with_both_values(
    tmp_path: Path, values: dict[str, object], text: str
) -> None:
    with pytest.raises(Conflict) as refused:
        check_resumable(RECORD, resolved(tmp_path, **values))
    assert refused.value.code == "state_differs"
    assert text in refused.value.message
    assert "secret" not in refused.value.message
    assert "to resume it, or with --fresh" in refused.value.message


def test_another_tp_contradicts(tmp_path: Path) -> None:
    assert differences(msgspec.structs.replace(RECORD, tp=2), resolved(tmp_path)) == ["--tp was 2, and is 1 now"]


@pytest.mark.parametrize(
    "values", [{}, {"devices": "host:4"}, {"replicas": 1}, {"kv_bytes": 1 << 20}, {"served_name": "x"}, {"port": 1}]
)
def test_what_can_change_contradicts_nothing(tmp_path: Path, values: dict[str, object]) -> None:
    assert differences(RECORD, resolved(tmp_path, **values)) == []


def test_devices_that_the_layout_uses_are_needed(tmp_path: Path) -> None:
    layout = layout_of(3, (0, 2))
    for fits in (None, layout):
        check_devices(fits, resolved(tmp_path, devices="host:3"))
    with pytest.raises(Conflict) as refused:
        check_devices(layout, resolved(tmp_path, devices="host:2"))
    assert refused.value.code == "state_differs"
    assert (
        "differs: its replicas lie on the first 3 devices, so --devices (ELASTICMOE_DEVICES) has to be host:3 or more; "
        "it is host:2 now. Start with its settings to resume it, or with --fresh" in refused.value.message
    )


@pytest.mark.parametrize("state_format", [0, STATE_FORMAT + 1])
def test_state_of_another_version_is_refused(tmp_path: Path, state_format: int) -> None:
    record = msgspec.structs.replace(RECORD, state_format=state_format)
    (text,) = differences(record, resolved(tmp_path))
    assert f"format {state_format} of another version, and this one has {STATE_FORMAT}" in text


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("", ""),
        ("redis://u:p@h:6379/1", "redis://h:6379/1"),
        ("unix://u:p@/a/b.sock?db=2&password=x", "unix:///a/b.sock?db=2"),
        ("rediss://[::1]:1", "rediss://[::1]:1"),
    ],
)
def test_a_store_is_named_without_its_secrets(url: str, name: str) -> None:
    assert store_name(url) == name


def test_what_is_resumed_and_what_is_ignored_is_said() -> None:
    assert explain(Resumed(3, 2, 2)) == ["resumed: layout 3 with 2 replicas, as it was committed last"]
    lines = explain(Resumed(3, 1, 2, "op-1"))
    assert lines[0] == "resumed: layout 3 with 1 replica, as it was committed last"
    assert lines[1].startswith("--replicas 2 is ignored because of that: `elasticmoe scale --replicas 2` changes it")
    assert lines[2] == "operation op-1, which was in progress, goes on"


class FakeStore:
    def __init__(self, operation: object = None, failure: Exception | None = None) -> None:
        self.operation, self.failure, self.is_closed = operation, failure, False

    def get_operation(self, _: object) -> object:
        if self.failure is not None:
            raise self.failure
        return self.operation

    def get_layout(self) -> Layout:
        return layout_of(3, (0, 2))

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("store", "is_known"),
    [
        (FakeStore(), True),
        (FakeStore(operation=b"one that was cut off"), False),
        (FakeStore(failure=Unavailable("its value is damaged")), False),
    ],
)
def test_which_layout_was_committed_last_is_told_only_where_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: FakeStore, is_known: bool
) -> None:
    monkeypatch.setattr("elasticmoe.common.store.store_of", lambda *_: store)
    assert checks.layout_left(resolved(tmp_path)) == (layout_of(3, (0, 2)) if is_known else None)
    assert store.is_closed
