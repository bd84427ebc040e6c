"""A checkpoint's files stay in the page cache where memory has plenty of room, and go as they are read elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.families import load_spec, record
from elasticmoe.common.model_spec import RecordKey, RecordSpec
from elasticmoe.services.hmm.loading import reader as module
from elasticmoe.services.hmm.loading.reader import Reader
from tests.device_memory import DeviceMemory
from tests.unit.page_cache import cached_bytes, drop
from tests.unit.test_model_parity import CONFIGS


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[tuple[Checkpoint, RecordSpec]]:
    """A checkpoint none of whose files is cached, and what is to be read of it: one expert."""
    directory = random_checkpoint(tmp_path / "m", CONFIGS["mixtral"], seed=3, dtype="float32")
    spec = load_spec(directory, "float32")
    with Checkpoint(directory, spec) as checkpoint:
        for file in checkpoint.files:
            drop(file.fd)
        if any(cached_bytes(file.fd) for file in checkpoint.files):
            pytest.skip("files of this folder do not leave the page cache")
        yield checkpoint, record(spec, RecordKey("expert", 0, 0))


@pytest.fixture(autouse=True)
def _no_group_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "group_room", lambda: None)


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The files that the kernel was asked to forget: what it is just reading ahead stays for a while all the same."""
    asked: list[int] = []
    advise = os.posix_fadvise

    def note(fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            asked.append(fd)
        advise(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", note)
    return asked


def read(checkpoint: Checkpoint, described: RecordSpec) -> None:
    memory = DeviceMemory(described.nbytes)
    reader = Reader(checkpoint, lambda _: None)
    reader.add(described, memory.device, memory.address)
    reader.read()


def test_files_stay_where_there_is_room_twice_for_them_and_what_is_made_of_them(
    reading: tuple[Checkpoint, RecordSpec], dropped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 4 * reading[1].nbytes)
    dropped.clear()
    read(*reading)
    assert dropped == []
    assert sum(cached_bytes(file.fd) for file in reading[0].files) > 0


@pytest.mark.parametrize("share", [0.0, 3.5])
def test_files_go_where_there_is_less(
    share: float, reading: tuple[Checkpoint, RecordSpec], dropped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: int(share * reading[1].nbytes))
    dropped.clear()
    read(*reading)
    assert dropped == [file.fd for file in reading[0].files]


def test_files_go_where_a_group_has_a_limit(
    reading: tuple[Checkpoint, RecordSpec], dropped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 40)
    monkeypatch.setattr(module, "group_room", lambda: 1 << 40)
    dropped.clear()
    read(*reading)
    assert dropped == [file.fd for file in reading[0].files]


def test_files_go_where_nobody_knows(
    reading: tuple[Checkpoint, RecordSpec], dropped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError(2, "no /proc")

    monkeypatch.setattr(module, "available_bytes", refuse)
    dropped.clear()
    read(*reading)
    assert dropped == [file.fd for file in reading[0].files]
