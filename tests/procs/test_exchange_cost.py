"""scripts/exchange_cost.py: real ranks of each exchange on the devices of the host, and one that cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticmoe.common.protocol.errors import DeviceError
from scripts import exchange_cost
from scripts.exchange_cost import main
from tests.hardware.exchange_rank import bytes_to_others

pytestmark = pytest.mark.procs

_WORDS = ("--rows", "1,5", "--hidden", "32", "--experts", "6", "--top-k", "2", "--times", "3")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "exchange.json").read_text())["rows"]
    return found


@pytest.mark.timeout(180)
def test_all_exchanges_bring_the_same_bits_on_the_same_rows(tmp_path: Path) -> None:
    assert main([*_WORDS, "--ranks", "3", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    kinds = ("shm", "mailbox", "torch_dist")
    assert [(row["rows"], row["exchange"]) for row in rows] == [(n, kind) for n in (1, 5) for kind in kinds]
    for row in rows:
        assert 0 < row["µs"] <= row["slowest µs"]
        assert row["bits"] == "the same"
        assert len(row["digests"]) == 3
    assert rows[0]["digests"] != rows[3]["digests"], "other rows are other work"


@pytest.mark.timeout(180)
def test_an_exchange_that_cannot_run_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> Any:
        raise DeviceError("no memory can be shared", code="driver_refused")

    monkeypatch.setattr(exchange_cost, "open_device", refused)  # of the owner of mailboxes: ranks have their own
    assert main([*_WORDS, "--exchanges", "mailbox,shm", "--output", str(tmp_path)]) == 0
    found = {(row["exchange"], row["bits"]) for row in rows_of(tmp_path)}
    assert found == {("mailbox", "not measured: no memory can be shared"), ("shm", "the same")}
    assert main([*_WORDS, "--exchanges", "mailbox", "--output", str(tmp_path)]) == 1, "nothing was measured"


def test_an_exchange_that_brings_other_bits_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"µs": 1.0, "slowest µs": 1.0, "KiB to others": 1.0}
    found = iter([{**told, "digests": ["a", "b"]}, {**told, "digests": ["a", "c"]}])
    monkeypatch.setattr(
        exchange_cost, "_measure", lambda *given: [{"hidden": 8, "rows": 1, "exchange": given[2], **next(found)}]
    )
    words = ["--exchanges", "shm,mailbox", "--hidden", "8", "--output", str(tmp_path)]
    assert main(words) == 1
    assert [row["bits"] for row in rows_of(tmp_path)] == ["the same", "others"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--exchanges", "pigeon"), "unknown exchange 'pigeon'; known: shm, mailbox, torch_dist"),
        (("--top-k", "7", "--experts", "6"), "--top-k 7 exceeds --experts 6"),
        (("--compute", "triton"), "triton does not compute on host:2: host or torch do"),
        (("--devices", "host:2", "--ranks", "3"), "--devices host:2: 3 devices needed"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    words: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=told):
        main([*words, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_goes_to_others_is_a_row_for_each_expert_or_each_token_once_and_each_answer() -> None:
    owners, ids = [0, 1, 0, 1, 2], torch.tensor([[0, 1, 3], [2, 1, 3]], dtype=torch.int32)
    row = 10 * 4
    assert bytes_to_others("shm", owners, 0, ids, 10) == (4 + 4) * row
    assert bytes_to_others("mailbox", owners, 0, ids, 10) == (2 + 4) * row
    assert bytes_to_others("torch_dist", owners, 2, ids, 10) == (2 * 2 + 6) * row, "both others get both tokens"
    assert bytes_to_others("mailbox", [0, 0, 0, 0], 0, ids, 10) == 0
