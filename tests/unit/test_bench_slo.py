"""`bench slo`: its arithmetic, and what its methods hold and order for what the policy says."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from elasticmoe.cli.bench import slo
from elasticmoe.cli.bench.scaling_methods import Scene
from elasticmoe.cli.bench.slo_figures import (
    Held,
    Objectives,
    SloFigures,
    compare,
    device_seconds,
    figures_of,
    reactions,
    sizes_of,
)
from elasticmoe.cli.bench.slo_methods import (
    HORIZONTAL,
    METHODS,
    OURS,
    Ours,
    Slo,
    SloColdRestart,
    SloHorizontal,
    SloMethod,
)
from elasticmoe.cli.bench.slo_run import SloRun, machine_times
from elasticmoe.cli.load.result import Result
from elasticmoe.cli.models.oracle import ORACLE_CONFIG, PACED_CONFIG
from elasticmoe.cli.replay import traffic

OBJECTIVES = Objectives(ttft_s=2.0, itl_s=0.1)


def result(number: int, ttft_s: float | None = 0.5, gap_ms: float | None = 50.0, **fields: Any) -> Result:
    due = float(number)
    first = None if ttft_s is None else due + ttft_s
    known: dict[str, Any] = {
        "number": number,
        "scheduled_s": due,
        "sent_s": due,
        "first_token_s": first,
        "last_token_s": first,
        "ended_s": first,
        "lag_ms": 0.0,
        "input_tokens": 8,
        "max_tokens": 4,
        "tokens": 4,
        "gap_mean_ms": gap_ms,
        "gap_p95_ms": gap_ms,
        "gap_max_ms": gap_ms,
        "status": 200,
        "outcome": "completed",
        "error": "",
    }
    return Result(**{**known, **fields})


def held(steps: list[tuple[float, int]], changes: list[tuple[float, int, int]] | None = None) -> Held:
    found = Held()
    for at, devices in steps:
        found.hold(at, devices)
    for at, before, after in changes or []:
        found.order(at, before, after)
    return found


def figures(violations: int, seconds: float, failed: int = 0) -> SloFigures:
    return SloFigures(
        num=100,
        attainment=1 - violations / 100,
        ttft_kept=1.0,
        itl_kept=1.0,
        violations=violations,
        failed=failed,
        device_seconds=seconds,
        mean_devices=seconds / 10,
        operations=0,
        flaps=0,
        ttft_p50_s=None,
        ttft_p95_s=None,
        ttft_p99_s=None,
        retries=0,
    )


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(0.0, 2)], 200.0),
        ([(90.0, 2)], 200.0),
        ([(90.0, 2), (95.0, 4)], 400.0),  # what was before the begin does not count
        ([(90.0, 2), (150.0, 4)], 300.0),
        ([(90.0, 2), (150.0, 4), (160.0, 3), (170.0, 2)], 100 + 40 + 30 + 60),
        ([(90.0, 2), (250.0, 4)], 200.0),  # nor what comes after the end
    ],
)
def test_devices_count_while_they_are_held_in_the_time_of_the_trace(
    steps: list[tuple[float, int]], expected: float
) -> None:
    assert device_seconds(steps, 100.0, 200.0) == expected


@pytest.mark.parametrize("steps", [[], [(100.5, 2)]])
def test_what_is_not_known_of_the_begin_has_no_device_seconds(steps: list[tuple[float, int]]) -> None:
    with pytest.raises(ValueError, match="not known"):
        device_seconds(steps, 100.0, 200.0)


def test_a_request_keeps_both_objectives_and_ends_whole_or_violates_them() -> None:
    results = [
        result(0, 2.0, 100.0),
        result(1, 2.01),
        result(2, gap_ms=100.1),
        result(3, gap_ms=None),  # a single token has no gap
        result(4, outcome="failed", error="cut_off"),
        result(5, None, None, outcome="failed", error="no_connection", status=0),
        result(6, None, None, outcome="interrupted"),
    ]
    found = figures_of(results, 7, held([(0.0, 2)]), 10.0, 10.0, OBJECTIVES, 3)
    assert (found.attainment, found.violations, found.failed) == (2 / 7, 5, 3)
    assert (found.ttft_kept, found.itl_kept) == (4 / 7, 4 / 7)
    assert (found.device_seconds, found.mean_devices, found.retries) == (20.0, 2.0, 3)
    assert found.ttft_p50_s == pytest.approx(0.5)
    assert found.ttft_p99_s == pytest.approx(2.01)
    assert sizes_of(results, held([(0.0, 2)]), 10.0, 10.0, OBJECTIVES).missed == [1.0, 2.0, 4.0, 5.0, 6.0]


def test_results_that_are_not_those_of_the_trace_have_no_figures() -> None:
    for results in ([result(0)], [result(0), result(0)], []):
        with pytest.raises(ValueError, match="of 2 requests"):
            figures_of(results, 2, held([(0.0, 1)]), 0.0, 1.0, OBJECTIVES, 0)


def test_orders_in_the_time_of_the_trace_are_operations_and_quick_returns_are_flaps() -> None:
    changes = [(99.0, 2, 3), (110.0, 3, 4), (150.0, 4, 3), (300.0, 3, 4), (400.0, 4, 3), (501.0, 3, 4)]
    found = figures_of([result(0)], 1, held([(0.0, 2)], changes), 100.0, 400.0, OBJECTIVES, 0)
    assert (found.operations, found.flaps) == (4, 2)  # 40 s and 100 s after the one before; 150 s is none


def test_the_line_of_a_run_begins_with_what_was_held_before() -> None:
    steps = held([(90.0, 2), (95.0, 3), (120.0, 4), (190.0, 3), (210.0, 2)])
    assert sizes_of([], steps, 100.0, 100.0, OBJECTIVES).sizes == [(0.0, 3), (20.0, 4), (90.0, 3)]


def test_ours_is_compared_by_the_mean_of_its_rounds() -> None:
    ours, theirs = [figures(2, 90.0), figures(4, 110.0)], [figures(20, 110.0), figures(10, 110.0)]
    found = compare(ours, theirs, "cold-restart", 0.2)
    assert (found.violations, found.device_seconds, found.is_met) == (3 / 15, 100 / 110, True)
    assert not compare(ours, theirs, "cold-restart", 0.19).is_met
    assert not compare(ours, [figures(20, 100.0)], "cold-restart", 0.2).is_met, "as many device-seconds"
    assert not compare([figures(0, 1.0, failed=1)], theirs, "cold-restart", 0.2).is_met
    assert compare([figures(0, 1.0)], [figures(0, 2.0)], "it", 0.5).violations is None
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([], theirs, "it", 0.5)


# ---- methods ------------------------------------------------------------------------------------------------------


class FakeDeployment:
    """Answers paths of the admin surface with what is put there; None: with an error."""

    port = 31_999

    def __init__(self, number: int, replicas: int) -> None:
        self.url = f"http://127.0.0.1:{number}"
        self.replicas = replicas
        self.policy: dict[str, Any] | None = {"version": 3, "target": replicas, "policy": {"hold_s": 0.0}}
        self.put_there: list[Any] = []
        self.scale: dict[str, Any] | None = {"effective_size": replicas, "pending_target": None}

    async def get(self, path: str) -> Any:
        answer = {"/v1/policy": self.policy, "/v1/scale": self.scale}[path]
        if answer is None:
            raise ValueError(f"{path}: HTTP 503")
        return answer

    async def put(self, path: str, body: dict[str, Any]) -> Any:
        self.put_there.append((path, body))


class FakeScene:
    """Notes what is started and ended, with what is held then. `on_deploy` is called while one starts."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.made: list[FakeDeployment] = []
        self.method: SloMethod | None = None

    def _held(self) -> int | None:
        steps = self.method.held.steps if self.method is not None else []
        return steps[-1][1] if steps else None

    async def deploy(self, replicas: int, devices: int, *, port: int = 0, **settings: Any) -> FakeDeployment:
        bounds = (settings["policy"], settings["replicas_min"], settings["replicas_max"])
        self.events.append(("up", replicas, devices, port, bounds, self._held()))
        self.made.append(FakeDeployment(len(self.made) + 1, replicas))
        return self.made[-1]

    async def end(self, deployment: FakeDeployment, *, at_once: bool = False) -> None:
        self.events.append(("down", deployment.url, at_once, self._held()))


