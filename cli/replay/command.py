"""`elasticmoe policy replay`: what policies and a clairvoyant make of the same traffic, in virtual time."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from elasticmoe.cli.arguments import WrongUsage, duration, number, refuse_beside, whole
from elasticmoe.cli.bench.report import NO_PLOT, table
from elasticmoe.cli.paths import absolute, run_dir_of
from elasticmoe.cli.replay import baselines, journal, judge, traffic
from elasticmoe.cli.replay.clairvoyant import clairvoyant
from elasticmoe.cli.replay.model import STEP, Actuation, DeploymentModel
from elasticmoe.cli.replay.plot import plot
from elasticmoe.cli.replay.policies import Fixed, Ours, Scaler
from elasticmoe.cli.replay.simulate import Replayed, simulate
from elasticmoe.cli.terminal import complain, say, say_json
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.scaler.policy.config import PolicyConfig, policy_config
from elasticmoe.services.scaler.policy.step_model import StepModel

REPLICAS_MAX = 8
DELAY_S = 1.0
BASELINE_DELAY_S = 100.0
CLAIRVOYANT = "clairvoyant"
FLAP_LIMITED = f"{CLAIRVOYANT}, at most 1 flap/h"
PICTURES = (".png", ".svg", ".pdf")


class ReplaySetting(NamedTuple):
    """What is the same for all who are compared."""

    model: DeploymentModel
    config: PolicyConfig

    def replay(self, arrivals: list[Arrival], seconds: float, scaler: Scaler, delay_s: float, width: int) -> Replayed:
        """Of one."""
        config = self.config
        actuation = Actuation(delay_s)
        return simulate(arrivals, seconds, scaler, self.model, actuation, width, config.ttft_s, config.itl_s)


class Contender(NamedTuple):
    """Somebody who decides, with an actuation."""

    name: str
    delay_s: float
    run: Callable[[ReplaySetting, list[Arrival], float], Replayed]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `policy replay`."""
    traffic.add_arguments(parser)
    add, config = parser.add_argument, PolicyConfig()
    add("--ttft", type=duration, default=config.ttft_s, metavar="TIME", help="objective: time to a first token (2s)")
    add("--itl", type=duration, default=config.itl_s, metavar="TIME", help="objective: time between tokens (100ms)")
    add("--replicas-min", type=whole(1), default=1, metavar="N", help="the fewest replicas, and the first (1)")
    add("--replicas-max", type=whole(1, 384), default=REPLICAS_MAX, metavar="N", help="the most (8)")
    add("--delay", type=duration, default=DELAY_S, metavar="TIME", help="from an order until replicas serve (1s)")
    model = DeploymentModel()
    add(
        "--baseline-delay",
        type=duration,
        default=BASELINE_DELAY_S,
        metavar="TIME",
        help="the same of those that start replicas from nothing, beside --delay (100s)",
    )
    add(
        "--baselines",
        type=_names,
        metavar="NAME,...",
        help=f"only these of {', '.join(_BASELINES)}; `none` for none of them (all)",
    )
    add(
        "--step",
        type=_step,
        default=STEP,
        metavar="A,B,C,D",
        help=f"seconds of a step, of each token of a prompt, "
        f"of KV, of each sequence in it ({STEP.a:g},{STEP.b:g},{STEP.c:g},{STEP.d:g})",
    )
    add(
        "--step-tokens-max",
        type=whole(1),
        default=model.step_tokens_max,
        metavar="N",
        help=f"tokens of prompts in a step ({model.step_tokens_max})",
    )
    add(
        "--memory-tokens",
        type=whole(1),
        default=model.memory_tokens,
        metavar="N",
        help=f"a replica's memory, in tokens of KV ({model.memory_tokens})",
    )
    add(
        "--expert-tokens",
        type=whole(0),
        default=model.expert_tokens,
        metavar="N",
        help=f"what all experts take of it, which the replicas share ({model.expert_tokens})",
    )
    add("--plot", type=_picture, metavar="FILE", help="draw the first traffic, and the sizes that each wanted for it")
    add("--save", metavar="FILE", help="with --run-dir: keep what the journal has, for --journal")
    add("--json", action="store_true", help="one JSON object instead of a table")


def _picture(text: str) -> Path:
    """The type of a flag: a file of a form that can be drawn."""
    path = absolute(text, "--plot")
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} ends with none of {', '.join(PICTURES)}")
    return path


