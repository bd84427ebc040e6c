"""`deployment.json` as a launcher writes it."""

from __future__ import annotations

from typing import Any

from elasticmoe.common.record import STATE_FORMAT, DeploymentRecord, ProcessRecord


def record_of(**changes: Any) -> DeploymentRecord:
    """Of two replicas that serve the model `/m`, but for `changes`. Its launcher is no process of ours."""
    facts: dict[str, Any] = {
        "state": "serving",
        "launcher": ProcessRecord("launcher", 1, 0),
        "processes": (),
        "model": "/m",
        "served_name": "m",
        "dtype": "float32",
        "devices": "host:2",
        "url": "http://127.0.0.1:1",
        "admin_url": "http://127.0.0.1:2",
        "port": 1,
        "admin_port": 2,
        "started_at": 0.0,
        "state_format": STATE_FORMAT,
    }
    return DeploymentRecord(**facts | changes)
