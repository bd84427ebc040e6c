"""A real Prometheus with deploy/prometheus/, word for word but for addresses: it scrapes a running deployment and
understands every rule."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.boards import QUERIES, keda_query
from tests.markdown import ROOT
from tests.procs.deployment import Deployment
from tests.procs.proxies import replaced
from tests.procs.waiting import free_port, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]

# What a deployment that has grown once, and has answered and refused one request, has no samples of.
OF_EVENTS = ("failed",)
FOLDER = ROOT / "deploy" / "prometheus"


def configured(folder: Path, deployment: Deployment) -> Path:
    """The folder's files with this deployment's addresses: where the configuration is."""
    text = replaced(
        (FOLDER / "prometheus.yml").read_text(),
        ("127.0.0.1:8000", deployment.base_url.removeprefix("http://")),
        ("127.0.0.1:8100", deployment.admin_url.removeprefix("http://")),
        ("/run/user/1000/elasticmoe-1000/default/secrets", f"{deployment.run_dir}/secrets"),
        ("scrape_interval: 5s", "scrape_interval: 2s"),
        ("evaluation_interval: 5s", "evaluation_interval: 200ms"),
    )
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(FOLDER / "alerts.json", folder)
    return folder / "prometheus.yml"


def tells_the_share_in_use(ask: Callable[..., Any], deployment: Deployment) -> bool:
    """Whether KEDA would be told what the scaler says: saturation, times the share of the devices that serve. What the
    query adds up is tested by promtool: here it is that the metrics are there, with labels that match."""
    headers = {"Authorization": f"Bearer {deployment.token}"}
    text = httpx.get(f"{deployment.admin_url}/metrics", headers=headers, trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith("elasticmoe:saturation{") and '"itl"' not in line]
    said = [float(line.split()[-1]) for line in lines]
    num_ranks = len(re.findall(r"^elasticmoe:experts_per_rank\{", text, re.MULTILINE))
    num_devices = len(re.findall(r'^elasticmoe:device_bytes\{.*state="budget"', text, re.MULTILINE))
    query = replaced(keda_query(), ("moe-elasticmoe-[0-9]+", "default"), ('namespace="serving",', ""))
    found = ask("query", query=query.replace('{namespace="serving"}', ""))
    if not said or not found or not found["result"]:
        return False
    return bool(abs(float(found["result"][0]["value"][1]) - max(said) * num_ranks / num_devices) < 1e-9)


def complete(deployment: Deployment) -> None:
    """One answer of a few tokens, so that latencies are known, and a refusal."""
    body = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    for asked, status in ((body, 200), (body | {"max_tokens": -1}, 400)):
        url = deployment.base_url + "/v1/completions"
        assert httpx.post(url, json=asked, timeout=60, trust_env=False).status_code == status


def not_told(deployment: Deployment) -> set[str]:
    """Metrics that the boards and the alerts name and that neither process tells of, not even that there are none."""
    headers = {"Authorization": f"Bearer {deployment.token}"}
    urls = (f"{deployment.base_url}/metrics", f"{deployment.admin_url}/metrics")
    texts = "".join(httpx.get(url, headers=headers, timeout=60, trust_env=False).text for url in urls)
    told = set(re.findall(r"^# TYPE (\S+)", texts, re.MULTILINE))
    named = " ".join([*(query.expr for query in QUERIES), (FOLDER / "alerts.json").read_text()])
    names = {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"(?:vllm|elasticmoe):\w+", named)}
    return names - told


def without_data(ask: Callable[..., Any]) -> list[str]:
    """Expressions of the boards' panels that Prometheus does not take, or has nothing for although it should."""
    missing = []
    for query in QUERIES:
        expr = replaced(query.expr, ("$instance", ".*")).replace("$__rate_interval", "1m").replace("$__interval", "1m")
        found = ask("query", query=expr)
        if found is None or not (found["result"] or any(name in query.expr for name in OF_EVENTS)):
            missing.append(expr)
    return missing


def test_prometheus_scrapes_both_listeners_and_evaluates_every_rule(
    deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    deployment = deploy("oracle", replicas=1, devices=2)
    assert deployment.scale(replicas=2)["phase"] == "done"
    config = configured(tmp_path, deployment)
    checked = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    port = free_port()
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with open(tmp_path / "log", "wb") as log:
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def ask(path: str, **parameters: str) -> Any:
        try:
            url = f"http://127.0.0.1:{port}/api/v1/{path}"
            return httpx.get(url, params=parameters, timeout=60, trust_env=False).json()["data"]
        except (httpx.HTTPError, json.JSONDecodeError, KeyError):
            assert process.poll() is None, (tmp_path / "log").read_text()
            return None

    def targets_are_up() -> bool:
        found = ask("targets")
        return bool(found) and [target["health"] for target in found["activeTargets"]] == ["up", "up"]

    def rules_are_evaluated() -> bool:
        found = ask("rules")
        rules = found["groups"][0]["rules"] if found and found["groups"] else []
        return bool(rules) and all(rule["health"] == "ok" for rule in rules)

    def serving() -> bool:
        found = ask("query", query="elasticmoe:serving")
        return bool(found) and [result["value"][1] for result in found["result"]] == ["1"]

    try:
        wait_until(targets_are_up, "both listeners are scraped", 60.0)
        wait_until(serving, "a metric has its value", 60.0)
        wait_until(rules_are_evaluated, "every rule is evaluated", 60.0)
        complete(deployment)
        wait_until(lambda: not not_told(deployment), f"every metric is told of, but for {not_told(deployment)}", 60.0)
        assert deployment.scale(replicas=1)["phase"] == "done"  # seen to change
        wait_until(lambda: tells_the_share_in_use(ask, deployment), "KEDA's query tells the share in use", 60.0)
        wait_until(lambda: not without_data(ask), f"every panel has data, but for {without_data(ask)}", 60.0)
        firing = [one["labels"]["alertname"] for one in ask("alerts")["alerts"] if one["state"] == "firing"]
        assert firing == [], "a deployment with nothing to do deserves nobody's attention"
    finally:
        process.terminate()
        process.wait(30)
