"""The compose profile `monitoring`: what it mounts is there, it scrapes what prometheus.yml does, on loopback only, and
traces find their way. Compose's own reading of the file is asked; no container is run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import yaml

from elasticmoe.common.config import RouterConfig
from tests.composing import compose_command

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"


def described(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_prometheus_among_containers_scrapes_what_it_scrapes_elsewhere() -> None:
    alone, among = (described(ROOT / "deploy/prometheus" / name) for name in ("prometheus.yml", "compose.yml"))
    for config in (alone, among):
        router, scaler = config.pop("scrape_configs")
        assert (router["job_name"], scaler["job_name"]) == ("elasticmoe-router", "elasticmoe-scaler")
        assert scaler["authorization"]["credentials_file"].endswith("/secrets/admin.token")
        addresses = [job["static_configs"][0]["targets"][0] for job in (router, scaler)]
        assert [address.rpartition(":")[2] for address in addresses] == ["8000", "8100"]
    assert alone == among
    services = described(ROOT / "compose.yaml")["services"]
    hosts = [address.rpartition(":")[0] for address in addresses]
    assert [set(services[host]["networks"]) <= set(services["prometheus"]["networks"]) for host in hosts] == [True] * 2


def test_grafana_finds_its_sources_and_its_boards() -> None:
    files = sorted((GRAFANA / "provisioning/datasources").iterdir())
    sources = [one for path in files for one in described(path)["datasources"]]
    assert {one["type"]: one["url"] for one in sources} == {
        "jaeger": "http://jaeger:16686",
        "prometheus": "http://prometheus:9090",
    }
    assert [one["type"] for one in sources if one.get("isDefault")] == ["prometheus"]
    services = described(ROOT / "compose.yaml")["services"]
    for one in sources:
        assert set(services["grafana"]["networks"]) & set(services[one["type"]]["networks"])
        assert not one["editable"]
    (provider,) = described(GRAFANA / "provisioning/dashboards/elasticmoe.yml")["providers"]
    mounted = {
        volume["target"]: volume["source"]
        for volume in described(ROOT / "compose.yaml")["services"]["grafana"]["volumes"]
    }
    assert (ROOT / mounted[provider["options"]["path"]]).resolve() == GRAFANA / "boards"
    assert len(list((GRAFANA / "boards").glob("*.json"))) == 3


def services_of(**settings: str) -> dict[str, Any]:
    """What compose makes of the profile with these in its environment."""
    environment = {"PATH": os.environ["PATH"], "ELASTICMOE_MODEL_DIR": "/models/some", **settings}
    command = [*compose_command(), "--file", "compose.yaml", "--profile", "monitoring", "config"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout)["services"])


def test_compose_takes_the_profile() -> None:
    services = services_of()
    for name in ("prometheus", "jaeger", "grafana"):
        assert (services[name]["read_only"], services[name]["cap_drop"]) == (True, ["ALL"])
        assert services[name]["user"] == "10001:10001"
        for port in services[name].get("ports", []):
            assert (port["host_ip"] if isinstance(port, dict) else port.split(":")[0]) == "127.0.0.1"
        for volume in services[name].get("volumes", []):
            if isinstance(volume, dict) and volume["type"] == "bind":
                assert Path(volume["source"]).exists()


def test_one_variable_sends_traces_to_the_profiles_jaeger() -> None:
    (told,) = set(re.findall(r"ELASTICMOE_OTLP_ENDPOINT=(\S+)", (ROOT / "docs" / "observability.md").read_text()))
    assert told == "http://jaeger:4318"
    msgspec.convert({"run_dir": "/r", "model": "/m", "otlp_endpoint": told}, RouterConfig)
    services = services_of(ELASTICMOE_OTLP_ENDPOINT=told)
    for name in ("router", "scaler"):
        assert services[name]["environment"]["ELASTICMOE_OTLP_ENDPOINT"] == told
        assert set(services[name]["networks"]) <= set(services["jaeger"]["networks"])
    assert not services_of()["router"]["environment"].get("ELASTICMOE_OTLP_ENDPOINT")
    assert re.fullmatch(r"jaegertracing/jaeger:2\.\d+\.\d+", services["jaeger"]["image"])
    (kept,) = re.findall(r"max_traces=(\d+)", " ".join(services["jaeger"]["command"]))
    assert f"last {int(kept):,} traces" in (ROOT / "docs" / "observability.md").read_text()
