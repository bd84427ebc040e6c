"""The Helm chart's schema of values, made from the settings: `helm` refuses a setting that no process knows, or one out
of its bounds, before anything starts. `make docs` writes it; a unit test compares it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

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
    "store_url",
    "drain_seconds",
    "failpoint_dir",
}
_KINDS = (config.HmmConfig, config.KeeperConfig, config.PoolConfig, config.ScalerConfig, config.RouterConfig)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern")
_KEPT = ("type", "description", "enum", "anyOf", *_BOUNDS)


def settings() -> dict[str, Any]:
    """The schema of each setting that a release may have, by name."""
    found: dict[str, Any] = {}
    for kind in _KINDS:
        schema = msgspec.json.schema(kind)
        for name, described in schema["$defs"][kind.__name__]["properties"].items():
            if name not in SET_BY_CHART:
                found[name] = {key: described[key] for key in _KEPT if key in described}
                if "pattern" in found[name]:
                    found[name]["pattern"] = _of_go(described["pattern"])
    return dict(sorted(found.items()))


def _of_go(pattern: str) -> str:
    """Its dollar is the end of the text, and it counts to 1,000."""
    return re.sub(r"\{0,\d{4,}\}", "*", pattern.replace(r"\Z", "$"))


def schema() -> str:
    """The file's text. What values.yaml has is all that there is: a name that it does not have is refused. `global` is
    Helm's."""
    values = _closed(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")))
    port = {"type": "integer", "minimum": 1, "maximum": 65_535}
    of = values["properties"]
    of["global"] = {"type": "object"}
    of["settings"] = {"type": "object", "additionalProperties": False, "properties": settings()}
    of["hosts"] = {"type": ["integer", "null"], "minimum": 1}
    of["drainSeconds"] = {"type": "integer", "minimum": 0, "maximum": 3_600}
    for name in ("service", "adminService"):
        of[name]["properties"]["port"] = port
    head = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": "Made by `make docs` from the settings and values.yaml: do not edit.",
    }
    return json.dumps(head | values | {"required": ["settings", "model"]}, indent=2, ensure_ascii=False) + "\n"


def _closed(value: Any, name: str = "") -> dict[str, Any]:
    """What `value` and the values in its place may be: an object has the names that it has here, unless it has none, or
    holds what Kubernetes asks for."""
    if isinstance(value, dict):
        if not value or name in ("requests", "limits"):
            return {"type": "object"}
        inner = {key: _closed(one, key) for key, one in value.items()}
        return {"type": "object", "additionalProperties": False, "properties": inner}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer"}
    return {"type": "array"} if isinstance(value, list) else {"type": "string"}


def write() -> None:
    """Write the file."""
    SCHEMA.write_text(schema(), encoding="utf-8")
