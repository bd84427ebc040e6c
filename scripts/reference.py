"""docs/reference, and files of deploy: alerts, boards, the chart's alerts and schema. All are made from the code;
`make docs` writes them, and unit tests compare them.

Each text stands beside what it describes: settings in common/settings.py, metrics in the `measures.py` of router and
scaler, errors in common/error_codes, events in services/scaler/api/events.py, flags where the parsers are made.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from elasticmoe.cli import main as command_line
from elasticmoe.common import config
from elasticmoe.common.error_codes import GROUPS, Code
from elasticmoe.common.measures import Alert, Measure
from elasticmoe.common.store import Event
from elasticmoe.services.router import measures as router_measures
from elasticmoe.services.scaler import measures as scaler_measures
from elasticmoe.services.scaler.api.event_stream import EVENTS_KEPT
from elasticmoe.services.scaler.api.events import KINDS
from scripts import boards, chart

_ROOT = Path(__file__).resolve().parent.parent
FOLDER = _ROOT / "docs" / "reference"
# The rules, for a Prometheus that reads files, and in the chart, whose templates can read no file outside it.
RULES = (_ROOT / "deploy" / "prometheus" / "alerts.json", chart.CHART / "files" / "alerts.json")
# The alert that no metric of ours has: of a listener that tells none. All others are silent then.
TARGET_DOWN = Alert(
    'up{job=~".*elasticmoe.*"} == 0',
    "The router or the scaler of a deployment does not answer: `elasticmoe status` there says which. Other alerts say "
    "nothing of it meanwhile.",
    "critical",
    held="1m",
)
_MADE = "<!-- Made by `make docs` from the code: do not edit. -->"
# The processes by the settings that they read.
_SERVICES = {
    config.HmmConfig: "hmm",
    config.KeeperConfig: "keeper",
    config.PoolConfig: "pool",
    config.ScalerConfig: "scaler",
    config.RouterConfig: "router",
}


PAGES = ("configuration.md", "cli.md", "metrics.md", "events.md", "errors.md")


def pages() -> dict[str, str]:
    """Every page's text by its file's name."""
    made = (_configuration(), _cli(), _metrics(), _events(), _errors())
    return {name: f"{_MADE}\n\n{text.rstrip()}\n" for name, text in zip(PAGES, made, strict=True)}


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    for path in RULES:
        path.parent.mkdir(exist_ok=True)
        path.write_text(rules(), encoding="utf-8")
    boards.write()
    chart.write()


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


# ---- settings --------------------------------------------------------------------------------------------------------


def _configuration() -> str:
    fields: dict[str, tuple[Any, list[str]]] = {}
    for kind, service in _SERVICES.items():
        for field in inspect.type_info(kind).fields:  # type: ignore[attr-defined]
            fields.setdefault(field.name, (field, []))[1].append(service)
    rows = [_setting(field, services) for field, services in fields.values()]
    return f"""# Settings

```sh
# In the file that ELASTICMOE_CONFIG names (TOML, no sections), in the environment, and as a flag where there is one:
echo 'max_sequences = 32' > elasticmoe.toml
ELASTICMOE_CONFIG=elasticmoe.toml ELASTICMOE_REQUESTS_MAX=64 elasticmoe up --model tiny --kv-memory 64MiB --detach
elasticmoe down
rm elasticmoe.toml
```

Flags win over the environment, the environment wins over the file. A name that no process knows stops the start, and so
does a value beyond its bounds. Sizes in the file and the environment are plain numbers of bytes. What is in force is
shown by `GET /v1/config` of the [admin API](../admin-api.md). Flags are in [cli.md](cli.md).

`ELASTICMOE_HOME` is no setting of a service: it names the folder of models and chat history, `~/.cache/elasticmoe` by
default.

