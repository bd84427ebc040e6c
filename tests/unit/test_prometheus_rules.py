"""deploy/prometheus/alerts.json and the query of deploy/keda, by Prometheus' promtool: over minutes that do not pass.

Each case has series of 15 s a value, and says which alerts fire.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.boards import keda_query
from tests.markdown import ROOT

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.json"
RULES = {rule["alert"]: rule for rule in json.loads(ALERTS.read_text())["groups"][0]["rules"]}
A, B = 'deployment="a",instance="a"', 'deployment="b",instance="b"'
OF_A = {"deployment": "a", "instance": "a"}
OF_B = {"deployment": "b", "instance": "b"}
MODEL = {"model_name": "m"}
LOST = MODEL | {"code": "rank_lost"}


class Case(NamedTuple):
    """At `at` exactly one alert of that name fires, with these labels beside its severity; or none, for None."""

    series: dict[str, str]
    alert: str
    at: str
    labels: dict[str, str] | None


class First(NamedTuple):
    """The first event that an alert is about: of which series, and how many where one is not enough. `by`: the labels
    that the alert keeps, beside those of the listener."""

    alert: str
    name: str
    labels: dict[str, str]
    by: tuple[str, ...] = ()
    count: int = 1


FIRSTS = (
    First(
        "ElasticMoEScalerScaleOperations",
        "elasticmoe:scale_operations_total",
        {"kind": "scale_up", "outcome": "aborted"},
        ("kind", "outcome"),
    ),
    First(
        "ElasticMoEScalerPolicyDecisions", "elasticmoe:policy_decisions_total", {"reason": "cancel_stuck"}, ("reason",)
    ),
    First("ElasticMoEScalerRequestsRefused", "elasticmoe:requests_refused_total", {"status": "401"}, ("status",)),
    First("ElasticMoEScalerRequestsRefused", "elasticmoe:requests_refused_total", {"status": "403"}, ("status",)),
    First("ElasticMoEScalerSpansLost", "elasticmoe:spans_lost_total", {}),
    First(
        "ElasticMoERouterRequestsFailed", "elasticmoe:requests_failed_total", {"code": "rank_lost"} | MODEL, ("code",)
    ),
    First("ElasticMoERouterRequestsRefused", "elasticmoe:requests_refused_total", {"status": "429"} | MODEL, (), 600),
    First(
        "ElasticMoERouterRequestsRefusedAccess",
        "elasticmoe:requests_refused_total",
        {"status": "401"} | MODEL,
        ("status",),
        20,
    ),
    First("ElasticMoERouterSpansLost", "elasticmoe:spans_lost_total", MODEL, ("model_name",)),
    First("ElasticMoERouterBadMessages", "elasticmoe:bad_messages_total", MODEL, ("model_name",)),
    First("ElasticMoERouterRequestsResubmitted", "elasticmoe:requests_resubmitted_total", MODEL, ("model_name",), 20),
)


def series_of(first: First) -> str:
    return (
        f"{first.name}{{{','.join([A, *(f'{label}={json.dumps(value)}' for label, value in first.labels.items())])}}}"
    )


def promtool(folder: Path, tests: list[dict[str, Any]]) -> None:
    """Let promtool run these. Skips where it is not installed."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: it comes with prometheus")
    shutil.copy(ALERTS, folder)
    text = json.dumps({"rule_files": ["alerts.json"], "evaluation_interval": "15s", "tests": tests})
    (folder / "cases.yml").write_text(text)
    command = ["promtool", "test", "rules", "cases.yml"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def check(folder: Path, cases: list[Case]) -> None:
    """Each case is what it says."""
    tests = []
    for series, alert, at, labels in cases:
        rule = RULES[alert]
        fired = []
        if labels is not None:
            fired.append({"exp_labels": labels | rule["labels"], "exp_annotations": rule["annotations"]})
        tests.append(
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": fired}],
            }
        )
    promtool(folder, tests)


def test_alerts_are_about_one_deployment_and_wait_for_what_does_not_pass(tmp_path: Path) -> None:
    epochs = {f"elasticmoe:epoch{{{A}}}": "3x40", f"elasticmoe:epoch{{{B}}}": "7x40"}
    other = 'elasticmoe:epoch{deployment="a",instance="scaler of a"}'
    stuck = {f"vllm:generation_tokens_total{{{A}}}": "5x40", f"vllm:num_requests_running{{{A}}}": "2x40"}
    well = {f"vllm:generation_tokens_total{{{B}}}": "0+90x40", f"vllm:num_requests_running{{{B}}}": "2x40"}
    gone = {'up{job="elasticmoe-scaler",deployment="a",instance="a"}': "0x40"}
    epoch, tokens, down = "ElasticMoERouterEpoch", "ElasticMoERouterGenerationTokens", "ElasticMoETargetDown"
    check(
        tmp_path,
        [
            Case(epochs, epoch, "10m", None),  # two deployments are two
            Case(epochs | {other: "3x30 4 3x9"}, epoch, "7m45s", None),  # a resize: scraped at different moments
            Case(epochs | {other: "4x40"}, epoch, "10m", {"deployment": "a"}),
            Case(stuck | well, tokens, "10m", OF_A),
            Case(well, tokens, "10m", None),
            Case(gone, down, "30s", None),
            Case(gone, down, "10m", OF_A | {"job": "elasticmoe-scaler"}),
        ],
    )


