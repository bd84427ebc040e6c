"""The operator's way: the command line and the admin API against a deployment that serves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.procs.deployment import ROOT, Deployment
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs

SETTINGS = {"devices": 3, "kv_bytes": 4 << 20, "device_bytes": 64 << 20}


@pytest.fixture(scope="module")
def deployment(model_folder: Callable[[str], Path]) -> Iterator[Deployment]:
    """One for all: a test leaves as many replicas as it likes."""
    deployment = Deployment(model_folder("oracle"), replicas=1, **SETTINGS)
    try:
        yield deployment.wait_ready()
        deployment.stop()
    finally:
        deployment.discard()


def elasticmoe(deployment: Deployment, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elasticmoe.cli.main", *args, "--run-dir", str(deployment.run_dir)]

    def heard() -> subprocess.CompletedProcess[str] | None:
        """A scaler that has not heard the HMM for a moment says that it is not ready, and for how long to wait."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        return None if "not_ready" in done.stdout + done.stderr else done

    done = wait_until(heard, f"{args} is heard", 60.0)
    assert done is not None
    return done


def test_the_command_line_plans_scales_and_shows_it(deployment: Deployment) -> None:
    assert deployment.scale(replicas=1)["phase"] == "done"
    epoch = deployment.admin("/v1/layout")["epoch"]
    planned = elasticmoe(deployment, "plan", "--replicas", "3")
    assert planned.returncode == 0
    assert "1 → 3 replicas" in planned.stdout
    assert deployment.admin("/v1/layout")["epoch"] == epoch, "a plan changes nothing"
    scaled = elasticmoe(deployment, "scale", "--replicas", "3", "--wait", "--op-id", "grow")
    assert scaled.returncode == 0, scaled.stderr
    assert "is done" in scaled.stdout
    status = json.loads(elasticmoe(deployment, "status", "--json").stdout)
    assert status["layout"]["replicas"] == 3
    removed = json.loads(elasticmoe(deployment, "scale", "--remove", "r0", "--wait", "--json").stdout)
    assert (removed["kind"], removed["outcome"]) == ("scale_down", "done")
    assert elasticmoe(deployment, "rebalance", "--wait").returncode == 0
    refused = elasticmoe(deployment, "scale", "--replicas", "9")
    assert refused.returncode == 1
    assert refused.stderr.startswith("elasticmoe: too_few_devices: ")


def test_the_api_is_strict_and_idempotent(deployment: Deployment) -> None:
    bad = [
        {},
        {"replicas": 2, "remove": [0]},
        {"replicas": "2"},
        {"replicas": 2, "unknown": 1},
        {"replicas": 0},
        {"replicas": 2, "deadline_s": -1},
        {"replicas": 2, "op_id": "x" * 1_000},
    ]
    for body in bad:
        status, answer = deployment.admin_call("POST", "/v1/scale", body)
        assert status in (400, 422), (body, answer)
        assert answer["error"]["code"]
    assert deployment.scale(replicas=1)["phase"] == "done"
    status, plan = deployment.admin_call("POST", "/v1/scale", {"replicas": 2, "dry_run": True})
    assert status == 200
    assert sum(leg["bytes_copied"] for leg in plan["legs"]) == plan["planned"]["bytes_copied"] > 0
    operation = deployment.scale(replicas=2, op_id="once")
    assert operation["phase"] == "done"
    status, again = deployment.admin_call("POST", "/v1/scale", {"replicas": 2, "op_id": "once"})
    assert (status, again["op_id"]) == (202, "once")
    status, reused = deployment.admin_call("POST", "/v1/scale", {"replicas": 3, "op_id": "once"})
    assert (status, reused["error"]["code"]) == (409, "op_id_reused")
    size = deployment.admin("/v1/scale")
    wanted = {"operation_id": "leave", "replicas": 1, "expected_instance_id": size["instance_id"]}
    before = size["participating_ranks"]
    assert size["effective_size"] == len(before) == 2
    status, refused = deployment.admin_call("POST", "/v1/scale", {**wanted, "expected_instance_id": "i-other"})
    assert (status, refused["error"]["code"]) == (409, "wrong_instance")
    assert deployment.scale(**wanted)["phase"] == "done"
    size = deployment.admin("/v1/scale")
    assert (size["operation_id"], size["phase"], size["effective_size"]) == ("leave", "done", 1)
    (left,) = set(before) - set(size["participating_ranks"])
    assert (size["pending_target"], size["safe_to_terminate_ranks"]) == (None, [left])
    assert size["topology_generation"] == operation["planned"]["epoch_after"] + 1
    status, _ = deployment.admin_call("DELETE", "/v1/operations/once")
    assert status == 409
    status, _ = deployment.admin_call("GET", "/v1/operations/never")
    assert status == 404
    assert deployment.admin("/v1/layout")["epoch"] == size["topology_generation"]
    assert [shown["op_id"] for shown in deployment.admin("/v1/operations")["operations"]][:2] == ["leave", "once"]


def test_events_are_streamed_and_resumed(deployment: Deployment) -> None:
    headers = {"Authorization": f"Bearer {deployment.token}"}
    seen: list[tuple[str, str]] = []

    def follow(after: str, until: str) -> None:
        """Read events until one that says `until`."""
        resume = {"Last-Event-ID": after} if after else {}
        with httpx.Client(base_url=deployment.admin_url, timeout=30, trust_env=False) as client:
            with client.stream("GET", "/v1/events", headers=headers | resume) as answer:
                assert answer.status_code == 200
                number = ""
                for line in answer.iter_lines():
                    if line.startswith("id: "):
                        number = line[4:]
                    elif line.startswith("data: "):
                        seen.append((number, line[6:]))
                        if until in line:
                            return

    assert deployment.scale(replicas=3, op_id="zeroth")["phase"] == "done"
    assert deployment.scale(replicas=2, op_id="first")["phase"] == "done"
    follow("0", '"first"')
    follow(seen[-1][0], '"operation_ended"')
    last = seen[-1][0]
    assert deployment.scale(replicas=1, op_id="second")["phase"] == "done"
    before = len(seen)
    follow(last, '"operation_ended"')
    ids = [number for number, _ in seen]
    assert len(ids) == len(set(ids)), "an event came twice"
    assert any("second" in text for _, text in seen[before:])
    assert not any("first" in text for _, text in seen[before:])
