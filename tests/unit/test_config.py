"""Configuration: sources, bounds, unknown keys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elasticmoe.common.config import (
    CONFIGS,
    HmmConfig,
    RouterConfig,
    ScalerConfig,
    environment_of,
    load,
    make_run_dirs,
)
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.service_links import is_service_link


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
    with pytest.raises(
        ConfigError, match="environment: unknown setting 'ELASTICMOE_PROT'; did you mean 'ELASTICMOE_PORT'"
    ):
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
        ("port", "65536", "at most 65535"),
        ("port", "x", 'a whole number; it is "x"'),
        ("requests_max", "0", "at least 1"),
        ("log_level", "loud", "one of debug, info, warning, error"),
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
    for key, value in environment_of({"replicas": 3, "devices": "host:4", "log_format": "json", "model": None}).items():
        monkeypatch.setenv(key, value)
    config = load(ScalerConfig)
    assert (config.replicas, config.device_count.count, config.log_format, config.model) == (3, 4, "json", "")


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


@pytest.mark.parametrize("value", [b"\xff", b"caf\xe9"])
def test_bytes_that_are_no_text_are_refused(value: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELASTICMOE_HOST", os.fsdecode(value))
    with pytest.raises(ConfigError, match=r"HOST: has to be text in UTF-8"):
        load(RouterConfig)
    monkeypatch.delenv("ELASTICMOE_HOST")
    path = tmp_path / "c.toml"
    path.write_bytes(b'host = "' + value + b'"')
    monkeypatch.setenv("ELASTICMOE_CONFIG", str(path))
    with pytest.raises(ConfigError, match="configuration file"):
        load(RouterConfig)


def test_a_file_that_is_no_toml_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    monkeypatch.setenv("ELASTICMOE_CONFIG", str(path))
    for text in ("port = ", "x = " + "[" * 100_000, 'host = "a\\u0000b"', 'host = "a\\ud800b"'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            load(RouterConfig)


@pytest.mark.parametrize(
    ("kind", "values", "code"),
    [
        (ScalerConfig, {"tp": "9"}, "tp_unsupported"),
        (ScalerConfig, {"tp": "64"}, "tp_unsupported"),
        (ScalerConfig, {"devices": "host:65"}, "too_many_devices"),
        (HmmConfig, {"devices": "host:999"}, "too_many_devices"),
        (ScalerConfig, {"replicas": "3"}, "too_few_devices"),
        (ScalerConfig, {"kv_bytes": str(1 << 60)}, "bad_config"),
        (ScalerConfig, {"rank_stall_s": "nan"}, "bad_config"),
        (ScalerConfig, {"exchange": "torch_dist", "devices": "cuda:0/2"}, "bad_config"),  # nccl refuses a GPU twice
    ],
)
def test_no_service_starts_with_what_it_cannot_build(
    kind: type[HmmConfig | ScalerConfig], values: dict[str, str], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in values.items():
        monkeypatch.setenv(f"ELASTICMOE_{key.upper()}", value)
    with pytest.raises(ConfigError) as refused:
        load(kind)
    assert refused.value.code == code
    assert all(value in refused.value.message for value in values.values())


# What Kubernetes 1.33 sets for a Service of two ports and for one of another name; the settings that share their names.
LINKS = {
    "SERVICE_HOST": "10.96.0.10",
    "SERVICE_PORT": "8000",
    "SERVICE_PORT_HTTP": "8000",
    "SERVICE_PORT_ADMIN_2": "8100",
    "PORT": "tcp://10.96.0.10:8000",
    "PORT_8000_TCP": "tcp://10.96.0.10:8000",
    "PORT_8000_TCP_PROTO": "tcp",
    "PORT_8000_TCP_PORT": "8000",
    "PORT_8000_TCP_ADDR": "10.96.0.10",
    "PORT_53_UDP": "udp://10.96.0.10:53",
    "PORT_53_UDP_PROTO": "udp",
    "PORT_9_SCTP_ADDR": "fd00::1",
    "ROUTER_SERVICE_HOST": "fd00::1",
    "ROUTER_SERVICE_PORT": "80",
    "ROUTER_PORT": "tcp://[fd00::1]:80",
    "ROUTER_PORT_80_TCP": "tcp://[fd00::1]:80",
    "ROUTER_PORT_80_TCP_PROTO": "tcp",
    "ROUTER_PORT_80_TCP_PORT": "80",
    "ADMIN_PORT": "tcp://10.96.0.11:8100",  # of a Service elasticmoe-admin
    "ADMIN_PORT_8100_TCP_PORT": "8100",
    "A_B_2_PORT_1_TCP_ADDR": "10.96.0.11",
}


def test_kubernetes_service_links_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LINKS.items():
        assert is_service_link(name, value), name
        monkeypatch.setenv(f"ELASTICMOE_{name}", value)
    for kind in CONFIGS:
        load(kind)
    assert (load(RouterConfig).port, load(ScalerConfig).admin_port) == (8000, 8100)
    monkeypatch.setenv("ELASTICMOE_PORT", "9000")  # a setting beside other links
    assert load(RouterConfig).port == 9000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http://10.96.0.10:8000"),
        ("PORT", "tcp://example.com:8000"),
        ("PORT", "tcp://10.96.0.10"),
        ("PORT", "tcp://10.96.0.10:99999"),
        ("PORT", "tcp://10.96.0.10:8000/x"),
        ("PORT", "tcp://10.96.0.10:8000\n"),
        ("PORT", "tcp://300.96.0.10:8000"),
        ("PORTS", "tcp://10.96.0.10:8000"),
        ("SERVICE_HOST", "example.com"),
        ("SERVICE_PORT", "http"),
        ("SERVICE_PORT", "0"),
        ("SERVICE_PORT", "70000"),
        ("SERVICE_HOSTS", "10.96.0.10"),
        ("SERVICE", "10.96.0.10"),
        ("PORT_8000_TCP", "udp://10.96.0.10:8000"),
        ("PORT_8000_TCP", "tcp://10.96.0.10:8001"),
        ("PORT_8000_TCP", "8000"),
        ("PORT_8000_TCP_PORT", "8001"),
        ("PORT_8000_TCP_PROTO", "udp"),
        ("PORT_8000_TCP_ADDR", "here"),
        ("PORT_8000_TCP_NAME", "/web/elasticmoe"),
        ("PORT_8000_HTTP", "http://10.96.0.10:8000"),
        ("_PORT_80_TCP_PROTO", "tcp"),
        ("HOST_PORT", "10.96.0.10:8000"),
    ],
)
def test_what_only_looks_like_a_service_link_stops_the_start(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_service_link(name, value)
    monkeypatch.setenv(f"ELASTICMOE_{name}", value)
    with pytest.raises(ConfigError, match=r"unknown setting|ELASTICMOE_\w+: has to be"):
        load(RouterConfig)
