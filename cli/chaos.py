"""`elasticmoe chaos`: load, random faults and random resizes on a deployment of its own, and which promises held.

With `--abuse` it runs twice from the same seed: alone, and beside a hostile client. What honest streams lose by that
client, and what the processes hold that it reaches, is in the table too. With `--act` the policy resizes, and the load
comes in bursts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.table import Table

from elasticmoe.cli.arguments import number, whole
from elasticmoe.cli.bench.deployment import Deployment, first_of, settings_of
from elasticmoe.cli.chaos_abuse import GAP_FACTOR_MAX, GIVEN_BACK_MIB, HEALTH_S_MAX, WATCHED, Abuse, abused
from elasticmoe.cli.chaos_act import ITL_S, MODEL, Acted, Acting, draw_bursts
from elasticmoe.cli.chaos_faults import KILL, NOT_NEEDED, draw_faults, draw_resizes
from elasticmoe.cli.chaos_load import BROKEN, HUNG, Clients, Tally
from elasticmoe.cli.chaos_run import AFTER_S, BLAMELESS_S, Run, Seen
from elasticmoe.cli.endings import ends_as_by_ctrl_c
from elasticmoe.cli.terminal import say, show
from elasticmoe.common.devices.names import COUNT_PATTERN, DeviceCount
from elasticmoe.common.protocol.errors import ConfigError, ElasticMoEError
from elasticmoe.common.wording import counted

HELP = "try a deployment: load, random faults, random resizes; tells which promises held"

_READY_S_MAX = 300.0
_FAILURES_TOLD_MAX = 20
_STOP_S_MAX = 60.0
_PAUSE_S_MAX = 5.0  # of a stream, while a process is away that it does not need; on busy cores


class Verdict(NamedTuple):
    """One line of the table. `has_held` None: not tried in this run."""

    promise: str
    what: str
    has_held: bool | None
    figure: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `chaos`."""
    add = parser.add_argument
    add("--minutes", type=number(), default=5.0, metavar="M", help="how long (5)")
    add(
        "--seed",
        type=whole(0),
        metavar="S",
        help="what faults and requests are drawn from (default: a random one)",
    )
    add("--model", metavar="MODEL", help="a model as `up` takes it (oracle; with --act: oracle-paced)")
    add("--replicas", type=whole(1), metavar="N", help="replicas to start with (3; with --act: 1)")
    add("--devices", default="host:5", metavar="host:N", help="devices to use (host:5)")
    add("--tp", type=whole(1), default=1, metavar="N", help="devices per replica (1)")
    add("--clients", type=whole(1), metavar="N", help="requests under way at once (16; with --act: 32, in bursts)")
    add("--fault-every", type=number(), metavar="S", help="mean time between faults in seconds (30; with --act: 20)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--abuse", action="store_true", help="a second run of the same seed beside a hostile client")
    mode.add_argument("--act", action="store_true", help="let the policy decide the size; faults are kills")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when every promise held, 1 when one broke. Raises ElasticMoEError when it could not be tried."""
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    _complete(args)
    is_count = args.devices.startswith("host:") and re.match(COUNT_PATTERN, args.devices)
    needed = args.replicas * args.tp
    if not is_count or (count := DeviceCount.parse(args.devices).count) < needed:
        text = f"devices {args.devices!r}: give host:N with N at least {needed}, --replicas of --tp devices each"
        raise ConfigError(text)
    say(f"seed {seed}: {args.minutes:g} min on {args.devices}, {args.clients} clients")
    try:
        with ends_as_by_ctrl_c():
            verdicts = _judged(args, seed, count)
    except ValueError as error:
        raise ElasticMoEError(f"{error}; seed {seed}", code="chaos_failed") from None
    return 0 if all(verdict.has_held is not False for verdict in verdicts) else 1


def _judged(args: argparse.Namespace, seed: int, count: int) -> list[Verdict]:
    """Try it, and say what held. Raises ValueError."""
    seen, tally, _ = asyncio.run(_run(args, seed, count))
    verdicts = judge(seen, tally)
    _print(verdicts, seen, tally)
    if args.abuse:
        alone = tally
        seen, tally, abuse = asyncio.run(_run(args, seed, count, is_abused=True))
        further = [*judge(seen, tally), *judge_abuse(abuse.without(_router_away(seen)), tally, alone)]
        _print(further, seen, tally, title="what held beside a hostile client")
        verdicts += further
    return verdicts


def _complete(args: argparse.Namespace) -> None:
    """What was not given, by the kind of run."""
    usual = (("model", "oracle", MODEL), ("replicas", 3, 1), ("clients", 16, 32), ("fault_every", 30.0, 20.0))
    for name, plain, acting in usual:
        if getattr(args, name) is None:
            setattr(args, name, acting if args.act else plain)


async def _run(
    args: argparse.Namespace, seed: int, devices: int, *, is_abused: bool = False
) -> tuple[Seen, Tally, Abuse]:
    begun = time.monotonic()

    def tell(text: str) -> None:
        say(f"{time.monotonic() - begun:7.1f} s  {text}")

    settings: dict[str, Any] = {"standbys": 3, "tp": args.tp}
    replicas_max = devices // args.tp
    if args.act:
        settings |= {"policy": "act", "itl_s": ITL_S, "replicas_max": replicas_max}
    settings |= settings_of(args.model)
    deployment = Deployment(args.model, args.replicas, first_of("", devices), **settings)
    try:
        await deployment.ready(_READY_S_MAX)
        clients = Clients(deployment.url, await deployment.served_name(), args.clients, seed)
        await clients.learn()
        seconds = args.minutes * 60.0
        faults = draw_faults(seed, seconds, args.fault_every, only_kills=args.act)
        resizes = [] if args.act else draw_resizes(seed, seconds, replicas_max)
        acting = None
        if args.act:
            acting = Acting(deployment, clients, draw_bursts(seed, seconds, args.clients), replicas_max, tell)
            await acting.begin()
        tell(f"serves; {counted(len(faults), 'fault')} and {counted(len(resizes), 'resize')} follow")
        hostile = abused(deployment, clients.model, seed) if is_abused else contextlib.nullcontext(Abuse())
        async with hostile as abuse:
            seen = await Run(deployment, clients, tell).run(faults, resizes, seconds, args.replicas, acting)
        await deployment.stop(_STOP_S_MAX)
        _tell_failures(deployment, seen, clients.tally, begun, tell)
        return seen, clients.tally, abuse
    finally:
        deployment.remove()


def _tell_failures(deployment: Deployment, seen: Seen, tally: Tally, begun: float, tell: Callable[[str], None]) -> None:
    """When requests failed without an excuse, and what the router complained of."""
    failed = [(at, code) for at, code in tally.errors if _excuse(seen, at, code) is None]
    for at, code in failed[:_FAILURES_TOLD_MAX]:
        tell(f"a request failed at {at - begun:.1f} s: {code}")
    if not failed:
        return
    text = (deployment.run_dir / "logs" / "router.log").read_text(errors="replace")
    for line in [line for line in text.split("\n") if " E router" in line][-_FAILURES_TOLD_MAX:]:
        tell(line)


def judge(seen: Seen, tally: Tally) -> list[Verdict]:
    """What held and what did not."""
    kinds = {fault.target for *_, fault in seen.faults}
    blamed = [(code, target) for at, code in tally.errors if (target := _excuse(seen, at, code)) is None]
    excused = len(tally.errors) - len(blamed)
    hung = tally.by_code()[HUNG]
    falls = [pair for pair in zip(seen.epochs, seen.epochs[1:], strict=False) if pair[1] < pair[0]]
    done = sum(operation["phase"] == "done" for operation in seen.operations)
    codes = ", ".join(f"{code} {count}" for code, count in tally.by_code().most_common()) or "none"
    return [
        Verdict("P1", "every request ended", not hung, f"{tally.good + tally.wrong} answered, {hung} hung"),
        Verdict("P2 P5 P6 P9", "no request failed", not blamed, f"{len(blamed)} failed, {excused} excused ({codes})"),
        Verdict("oracle", "no token was wrong", not tally.wrong, f"{tally.wrong} wrong texts; {tally.tokens} tokens"),
        Verdict(
            "P3",
            "every operation ended",
            not seen.stuck if seen.operations or seen.stuck else None,
            f"{done} done, {len(seen.operations) - done} undone, {len(seen.stuck)} stuck",
        ),
        Verdict(
            "P7", "the epoch never fell", not falls, f"{seen.epochs[0]} to {seen.epochs[-1]}" if seen.epochs else ""
        ),
        Verdict(
            "P5 P6 P7 P9",
            "recovered after every fault",
            not seen.not_recovered if kinds else None,
            f"{counted(len(seen.faults), 'fault')} of {', '.join(sorted(kinds))}; "
            f"not after: {seen.not_recovered or 'none'}",
        ),
        _pauses(seen, tally),
        Verdict("integrity", "memory and blocks are sound", not seen.findings, "; ".join(seen.findings[:3]) or "sound"),
        Verdict("P17", "nothing leaked", not seen.leaks, "; ".join(seen.leaks[:3]) or "as before"),
        *(judge_act(seen.acted) if seen.acted is not None else ()),
    ]


def judge_act(acted: Acted) -> list[Verdict]:
    """Whether the policy kept its bounds and its word."""
    within = [acted.least <= size <= acted.most for size in (*acted.sizes, *acted.targets)]
    ended = Counter(operation["outcome"] or "in progress" for operation in acted.operations)
    up, down = (sum(operation["kind"] == kind for operation in acted.operations) for kind in ("scale_up", "scale_down"))
    waited = "never" if acted.settled_s is None else f"{acted.settled_s:.0f} s after the load"
    return [
        Verdict(
            "policy",
            f"size and target within {acted.least} to {acted.most}",
            all(within) if acted.sizes else None,
            f"sizes {' '.join(map(str, acted.sizes))}",
        ),
        Verdict(
            "policy",
            "every operation of the policy ended",
            not ended["in progress"] if acted.operations else None,
            f"{up} growths, {down} shrinks; " + ", ".join(f"{count} {name}" for name, count in ended.most_common()),
        ),
        Verdict(
            "policy",
            "the size was what the policy wants",
            acted.settled_s is not None,
            f"{waited}: {counted(acted.size, 'replica')}, {acted.reason}",
        ),
    ]


def _router_away(seen: Seen) -> list[tuple[float, float]]:
    """When the router could not answer, for another reason than an attack."""
    return [(begin, end) for begin, end, fault in seen.faults if fault.target == "router"]


def judge_abuse(abuse: Abuse, tally: Tally, alone: Tally) -> list[Verdict]:
    """What a hostile client has cost others. `alone`: the same run without it."""
    longest, before = tally.percentile_gap(100), alone.percentile_gap(100)
    seconds, under_way = abuse.slowest_health()
    over = [
        f"{name} {abuse.peaks[name]:.0f} MiB" for name, most in WATCHED.items() if abuse.peaks.get(name, 0.0) > most
    ]
    kept = {name: abuse.after.get(name, 0.0) - abuse.before.get(name, 0.0) for name in WATCHED}
    peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in sorted(abuse.peaks.items()))
    return [
        Verdict(
            "P26",
            "no attack was an internal error",
            not abuse.failures() if abuse.answers else None,
            f"{sum(abuse.answers.values())} attacks; {'; '.join(abuse.failures()) or 'none'}",
        ),
        Verdict(
            "P26",
            f"pauses within {GAP_FACTOR_MAX:g} x of the run alone",
            longest <= GAP_FACTOR_MAX * before,
            f"{longest * 1e3:.0f} ms beside {before * 1e3:.0f} ms",
        ),
        Verdict(
            "P26",
            f"/health within {HEALTH_S_MAX * 1e3:.0f} ms, but for one probe in a hundred",
            abuse.health_percentile(99) <= HEALTH_S_MAX,
            f"p99 {abuse.health_percentile(99) * 1e3:.0f} ms; longest {seconds * 1e3:.0f} ms "
            f"(beside {', '.join(under_way) or 'none'}); p99 beside the slowest: "
            + ", ".join(f"{name} {waited * 1e3:.0f} ms" for name, waited in [*abuse.health_beside(99).items()][:3]),
        ),
        Verdict("P26", "memory within its limits", not over, f"peaks in MiB: {peaks}"),
        Verdict(
            "P26",
            f"memory given back to within {GIVEN_BACK_MIB} MiB",
            all(mib <= GIVEN_BACK_MIB for mib in kept.values()),
            ", ".join(f"{name} {mib:+.0f} MiB" for name, mib in kept.items()),
        ),
    ]


def _pauses(seen: Seen, tally: Tally) -> Verdict:
    """Whether streams went on while processes were away that serving does not need."""
    now = time.monotonic()
    faults = [(begin, end + AFTER_S) for begin, end, fault in seen.faults if fault.target in NOT_NEEDED]
    pauses = [tally.longest_gap(begin, end, now) for begin, end in faults]
    longest = max(pauses, default=0.0)
    return Verdict(
        "P5 P6",
        "streams went on",
        longest <= _PAUSE_S_MAX if pauses else None,
        f"{longest * 1e3:.0f} ms at most around {len(pauses)} faults of {', '.join(sorted(NOT_NEEDED))}",
    )


def _excuse(seen: Seen, at: float, code: str) -> str | None:
    """The target of the fault that excuses an error: a killed router's own connections break."""
    for begun, recovered, fault in seen.faults:
        is_router = fault.kind == KILL and fault.target == "router"
        if is_router and code == BROKEN and begun <= at <= recovered + BLAMELESS_S:
            return fault.target
    return None


def _print(verdicts: list[Verdict], seen: Seen, tally: Tally, *, title: str = "what held") -> None:
    table = Table("promise", "what", "held", "figures", title=title)
    words = {True: "yes", False: "NO", None: "not tried"}
    for verdict in verdicts:
        table.add_row(verdict.promise, verdict.what, words[verdict.has_held], verdict.figure)
    windows = [(begin, end + AFTER_S) for begin, end, _ in seen.faults]
    calm = [gap for at, gap in tally.gaps if not any(begin <= at and at - gap <= end for begin, end in windows)]
    table.add_row(
        "",
        "pauses of streams",
        "",
        f"p99 {tally.percentile_gap(99) * 1e3:.0f} ms, longest {tally.percentile_gap(100) * 1e3:.0f} ms, "
        f"longest outside of faults {max(calm, default=0.0) * 1e3:.0f} ms",
    )
    show(table)
