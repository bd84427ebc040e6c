"""A deployment looked at from outside: logs as JSON, in which requests and operations are found by their ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.procs.deployment import Deployment

pytestmark = pytest.mark.procs

SETTINGS: dict[str, Any] = {"devices": 2, "max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20}


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of a log in JSON. Fails for one that is not."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_json_and_names_what_it_is_of(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy("oracle", replicas=1, log_format="json", log_level="debug", **SETTINGS)
    body = {"model": "oracle", "prompt": [1, 2, 3], "max_tokens": 4, "stream": True}
    headers = {"x-request-id": "mine"}
    answer = httpx.post(deployment.base_url + "/v1/completions", json=body, headers=headers, trust_env=False)
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
    op_id = deployment.scale(replicas=2)["op_id"]
    logs = {path.stem: logged(path) for path in (deployment.run_dir / "logs").glob("*.log") if path.stem != "store"}
    logs["launcher"] = logged(deployment.output_path)
    assert logs.keys() >= {"keeper", "hmm", "pool", "scaler", "router", "launcher"}
    for name, lines in logs.items():
        assert lines, name
        assert all(line["message"] and line["level"] and line["ts"].endswith("+00:00") for line in lines), name
    assert {line["service"] for line in logs["pool"]} >= {"worker", "rank-r0t0", "rank-r1t0"}
    of_mine = [line for line in logs["router"] if line.get("request_id") == "mine"]
    assert [line["message"] for line in of_mine] == ["submitted"]
    assert of_mine[0]["stream"].startswith("cmpl-")
    for name in ("scaler", "hmm"):
        phases = [
            line["phase"] if name == "hmm" else line["message"]
            for line in logs[name]
            if line.get("operation_id") == op_id
        ]
        assert len(phases) >= 4, (name, phases)
