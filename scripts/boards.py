"""The Grafana boards of deploy/grafana: serving, scaling, memory. Made by `make docs` from what the metrics are called,
so that none names a metric that does not exist; a unit test compares the files.

Source of the form: Grafana's dashboard JSON model, schema version 39 (Grafana 10 and later). Rates are taken over
`$__rate_interval`, which Grafana fits to the scrape interval. A board works with any number of deployments: the
variable `instance` chooses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from elasticmoe.common.measures import Measure
from elasticmoe.services.router import measures as router
from elasticmoe.services.scaler import measures as scaler

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "boards"
_WIDTH, _HEIGHT = 12, 8  # of a panel, in Grafana's grid of 24 columns
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_QUANTILES = (0.5, 0.95, 0.99)


class Query(NamedTuple):
    """A PromQL expression and what each of its series is called."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """`text` says what is seen. `unit`: Grafana's name of it. `most`: the end of the scale, where there is one."""

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    most: float | None = None


class Board(NamedTuple):
    """One page."""

    uid: str
    title: str
    text: str
    panels: tuple[Panel, ...]


def _of(measure: Measure, **labels: str) -> str:
    """The metric's selector. A label's value is a regular expression."""
    chosen = ['instance=~"$instance"', *(f'{name}=~"{value}"' for name, value in labels.items())]
    return f"{measure.exposed}{{{','.join(chosen)}}}"


def _rate(measure: Measure, by: str = "", **labels: str) -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({_of(measure, **labels)}[$__rate_interval]))"


def _happened(expr: str) -> str:
    """Without what has not happened: there is a series for whatever could."""
    return f"{expr} > 0"


def _quantiles(measure: Measure) -> tuple[Query, ...]:
    chosen = f'{measure.exposed}_bucket{{instance=~"$instance"}}'
    return tuple(
        Query(f"histogram_quantile({q:g}, sum by (le) (rate({chosen}[$__rate_interval])))", f"p{q * 100:g}")
        for q in _QUANTILES
    )


def _mean(measure: Measure, by: str) -> str:
    total, count = (f'{measure.exposed}_{part}{{instance=~"$instance"}}' for part in ("sum", "count"))
    window = "[$__rate_interval]"
    return f"sum by ({by}) (rate({total}{window})) / sum by ({by}) (rate({count}{window}))"


SERVING = Board(
    "elasticmoe-serving",
    "ElasticMoE: serving",
    "What clients get: latencies, tokens, requests, and how much room is left.",
    (
        Panel("Time to the first token", router.TTFT.text, "s", _quantiles(router.TTFT)),
        Panel("Time between tokens", router.GAP.text, "s", _quantiles(router.GAP)),
        Panel(
            "Tokens per second",
            "Prompt tokens as they are accepted, and tokens generated",
            "short",
            (
                Query(_rate(router.GENERATION_TOKENS), "generated"),
                Query(_rate(router.PROMPT_TOKENS), "prompts"),
                Query(_rate(router.RECOMPUTED), "computed once more"),
            ),
        ),
        Panel(
            "Requests under way",
            "Of all replicas: those that compute, and those that wait",
            "short",
            (
                Query(f"sum ({_of(router.RUNNING)})", "running"),
                Query(f"sum ({_of(router.WAITING)})", "waiting"),
            ),
        ),
        Panel(
            "Answers per second",
            "By how they ended: a finish reason, an error's code, or the status of a refusal",
            "reqps",
            (
                Query(_rate(router.SUCCESS, "finished_reason"), "{{finished_reason}}"),
                Query(_happened(_rate(router.FAILED, "code")), "failed: {{code}}"),
                Query(_rate(router.REFUSED, "status", model_name=".+"), "refused: {{status}}"),
            ),
        ),
        Panel("From acceptance to the end", router.E2E.text, "s", _quantiles(router.E2E)),
        Panel(
            "KV in use",
            "Share of each replica's blocks; what is full is computed again later",
            "percentunit",
            (Query(_of(router.KV_USAGE), "replica {{engine}}"),),
            1.0,
        ),
        Panel(
            "Steps: what is not tensor mathematics",
            "Mean over ranks that lead a replica; those that follow one wait for its plan, too",
            "percentunit",
            (Query(f"avg by (part) ({_of(router.STEP_SHARE, rank='r[0-9]+t0')})", "{{part}}"),),
            1.0,
        ),
        Panel(
            "Prompt tokens that wait",
            "Of each replica: what new requests stand behind",
            "short",
            (Query(_of(router.QUEUED), "replica {{engine}}"),),
        ),
        Panel(
            "Lengths",
            "Mean prompt and mean answer, in tokens",
            "short",
            (
                Query(_mean(router.PROMPT_SIZE, "model_name"), "prompt"),
                Query(_mean(router.OUTPUT_SIZE, "model_name"), "answer"),
            ),
        ),
    ),
)

