"""Settings and checks of `elasticmoe up`: resolved once, refused clearly, before anything starts."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.cli import checks, settings, up
from elasticmoe.cli.console import size
from elasticmoe.cli.listeners import ADMIN, ROUTER, Listeners
from elasticmoe.cli.probes import bind_once
from elasticmoe.common.capacity import sizes_of, weights_on
from elasticmoe.common.families import load_spec
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.protocol.errors import CheckpointError, ConfigError, DoesNotFit, ElasticMoEError, InvalidRequest
from tests.procs.waiting import free_port

pytestmark = pytest.mark.usefixtures("no_settings_of_the_caller")


def flags(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    return parser.parse_args(argv)


def resolved(tmp_path: Path, *argv: str) -> settings.Settings:
    return settings.from_flags(flags("--run-dir", str(tmp_path), *argv))


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4GiB", 4 << 30), ("256 MiB", 256 << 20), ("1.5kib", 1536), ("77", 77), ("8B", 8)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert settings.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4GB", "1e9", "4 GiB x", "nan"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
        settings.parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.50 KiB"), (1023 << 20, "1.00 GiB"), (24 << 30, "24.0 GiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_flags_come_before_the_environment_and_that_before_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTICMOE_REPLICAS", "1")
    monkeypatch.setenv("ELASTICMOE_PORT", "9000")
    monkeypatch.setenv("ELASTICMOE_HOME", str(tmp_path / "home"))
    found = resolved(tmp_path, "--port", "9001", "--kv-memory", "1MiB")
    assert (found.scaler.replicas, found.router.port, found.scaler.kv_bytes) == (1, 9001, 1 << 20)
    assert (found.scaler.admin_port, found.scaler.dtype) == (8100, "bfloat16")
    environment = settings.child_environment(found)
    assert (environment["ELASTICMOE_PORT"], environment["ELASTICMOE_REPLICAS"]) == ("9001", "1")
    assert os.environ["ELASTICMOE_HOME"] == str(tmp_path / "home")


def test_children_resolve_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file = tmp_path / "deployment.toml"
    config_file.write_text('max_sequences = 7\nlog_level = "debug"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ELASTICMOE_CONFIG", "deployment.toml")
    first = resolved(tmp_path, "--devices", "host:3", "--device-memory", "64MiB", "--port", "0")
    environment = settings.child_environment(first)
    monkeypatch.chdir("/")
    for name in [name for name in os.environ if name.startswith("ELASTICMOE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith("ELASTICMOE_"):
            monkeypatch.setenv(name, value)
    again = settings.from_flags(flags())
    assert (again.scaler, again.router, again.hmm) == (first.scaler, first.router, first.hmm)
    assert (first.scaler.max_sequences, first.scaler.log_level) == (7, "debug")


def test_an_unknown_variable_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTICMOE_REPLICA", "1")
    with pytest.raises(ConfigError, match="unknown setting 'ELASTICMOE_REPLICA'"):
        resolved(tmp_path)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("--devices", "cuda:2"), "devices"),
        (("--replicas", "0"), "replicas"),
        (("--port", "70000"), "port"),
        (("--max-model-len", "1"), "--max-model-len: has to be a whole number of at least 2"),
    ],
)
def test_values_out_of_bounds_are_refused(tmp_path: Path, argv: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolved(tmp_path, *argv)


def test_port_zero_becomes_two_free_ports(tmp_path: Path) -> None:
    found = resolved(tmp_path, "--port", "0", "--admin-port", "0")
    checks.check_ports(found)
    listeners = Listeners(found)
    ports = [listeners.port(ROUTER), listeners.port(ADMIN)]
    assert len({0, *ports}) == 3
    for port in ports:  # nobody else can have them
        with pytest.raises(InvalidRequest, match="in use"):
            bind_once("127.0.0.1", port, "--port")
    listeners.close()
    for port in ports:
        bind_once("127.0.0.1", port, "--port")


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:1"), ("::1", "http://[::1]:1"), ("localhost", "http://localhost:1")],
)
def test_urls(tmp_path: Path, host: str, url: str) -> None:
    assert resolved(tmp_path, "--host", host, "--port", "1").url == url


def test_a_listener_on_all_addresses_is_reached_on_loopback(tmp_path: Path) -> None:
    everywhere = ".".join("0000")
    assert resolved(tmp_path, "--host", everywhere, "--port", "1").url == "http://127.0.0.1:1"


def test_two_deployments_in_one_external_store_have_two_names(tmp_path: Path) -> None:
    names = {
        resolved(tmp_path / name, "--store", "redis://127.0.0.1/0").scaler.deployment for name in ("one", "two", "one")
    }
    assert len(names) == 2
    assert resolved(tmp_path).scaler.deployment == "default"


def test_a_long_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shorter run directory"):
        settings.require_run_dir(resolved(tmp_path / ("x" * 100)))


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (("--tp", "9"), "tp_unsupported", r"tp 9 \(--tp\) exceeds the limit of 8"),
        (("--replicas", "3", "--devices", "host:2"), "too_few_devices", "3 replicas of tp 1 need 3 devices.* has 2"),
        (("--devices", "host:65"), "too_many_devices", "limit of 64"),
    ],
)
def test_impossible_topologies_are_refused(tmp_path: Path, argv: tuple[str, ...], code: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as refused:
        resolved(tmp_path, *argv)
    assert refused.value.code == code


def test_bounds_that_contradict_one_another_are_refused_by_the_names_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler alone refused them, when all else had been started."""
    with pytest.raises(ConfigError, match=r"^--replicas-min is 3, above --replicas-max, which is 2$"):
        resolved(tmp_path, "--replicas-min", "3", "--replicas-max", "2")
    monkeypatch.setenv("ELASTICMOE_REPLICAS_MAX", "2")
    with pytest.raises(ConfigError, match=r"^--replicas-min is 3, above ELASTICMOE_REPLICAS_MAX, which is 2$"):
        resolved(tmp_path, "--replicas-min", "3")
    assert resolved(tmp_path, "--replicas-min", "2").scaler.replicas_max == 2