def make(
    kind: Callable[[Scene, Slo, Callable[[tuple[str, ...]], None]], SloMethod],
) -> tuple[FakeScene, Any, list[tuple[str, ...]]]:
    scene, routes = FakeScene(), cast(list[tuple[str, ...]], [])
    method = kind(cast(Scene, scene), Slo(sizes=(2, 4), policy={"ttft_s": 2.0}), routes.append)
    scene.method = method
    asyncio.run(method.start())
    scene.events.clear()
    return scene, method, routes


def want(scene: FakeScene, *targets: int, hold_s: float = 0.0) -> None:
    for deployment, target in zip(scene.made[-len(targets) :], targets, strict=True):
        deployment.policy = {"target": target, "policy": {"hold_s": hold_s}}


def test_ours_holds_what_an_operation_brings_from_its_begin_and_what_it_takes_until_its_end() -> None:
    scene, method, _ = make(Ours)
    one = scene.made[0]
    for effective, pending in ((2, None), (2, 4), (4, None), (4, 3), (3, None)):
        one.scale = {"effective_size": effective, "pending_target": pending}
        asyncio.run(method.look())
        one.scale = None  # a scaler that is being replaced changes nothing
        asyncio.run(method.look())
    assert [devices for _, devices in method.held.steps] == [2, 4, 3]
    assert [change[1:] for change in method.held.changes] == [(2, 4), (4, 3)]
    assert method.held.changes[0][0] == method.held.steps[1][0], "held from the order on"
    assert method.held.changes[1][0] < method.held.steps[2][0], "held until it has ended"
    assert scene.events == []


