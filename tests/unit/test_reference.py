"""docs/reference is what the code says: `make docs` writes it anew. And what the code says is whole."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elasticmoe.common import config
from elasticmoe.common.layout import RankId, initial_layout
from elasticmoe.common.measures import Measure
from elasticmoe.common.protocol.router import RankStatus
from elasticmoe.common.protocol.scaler import PoolStatus
from elasticmoe.services.router import measures as router_measures
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.scaler import measures as scaler_measures
from elasticmoe.services.scaler.api.events import KINDS
from elasticmoe.services.scaler.api.prometheus import render_metrics
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot
from elasticmoe.services.scaler.control.autoscaler import Decided
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.operation.operation import planned_of
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.figures import Signals
from elasticmoe.services.scaler.policy.record import PolicyRecord
from elasticmoe.services.scaler.policy.saturation import Saturation
from elasticmoe.services.scaler.policy.state import Evidence, Reason
from scripts import boards, reference
from tests.boards import QUERIES, keda_query, selectors
from tests.unit.test_scaler_admin import SIZES, snapshot_of
from tests.unit.transitions import UP, World, operation_of

ROOT = Path(__file__).parent.parent.parent
PAGES = reference.pages()
SCALER = sorted((ROOT / "services" / "scaler").rglob("*.py"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    assert (reference.FOLDER / name).read_text() == PAGES[name], "the code has changed: run `make docs`"


def test_the_alerts_are_what_the_code_says_and_each_has_a_name_of_its_own() -> None:
    for path in reference.RULES:
        assert path.read_text() == reference.rules(), "the code has changed: run `make docs`"
    rules = json.loads(reference.rules())["groups"][0]["rules"]
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names) > 10
    assert {rule["labels"]["severity"] for rule in rules} == {"warning", "critical"}


@pytest.mark.parametrize("board", boards.BOARDS, ids=lambda board: board.uid)
def test_the_boards_are_what_the_code_says(board: boards.Board) -> None:
    assert (boards.FOLDER / f"{board.uid}.json").read_text() == boards.text_of(board), "run `make docs`"
    assert len({panel.title for panel in board.panels}) == len(board.panels)


def test_every_metric_is_on_a_board_and_every_board_names_only_metrics_that_exist() -> None:
    known: dict[str, set[str]] = {}
    for measure in (*router_measures.MEASURES, *scaler_measures.MEASURES):
        endings = ("_bucket", "_sum", "_count") if measure.kind == "histogram" else ("",)
        for ending in endings:
            known.setdefault(measure.exposed + ending, set()).update(measure.labels)
    shown = set()
    for query in QUERIES:
        selectors = re.findall(r"((?:vllm|elasticmoe):\w+)\{([^}]*)\}", query.expr)
        assert len(selectors) == len(re.findall(r"(?:vllm|elasticmoe):", query.expr)), query
        for name, labels in selectors:
            shown.add(name)
            assert {part.split("=")[0] for part in labels.split(",")} <= known[name] | {"instance"}, query
        named = {label for name, _ in selectors for label in known[name]}
        assert set(re.findall(r"{{(\w+)}}", query.legend)) <= named | {"job"}, query
    left_out = {"elasticmoe:bad_messages_total", "elasticmoe:spans_lost_total", "elasticmoe:rank_silent_seconds"}
    assert {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in known} - {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in shown
    } <= left_out, "faults, which have alerts"


def test_every_setting_has_a_meaning_and_every_number_a_bound() -> None:
    for kind in config.CONFIGS:
        for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
            known = field.type
            assert isinstance(known, msgspec.inspect.Metadata), field.name
            assert known.extra_json_schema is not None, field.name
            assert known.extra_json_schema["description"], field.name
            if isinstance(known.type, msgspec.inspect.IntType | msgspec.inspect.FloatType):
                assert known.type.le is not None, field.name
                is_told = field.name.endswith(("_bytes", "_s", "_seconds", "_ms", "_bytes_max", "_seconds_max"))
                assert not is_told or known.extra["unit"], field.name
            elif isinstance(known.type, msgspec.inspect.StrType) and known.type.pattern is not None:
                assert known.extra["form"], f"{field.name}: say in words what {known.type.pattern} takes"


def test_settings_of_one_name_are_one_setting() -> None:
    seen: dict[str, object] = {}
    for kind in config.CONFIGS:
        for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
            assert seen.setdefault(field.name, field.type) == field.type, field.name


def families(text: bytes) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Kind, text and label names of each metric in a Prometheus text."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        if family.type == "gauge" and family.name.endswith("_created"):
            continue  # prometheus-client's own, beside each counter and histogram
        labels = [name for sample in family.samples[:1] for name in sample.labels if name != "le"]
        found[family.name] = (family.type, family.documentation, tuple(sorted(labels)))
    return found


def declared(measures: tuple[Measure, ...]) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    return {measure.name: (measure.kind, measure.text, tuple(sorted(measure.labels))) for measure in measures}


def test_the_router_shows_the_metrics_that_the_page_names() -> None:
    metrics, rank = Metrics("m"), RankId(0, 0)
    status = RankStatus(rank, "i", 1, 1, 0, 0, 3, 4, 64)
    link = SimpleNamespace(status=status, left_at=None, silent_s=lambda _: 0.5)
    metrics.watch({rank: link}, lambda: initial_layout((2,), ("host:0", "host:1")))  # type: ignore[dict-item]
    assert families(metrics.render()) == declared(router_measures.MEASURES)


def test_the_scaler_shows_the_metrics_that_the_page_names() -> None:
    assert families(render_metrics(decided_snapshot(), Meters())) == declared(scaler_measures.MEASURES)


def decided_snapshot() -> StatusSnapshot:
    """Of a deployment whose policy has seen a load and decided, and whose last operation is over."""
    config = PolicyConfig()
    evidence = Evidence(raw=Saturation(0.5, 0.4, 0.1, 0.0, 0.2))
    decided = Decided(
        time_unix=1.0,
        mode="advise",
        reason=Reason.STEADY,
        replicas=2,
        target=None,
        op_id=None,
        supersedes=None,
        acts=False,
        evidence=evidence,
    )
    over = msgspec.structs.replace(operation_of(UP), phase="done", planned=planned_of(UP, SIZES))
    return snapshot_of(
        World(UP.before),
        policy=PolicyRecord(1, config, config),
        decided=(decided,),
        decision=decided,
        signals=Signals(at_s=1.0, attainment=0.98),
        saturation=evidence.raw,
        ended=(over,),
    )


def samples(snapshot: StatusSnapshot) -> dict[tuple[str, ...], float]:
    text = render_metrics(snapshot, Meters()).decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}


def test_what_is_wanted_does_not_fall_back_while_it_is_brought_about() -> None:
    """Whoever provides devices by it would take them away in the middle of the growth."""
    running = msgspec.structs.replace(operation_of(UP), phase="prepare", planned=planned_of(UP, SIZES))
    desired = ("elasticmoe:desired_replicas",)
    snapshot = decided_snapshot()
    assert samples(snapshot)[desired] == 2
    assert samples(msgspec.structs.replace(snapshot, operation=running))[desired] == 3
    undone = msgspec.structs.replace(running, phase="abort")
    assert samples(msgspec.structs.replace(snapshot, operation=undone))[desired] == 2


def test_the_saturation_is_the_present_one_though_the_decision_stays() -> None:
    now = msgspec.structs.replace(decided_snapshot(), saturation=Saturation(0.9))
    assert samples(now)["elasticmoe:saturation", "ttft"] == 0.9
    assert ("elasticmoe:saturation", "kv") not in samples(now)


def test_as_many_standbys_are_wanted_as_are_set_whatever_there_is() -> None:
    before = decided_snapshot()
    assert before.cluster is not None
    for standbys, pool, free in ((2, PoolStatus(2, ()), 2), (0, PoolStatus(0, (), True), 0), (3, None, 0)):
        hosts = {name: msgspec.structs.replace(host, pool=pool) for name, host in before.cluster.hosts.items()}
        cluster = msgspec.structs.replace(before.cluster, hosts=hosts)
        told = samples(msgspec.structs.replace(before, cluster=cluster, config={"standbys": standbys}))
        assert told["elasticmoe:standby_ranks_wanted",] == standbys
        assert told["elasticmoe:standby_ranks",] == free


def test_an_alert_is_about_its_metric() -> None:
    known = {one.name for one in (*router_measures.MEASURES, *scaler_measures.MEASURES)}
    for measure in (*router_measures.MEASURES, *scaler_measures.MEASURES):
        for alert in measure.alerts:
            assert alert.why, measure.name
            assert measure.name in alert.condition, measure.name
            named = {re.sub(r"_(total|bucket)$", "", name) for name, _ in selectors(alert.condition)}
            assert named <= known, measure.name
        assert len({alert.name for alert in measure.alerts}) == len(measure.alerts), measure.name


def test_what_both_listeners_tell_is_told_apart_or_counted_once() -> None:
    router = {measure.exposed: set(measure.labels) for measure in router_measures.MEASURES}
    scaler = {measure.exposed: set(measure.labels) for measure in scaler_measures.MEASURES}
    both = set(router) & set(scaler)
    assert both >= {"elasticmoe:kv_blocks", "elasticmoe:requests_refused_total", "elasticmoe:experts_per_rank"}
    alerts = [alert for one in (*router_measures.MEASURES, *scaler_measures.MEASURES) for alert in one.alerts]
    exprs = [*(alert.condition for alert in alerts), *(query.expr for query in QUERIES), keda_query()]
    for expr in exprs:
        for name, matchers in selectors(expr):
            if name not in both:
                continue
            if own := router[name] ^ scaler[name]:
                assert own & {label for label, _, _ in matchers}, expr
            elif name == "elasticmoe:experts_per_rank":
                assert re.search(r"max by \([a-z, ]*\brank\) \(elasticmoe:experts_per_rank", expr), expr
            else:
                assert name == "elasticmoe:epoch", "which both are compared by"


def facts_of(function: ast.AST, call: ast.Call) -> set[str]:
    """The names of the facts that a call of `_tell` may have; `**facts` are the dictionaries of that name there."""
    found = {word.arg for word in call.keywords if word.arg is not None}
    for word in call.keywords:
        if word.arg is not None:
            continue
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Name) and target.id == ast.unparse(word.value):
                    assert isinstance(node, ast.Assign)
                    assert isinstance(node.value, ast.Dict)
                    found |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
                if isinstance(target, ast.Subscript) and ast.unparse(target.value) == ast.unparse(word.value):
                    assert isinstance(target.slice, ast.Constant)
                    found.add(target.slice.value)
    return found


def test_events_are_those_that_the_page_names() -> None:
    told: dict[str, set[str]] = {}
    for path in SCALER:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "self._tell":
                    assert isinstance(call.args[0], ast.Constant), f"{path.name}:{call.lineno}"
                    told.setdefault(call.args[0].value, set()).update(facts_of(function, call))
    assert told == {name: set(kind.facts) for name, kind in KINDS.items()}