def test_a_port_in_use_is_named_with_its_flag(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag, other in (("--port", "--admin-port"), ("--admin-port", "--port")):
            with pytest.raises(InvalidRequest) as refused:
                checks.check_ports(resolved(tmp_path, flag, str(port), other, "0"))
            assert refused.value.message == f"port {port} on 127.0.0.1 is in use; choose another with {flag}"


def test_equal_ports_and_wrong_hosts_are_refused(tmp_path: Path) -> None:
    port = str(free_port())
    with pytest.raises(InvalidRequest, match="both"):
        checks.check_ports(resolved(tmp_path, "--port", port, "--admin-port", port))
    with pytest.raises(InvalidRequest, match="Cannot assign") as refused:
        bind_once("192.0.2.1", 0, "--port")
    assert refused.value.code == "bad_host"


MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    return folder


def test_a_model_that_fits_passes(tmp_path: Path, model: Path) -> None:
    checks.check_memory(resolved(tmp_path), model)


def test_too_small_devices_are_refused_with_the_figures(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"KiB of bfloat16 weights, .* per device, more than the 64\.0 KiB of --dev"):
        checks.check_memory(resolved(tmp_path, "--device-memory", "64KiB"), model)


def test_too_little_memory_is_refused_with_the_figures(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "available_bytes", lambda: 4 << 20)
    with pytest.raises(DoesNotFit, match=r"more than the 816 KiB that each of 4 gets of the 3\.20 MiB that are 80% of"):
        checks.check_memory(resolved(tmp_path), model)
    with pytest.raises(DoesNotFit, match=r"take 6\.\d+ MiB on 2 devices, more than the 3\.20 MiB that are 80%"):
        checks.check_memory(resolved(tmp_path, "--device-memory", "64MiB"), model)
    with pytest.raises(DoesNotFit, match=r"more KV than the 64\.0 KiB of --kv-memory; raise it, or lower --max"):
        checks.check_memory(resolved(tmp_path, "--device-memory", "64MiB", "--kv-memory", "64KiB"), model)


def test_experts_are_shared_out_and_the_rest_is_not(model: Path) -> None:
    spec = load_spec(model, "float32")
    devices, sizes = [f"host:{i}" for i in range(4)], sizes_of(spec, 4096)
    layouts = [initial_layout(spec.num_experts_by_layer, devices[:number]) for number in (1, 2, 4)]
    one, two, four = (max(weights_on(sizes, layout).values()) for layout in layouts)
    assert one - two == 2 * (two - four)


def test_a_model_that_is_none_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(CheckpointError):
        checks.check_memory(resolved(tmp_path), model)


def test_every_refusal_is_one_line(tmp_path: Path) -> None:
    for argv in (("--tp", "9"), ("--replicas", "64", "--devices", "host:2")):
        with pytest.raises(ElasticMoEError) as refused:
            resolved(tmp_path, *argv)
        assert "\n" not in refused.value.message


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "1e99", "soon"])
def test_wrong_times_are_a_wrong_command_line(text: str) -> None:
    with pytest.raises(SystemExit):
        flags("--ready-timeout", text)


NAMES = ["m", "it's", 'a "quoted" name', "$HOME `id` $(id)", "back\\slash", "naïve 模型", "!x; rm -rf /", ":smile: [b]"]


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_curl_line_survives_a_shell(name: str, tmp_path: Path) -> None:
    key_file = tmp_path / f"key of {name.replace('/', '_')}"
    key_file.write_text("s3cret")
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    curl.chmod(0o700)
    line = up.curl_line("http://127.0.0.1:1", name, str(key_file))
    told = subprocess.run(
        ["sh", "-c", line], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, check=True
    )
    words = told.stdout.decode().split("\0")[:-1]
    assert words[:2] == ["-N", "http://127.0.0.1:1/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == name
    assert words[-1] == "Authorization: Bearer s3cret"


@pytest.mark.parametrize("name", NAMES)
def test_names_with_quotes_and_spaces_reach_the_children(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = settings.child_environment(resolved(tmp_path, "--served-name", name))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert settings.from_flags(flags()).router.served_name == name


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x00b", "a\n", "x" * 257, "\udcff"])
def test_names_that_no_line_holds_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--served-name: has to be"):
        resolved(tmp_path, "--served-name", name)
