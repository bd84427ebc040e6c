"""What the Prometheus operator asks of the resources that the chart makes for it: its fields, types, patterns and what
is required, for what we use of them; nothing else is let through. After its custom resource definitions of version
0.84 (ServiceMonitor) and 0.82 (PrometheusRule), which Kubernetes' own schemas do not have."""

from __future__ import annotations

from typing import Any

# A length of time as Prometheus writes it.
_DURATION = {
    "type": "string",
    "pattern": r"^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$",
    "minLength": 1,
}
_LABEL_NAME = {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def _only(required: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    """An object with these fields and no other."""
    return {"type": "object", "additionalProperties": False, "properties": fields, "required": list(required)}


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    name = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
    return _only(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": kind},
        metadata=_only(("name", "labels"), name=name, labels=_TEXTS),
        spec=spec,
    )


_SECRET_KEY = _only(("name", "key"), name={"type": "string", "minLength": 1}, key={"type": "string", "minLength": 1})
_RELABELING = _only(
    ("sourceLabels", "targetLabel"), sourceLabels={"type": "array", "items": _LABEL_NAME}, targetLabel=_LABEL_NAME
)
_ENDPOINT = _only(
    ("port",),
    port={"type": "string"},  # by its name in the Service: a number is `targetPort`
    interval=_DURATION,
    relabelings={"type": "array", "items": _RELABELING},
    authorization=_only(("credentials",), credentials=_SECRET_KEY),
)
_RULE = _only(
    ("alert", "expr"),
    alert=_LABEL_NAME,
    expr={"type": "string", "minLength": 1},
    labels=_TEXTS,
    annotations=_TEXTS,
    **{"for": _DURATION},
)
_GROUP = _only(("name",), name={"type": "string", "minLength": 1}, rules={"type": "array", "items": _RULE})

# By the resource's kind.
SCHEMAS: dict[str, dict[str, Any]] = {
    "ServiceMonitor": _resource(
        "ServiceMonitor",
        _only(
            ("endpoints", "selector"),
            endpoints={"type": "array", "items": _ENDPOINT, "minItems": 1},
            selector=_only((), matchLabels=_TEXTS),
        ),
    ),
    "PrometheusRule": _resource("PrometheusRule", _only(("groups",), groups={"type": "array", "items": _GROUP})),
}