def test_a_cold_restart_has_both_sizes_until_the_old_one_is_gone() -> None:
    scene, method, routes = make(SloColdRestart)
    asyncio.run(method.look())
    assert scene.events == [], "it is as it should be"
    want(scene, 9)
    asyncio.run(method.look())
    advised = ("advise", 2, 4)
    assert scene.events == [("down", "http://127.0.0.1:1", True, 4), ("up", 4, 4, 31_999, advised, 4)]
    want(scene, 1)
    scene.events.clear()
    asyncio.run(method.look())
    assert scene.events == [("down", "http://127.0.0.1:2", True, 4), ("up", 2, 4, 31_999, advised, 2)]
    assert [change[1:] for change in method.held.changes] == [(2, 4), (4, 2)]
    assert routes == [], "the address stays"


def test_a_baseline_shrinks_only_when_the_last_change_is_hold_s_old_and_grows_at_once() -> None:
    scene, method, _ = make(SloColdRestart)
    want(scene, 3, hold_s=3600.0)
    asyncio.run(method.look())
    want(scene, 2, hold_s=3600.0)
    asyncio.run(method.look())
    assert len(scene.made) == 2, "a shrink is too soon"
    want(scene, 4, hold_s=3600.0)
    asyncio.run(method.look())
    assert scene.made[-1].replicas == 4
    scene.made[-1].policy = None
    asyncio.run(method.look())
    assert len(scene.made) == 3, "nothing is known"


def test_a_horizontal_growth_is_a_whole_copy_and_a_shrink_drains_it() -> None:
    scene, method, routes = make(SloHorizontal)
    want(scene, 3)
    asyncio.run(method.look())
    assert scene.events == [("up", 2, 4, 0, ("advise", 1, 4), 4)]
    assert routes == [("http://127.0.0.1:1", "http://127.0.0.1:2")]
    want(scene, 2, 1)
    asyncio.run(method.look())
    want(scene, 4, 4)
    asyncio.run(method.look())
    assert len(scene.events) == 1, "three replicas take two copies, and more than two there are not"
    want(scene, 1, 1)
    scene.events.clear()
    asyncio.run(method.look())
    assert scene.events == [("down", "http://127.0.0.1:2", False, 4)], "held until it has drained"
    assert routes[-1] == ("http://127.0.0.1:1",)
    assert [change[1:] for change in method.held.changes] == [(2, 4), (4, 2)]
    assert method.held.steps[-1][1] == 2


def test_every_method_follows_until_it_is_over() -> None:
    for kind in METHODS.values():
        _, method, _ = make(kind)
        method.is_over = True
        asyncio.run(method.follow())
        assert method.held.steps[0][1] in (2, 4)


def test_every_deployment_of_every_method_has_the_same_numbers_of_the_policy() -> None:
    for kind in METHODS.values():
        scene = FakeScene()
        slo_ = Slo(sizes=(2, 4), policy={}, fields={"hold_s": 20.0, "flap_s": 5.0})
        method = kind(cast(Scene, scene), slo_, lambda _: None)
        asyncio.run(method.start())
        want(scene, 4)
        asyncio.run(method.look())
        for one in scene.made:
            assert one.put_there == [("/v1/policy", {"version": 3, "policy": {"hold_s": 20.0, "flap_s": 5.0}})]


def test_from_a_step_of_load_to_the_first_order_to_grow_in_it() -> None:
    changes = [(1.0, 2, 3), (12.5, 3, 4), (14.0, 4, 5), (25.0, 5, 4), (41.0, 4, 5)]
    assert reactions(changes, [10.0, 20.0, 30.0, 40.0], 10.0) == [2.5, None, None, 1.0]


