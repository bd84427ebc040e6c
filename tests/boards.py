"""What is asked of Prometheus: by the Grafana boards, by KEDA."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from scripts.boards import BOARDS, LAYOUT_CHANGED, Query

QUERIES: list[Query] = [query for board in BOARDS for panel in board.panels for query in panel.queries]
QUERIES.append(LAYOUT_CHANGED)
_KEDA = Path(__file__).parent.parent / "deploy" / "keda" / "scaledobject.yaml"


def keda_query() -> str:
    """The query of deploy/keda/."""
    (trigger,) = yaml.safe_load(_KEDA.read_text())["spec"]["triggers"]
    return str(trigger["metadata"]["query"])


def selectors(expr: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The metrics of ours that a PromQL expression names, each with its matchers: label, operator, value."""
    found = re.findall(r"((?:vllm|elasticmoe):\w+)(?:\{([^}]*)\})?", expr)
    return [(name, re.findall(r"""(\w+)(=~|!=|!~|=)['"]([^'"]*)['"]""", matchers)) for name, matchers in found]
