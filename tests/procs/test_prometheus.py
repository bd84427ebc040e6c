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
import yaml

from tests.boards import QUERIES
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


def keda_query() -> str:
    """The query of deploy/keda/."""
    (trigger,) = yaml.safe_load((ROOT / "deploy" / "keda" / "scaledobject.yaml").read_text())["spec"]["triggers"]
    return str(trigger["metadata"]["query"])


def tells_the_share_in_use(ask: Callable[..., Any], deployment: Deployment) -> bool:
    """Whether KEDA would be told what the scaler says: saturation, with each device in use. What it adds up is tested
    below: here it is that the metrics are there, with labels that match."""
    headers = {"Authorization": f"Bearer {deployment.token}"}
    text = httpx.get(f"{deployment.admin_url}/metrics", headers=headers, trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith("elasticmoe:saturation{") and '"itl"' not in line]
    said = [float(line.split()[-1]) for line in lines]
    query = replaced(keda_query(), ("moe-elasticmoe-[0-9]+", "default"), ('namespace="serving",', ""))
    found = ask("query", query=query.replace('{namespace="serving"}', ""))
    if not said or not found or not found["result"]:
        return False
    return bool(abs(float(found["result"][0]["value"][1]) - max(said)) < 1e-9)


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


def test_alerts_are_about_one_deployment_and_wait_for_what_does_not_pass(tmp_path: Path) -> None:
    """By promtool, over minutes that do not pass: each case has series of 15 s a value, and which alerts fire."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: it comes with prometheus")
    shutil.copy(FOLDER / "alerts.json", tmp_path)
    rules = json.loads((FOLDER / "alerts.json").read_text())["groups"][0]["rules"]
    told = {rule["alert"]: rule["annotations"] for rule in rules}
    a, b = 'deployment="a",instance="a"', 'deployment="b",instance="b"'
    of_a = {"deployment": "a", "instance": "a"}
    epochs = {f"elasticmoe:epoch{{{a}}}": "3x40", f"elasticmoe:epoch{{{b}}}": "7x40"}
    other = 'elasticmoe:epoch{deployment="a",instance="scaler of a"}'
    stuck = {f"vllm:generation_tokens_total{{{a}}}": "5x40", f"vllm:num_requests_running{{{a}}}": "2x40"}
    well = {f"vllm:generation_tokens_total{{{b}}}": "0+90x40", f"vllm:num_requests_running{{{b}}}": "2x40"}
    kv = {f'elasticmoe:kv_blocks{{{a},state="free"}}': "1x40", f'elasticmoe:kv_blocks{{{a},state="used"}}': "99x40"}
    room = {f'elasticmoe:kv_blocks{{{b},state="free"}}': "99x40", f'elasticmoe:kv_blocks{{{b},state="used"}}': "1x40"}
    gone = {'up{job="elasticmoe-scaler",deployment="a",instance="a"}': "0x40"}
    epoch, tokens, full = "ElasticMoERouterEpoch", "ElasticMoERouterGenerationTokens", "ElasticMoEScalerKvBlocks"
    down = "ElasticMoETargetDown"
    cases: list[tuple[dict[str, str], str, str, dict[str, str] | None]] = [
        (epochs, epoch, "10m", None),  # two deployments are two
        (epochs | {other: "3x30 4 3x9"}, epoch, "7m45s", None),  # a resize: scraped at different moments
        (epochs | {other: "4x40"}, epoch, "10m", {"deployment": "a"}),
        (stuck | well, tokens, "10m", of_a),
        (well, tokens, "10m", None),
        (kv | room, full, "4m", None),
        (kv | room, full, "10m", of_a),
        (gone, down, "30s", None),
        (gone, down, "10m", of_a | {"job": "elasticmoe-scaler"}),
    ]
    tests = [
        {
            "interval": "15s",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [
                {
                    "eval_time": at,
                    "alertname": alert,
                    "exp_alerts": [{"exp_labels": labels, "exp_annotations": told[alert]}] if labels else [],
                }
            ],
        }
        for series, alert, at, labels in cases
    ]
    text = json.dumps({"rule_files": ["alerts.json"], "evaluation_interval": "15s", "tests": tests})
    (tmp_path / "cases.yml").write_text(text)
    ran = subprocess.run(
        ["promtool", "test", "rules", "cases.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_kedas_query_adds_up_what_all_hosts_use(tmp_path: Path) -> None:
    """By promtool, in numbers that no order of adding rounds: half of four devices at 1.5 times the objective, two of
    two devices at a quarter of it, and one host not scraped; beside them others of those names in another namespace,
    and of another release."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: it comes with prometheus")
    series = []
    for namespace, pod, num_ranks, num_devices, saturation in (
        ("serving", "moe-elasticmoe-0", 2, 4, (1.5, 0.5)),
        ("serving", "moe-elasticmoe-1", 2, 2, (0.125, 0.25)),
        ("serving", "moe-elasticmoe-2", 0, 0, ()),
        ("staging", "moe-elasticmoe-0", 4, 4, (9.0, 9.0)),
        ("serving", "moe-elasticmoe-b-0", 1, 1, (9.0,)),
    ):
        of = f'namespace="{namespace}",deployment="{pod}"'
        kinds = [(f'elasticmoe:saturation{{{of},component="{n}"}}', value) for n, value in enumerate(saturation)]
        kinds += [(f'elasticmoe:saturation{{{of},component="itl"}}', 7.0)] * bool(saturation)
        kinds += [(f'elasticmoe:experts_per_rank{{{of},rank="r{n}t0"}}', 8.0) for n in range(num_ranks)]
        kinds += [
            (f'elasticmoe:device_bytes{{{of},device="host:{n}",state="{state}"}}', 1.0)
            for n in range(num_devices)
            for state in ("budget", "free")
        ]
        kinds += [(f'up{{{of},job="{job}"}}', float(bool(num_ranks))) for job in ("router", "scaler")]
        series += [{"series": name, "values": f"{value}x4"} for name, value in kinds]
    wanted = [{"labels": "{}", "value": (1.5 * 2 / 4 + 0.25) / 2 * 3}]
    asked = {"expr": keda_query(), "eval_time": "30s", "exp_samples": wanted}
    tests = [{"interval": "15s", "input_series": series, "promql_expr_test": [asked]}]
    (tmp_path / "cases.yml").write_text(json.dumps({"tests": tests}))
    ran = subprocess.run(
        ["promtool", "test", "rules", "cases.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
