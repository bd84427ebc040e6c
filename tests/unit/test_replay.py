"""Replays: our policy, fixed sizes and a clairvoyant on the same traffic, and how they are judged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from elasticmoe.cli import policy
from elasticmoe.cli.arguments import WrongUsage
from elasticmoe.cli.replay.clairvoyant import Planned, clairvoyant, sizes_for
from elasticmoe.cli.replay.command import CLAIRVOYANT, FLAP_LIMITED
from elasticmoe.cli.replay.judge import flaps, judge, mean
from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.policies import Fixed, Ours, Scaler
from elasticmoe.cli.replay.replica import Stream
from elasticmoe.cli.replay.simulate import Replayed, simulate
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.cli.traces.generate import generate
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.state import Reason

MODEL = DeploymentModel()
CONFIG = PolicyConfig(mode="act", replicas_min=1, replicas_max=6)
SECONDS = 240.0


def evenly(rate: float, seconds: float) -> list[Arrival]:
    return [Arrival(at / rate, 800, 150) for at in range(int(rate * seconds))]


def step() -> list[Arrival]:
    """One request per second, fifteen from the 60th second to the 120th."""
    return sorted(
        [*evenly(1.0, SECONDS), *(Arrival(60.0 + at / 14.0, 800, 150) for at in range(840))], key=lambda one: one.at_s
    )


def replay(arrivals: list[Arrival], scaler: Scaler, width: int, delay_s: float = 1.0) -> Replayed:
    return simulate(arrivals, SECONDS, scaler, MODEL, Actuation(delay_s), width, CONFIG.ttft_s, CONFIG.itl_s)


def test_our_policy_grows_for_a_step_of_load_and_the_objectives_are_kept() -> None:
    ours = Ours(CONFIG)
    run = replay(step(), ours, 1)
    grown = [(at, decision) for at, decision in ours.decisions if decision.target is not None and decision.acts]
    at, decision = grown[0]
    assert 60.0 < at <= 66.0
    assert decision.reason in (Reason.GROW_PANIC, Reason.GROW_SATURATED, Reason.GROW_DEMAND)
    assert run.sizes[1][0] == at
    least, most = replay(step(), Fixed(), 1), replay(step(), Fixed(), 6)
    assert run.verdict.attainment >= 0.95 * most.verdict.attainment > least.verdict.attainment
    assert run.verdict.device_seconds < most.verdict.device_seconds


def test_a_replay_is_the_same_each_time() -> None:
    runs, decisions = [], []
    for _ in range(2):
        ours = Ours(CONFIG)
        runs.append(replay(step(), ours, 1))
        decisions.append(ours.decisions)
    assert runs[0] == runs[1]
    assert decisions[0] == decisions[1]


def test_what_the_policy_learns_is_the_model_of_the_plant() -> None:
    ours = Ours(CONFIG)
    replay(step(), ours, 3)
    learned = ours.models.of(3)
    assert learned is not None
    for name in ("a", "b", "c", "d"):
        assert getattr(learned, name) == pytest.approx(getattr(MODEL.step, name), rel=0.01)


def test_a_later_actuation_breaks_more_objectives() -> None:
    soon, late = (replay(step(), Ours(CONFIG), 1, delay_s) for delay_s in (1.0, 60.0))
    assert late.verdict.violations > 2 * soon.verdict.violations


def test_the_clairvoyant_attains_what_the_largest_does_for_less() -> None:
    plan = clairvoyant(step(), SECONDS, MODEL, Actuation(1.0), 1, 6, CONFIG.ttft_s, CONFIG.itl_s)
    most, ours = replay(step(), Fixed(), 6), replay(step(), Ours(CONFIG), 1)
    assert plan.verdict.attainment >= 0.99 * most.verdict.attainment
    assert plan.verdict.device_seconds < 0.6 * most.verdict.device_seconds
    assert plan.verdict.device_seconds <= ours.verdict.device_seconds


def test_a_plan_is_ordered_by_the_actuation_before_it_is_needed() -> None:
    plan = Planned([1, 1, 3, 1])
    assert [plan.wanted(at, 1.0) for at in (0.0, 17.0, 18.0, 29.0, 30.0, 90.0)] == [1, 1, 3, 3, 1, 1]
    assert plan.wanted(0.0, 20.0) == 3


def test_work_that_the_largest_size_cannot_do_waits_for_the_next_interval() -> None:
    assert sizes_for([0.4, 1.6, 0.0], 1.0, 1, 8) == [1, 2, 1]
    assert sizes_for([0.4, 1.6, 0.0], 2.0, 1, 8) == [1, 4, 1]
    assert sizes_for([5.5, 0.5, 0.0, 0.0], 1.0, 1, 3) == [3, 3, 1, 1]


def test_flaps_are_changes_turned_back_within_two_minutes() -> None:
    assert flaps([]) == 0
    assert flaps([(0.0, 1, 2), (10.0, 2, 4)]) == 0
    assert flaps([(0.0, 1, 2), (120.0, 2, 1), (130.0, 1, 2)]) == 2
    assert flaps([(0.0, 1, 2), (121.0, 2, 1)]) == 0


def ended(number: int, first_s: float, ended_s: float) -> Stream:
    stream = Stream(number, Arrival(0.0, 10, 11))
    stream.first_s, stream.ended_s = first_s, ended_s
    return stream


def test_a_request_keeps_both_objectives_or_is_a_violation() -> None:
    streams = [ended(0, 2.0, 3.0), ended(1, 2.1, 3.0), ended(2, 1.0, 2.1)]
    verdict = judge(4, streams, [(5.0, 1, 2)], 50.0, 100.0, 1, 2.0, 0.1)
    assert (verdict.violations, verdict.attainment, verdict.operations) == (3, 0.25, 1)
    assert verdict.mean_replicas == 0.5
    other = judge(4, [], [], 150.0, 100.0, 1, 2.0, 0.1)
    assert mean([verdict, other]).device_seconds == 100.0
    assert mean([verdict, other]).p95_ttft_s == verdict.p95_ttft_s
    with pytest.raises(ValueError, match="without a request"):
        judge(0, [], [], 0.0, 1.0, 1, 2.0, 0.1)


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    policy.add_arguments(parser)
    return policy.run(parser.parse_args(["replay", *argv]))


def test_the_command_tells_the_mean_of_its_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--generate", "conversation", "--duration", "40s", "--seed", "3", "--seeds", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["source"] == {"profile": "conversation", "seeds": [3, 4]}
    names = [one["policy"] for one in told["policies"]]
    assert names[:5] == ["static minimum", "static maximum", CLAIRVOYANT, FLAP_LIMITED, "ours"]
    others = ["HPA on queue", "KPA", "Ray Serve", "llm-d", "Dynamo load"]
    assert names[5:] == 2 * others
    assert [one["delay_s"] for one in told["policies"][5:]] == 5 * [1.0] + 5 * [100.0]
    nums = [len(generate("conversation", seed, 40.0)) for seed in (3, 4)]
    for one in told["policies"]:
        assert [each["num"] for each in one["runs"]] == nums
        assert one["mean"]["num"] == sum(nums) / 2
    largest = told["policies"][1]["mean"]
    assert largest["device_seconds"] == 8 * 40.0
    assert told["policies"][2]["times_clairvoyant"] == told["policies"][3]["times_flap_limited"] == 1.0


def test_only_the_baselines_that_are_named_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("--generate", "step", "--duration", "1m", "--baselines", "kpa, LLM-D", "--baseline-delay", "1s", "--json")
        == 0
    )
    names = [one["policy"] for one in json.loads(capsys.readouterr().out)["policies"]]
    assert names[5:] == ["KPA", "llm-d"]
    with pytest.raises(SystemExit):
        run("--generate", "step", "--baselines", "KPA,nobody")
    assert "'nobody' is none of HPA on queue, KPA, Ray Serve, llm-d, Dynamo load, none" in capsys.readouterr().err


def test_the_command_replays_a_recorded_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    lines = ({"timestamp": 1000 * at, "input_length": 500, "output_length": 20} for at in range(30))
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert run(str(path), "--time-scale", "2", "--replicas-max", "2") == 0
    rows = capsys.readouterr().out.splitlines()
    assert "static minimum" in rows[2]
    assert "100.00%" in rows[2]


def test_the_command_draws_the_first_traffic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "replay.svg"
    assert run("--generate", "step", "--duration", "20s", "--seeds", "2", "--plot", str(picture)) == 0
    drawn = picture.read_text()
    assert drawn.startswith("<?xml")
    assert "ours, 1 s" in drawn
    assert "| ours" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--generate", "step", "--plot", str(tmp_path / "replay.doc"))
    with pytest.raises(ConfigError, match="--plot"):
        run("--generate", "step", "--duration", "5s", "--plot", str(picture / "below.png"))


def test_the_command_refuses_what_cannot_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="--seeds: it has no effect beside TRACE"):
        run(str(tmp_path / "trace.csv"), "--seeds", "2")
    with pytest.raises(WrongUsage, match="leave none for KV"):
        run("--generate", "step", "--memory-tokens", "5", "--expert-tokens", "5")
    with pytest.raises(WrongUsage, match="a replica's KV"):
        run("--generate", "step", "--memory-tokens", "300", "--expert-tokens", "0")
    with pytest.raises(ConfigError, match="replicas_min"):
        run("--generate", "step", "--replicas-min", "9")
    with pytest.raises(ConfigError, match="trace"):
        run(str(tmp_path / "none.csv"))
