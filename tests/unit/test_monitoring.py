"""The compose profile `monitoring`: what it mounts is there, it scrapes what prometheus.yml does, on loopback only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

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


def test_grafana_finds_its_source_and_its_boards() -> None:
    (source,) = described(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = described(GRAFANA / "provisioning/dashboards/elasticmoe.yml")["providers"]
    mounted = {
        volume["target"]: volume["source"]
        for volume in described(ROOT / "compose.yaml")["services"]["grafana"]["volumes"]
    }
    assert (ROOT / mounted[provider["options"]["path"]]).resolve() == GRAFANA / "boards"
    assert len(list((GRAFANA / "boards").glob("*.json"))) == 3


def test_compose_takes_the_profile() -> None:
    settings = {"PATH": os.environ["PATH"], "ELASTICMOE_MODEL_DIR": "/models/some"}
    command = [*compose_command(), "--file", "compose.yaml", "--profile", "monitoring", "config"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    for name in ("prometheus", "grafana"):
        assert (services[name]["read_only"], services[name]["cap_drop"]) == (True, ["ALL"])
        for port in services[name].get("ports", []):
            assert (port["host_ip"] if isinstance(port, dict) else port.split(":")[0]) == "127.0.0.1"
        for volume in services[name]["volumes"]:
            if isinstance(volume, dict) and volume["type"] == "bind":
                assert Path(volume["source"]).exists()
