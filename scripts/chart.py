"""The Helm chart's schema of values, made from the settings: `helm` refuses a setting that no process knows, or one out
of its bounds, before anything starts. `make docs` writes it; a unit test compares it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from elasticmoe.common import config

CHART = Path(__file__).resolve().parent.parent / "deploy" / "helm" / "elasticmoe"
SCHEMA = CHART / "values.schema.json"
SET_BY_CHART = {
    "run_dir",
    "model",
    "host",
    "port",
    "admin_host",
    "admin_port",
    "api_key_file",
    "allowed_hosts",
    "failpoint_dir",
}
_KINDS = (config.HmmConfig, config.KeeperConfig, config.PoolConfig, config.ScalerConfig, config.RouterConfig)
_KEPT = ("type", "description", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "anyOf")


def settings() -> dict[str, Any]:
    """The schema of each setting that a release may have, by name."""
    found: dict[str, Any] = {}
    for kind in _KINDS:
        schema = msgspec.json.schema(kind)
        for name, described in schema["$defs"][kind.__name__]["properties"].items():
            if name not in SET_BY_CHART:
                found[name] = {key: described[key] for key in _KEPT if key in described}
    return dict(sorted(found.items()))


def schema() -> str:
    """The file's text. Of the other values it says what is not clear from values.yaml: the product says the rest."""
    positive = {"type": "integer", "minimum": 0}
    port = {"type": "integer", "minimum": 1, "maximum": 65_535}
    values = {
        "settings": {"type": "object", "additionalProperties": False, "properties": settings()},
        "model": {"type": "object", "required": ["volume"], "properties": {"volume": {"type": "object"}}},
        "drainSeconds": positive,
        "service": {"type": "object", "properties": {"port": port}},
        "adminService": {"type": "object", "properties": {"port": port}},
    }
    made = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": "Made by `make docs` from the settings: do not edit.",
        "type": "object",
        "required": ["settings", "model"],
        "properties": values,
    }
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def write() -> None:
    """Write the file."""
    SCHEMA.write_text(schema(), encoding="utf-8")
