"""Events as people read them."""

from __future__ import annotations

import ast
import string
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.cli.sentences import _SENTENCES, sentence

ROOT = Path(__file__).parent.parent.parent
TELLERS = {"_tell", "tell"}


def told() -> dict[str, set[str]]:
    """What the scaler tells: the facts of each kind of event that stand in its calls."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "services/scaler").rglob("*.py")):
        module = ast.parse(path.read_text())
        keys = {
            key.value
            for node in ast.walk(module)
            if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
        for node in ast.walk(module):
            is_telling = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TELLERS
            )
            if not is_telling or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            facts = {keyword.arg for keyword in node.keywords if keyword.arg}
            if any(keyword.arg is None for keyword in node.keywords):  # **facts, made in that module
                facts |= keys
            found.setdefault(str(node.args[0].value), set()).update(facts)
    return found


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The time zone, whatever this machine's is."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_every_kind_of_event_has_a_sentence_of_its_facts() -> None:
    kinds = told()
    assert len(kinds) >= 10
    assert set(_SENTENCES) == set(kinds)
    for kind, form in _SENTENCES.items():
        names = {name for _, name, _, _ in string.Formatter().parse(form) if name}
        assert "reason" in names
        assert names - {"reason"} <= kinds[kind], kind


@pytest.mark.parametrize(
    ("kind", "facts", "text"),
    [
        ("decision", {"phase": "serving"}, "the deployment is serving: why"),
        ("rank_exited", {"rank": "r1t0"}, "rank r1t0 has ended, and a standby takes its seat: why"),
        ("operation_accepted", {"op_id": "op", "kind": "scale_up"}, "operation op (scale up) begins: why"),
        ("operation_accepted", {"op_id": "op", "kind": "none"}, "operation op asks for what is there already: why"),
        (
            "operation_phase",
            {"op_id": "op", "phase": "commit", "leg": "2", "before": "prepare", "before_s": "0.421"},
            "operation op: prepare took 0.421 s; now commit, leg 2: why",
        ),
        ("policy", {"mode": "act", "replicas": "1", "target": "2"}, "the policy (act), at 1 replica: why, target 2"),
        ("policy", {"mode": "act", "replicas": "3"}, "the policy (act), at 3 replicas: why, target unknown"),
        ("operation_ended", {"op_id": "op"}, "operation op has ended, unknown: why"),
        ("of tomorrow", {"a": "{b}"}, "of tomorrow: why a={b}"),
    ],
)
def test_sentences(kind: str, facts: dict[str, str], text: str, utc: None) -> None:
    event = {"kind": kind, "reason": "why", "epoch": 3, "time_unix": 1e9, "facts": facts}
    stamp, _, rest = sentence(event).partition("  ")
    assert stamp.startswith("2001-09-09 ")
    assert rest == f"epoch 3  {text}"


@pytest.mark.parametrize("event", [{}, {"facts": 1, "time_unix": "x"}, {"kind": "decision", "facts": {"phase": None}}])
def test_what_is_not_as_it_should_be_is_shown_all_the_same(event: dict[str, object]) -> None:
    assert "epoch" in sentence(event)