# ---- the command --------------------------------------------------------------------------------------------------


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    slo.add_arguments(parser)
    return parser.parse_args(["--generate", "step", *flags])


def test_methods_are_those_that_are_named_and_with_a_load_the_baselines_run_twice() -> None:
    assert slo.methods_of(arguments()) == list(METHODS)
    loaded = slo.methods_of(arguments("--methods", "ours,cold-restart", "--load-s", "5"))
    assert loaded == ["ours", "cold-restart", "cold-restart+load"]


@pytest.mark.parametrize("text", ["hold_s", "hold_s=x", "hold=3", "hold_s=-1", "hold_s=700"])
def test_numbers_that_no_policy_has_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        slo.policy_fields(text)
    assert slo.policy_fields("hold_s=20,flap_s=5") == {"hold_s": 20.0, "flap_s": 5.0}


def test_the_steps_of_what_is_played_are_known() -> None:
    played = arguments("--start", "100s", "--time-scale", "8")
    assert traffic.steps(played, 120.0) == ([10.0, 70.0], 15.0)
    played.generate = "code"
    assert traffic.steps(played, 120.0) == ([], 0.0)


def test_a_share_of_a_trace_has_so_many_requests_over_the_same_time() -> None:
    whole, seconds = traffic.traffic(arguments("--time-scale", "8"), 1)
    part, same = traffic.traffic(arguments("--time-scale", "8", "--share", "0.25"), 1)
    assert seconds == same
    assert len(part) == pytest.approx(len(whole) / 4, rel=0.1)
    assert {one.at_s for one in part} <= {one.at_s for one in whole}


def test_reactions_are_told_of_all_rounds_together() -> None:
    line = sizes_of([], held([(0.0, 1)]), 0.0, 1.0, OBJECTIVES)
    runs = [
        slo.SloResult(OURS, seed, SloRun(figures(0, 1.0), line, changes, 0.0, 0.1, 0.5, {}))
        for seed, changes in ((1, [(12.0, 2, 4)]), (2, [(13.0, 2, 4), (33.0, 2, 4)]))
    ]
    (told,) = slo.told_reactions([*runs, slo.SloResult("it", 1, None, "down")], [10.0, 30.0], 5.0)
    assert (
        told == "ours: from a step of load to the order to grow 3.0 s in the median, 3.0 s at the most, in 3 of 4 steps"
    )


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--methods", "ours,best"], "unknown method 'best'"),
        (["--replicas-min", "4"], "--replicas-min 4 has to be below --replicas-max 4"),
        (["--replicas-min", "1"], "have --replicas-min 1; that has to be 2"),
        (["--replicas-max", "5"], "divisor of --replicas-max 5"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        slo.methods_of(arguments(*flags))


def test_one_replica_is_measured_without_copies() -> None:
    assert HORIZONTAL not in slo.methods_of(arguments("--replicas-min", "1", "--methods", "ours,cold-restart"))


def test_a_paced_model_is_labelled_as_a_stand_in_and_another_is_not() -> None:
    label = slo.pace_of(PACED_CONFIG)
    assert "stand-in" in label
    assert "step_us 10000" in label
    assert slo.pace_of(ORACLE_CONFIG) == ""


def test_the_report_has_the_label_the_aims_and_a_warning_where_the_largest_size_is_too_small() -> None:
    def ran(method: str, found: SloFigures) -> slo.SloResult:
        line = sizes_of([], held([(0.0, 1)]), 0.0, 1.0, OBJECTIVES)
        return slo.SloResult(method, 1, SloRun(found, line, [], 0.0, 0.1, 0.5, {}))

    results = [
        ran("static-max", figures(5, 40.0)),
        ran(OURS, figures(2, 30.0)),
        ran("cold-restart", figures(11, 31.0)),
        ran(HORIZONTAL, figures(4, 29.0)),
        slo.SloResult("static-min", 1, None, "it did not come up"),
    ]
    lines = slo.report(results, "paced model: a stand-in")
    assert lines[0] == "paced model: a stand-in"
    text = "\n".join(lines)
    assert "ours beside cold-restart: 0.18 times its violations (aim 0.20), 0.968 times" in text
    assert [line.rpartition(": ")[2] for line in lines if line.startswith("ours beside")] == ["met", "not met"]
    assert "the largest size itself attains 95.00%" in text
    assert "warning" not in "\n".join(slo.report([ran("static-max", figures(1, 40.0))], ""))
    assert msgspec.json.encode(results)


def test_the_machines_time_only_grows() -> None:
    busy, total = machine_times()
    assert 0 < busy < total
    assert machine_times()[1] >= total
