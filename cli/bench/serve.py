"""`elasticmoe bench serve`: steady state. Tokens per second, TTFT and TPOT at several concurrencies.

For each model and number of replicas a deployment is started, left until its memory lies in large pages, warmed up,
measured and stopped; rounds are interleaved over the concurrencies, because shared machines drift, and the best round
of each is reported beside the median. In turn with these, `--structured` measures the same answers by a grammar that
allows any, so that masks are all that differs, and answers that have to be JSON of a schema, alone and as many of
either kind in the same steps; `--traces` requests that are traced, where nobody asks for it, to a collector, and to one
that is gone.
`--recipes` measures settings beside one another: the deployments of all run at once, take turns in each round, and are
told beside the first. `--peers` compares with other engines instead (see peers).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from elasticmoe.cli.arguments import WrongUsage, refuse_beside, whole, wholes
from elasticmoe.cli.bench.deployment import Running, add_devices, add_tp, first_of, running, wait_settled
from elasticmoe.cli.bench.peers import command as peers
from elasticmoe.cli.bench.peers.engines import ENGINES, engines
from elasticmoe.cli.bench.recipes import Recipe, recipes, sized
from elasticmoe.cli.bench.report import NO_PLOT, add_output, provenance, table, write_raw
from elasticmoe.cli.bench.sink import TRACEPARENT, refusal, sink
from elasticmoe.cli.bench.steady import Figures, figures
from elasticmoe.cli.chat import first_model
from elasticmoe.cli.http import client as http_client
from elasticmoe.cli.load.client import run_clients
from elasticmoe.cli.load.endpoint import Shape
from elasticmoe.cli.terminal import say
from elasticmoe.common.protocol import router as router_messages
from elasticmoe.common.protocol.rank import Watch
from elasticmoe.common.transport import Client, new_identity

Deployments = dict[tuple[Recipe, str], Running]  # by recipe and collector

ANY, MASKED, JSON = "any", "any, masked", "JSON"  # kinds of answers
STATUS_MS = 5_000
_SERIES = ("model", "recipe", "answers", "traced")
_PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "likes": {"enum": ["tea", "coffee"]}},
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
ANYTHING = r"(.|\n)*"
ENDLESS = {"type": "array", "items": _PERSON, "minItems": 10_000}  # so that answers are as long as asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench serve`."""
    parser.add_argument("--models", default="demo,qwen3-moe-1b", help="names or paths, comma-separated")
    parser.add_argument("--replicas", type=wholes, help="numbers of replicas, comma-separated (1,2)")
    parser.add_argument(
        "--recipes",
        type=recipes,
        metavar="RECIPES",
        help="compare settings, in place of --replicas, --tp and --devices: 'NAME: SETTING=VALUE ...; NAME: ...'",
    )
    parser.add_argument("--concurrency", type=wholes, default=(1, 8, 32), help="clients at once, comma-separated")
    parser.add_argument("--prompt-tokens", type=whole(1), default=128, help="tokens of each prompt")
    parser.add_argument("--output-tokens", type=whole(1), default=128, help="tokens of each answer")
    parser.add_argument("--requests-per-client", type=whole(1), default=2, help="requests of a client in a round")
    parser.add_argument(
        "--rounds",
        type=whole(1),
        default=3,
        help="rounds of each, of which the best is told; the median beside --peers",
    )
    parser.add_argument(
        "--structured", action="store_true", help="answers by grammars, too: of any text, and in JSON of a schema"
    )
    parser.add_argument("--traces", action="store_true", help="requests that are traced, too: needs the extra otel")
    parser.add_argument(
        "--peers",
        nargs="?",
        type=engines,
        const=tuple(ENGINES.values()),
        metavar="NAMES",
        help=f"other engines, too, each installed in an environment of its own: {', '.join(ENGINES)} (all of them)",
    )
    add_devices(parser)
    add_tp(parser)
    parser.set_defaults(tp=None)  # so that one that is given beside --recipes is known
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write raw data and the plot; the exit status (1: some request failed). Raises
    WrongUsage."""
    if args.recipes is not None:
        for name in ("replicas", "tp"):
            refuse_beside(args, name, "--recipes")
        if args.devices:
            raise WrongUsage("--devices: it has no effect beside --recipes")
    args.replicas, args.tp = args.replicas or (1, 2), args.tp or 1
    if args.peers is not None:
        for name in ("structured", "traces"):
            refuse_beside(args, name, "--peers")
        if args.devices:
            raise WrongUsage("--devices: it has no effect beside --peers")
        return peers.run(args)
    rows: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    for model in args.models.split(","):
        for compared in _compared(args):
            for row, data in _measure(args, model, compared):
                rows.append(row)
                raw.append(data)
    say(table(rows))
    data = {"provenance": provenance(" ".join(["elasticmoe", *sys.argv[1:]])), "rows": rows, "rounds": raw}
    path = write_raw(args.output, "serve", data)
    _plot(rows, args.output / "serve.png")
    say(f"raw data: {path}")
    return 1 if any(row["failed"] for row in rows) else 0


def _compared(args: argparse.Namespace) -> list[tuple[Recipe, ...]]:
    """Recipes by those that are measured beside one another."""
    if args.recipes is not None:
        return [args.recipes]
    return [(sized(replicas, args.tp, first_of(args.devices, replicas * args.tp)),) for replicas in args.replicas]


class Shares(NamedTuple):
    """Of a step: overhead, and waiting for another rank, of leaders and of followers; the largest of their kind."""

    overhead: float
    waiting: float
    followers_overhead: float = 0.0
    followers_waiting: float = 0.0


Rounds = list[tuple[Figures, Shares]]


class Tracing(NamedTuple):
    """Whether requests are traced. `collector`: of their deployment, as in _tracing."""

    name: str
    collector: str
    traceparent: str


TRACINGS = (
    Tracing("no", "none", ""),
    Tracing("not asked for", "there", ""),
    Tracing("yes", "there", TRACEPARENT),
    Tracing("to nobody", "gone", TRACEPARENT),
)


class Workload(NamedTuple):
    """What is measured of one deployment. `answers`: of which kinds, by as many clients each, in the same steps."""

    concurrency: int
    answers: tuple[str, ...]
    tracing: Tracing

    def name_of(self, answers: str) -> str:
        """One of its kinds, and what is beside it."""
        return " beside ".join([answers, *(other for other in self.answers if other != answers)])


def _kinds(args: argparse.Namespace) -> list[Workload]:
    forms = [(ANY,), (MASKED,), (JSON,), (ANY, JSON)][: 4 if args.structured else 1]
    kinds = itertools.product(args.concurrency, forms, TRACINGS if args.traces else TRACINGS[:1])
    return [kind for kind in map(Workload._make, kinds) if kind.concurrency >= len(kind.answers)]


@contextmanager
def _tracing(collector: str) -> Iterator[dict[str, Any]]:
    """Settings of a deployment without a collector of traces (`none`), or one that traces the requests whose callers
    want it, to a collector that is `there`, or where nobody listens (`gone`)."""
    if collector == "none":
        yield {}
        return
    with sink() if collector == "there" else refusal() as url:
        yield {"otlp_endpoint": url, "trace_ratio": 0.0}


@contextmanager
def _deployments(model: str, compared: Sequence[Recipe], kinds: list[Workload]) -> Iterator[Deployments]:
    """All that the kinds need of each recipe: those that are not measured just now do nothing."""
    with ExitStack() as stack:
        found: Deployments = {}
        for recipe in compared:
            for collector in dict.fromkeys(kind.tracing.collector for kind in kinds):
                settings = dict(recipe.settings) | stack.enter_context(_tracing(collector)) | {"tp": recipe.tp}
                made = running(model, recipe.replicas, devices=recipe.devices, **settings)
                found[recipe, collector] = stack.enter_context(made)
        for deployment in found.values():
            wait_settled(deployment)
        yield found


def _measure(
    args: argparse.Namespace, model: str, compared: Sequence[Recipe]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    kinds = _kinds(args)
    turns = list(itertools.product(kinds, compared))
    results: dict[tuple[Recipe, Workload, str], Rounds] = {
        (recipe, kind, answers): [] for kind, recipe in turns for answers in kind.answers
    }
    with _deployments(model, compared, kinds) as deployments:
        with http_client(next(iter(deployments.values())).url, timeout=10) as client:
            shape = Shape(first_model(client), args.prompt_tokens, args.output_tokens)
        shapes = {
            ANY: shape,
            MASKED: msgspec.structs.replace(shape, structured_outputs={"regex": ANYTHING}),
            JSON: msgspec.structs.replace(shape, structured_outputs={"json": ENDLESS}),
        }
        each_kind = {answers for _, _, answers in results}
        for answers, ((recipe, _), deployment) in itertools.product(each_kind, deployments.items()):
            num = 2 * recipe.replicas
            asyncio.run(run_clients(deployment.url, shapes[answers], num, num, seed=0))
        for turn in range(args.rounds):
            # Nobody is always the first, or behind another.
            for kind, recipe in turns if turn % 2 == 0 else reversed(turns):
                seed, deployment = 1 + turn * 1_000 + kinds.index(kind), deployments[recipe, kind.tracing.collector]
                found = asyncio.run(_run(deployment.url, shapes, kind, args.requests_per_client, seed))
                shares = _shares(deployment.run_dir, recipe.replicas)
                for answers, one in found.items():
                    results[recipe, kind, answers].append((one, shares))
    summaries = []
    for (recipe, kind, answers), rounds in results.items():
        first = results[compared[0], kind, answers] if len(compared) > 1 else None
        summaries.append(_summary(model, recipe, rounds, kind, answers, first))
    return summaries


async def _run(url: str, shapes: dict[str, Shape], kind: Workload, each: int, seed: int) -> dict[str, Figures]:
    """A round: `each` requests of each client, at least two of each kind of answers; figures by that kind."""
    n = kind.concurrency // len(kind.answers)
    parent = kind.tracing.traceparent
    works = (
        run_clients(url, shapes[answers], n, max(n * each, 2), seed + 500 * place, traceparent=parent)
        for place, answers in enumerate(kind.answers)
    )
    found = await asyncio.gather(*works)
    return {answers: figures(samples, n) for answers, samples in zip(kind.answers, found, strict=True)}


def _shares(run_dir: Path, replicas: int) -> Shares:
    """The largest shares over the leaders of replicas, and over the others (see RankStatus), averages over their last
    steps."""
    statuses: list[router_messages.RankStatus] = []
    for replica in range(replicas):
        path = run_dir / "sockets" / f"rank-r{replica}t0.sock"
        client = Client(path, new_identity("bench"), router_messages.CODEC)
        try:
            client.send(Watch())
            received = client.receive(STATUS_MS)
        finally:
            client.close()
        if received is None or not isinstance(received.body, router_messages.RankStatus):
            raise ValueError(f"rank r{replica}t0 sent no status within {STATUS_MS} ms")
        statuses.append(received.body)
    followers = [one for status in statuses for one in status.followers]
    return Shares(
        max(status.share_overhead for status in statuses),
        max(status.share_waiting for status in statuses),
        max((one.overhead for one in followers), default=0.0),
        max((one.waiting for one in followers), default=0.0),
    )


def _summary(
    model: str, recipe: Recipe, rounds: Rounds, kind: Workload, answers: str, first: Rounds | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of the table, and what is kept. `first`: the same rounds of the first recipe, where there are several."""
    found = [item for item, _ in rounds]
    best = max(found, key=lambda item: item.tokens_per_s)
    row = {
        "model": Path(model).name,
        "recipe": recipe.name,
        "concurrency": kind.concurrency,
        "answers": kind.name_of(answers),
        "traced": kind.tracing.name,
        "tokens/s best": best.tokens_per_s,
        "tokens/s median": statistics.median(item.tokens_per_s for item in found),
        **(_beside(rounds, first) if first is not None else {}),
        "TTFT p50 ms": best.ttft_p50_ms,
        "TPOT p50 ms": best.tpot_p50_ms,
        "TPOT p99 ms": best.tpot_p99_ms,
        "overhead %": min(shares.overhead for _, shares in rounds) * 100,
        "waiting %": min(shares.waiting for _, shares in rounds) * 100,
        **(_of_followers([shares for _, shares in rounds]) if recipe.tp > 1 else {}),
        "failed": sum(item.failed for item in found),
    }
    facts = {name: row[name] for name in _SERIES}
    size = {"replicas": recipe.replicas, "tp": recipe.tp, "devices": recipe.devices, "settings": dict(recipe.settings)}
    raw = {**facts, **size, "rounds": [msgspec.to_builtins(item) for item in rounds]}
    return row, raw


def _beside(rounds: Rounds, first: Rounds) -> dict[str, str]:
    ratios = sorted(
        mine.tokens_per_s / theirs.tokens_per_s for (mine, _), (theirs, _) in zip(rounds, first, strict=True)
    )
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "of the first's, median": f"{statistics.median(ratios):.2f}",
        "middle half": f"{low:.2f} to {high:.2f}",
    }


def _of_followers(rounds: list[Shares]) -> dict[str, float]:
    return {
        "followers' overhead %": min(shares.followers_overhead for shares in rounds) * 100,
        "followers' waiting %": min(shares.followers_waiting for shares in rounds) * 100,
    }


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        say(NO_PLOT)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key in sorted({tuple(row[name] for name in _SERIES) for row in rows}):
        mine = [row for row in rows if tuple(row[name] for name in _SERIES) == key]
        axes.plot(
            [r["concurrency"] for r in mine],
            [r["tokens/s best"] for r in mine],
            "o-",
            label=f"{key[0]}, {key[1]}, answers: {key[2]}, traced: {key[3]}",
        )
    axes.set(xlabel="concurrent requests", ylabel="tokens per second", xscale="log", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
