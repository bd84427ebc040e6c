"""A checkpoint's beginning is read while its memory is being made."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe.services.hmm.loading import read_ahead as module
from elasticmoe.services.hmm.loading.read_ahead import read_ahead
from tests.procs.waiting import wait_until
from tests.unit.page_cache import cached_bytes, drop

NBYTES = 4 << 20


class File:
    """`fd`, and how much of it is in the page cache."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(NBYTES))
        self.fd = os.open(path, os.O_RDONLY)
        drop(self.fd)

    def cached(self) -> int:
        """Bytes."""
        return cached_bytes(self.fd)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[Any]]:
    files = [File(tmp_path / str(number)) for number in range(2)]
    if any(file.cached() for file in files):
        pytest.skip("files of this folder do not leave the page cache")
    yield files
    for file in files:
        file.close()


def test_files_are_read_one_after_the_other(files: list[Any]) -> None:
    with read_ahead(files):
        wait_until(lambda: all(file.cached() == NBYTES for file in files), "both are read")


def test_it_reads_no_more_than_it_may(files: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AHEAD_BYTES", NBYTES)
    with read_ahead(files):
        wait_until(lambda: files[0].cached() == NBYTES, "the first one is read")
    assert files[1].cached() == 0


def test_what_cannot_be_read_is_no_fault_of_it(files: list[Any]) -> None:
    ends = os.pipe()
    with read_ahead([SimpleNamespace(fd=ends[0]), *files]):
        wait_until(lambda: files[1].cached() == NBYTES, "the others are read")
    for end in ends:
        os.close(end)


def test_it_ends_with_its_block(files: list[Any]) -> None:
    with pytest.raises(ValueError, match="no room"), read_ahead(files):
        raise ValueError("no room")
    assert "read-ahead" not in {thread.name for thread in threading.enumerate()}
