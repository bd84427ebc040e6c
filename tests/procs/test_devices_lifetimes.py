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


def used(folder: Path, kind: str = "npu") -> int:
    """Bytes of device 0 that any process holds."""
    return int(standins.loaded(standins.process(kind, folder)).standin_used(0))


def hand_on(owner: Holder, rank: Holder, kind: str) -> None:
    """The rank has what the owner makes."""
    key = owner.ask("share", "weights", rank.ask("number"))
    if kind == "cuda":
        fd = owner.receive()
        rank.send(fd)
        os.close(fd)
    rank.ask("take", key)


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


@pytest.mark.parametrize("kind", standins.KINDS)
def test_a_killed_rank_leaves_memory_to_its_owner(kind: str, folder: Path) -> None:
    with holder(kind) as owner, holder(kind) as rank:
        hand_on(owner, rank, kind)
        rank.kill()
        assert used(folder, kind) == PAGE
        assert owner.ask("read", 7) == "weights"
        owner.kill()
        assert used(folder, kind) == 0


def test_a_gpus_memory_outlives_its_owner_as_long_as_a_rank_holds_it(folder: Path) -> None:
    with holder("cuda") as owner, holder("cuda") as rank:
        hand_on(owner, rank, "cuda")
        owner.kill()
        assert used(folder, "cuda") == PAGE
        assert rank.ask("read", 7) == "weights"
        rank.kill()
        assert used(folder, "cuda") == 0


def test_a_descriptor_alone_keeps_a_gpus_memory_for_whoever_comes(folder: Path) -> None:
    """As the keeper has it, which has no device: both sides are dead."""
    with holder("cuda") as owner, holder("cuda") as rank:
        key = owner.ask("share", "weights", 0)
        kept = owner.receive()
        rank.send(kept)
        rank.ask("take", key)
        owner.kill()
        rank.kill()
        assert used(folder, "cuda") == PAGE
    with holder("cuda") as successor:
        successor.send(kept)
        os.close(kept)
        successor.ask("take", key)
        assert successor.ask("read", 7) == "weights"
        successor.kill()
        assert used(folder, "cuda") == 0
