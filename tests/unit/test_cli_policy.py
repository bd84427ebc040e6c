"""What `elasticmoe policy` shows and changes, from answers of the admin listener."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.cli import policy
from elasticmoe.cli.arguments import WrongUsage
from elasticmoe.services.scaler.api.examples import EXAMPLES
from elasticmoe.services.scaler.policy.state import Reason
from elasticmoe.services.scaler.policy.words import REASONS


class Listener:
    """Answers with `shown`; what is put is in force at once."""

    def __init__(self, shown: dict[str, Any]) -> None:
        self.shown = shown
        self.put: list[dict[str, Any]] = []

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        assert path == "/v1/policy"
        if method == "PUT":
            assert body is not None
            self.put.append(body)
            self.shown = self.shown | {"version": body["version"] + 1, "policy": body["policy"]}
        return self.shown


Run = Callable[..., int]


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    listener = Listener(msgspec.json.decode(msgspec.json.encode(EXAMPLES["PolicyView"])))
    monkeypatch.setattr(policy, "admin_of", lambda _: listener)
    return listener


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    policy.add_arguments(parser)
    return policy.run(parser.parse_args([*argv, "--run-dir", str(Path("/nowhere"))]))


def test_what_is_in_force_is_shown_with_the_load(listener: Listener, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show") == 0
    told = capsys.readouterr().out
    assert "policy      act, version 2" in told
    assert "first token within 2 s, then a token within 100 ms, for 99.00% of requests" in told
    assert "2 now, 3 wanted, 1 to 4 allowed" in told
    assert "6.2 requests/s, 14 wait, 61 run, KV of the fullest rank 71% used" in told
    assert "2 → 3 replicas ordered: an objective is broken" in told


def test_what_is_not_known_is_not_shown_as_zero(listener: Listener, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {"requests_per_s": None, "running": None, "kv_share": None, "attainment": None, "silent": ["r1t0"]}
    listener.shown["load"] |= unknown
    run("show")
    told = capsys.readouterr().out
    assert "requests unknown, 14 wait, silent: r1t0" in told
    assert "nothing has ended lately" in told


def test_a_decision_is_explained_in_one_screen(listener: Listener, capsys: pytest.CaptureFixture[str]) -> None:
    listener.shown["decision"]["evidence"] |= {
        "predicted": {"ttft": 0.7, "itl": 0.5, "backlog": None, "queue_age": None, "kv": 0.6},
        "saved_s": 300.0,
        "cost_s": 12.5,
    }
    run("explain")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24
    told = "\n".join(lines)
    for part in (
        "  ttft        1.30",
        "  smoothed    1.10  grows above 0.81",
        "6.20 requests/s of 757 prompt and 151 output tokens",
        "6.90 requests/s in 30 s",
        "at 3 replicas: ttft 0.70, itl 0.50, kv 0.60",
        "12.5 device-seconds, to save 300.0",
    ):
        assert part in told
    listener.shown["decision"] |= {"acts": False, "mode": "advise"}
    run("explain")
    assert "`elasticmoe policy act` lets it act" in capsys.readouterr().out
    listener.shown["decision"] = None
    run("explain")
    assert "nothing has been decided yet" in capsys.readouterr().out


def test_a_change_is_of_what_was_seen_and_of_nothing_else(listener: Listener) -> None:
    before = listener.shown["policy"]
    assert run("set", "--ttft", "500ms", "--replicas-max", "6") == 0
    assert run("off") == 0
    first, second = listener.put
    assert first == {"version": 2, "policy": before | {"ttft_s": 0.5, "replicas_max": 6}}
    assert second == {"version": 3, "policy": first["policy"] | {"mode": "off"}}


def test_a_change_of_nothing_or_to_what_cannot_be_is_a_wrong_command(listener: Listener) -> None:
    with pytest.raises(WrongUsage, match="one of --ttft, --itl, --attainment"):
        run("set")
    with pytest.raises(WrongUsage, match="--replicas-min is 3, above --replicas-max, which is 2"):
        run("set", "--replicas-min", "3", "--replicas-max", "2")
    assert listener.put == []


def test_every_reason_is_said_in_words() -> None:
    assert set(REASONS) == {reason.value for reason in Reason}