def _names(text: str) -> tuple[str, ...]:
    """The type of a flag: names of baselines, in whatever case."""
    names = {name.lower(): name for name in _BASELINES}
    asked = [] if text.lower() == "none" else [part.strip() for part in text.split(",")]
    wrong = next((name for name in asked if name.lower() not in names), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{wrong!r} is none of {', '.join(_BASELINES)}, none")
    return tuple(names[name.lower()] for name in asked)


def _step(text: str) -> StepModel:
    """The type of a flag: four numbers."""
    parts = [number()(part) for part in text.split(",")]
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(parts)} numbers; it has to have 4")
    return StepModel(*parts)


Runs = Callable[[ReplaySetting, list[Arrival], float], Replayed]


def contenders(
    setting: ReplaySetting, delay_s: float, baseline_delay_s: float, names: Sequence[str] | None = None
) -> list[Contender]:
    """All, the static ones first; the baselines, or those that are named, with either delay."""
    least, most = setting.config.replicas_min, setting.config.replicas_max

    def fixed(width: int) -> Runs:
        return lambda setting, arrivals, seconds: setting.replay(arrivals, seconds, Fixed(), delay_s, width)

    def ours(setting: ReplaySetting, arrivals: list[Arrival], seconds: float) -> Replayed:
        return setting.replay(arrivals, seconds, Ours(setting.config), delay_s, least)

    def knowing(setting: ReplaySetting, arrivals: list[Arrival], seconds: float) -> Replayed:
        from elasticmoe.cli.replay.foresight import flap_limited  # loads numpy

        config, actuation = setting.config, Actuation(delay_s)
        plain = clairvoyant(arrivals, seconds, setting.model, actuation, least, most, config.ttft_s, config.itl_s)
        other = flap_limited(arrivals, seconds, setting.model, actuation, config, math.inf)
        return min(plain, other, key=lambda run: run.verdict.device_seconds)

    def rarely_turning(setting: ReplaySetting, arrivals: list[Arrival], seconds: float) -> Replayed:
        from elasticmoe.cli.replay.foresight import flap_limited  # loads numpy

        return flap_limited(arrivals, seconds, setting.model, Actuation(delay_s), setting.config)

    return [
        Contender("static minimum", delay_s, fixed(least)),
        Contender("static maximum", delay_s, fixed(most)),
        Contender(CLAIRVOYANT, delay_s, knowing),
        Contender(FLAP_LIMITED, delay_s, rarely_turning),
        Contender("ours", delay_s, ours),
        *(
            Contender(name, each_s, _baseline(make, each_s))
            for each_s in dict.fromkeys((delay_s, baseline_delay_s))
            for name, make in _BASELINES.items()
            if names is None or name in names
        ),
    ]


def _baseline(make: Callable[[ReplaySetting, list[Arrival]], Scaler], delay_s: float) -> Runs:
    def run(setting: ReplaySetting, arrivals: list[Arrival], seconds: float) -> Replayed:
        return setting.replay(arrivals, seconds, make(setting, arrivals), delay_s, setting.config.replicas_min)

    return run


def _bounds(setting: ReplaySetting) -> baselines.Bounds:
    return baselines.Bounds(setting.config.replicas_min, setting.config.replicas_max)


def _hpa(setting: ReplaySetting, _: list[Arrival]) -> Scaler:
    return baselines.HpaOnQueue(_bounds(setting))


def _kpa(setting: ReplaySetting, arrivals: list[Arrival]) -> Scaler:
    return baselines.Kpa(_bounds(setting), baselines.open_target(arrivals, setting.model, setting.config))


def _ray_serve(setting: ReplaySetting, arrivals: list[Arrival]) -> Scaler:
    return baselines.RayServe(_bounds(setting), baselines.open_target(arrivals, setting.model, setting.config))


def _llm_d(setting: ReplaySetting, _: list[Arrival]) -> Scaler:
    return baselines.LlmD(_bounds(setting), setting.config.ttft_s, setting.config.itl_s)


def _dynamo(setting: ReplaySetting, arrivals: list[Arrival]) -> Scaler:
    prompt = baselines.mean_demand(arrivals, 0.0).prompt_tokens
    return baselines.DynamoLoad(_bounds(setting), setting.config.ttft_s, setting.config.itl_s, prompt)


_BASELINES: dict[str, Callable[[ReplaySetting, list[Arrival]], Scaler]] = {
    "HPA on queue": _hpa,
    "KPA": _kpa,
    "Ray Serve": _ray_serve,
    "llm-d": _llm_d,
    "Dynamo load": _dynamo,
}