SCALING = Board(
    "elasticmoe-scaling",
    "ElasticMoE: scaling",
    "How many replicas there are and should be, why, and what each transition costs.",
    (
        Panel(
            "Replicas",
            "Those of the layout in force, and those that there should be",
            "short",
            (Query(_of(scaler.REPLICAS), "in force"), Query(_of(scaler.DESIRED), "wanted")),
        ),
        Panel(
            "Saturation",
            scaler.SATURATION.text,
            "percentunit",
            (Query(_of(scaler.SATURATION), "{{component}}"),),
        ),
        Panel("Attainment", scaler.ATTAINMENT.text, "percentunit", (Query(_of(scaler.ATTAINMENT), "kept"),), 1.0),
        Panel("Error budget burnt", scaler.BURN.text, "short", (Query(_of(scaler.BURN), "times"),)),
        Panel(
            "Operations ended",
            "In the last five minutes, by kind and outcome",
            "short",
            (
                Query(
                    _happened(f"sum by (kind, outcome) (increase({_of(scaler.OPERATIONS)}[5m]))"),
                    "{{kind}}: {{outcome}}",
                ),
            ),
        ),
        Panel(
            "The last operation",
            "What it was to take, and what it has taken",
            "s",
            (Query(_of(scaler.PREDICTED_S), "planned"), Query(_of(scaler.ACTUAL_S), "measured")),
        ),
        Panel("Phases", "Mean time of each", "s", (Query(_mean(scaler.PHASES, "phase"), "{{phase}}"),)),
        Panel("Pauses", scaler.PAUSES.text, "s", _quantiles(scaler.PAUSES)),
        Panel(
            "Bytes copied between devices",
            "Per second",
            "Bps",
            (Query(_rate(scaler.BYTES_MOVED), "copied"),),
        ),
        Panel(
            "Requests that changed their rank",
            "Per second: moved with their KV, or submitted anew after a rank was lost",
            "reqps",
            (Query(_rate(router.MOVED), "moved"), Query(_rate(router.RESUBMITTED), "submitted anew")),
        ),
        Panel(
            "Decisions",
            "In the last five minutes, by reason",
            "short",
            (Query(_happened(f"sum by (reason) (increase({_of(scaler.DECISIONS)}[5m]))"), "{{reason}}"),),
        ),
        Panel(
            "State",
            "1: all ranks step; an operation is in progress. Others: processes that wait for a seat, and those that do "
            "not tell of their load",
            "short",
            (
                Query(_of(scaler.SERVING), "serving"),
                Query(_of(scaler.BUSY), "an operation"),
                Query(_of(scaler.STANDBY), "standbys"),
                Query(_of(scaler.STANDBY_WANTED), "standbys wanted"),
                Query(_of(scaler.BLIND), "silent"),
            ),
        ),
    ),
)