def test_the_first_event_fires_and_the_first_after_a_restart(tmp_path: Path) -> None:
    """Of a counter that is there from the start. One that comes with its first event fires nothing: no alert may rest
    on such a one, and tests/unit/test_metrics_start.py sees to it that none does."""
    cases = []
    for first in FIRSTS:
        name, count = series_of(first), first.count
        labels = OF_A | {label: first.labels[label] for label in first.by}
        cases += [
            Case({name: f"0 0 {count}x20"}, first.alert, "15s", None),
            Case({name: f"0 0 {count}x20"}, first.alert, "2m", labels),
            Case({name: f"7x4 0 0 {count}x20"}, first.alert, "1m15s", None),
            Case({name: f"7x4 0 0 {count}x20"}, first.alert, "3m", labels),
            Case({name: f"_ _ {count}x20"}, first.alert, "2m", None),
        ]
    check(tmp_path, cases)


def test_what_one_listener_tells_fires_nothing_that_is_said_of_the_other(tmp_path: Path) -> None:
    burst = "0 0 600x20"
    refused, lost = "elasticmoe:requests_refused_total", "elasticmoe:spans_lost_total"
    router = {f'{refused}{{{A},model_name="m",status="{status}"}}': burst for status in ("401", "403", "429", "503")}
    scaler = {f'{refused}{{{A},status="{status}"}}': burst for status in ("401", "403", "429", "503")}
    both = f'{{{A},model_name="m"}}'
    check(
        tmp_path,
        [
            Case(router, "ElasticMoEScalerRequestsRefused", "2m", None),
            Case(scaler, "ElasticMoERouterRequestsRefused", "2m", None),
            Case(scaler, "ElasticMoERouterRequestsRefusedAccess", "2m", None),
            Case({f"{lost}{both}": burst}, "ElasticMoEScalerSpansLost", "2m", None),
            Case({f"{lost}{{{A}}}": burst}, "ElasticMoERouterSpansLost", "2m", None),
        ],
    )


def test_keys_that_are_tried_fire_without_any_overload(tmp_path: Path) -> None:
    tried = {f'elasticmoe:requests_refused_total{{{A},model_name="m",status="401"}}': "0 0 20x20"}
    few = {name: "0 0 3x20" for name in tried}
    access, overload = "ElasticMoERouterRequestsRefusedAccess", "ElasticMoERouterRequestsRefused"
    check(
        tmp_path,
        [
            Case(tried, access, "2m", OF_A | {"status": "401"}),
            Case(tried, overload, "2m", None),
            Case(few, access, "2m", None),  # somebody who mistyped a key
        ],
    )


def test_full_kv_is_said_once_though_both_listeners_tell_of_it(tmp_path: Path) -> None:
    def blocks(of: str, free: int) -> dict[str, str]:
        values = {"free": free, "used": 100 - free}
        return {f'elasticmoe:kv_blocks{{{of},state="{state}"}}': f"{num}x40" for state, num in values.items()}

    full = "ElasticMoEScalerKvBlocks"
    router = 'deployment="a",instance="router of a",model_name="m",engine="0"'
    seen = blocks(A, 1) | blocks(router, 1) | blocks(B, 99)
    check(
        tmp_path,
        [
            Case(seen, full, "4m", None),
            Case(seen, full, "10m", OF_A),
            Case(blocks(A, 50) | blocks(router, 1), full, "10m", None),
        ],
    )


def test_standbys_are_missed_where_some_are_wanted(tmp_path: Path) -> None:
    def pools(of: str, standing: int, wanted: int) -> dict[str, str]:
        return {
            f"elasticmoe:standby_ranks{{{of}}}": f"{standing}x40",
            f"elasticmoe:standby_ranks_wanted{{{of}}}": f"{wanted}x40",
        }

    missed = "ElasticMoEScalerStandbyRanks"
    check(
        tmp_path,
        [
            Case(pools(A, 0, 0), missed, "10m", None),  # each rank is to start from nothing
            Case(pools(A, 2, 2), missed, "10m", None),
            Case(pools(A, 0, 0) | pools(B, 0, 2), missed, "1m", None),  # one has just taken a seat
            Case(pools(A, 0, 0) | pools(B, 0, 2), missed, "10m", OF_B),
            Case(pools(B, 1, 2), missed, "10m", OF_B),
        ],
    )


def test_kedas_query_adds_up_what_all_hosts_use(tmp_path: Path) -> None:
    """In numbers that no order of adding rounds: half of four devices at 1.5 times the objective, two of two devices at
    a quarter of it, and one host not scraped; beside them others of those names in another namespace, and of another
    release. Router and scaler both tell of each rank."""
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
        kinds += [
            (f'elasticmoe:experts_per_rank{{{of},job="{job}",rank="r{n}t0"}}', 8.0)
            for n in range(num_ranks)
            for job in ("router", "scaler")
        ]
        kinds += [
            (f'elasticmoe:device_bytes{{{of},device="host:{n}",state="{state}"}}', 1.0)
            for n in range(num_devices)
            for state in ("budget", "free")
        ]
        kinds += [(f'up{{{of},job="{job}"}}', float(bool(num_ranks))) for job in ("router", "scaler")]
        series += [{"series": name, "values": f"{value}x4"} for name, value in kinds]
    wanted = [{"labels": "{}", "value": (1.5 * 2 / 4 + 0.25) / 2 * 3}]
    asked = {"expr": keda_query(), "eval_time": "30s", "exp_samples": wanted}
    promtool(tmp_path, [{"interval": "15s", "input_series": series, "promql_expr_test": [asked]}])
