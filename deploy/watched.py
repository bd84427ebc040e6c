"""Whether the Prometheus of compose.yaml scrapes router and scaler, has their figures, and knows the alerts: exit
status 0, or 1 with what is missing. For `compose_test.sh`, which runs it in the scaler's container."""

from __future__ import annotations

import json
import sys
import urllib.parse
import urllib.request
from typing import Any

URL = "http://prometheus:9090/api/v1/"
WANTED = {"elasticmoe-router": "elasticmoe:prompt_tokens_queued", "elasticmoe-scaler": "elasticmoe:replicas"}


def ask(path: str, **query: str) -> Any:
    """The data of an answer."""
    with urllib.request.urlopen(f"{URL}{path}?{urllib.parse.urlencode(query)}", timeout=5) as answer:
        return json.load(answer)["data"]


def main() -> int:
    """See above."""
    targets = {one["labels"]["job"]: one["health"] for one in ask("targets", state="active")["activeTargets"]}
    if targets != dict.fromkeys(WANTED, "up"):
        print(f"targets: {targets}")
        return 1
    for job, name in WANTED.items():
        if not ask("query", query=f"{{__name__='{name}', job='{job}'}}")["result"]:
            print(f"{job} tells no {name}")
            return 1
    rules = [rule["health"] for group in ask("rules")["groups"] for rule in group["rules"]]
    if not rules or set(rules) != {"ok"}:
        print(f"rules: {rules}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
