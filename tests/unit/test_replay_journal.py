"""Decisions of a real deployment made again by the present code: `policy replay --journal` and `--run-dir`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.cli.arguments import WrongUsage
from elasticmoe.cli.replay import journal
from elasticmoe.common.protocol.errors import ConfigError, ElasticMoEError
from elasticmoe.services.scaler.control import autoscaling
from elasticmoe.services.scaler.control.audit_log import ADVICE_AGAIN_S, Advice, TurnTaken, turn_taken
from elasticmoe.services.scaler.control.reconciler import reconcile
from elasticmoe.services.scaler.control.state import State, Status
from elasticmoe.services.scaler.observation import Load
from tests.unit.test_autoscaling import BUSY, load, signals
from tests.unit.test_replay import run
from tests.unit.transitions import UP, World, operation_of

Say = pytest.CaptureFixture[str]


def turn(seen: Load, now: float = 101.0, **changes: Any) -> tuple[State, TurnTaken]:
    """One in which the policy decides, with its record."""
    state = State(status=Status("serving", ""), ever_served=True, stall_s=60.0, **changes)
    shown = msgspec.structs.replace(World(UP.before).seen(), load=seen)
    step = reconcile(state, shown, now)
    return step.state, turn_taken(state, shown, now, step)


def records(*turns: TurnTaken) -> list[bytes]:
    return [msgspec.msgpack.encode(taken) for taken in turns]


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., str]:
    def keep(*turns: TurnTaken) -> str:
        path = tmp_path / f"journal-{len(list(tmp_path.iterdir()))}"
        journal.save(path, records(*turns))
        return str(path)

    return keep


def test_what_was_decided_comes_out_the_same(kept: Callable[..., str], capsys: Say) -> None:
    _, grown = turn(load(BUSY))
    _, advised = turn(load(BUSY, mode="advise"))
    assert run("--journal", kept(grown, advised)) == 0
    told = capsys.readouterr().out
    assert "2 turns of the policy made again (2 grow_panic)" in told
    assert "0 come out otherwise" in told


def test_another_policy_is_told_apart(kept: Callable[..., str], capsys: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept(turn(load(BUSY))[1])
    decides = autoscaling.recommend

    def smaller(*args: Any) -> Any:
        decision = decides(*args)
        return msgspec.structs.replace(decision, target=3)

    with monkeypatch.context() as patch:
        patch.setattr(autoscaling, "recommend", smaller)
        assert run("--journal", path) == 1
        assert "2 -> 3 replicas, grow_panic and not 2 -> 4 replicas, grow_panic" in capsys.readouterr().out
        assert run("--journal", path, "--json") == 1
        told = msgspec.json.decode(capsys.readouterr().out)
        assert [one["decided"] for one in told["policy"]] == ["2 -> 4 replicas, grow_panic"]
        assert len(told["different"]) == 1

    def forgetful(*args: Any) -> Any:
        decision = decides(*args)
        return msgspec.structs.replace(decision, state=msgspec.structs.replace(decision.state, num_orders=7))

    with monkeypatch.context() as patch:
        patch.setattr(autoscaling, "recommend", forgetful)
        assert run("--journal", path) == 1
        assert "by other figures, or with another state" in capsys.readouterr().out


def test_records_that_cannot_be_made_again_are_counted_and_not_taken_for_others(capsys: Say) -> None:
    _, grown = turn(load(BUSY))
    _, meanwhile = turn(load(BUSY), operation=operation_of(UP))
    assert journal.tell([*records(meanwhile, grown), b"\x81\xa4type\xa5other", b""], as_json=False) == 0
    told = capsys.readouterr().out
    assert "1 turns of the policy" in told
    assert "left out: 1 whose plan the journal has no more, 2 of another release" in told


def test_a_journal_without_a_decision_of_the_policy_proves_nothing(kept: Callable[..., str]) -> None:
    with pytest.raises(ElasticMoEError, match="0 records, 0 of another release") as caught:
        run("--journal", kept())
    assert caught.value.code == "nothing_recorded"


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, kept: Callable[..., str]) -> None:
    whole = Path(kept(turn(load(BUSY))[1])).read_bytes()
    bad = {
        "missing": None,
        "other": b"timestamp,input,output\n",
        "cut": whole[:-9],
        "damaged": whole[:40] + b"\xff" * 20,
        "no list": journal._MAGIC + zlib.compress(b"\x81\x01\x02"),
    }
    for name, raw in bad.items():
        path = tmp_path / name
        if raw is not None:
            path.write_bytes(raw)
        with pytest.raises(ConfigError, match=f"--journal {path}: "):
            run("--journal", str(path))
    with pytest.raises(ConfigError, match=f"cut off after {len(whole) - 9} bytes"):
        journal.of_file(tmp_path / "cut")
    (tmp_path / "there").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"--save .*there: File exists"):
        journal.save(tmp_path / "there", [])
    assert (tmp_path / "there").read_bytes() == b"mine"


def test_what_is_kept_can_be_read_however_much_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a large deployment compress well: all of them would inflate to more than a reader takes."""
    monkeypatch.setattr(journal, "_BYTES_MAX", 100_000)
    records = [bytes([number]) * 999 for number in range(200)]
    num_kept = journal.save(tmp_path / "kept", records)
    assert 90 < num_kept < 100
    assert journal.of_file(tmp_path / "kept") == records[-num_kept:]
    assert journal.save(tmp_path / "none", [b"x" * 100_000]) == 0
    bomb = tmp_path / "bomb"
    bomb.write_bytes(journal._MAGIC + zlib.compress(b"x" * 1_000_000))
    with pytest.raises(ConfigError, match="inflates to over 100000 bytes"):
        journal.of_file(bomb)


def test_a_file_that_could_not_be_written_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: bytes) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.zlib, "compress", full)
    with pytest.raises(ConfigError, match="No space left"):
        journal.save(tmp_path / "kept", [b"a"])
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ("--journal", "f", "--seed", "1"),
        ("--run-dir", "d", "--duration", "9s"),
        ("--journal", "f", "--save", "g"),
        ("--generate", "step", "--save", "g"),
    ],
)
def test_flags_without_effect_are_refused(argv: tuple[str, ...]) -> None:
    with pytest.raises(WrongUsage, match="no effect"):
        run(*argv)


def test_advice_is_recorded_once_a_minute_for_each_size_and_reason() -> None:
    advice = Advice()
    shown, acting = (
        msgspec.structs.replace(World(UP.before).seen(), load=load(BUSY, mode=mode)) for mode in ("advise", "act")
    )
    (busy, _), (acted, _), (calm, _) = (
        turn(seen) for seen in (load(BUSY, mode="advise"), load(BUSY), load(signals(1.0), mode="advise"))
    )
    fewer, _ = turn(load(BUSY, mode="advise", devices=("host:0", "host:1", "host:2")))
    assert advice.is_notable(busy, shown, 0.0)
    assert not advice.is_notable(calm, shown, 1.0), "nothing is advised"
    assert not advice.is_notable(acted, acting, 1.0), "it is recorded as an order"
    assert not advice.is_notable(busy, shown, ADVICE_AGAIN_S - 1.0)
    assert advice.is_notable(fewer, shown, 2.0)
    assert advice.is_notable(busy, shown, ADVICE_AGAIN_S)
    assert not advice.is_notable(busy, World(UP.before).seen(), 1e6), "the policy has not decided in this turn"
