"""`elasticmoe policy`: what the deployment does about its load: see it, set it, and have a decision explained."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

from elasticmoe.cli.admin import Admin, admin_of
from elasticmoe.cli.arguments import WrongUsage, duration, number, whole
from elasticmoe.cli.paths import run_dir_of
from elasticmoe.cli.replay import command as replay
from elasticmoe.cli.terminal import say, say_json
from elasticmoe.common.wording import counted
from elasticmoe.services.scaler.policy.words import REASONS

HELP = "let the load decide the number of replicas, or see what would be decided"

_ACTIONS = {
    "show": "objectives, bounds, mode and the load",
    "set": "change objectives and bounds",
    "advise": "decide and tell, and do nothing (what a new deployment does)",
    "act": "do what is decided",
    "off": "decide nothing",
    "explain": "why the last decision is what it is",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in _ACTIONS.items():
        action = actions.add_parser(name, help=text)
        action.add_argument("--run-dir", metavar="DIR", help="the deployment's run directory")
        if name in ("show", "explain"):
            action.add_argument("--json", action="store_true", help="one JSON object")
        if name == "set":
            _add_fields(action)
    replay.add_arguments(actions.add_parser("replay", help="compare it with others on a trace, without a deployment"))


def _add_fields(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ttft", type=duration, metavar="TIME", help="objective: time to a first token, such as 2s")
    add("--itl", type=duration, metavar="TIME", help="objective: time between tokens, such as 100ms")
    add("--attainment", type=number(most=1.0), metavar="SHARE", help="objective: share of requests that keep both")
    add("--replicas-min", type=whole(1), metavar="N", help="the fewest replicas")
    add("--replicas-max", type=whole(1), metavar="N", help="the most replicas")


_FIELDS = {"ttft": "ttft_s", "itl": "itl_s"}


def run(args: argparse.Namespace) -> int:
    """Exit status 0. Raises ElasticMoEError, WrongUsage."""
    if args.action == "replay":
        return replay.run(args)
    with admin_of(run_dir_of(args.run_dir)) as admin:
        if args.action in ("show", "explain"):
            policy = admin.call("GET", "/v1/policy")
            if args.json:
                say_json(policy)
            else:
                say("\n".join(explained(policy) if args.action == "explain" else shown(policy)))
            return 0
        if args.action == "set":
            names = ("ttft", "itl", "attainment", "replicas_min", "replicas_max")
            given = {_FIELDS.get(name, name): getattr(args, name) for name in names if getattr(args, name) is not None}
            if not given:
                raise WrongUsage("one of --ttft, --itl, --attainment, --replicas-min, --replicas-max is needed")
            least, most = given.get("replicas_min", 0), given.get("replicas_max", math.inf)
            if least > most:
                raise WrongUsage(f"--replicas-min is {least}, above --replicas-max, which is {most}")
        else:
            given = {"mode": args.action}
        say("\n".join(shown(_change(admin, given))))
    return 0


def _change(admin: Admin, given: dict[str, Any]) -> dict[str, Any]:
    """Change these fields of the policy as it is now."""
    now = admin.call("GET", "/v1/policy")
    return admin.call("PUT", "/v1/policy", {"version": now["version"], "policy": now["policy"] | given})


def shown(policy: dict[str, Any]) -> list[str]:
    """The policy in force, as lines."""
    config = policy["policy"]
    lines = [
        f"policy      {config['mode']}, version {policy['version']}",
        f"objectives  first token within {_time(config['ttft_s'])}, then a token within {_time(config['itl_s'])}, "
        f"for {config['attainment']:.2%} of requests",
        f"replicas    {policy['replicas']} now, {policy['target']} wanted, {config['replicas_min']} to "
        f"{config['replicas_max']} allowed",
    ]
    load = policy["load"]
    if load is not None:
        lines.append(f"load        {_load(load)}")
        attained = "nothing has ended lately" if load["attainment"] is None else f"{load['attainment']:.2%}"
        lines.append(f"attainment  {attained}")
    if policy["decision"] is not None:
        lines.append(f"decision    {sentence(policy['decision'])}")
    return lines


def _load(load: dict[str, Any]) -> str:
    parts = [
        "requests unknown" if load["requests_per_s"] is None else f"{load['requests_per_s']:g} requests/s",
        f"{load['queued']} wait",
    ]
    if load["running"] is not None:
        parts.append(f"{load['running']:g} run")
    if load["kv_share"] is not None:
        parts.append(f"KV of the fullest rank {load['kv_share']:.0%} used")
    if load["silent"]:
        parts.append(f"silent: {', '.join(load['silent'])}")
    return ", ".join(parts)


def sentence(decision: dict[str, Any]) -> str:
    """A decision in one sentence."""
    text = REASONS.get(decision["reason"], decision["reason"])
    if decision["target"] is None:
        return f"{text} ({decision['reason']})"
    done = "ordered" if decision["acts"] else "advised" if decision["mode"] == "advise" else "wanted"
    return f"{decision['replicas']} → {counted(decision['target'], 'replica')} {done}: {text} ({decision['reason']})"


def explained(policy: dict[str, Any]) -> list[str]:
    """The last decision with what it rests on, in one screen."""
    decision = policy["decision"]
    if decision is None:
        return [*shown(policy), "nothing has been decided yet"]
    config, evidence = policy["policy"], decision["evidence"]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision["time_unix"]))
    lines = [f"{when}  {sentence(decision)}", ""]
    raw = {name: value for name, value in evidence["raw"].items() if value is not None}
    if raw:
        lines.append("saturation (1: at the objective)")
        lines += [f"  {name:<10}{value:6.2f}" for name, value in sorted(raw.items(), key=lambda part: -part[1])]
    if evidence["smoothed"] is not None:
        lines.append(f"  {'smoothed':<10}{evidence['smoothed']:6.2f}  grows above {evidence['threshold']:.2f}")
    if evidence["demand"] is not None:
        demand = evidence["demand"]
        lines.append(
            f"demand      {demand['requests_per_s']:.2f} requests/s of {demand['prompt_tokens']:.0f} prompt and "
            f"{demand['output_tokens']:.0f} output tokens"
        )
    if evidence["excess_s"]:
        lines.append(f"excess      {evidence['excess_s']:.1f} s of work beyond what this size can do")
    if evidence["forecast_per_s"] is not None:
        lines.append(f"forecast    {evidence['forecast_per_s']:.2f} requests/s in {_time(config['horizon_s'])}")
    if evidence["predicted"] is not None:
        parts = [f"{name} {value:.2f}" for name, value in evidence["predicted"].items() if value is not None]
        lines.append(f"predicted   at {counted(evidence['of_width'], 'replica')}: {', '.join(parts)}")
    if evidence["cost_s"] is not None:
        lines.append(f"price       {evidence['cost_s']:.1f} device-seconds, to save {evidence['saved_s']:.1f}")
    if evidence["silent"]:
        lines.append(f"silent      {', '.join(evidence['silent'])}")
    if decision["target"] is not None and decision["mode"] == "advise":
        lines.append("nothing was done: `elasticmoe policy act` lets it act")
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:g} ms" if seconds < 1 else f"{seconds:g} s"