def run(args: argparse.Namespace) -> int:
    """Returns 0, and 1 where decisions of a journal come out otherwise. Raises ElasticMoEError, WrongUsage."""
    if args.journal is not None or args.run_dir is not None:
        return _journal(args)
    refuse_beside(args, "save", "traffic: it keeps a journal")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(NO_PLOT)
    setting = _setting(args)
    found: dict[tuple[str, float], list[judge.ReplayVerdict]] = {}
    seeds = traffic.seeds_of(args)
    for seed in seeds:
        arrivals, seconds = traffic.traffic(args, seed)
        runs = {}
        for one in contenders(setting, args.delay, args.baseline_delay, args.baselines):
            try:
                replayed = one.run(setting, arrivals, seconds)
            except ValueError as error:
                raise WrongUsage(str(error)) from None
            runs[f"{one.name}, {one.delay_s:g} s"] = replayed
            found.setdefault((one.name, one.delay_s), []).append(replayed.verdict)
        if args.plot is not None and seed == seeds[0]:
            title = f"{args.generate}, seed {seed}" if args.generate else Path(args.trace).name
            _draw(args.plot, title, arrivals, seconds, runs)
    means = {key: judge.mean(verdicts) for key, verdicts in found.items()}
    if args.json:
        say_json(_as_json(args, setting, seeds, found, means))
    else:
        say(table([_row(key, verdict, means) for key, verdict in means.items()]))
    return 0


def _journal(args: argparse.Namespace) -> int:
    """A deployment's decisions made again."""
    for name in ("seed", "seeds", "start", "duration", "plot"):
        refuse_beside(args, name, "--journal and --run-dir, which replay no traffic")
    if args.run_dir is not None:
        records = journal.of_run_dir(run_dir_of(args.run_dir))
        if args.save is not None:
            num_kept = journal.save(absolute(args.save, "--save"), records)
            if num_kept < len(records):
                complain(f"--save: kept: the last {num_kept} of {len(records)} records; more do not fit into a file")
    else:
        refuse_beside(args, "save", "--journal")
        records = journal.of_file(absolute(args.journal, "--journal"))
    return journal.tell(records, as_json=args.json)


def _draw(path: Path, title: str, arrivals: list[Arrival], seconds: float, runs: dict[str, Replayed]) -> None:
    try:
        plot(path, title, arrivals, seconds, runs)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror or error}") from None


def _setting(args: argparse.Namespace) -> ReplaySetting:
    config = policy_config(
        {
            "mode": "act",
            "ttft_s": args.ttft,
            "itl_s": args.itl,
            "replicas_min": args.replicas_min,
            "replicas_max": args.replicas_max,
        }
    )
    try:
        model = DeploymentModel(
            step=args.step,
            step_tokens_max=args.step_tokens_max,
            memory_tokens=args.memory_tokens,
            expert_tokens=args.expert_tokens,
        )
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    return ReplaySetting(model, config)


Means = dict[tuple[str, float], judge.ReplayVerdict]


def _ratio(verdict: judge.ReplayVerdict, means: Means, name: str) -> float:
    """Device-seconds beside those of one of the clairvoyants."""
    return verdict.device_seconds / next(one.device_seconds for (who, _), one in means.items() if who == name)


def _row(key: tuple[str, float], verdict: judge.ReplayVerdict, means: Means) -> dict[str, Any]:
    name, delay_s = key
    return {
        "policy": name,
        "delay, s": f"{delay_s:g}",
        "attainment": f"{verdict.attainment:.2%}",
        "violations": f"{verdict.violations:.0f}",
        "device-seconds": f"{verdict.device_seconds:.0f}",
        "× clairvoyant": f"{_ratio(verdict, means, CLAIRVOYANT):.2f}",
        "× with 1 flap/h": f"{_ratio(verdict, means, FLAP_LIMITED):.2f}",
        "replicas": f"{verdict.mean_replicas:.2f}",
        "operations": f"{verdict.operations:.0f}",
        "flaps/h": f"{verdict.flaps_per_hour:.1f}",
        "TTFT p95, s": "" if verdict.p95_ttft_s is None else f"{verdict.p95_ttft_s:.2f}",
    }


def _as_json(
    args: argparse.Namespace,
    setting: ReplaySetting,
    seeds: list[int],
    found: dict[tuple[str, float], list[judge.ReplayVerdict]],
    means: Means,
) -> dict[str, Any]:
    source = {"profile": args.generate, "seeds": seeds} if args.generate else {"trace": args.trace}
    policies = [
        {
            "policy": key[0],
            "delay_s": key[1],
            "times_clairvoyant": _ratio(verdict, means, CLAIRVOYANT),
            "times_flap_limited": _ratio(verdict, means, FLAP_LIMITED),
            "mean": msgspec.to_builtins(verdict),
            "runs": msgspec.to_builtins(found[key]),
        }
        for key, verdict in means.items()
    ]
    return {
        "source": source,
        "time_scale": args.time_scale,
        "deployment": msgspec.to_builtins(setting.model),
        "policy": msgspec.to_builtins(setting.config),
        "policies": policies,
    }
