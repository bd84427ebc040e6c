"""Configuration: sources, bounds, unknown keys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.config import (
    CONFIGS,
    HmmConfig,
    RouterConfig,
    ScalerConfig,
    environment_of,
    load,
    make_run_dirs,
)
from common.protocol.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in list(os.environ):
        if key.startswith("ELASTICMOE_"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("ELASTICMOE_RUN_DIR", str(tmp_path))


def test_file_is_overridden_by_environment_and_that_by_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('port = 1000\nrequests_max = 11\nhost = "127.0.0.2"\n')
    monkeypatch.setenv("ELASTICMOE_CONFIG", str(path))
    monkeypatch.setenv("ELASTICMOE_PORT", "2000")
    monkeypatch.setenv("ELASTICMOE_REQUESTS_MAX", "12")
    config = load(RouterConfig, {"port": 3000, "host": None})
    assert (config.port, config.requests_max, config.host) == (3000, 12, "127.0.0.2")


def test_unknown_keys_stop_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELASTICMOE_PROT", "1")
    with pytest.raises(ConfigError, match="environment: unknown setting 'prot'"):
        load(RouterConfig)
    monkeypatch.delenv("ELASTICMOE_PROT")
    path = tmp_path / "c.toml"
    path.write_text("wrong = 1")
    monkeypatch.setenv("ELASTICMOE_CONFIG", str(path))
    with pytest.raises(ConfigError, match="unknown setting 'wrong'"):
        load(RouterConfig)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("port", "65536", "<= 65535"),
        ("port", "x", "int"),
        ("requests_max", "0", ">= 1"),
        ("log_level", "loud", "regex"),
    ],
)
def test_bounds(name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ELASTICMOE_{name.upper()}", value)
    with pytest.raises(ConfigError, match=text):
        load(RouterConfig)


def test_run_dir_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELASTICMOE_RUN_DIR")
    with pytest.raises(ConfigError, match="run_dir is not set"):
        load(HmmConfig)


def test_a_childs_environment_gives_back_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in environment_of({"replicas": 3, "devices": "host:4", "log_json": True, "model": None}).items():
        monkeypatch.setenv(key, value)
    config = load(ScalerConfig)
    assert (config.replicas, config.num_devices, config.log_json, config.model) == (3, 4, True, "")


def test_every_service_starts_with_defaults_alone() -> None:
    for kind in CONFIGS:
        assert load(kind).run_dir


def test_run_dirs_are_private(tmp_path: Path) -> None:
    config = load(HmmConfig, {"run_dir": str(tmp_path / "run")})
    make_run_dirs(config)
    make_run_dirs(config)
    for path in (tmp_path / "run", *(tmp_path / "run").iterdir()):
        assert path.stat().st_mode & 0o077 == 0


def test_socket_paths_fit_the_kernels_limit(tmp_path: Path) -> None:
    config = load(HmmConfig, {"run_dir": str(tmp_path / ("x" * 120))})
    with pytest.raises(ConfigError, match="exceeds the limit of 107"):
        config.socket("hmm")
