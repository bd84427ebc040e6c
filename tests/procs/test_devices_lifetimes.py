"""Memory of accelerators when processes are killed, on the stand-in drivers: who holds it, and that none is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devices import standins
from tests.devices.holder import PAGE, Holder

pytestmark = pytest.mark.procs


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with standins.memory(monkeypatch) as made:
        yield made


def holder(kind: str) -> Holder:
    settings = {"STANDIN_FOLDER": os.environ["STANDIN_FOLDER"], "PATH": os.environ["PATH"]}
    return Holder(kind, standins.library(kind), settings)


def used(folder: Path) -> int:
    """Bytes of device 0 that any process holds."""
    return int(standins.loaded(standins.process("npu", folder)).standin_used(0))


def test_an_npus_memory_outlives_its_owner_as_long_as_a_rank_holds_it(folder: Path) -> None:
    with holder("npu") as owner, holder("npu") as rank, holder("npu") as late:
        key = owner.ask("share", "weights", rank.ask("number"))
        rank.ask("take", key)
        with pytest.raises(AssertionError, match="not_admitted"):
            late.ask("take", key)
        owner.kill()
        assert rank.ask("read", 7) == "weights"
        assert used(folder) == PAGE
        with pytest.raises(AssertionError, match="not_admitted"):  # and nobody is left who could admit it
            late.ask("take", key)
        rank.kill()
        assert used(folder) == 0


def test_a_killed_rank_leaves_an_npus_memory_to_its_owner(folder: Path) -> None:
    with holder("npu") as owner, holder("npu") as rank:
        rank.ask("take", owner.ask("share", "weights", rank.ask("number")))
        rank.kill()
        assert used(folder) == PAGE
        assert owner.ask("read", 7) == "weights"
        owner.kill()
        assert used(folder) == 0