{table(("key in the file", "in the environment", "default", "unit", "bounds", "read by", "meaning"), rows)}"""


def _setting(field: Any, services: list[str]) -> tuple[str, ...]:
    known = field.type
    unit, form = known.extra["unit"], known.extra["form"]
    read_by = "all" if len(services) == len(_SERVICES) else ", ".join(services)
    text = known.extra_json_schema["description"]
    variable = f"`{config.PREFIX}{field.name.upper()}`"
    bounds = form or _bounds(known.type, unit)
    return f"`{field.name}`", variable, _default(field.default, unit), unit, bounds, read_by, text


def _default(value: Any, unit: str) -> str:
    if value is msgspec.NODEFAULT:
        return "none"
    if value == "":
        return "empty"
    told = f"`{str(value).lower() if isinstance(value, bool) else value}`"
    return f"{told} ({_amount(value, unit)})" if unit.startswith("bytes") and value >= 1 << 20 else told


def _bounds(kind: Any, unit: str) -> str:
    if isinstance(kind, inspect.BoolType):
        return "`true`, `false`"
    if isinstance(kind, inspect.StrType):
        return ""
    least = _amount(kind.ge, unit) if kind.ge is not None else f"above {_amount(kind.gt, unit)}"
    return f"{least} to {_amount(kind.le, unit)}"


def _amount(value: float, unit: str) -> str:
    """A number for people: bytes in the largest unit that leaves it whole."""
    if unit.startswith("bytes"):
        for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
            if value and value % (1 << power) == 0:
                return f"{int(value) >> power} {name}"
    return f"{value:,}"


# ---- commands --------------------------------------------------------------------------------------------------------


def _cli() -> str:
    parser = command_line.make_parser()
    sections = [_command(name, command) for name, command in _commands("elasticmoe", parser)]
    return f"""# Commands

```sh
elasticmoe --help
elasticmoe up --help      # and so for each command
```

An error is one line, `elasticmoe: CODE: text`, on the standard error output; [errors.md](errors.md) has the codes. Exit
status: 0, 1 for an error, 2 for a wrong command line, 130 when interrupted, 141 when the reader of the output has left.

{"".join(sections)}"""


def _commands(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and those of its subcommands, with their names; a parser that only has subcommands is left out."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups or name == "elasticmoe":
        yield name, parser
    for group in groups:
        helps = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for word, command in group.choices.items():
            command.description = helps[word]
            yield from _commands(f"{name} {word}", command)


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    text = (parser.description or "").rstrip(".")
    rows = [
        (_flag(action), action.help or "")
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    ]
    told = f"## `{name}`\n\n{text[:1].upper()}{text[1:]}.\n\n" + (table(("flag", ""), rows) + "\n" if rows else "")
    return told + (f"```text\n{parser.epilog.rstrip()}\n```\n\n" if parser.epilog else "")


def _flag(action: argparse.Action) -> str:
    if action.nargs == 0:
        value = ""
    elif action.choices is not None:
        value = "|".join(map(str, action.choices))
    else:
        value = str(action.metavar or action.dest.upper())
    value = f"{value}..." if action.nargs in ("+", "*") else value
    if not action.option_strings:
        return f"`{value}`"
    return f"`{', '.join(action.option_strings)}{' ' + value if value else ''}`"


# ---- metrics ---------------------------------------------------------------------------------------------------------


def _metrics() -> str:
    measures = [*router_measures.MEASURES, *scaler_measures.MEASURES]
    sections = []
    for source, what in (
        ("router", "Counted by the router"),
        ("ranks", "Reported by the ranks, shown by the router; `engine` is the replica's number"),
        ("scaler", "Shown by the scaler"),
    ):
        rows = [_measure(measure) for measure in measures if measure.source == source]
        sections.append(f"## {what}\n\n{table(('name', 'type', 'labels', 'meaning', 'alert'), rows)}")
    return f"""# Metrics

```sh
elasticmoe up --model tiny --detach
RUN_DIR=$(elasticmoe status --json | sed -n 's/.*"run_dir": "\\(.*\\)",/\\1/p')
curl -s http://127.0.0.1:8000/metrics | grep '^vllm:'
curl -s http://127.0.0.1:8100/metrics -H "Authorization: Bearer $(cat "$RUN_DIR/secrets/admin.token")"
elasticmoe down
```

