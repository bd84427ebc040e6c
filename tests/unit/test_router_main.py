"""Settings that must stop the router's start, each told in one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.common.config import PREFIX
from elasticmoe.services.router.__main__ import main
from tests.procs.router_harness import write_model


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"port": "99999"}, "ELASTICMOE_PORT: has to be a whole number of at most 65535"),
        ({"prot": "1"}, "unknown setting 'ELASTICMOE_PROT'"),
        ({"model": "elsewhere"}, "model elsewhere is not a directory"),
        ({"model": ""}, "model is not set"),
        ({"api_key_file": "missing"}, "API key file missing cannot be read"),
        ({"api_key_file": "empty"}, "holds no key"),
        ({"host": "192.0.2.1"}, "port 0 on 192.0.2.1 cannot be used"),
        ({"host": "no such host"}, "host no such host"),
    ],
)
def test_bad_settings(
    settings: dict[str, str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    base = {"run_dir": str(tmp_path / "run"), "model": str(write_model(tmp_path / "model")), "port": "0"}
    for key, value in {**base, **settings}.items():
        monkeypatch.setenv(PREFIX + key.upper(), value)
    assert main() == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"elasticmoe-router: [a-z_]+: [^\n]*\n", error), error
    assert text in error


def test_a_bad_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    for key, value in {"RUN_DIR": tmp_path / "run", "MODEL": model, "PORT": 0}.items():
        monkeypatch.setenv(PREFIX + key, str(value))
    assert main() == 1
    assert capsys.readouterr().err.startswith("elasticmoe-router: bad_checkpoint: tokenizer.json is not valid")