MEMORY = Board(
    "elasticmoe-memory",
    "ElasticMoE: memory",
    "What lies on each device: weights, experts and KV, what is free, and which devices have failed.",
    (
        Panel(
            "Devices: budget and what is free",
            scaler.DEVICE_BYTES.text,
            "bytes",
            (Query(_of(scaler.DEVICE_BYTES, state="budget|free"), "{{device}}: {{state}}"),),
        ),
        Panel(
            "All devices",
            "Bytes of each kind together, and what of weights and KV lies in large pages",
            "bytes",
            (
                Query(f"sum by (state) ({_of(scaler.DEVICE_BYTES, state='weights|kv|other|free')})", "{{state}}"),
                Query(f"sum({_of(scaler.LARGE_PAGES)})", "in large pages"),
            ),
        ),
        Panel(
            "KV blocks",
            scaler.KV_BLOCKS.text,
            "short",
            (Query(f'sum by (state) ({scaler.KV_BLOCKS.exposed}{{instance=~"$instance",engine=""}})', "{{state}}"),),
        ),
        Panel(
            "KV blocks of each replica",
            router.KV_BLOCKS.text,
            "short",
            (Query(_of(router.KV_BLOCKS, engine=".+"), "replica {{engine}}: {{state}}"),),
        ),
        Panel(
            "Experts",
            "Records on each rank's device: the spread is what a step waits for",
            "short",
            (Query(f"max by (rank) ({_of(scaler.EXPERTS)})", "{{rank}}"),),
        ),
        Panel(
            "Epochs",
            "Of the layout that the scaler has and that the router follows, and of the scaler's fence",
            "short",
            (Query(_of(scaler.EPOCH), "layout, {{job}}"), Query(_of(scaler.FENCE), "fence")),
        ),
        Panel(
            "Devices that have failed",
            scaler.DEVICE_FAILED.text,
            "short",
            (Query(_of(scaler.DEVICE_FAILED), "{{device}}"),),
        ),
    ),
)

BOARDS = (SERVING, SCALING, MEMORY)


def write() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        (FOLDER / f"{board.uid}.json").write_text(text_of(board), encoding="utf-8")


def text_of(board: Board) -> str:
    """A board as Grafana reads it."""
    model = {
        "uid": board.uid,
        "title": board.title,
        "description": board.text,
        "tags": ["elasticmoe"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair on all panels
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "",
        "annotations": {"list": [_annotation()]},
        "links": [{"type": "dashboards", "tags": ["elasticmoe"], "title": "Boards", "asDropdown": False}],
        "templating": {"list": [_source_variable(), _instance_variable()]},
        "panels": [_panel(number, panel) for number, panel in enumerate(board.panels)],
    }
    return json.dumps(model, indent=2, ensure_ascii=False) + "\n"


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, 24 // _WIDTH)
    limits = {"min": 0} | ({} if panel.most is None else {"max": panel.most})
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                **limits,
                "custom": {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": False},
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query.expr, "legendFormat": query.legend}
            for index, query in enumerate(panel.queries)
        ],
    }


# Once for each change: the router tells the epoch as well, and only the scaler has the other metric.
LAYOUT_CHANGED = Query(
    f"changes({_of(scaler.EPOCH)}[$__interval]) > 0 and on (instance) {_of(scaler.SERVING)}", "Layout changed"
)


def _annotation() -> dict[str, Any]:
    """A mark wherever the layout changes."""
    return {
        "name": LAYOUT_CHANGED.legend,
        "enable": True,
        "iconColor": "purple",
        "datasource": _SOURCE,
        "expr": LAYOUT_CHANGED.expr,
        "titleFormat": LAYOUT_CHANGED.legend,
        "step": "5s",
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"}


def _instance_variable() -> dict[str, Any]:
    """Router and scaler are two instances; both are chosen unless somebody chooses."""
    query = f'label_values({{__name__=~"{router.EPOCH.exposed}|{scaler.SERVING.exposed}"}}, instance)'
    return {
        "name": "instance",
        "label": "Instance",
        "type": "query",
        "datasource": _SOURCE,
        "query": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