Prometheus text from two listeners: the router's asks for no key, the scaler's for the admin token. Names with `vllm:`
are vLLM's, with its meaning, so that its dashboards work. A histogram is scraped as `_bucket`, `_sum` and `_count`.
Alerts are suggestions in PromQL: their figures are for you to change. What has none belongs on a dashboard. What
`warning` and `critical` ask of you: [observability.md](../observability.md#alerts). Give what
you scrape a label `deployment` where Prometheus sees several (`deploy/prometheus/prometheus.yml` does): alerts add up
and compare within one.
`deploy/prometheus/` has them as a file of rules, and a configuration that scrapes both listeners and reads it; the
[chart](../../deploy/helm/README.md) as a PrometheusRule.

{chr(10).join(sections)}"""


def _measure(measure: Measure) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in measure.labels)
    alerts = " ".join(map(_alert, measure.alerts))
    return f"`{measure.exposed}`", measure.kind, labels, measure.text, alerts


def _alert(alert: Alert) -> str:
    held = f" for {alert.held}" if alert.held else ""
    return f"`{alert.condition}`{held} ({alert.severity}): {_linked(alert.why)}"


def rules() -> str:
    """The alerts that metrics suggest, as a file of rules: JSON, which Prometheus reads as the YAML that it is."""
    alerts = [
        _rule(_alert_name(measure, alert), alert, measure.text)
        for measure in (*router_measures.MEASURES, *scaler_measures.MEASURES)
        for alert in measure.alerts
    ]
    alerts.append(_rule("ElasticMoETargetDown", TARGET_DOWN, "A listener cannot be scraped"))
    return json.dumps({"groups": [{"name": "elasticmoe", "rules": alerts}]}, indent=2) + "\n"


def _rule(name: str, alert: Alert, summary: str) -> dict[str, Any]:
    rule = {"alert": name, "expr": alert.condition} | ({"for": alert.held} if alert.held else {})
    annotations = {"summary": summary, "description": alert.why}
    return rule | {"labels": {"severity": alert.severity}, "annotations": annotations}


def _alert_name(measure: Measure, alert: Alert) -> str:
    words = [measure.source, *measure.name.partition(":")[2].split("_")]
    return "ElasticMoE" + "".join(word.capitalize() for word in words) + alert.name


# ---- events ----------------------------------------------------------------------------------------------------------


def _events() -> str:
    fields = [
        (f"`{field.name}`", field.type.extra_json_schema["description"])
        for field in inspect.type_info(Event).fields  # type: ignore[attr-defined]
    ]
    kinds = [
        (f"`{name}`", kind.when, "; ".join(f"`{fact}`: {_linked(text)}" for fact, text in kind.facts.items()))
        for name, kind in KINDS.items()
    ]
    return f"""# Events

```sh
elasticmoe up --model tiny --devices host:3 --detach
elasticmoe scale --replicas 3 --wait
timeout 5 elasticmoe events --json || true      # until Ctrl-C
elasticmoe down
```

What the scaler decides and does, as it happens: `elasticmoe events`, or `GET /v1/events` of the
[admin API](../admin-api.md), which is a stream of server-sent events whose `data` is the JSON object below. The last
{EVENTS_KEPT:,} are kept while a scaler runs; the store has them also afterwards.

{table(("field", ""), fields)}
{table(("kind", "comes when", "facts"), kinds)}"""


# ---- errors ----------------------------------------------------------------------------------------------------------


def _errors() -> str:
    head = ("code", "HTTP status", "try again", "meaning", "what to do")
    sections = [
        f"## {title}\n\n{table(head, [_error(name, code) for name, code in codes.items()])}"
        for title, codes in GROUPS.items()
    ]
    return f"""# Error codes

```sh
elasticmoe up --model tiny --detach
curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{{"prompt": 1.5}}'
elasticmoe down
```

Each error has one stable code. Over HTTP it is `code` in `{{"error": {{"message", "type", "param", "code"}}}}`;
commands print `elasticmoe: CODE: text`; logs and operations have it beside their text. The text has the limit and the
value. An answer whose request may be repeated as it is has `Retry-After`. Where a server answers a command without a
code, that is `http_` and the status.

{chr(10).join(sections)}"""


def _error(name: str, code: Code) -> tuple[str, ...]:
    again = {True: "yes", False: "no", None: "depends"}[code.is_retryable]
    return f"`{name}`", ", ".join(map(str, code.statuses)), again, code.meaning, _linked(code.remedy)


def _linked(text: str) -> str:
    """Names of pages become links."""

    def link(match: re.Match[str]) -> str:
        name = match[0]
        return f"[{name}]({name if name in PAGES else f'../{name}'})"

    return re.sub(r"[\w/-]+\.md", link, text)


if __name__ == "__main__":
    main()
