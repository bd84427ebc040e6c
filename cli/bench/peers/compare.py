"""Rounds over all engines, and the tables that come of them.

In each round every engine is started, warmed up, measured and ended before the next one, because they do not fit into
memory together and some of them spin while they wait; every second round goes through them backwards. What counts are
ratios within a round: machines drift by half within an hour.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import psutil

from elasticmoe.cli.bench.deployment import COMMAND
from elasticmoe.cli.bench.peers.engine import Demand, Engine, Launch
from elasticmoe.cli.bench.peers.environment import Environment, own_variables
from elasticmoe.cli.bench.peers.installation import converted, made
from elasticmoe.cli.bench.peers.interference import Interference, Meter
from elasticmoe.cli.bench.peers.server import PeerServer, free_port
from elasticmoe.cli.bench.recipes import Recipe
from elasticmoe.cli.bench.steady import Figures, figures
from elasticmoe.cli.load.endpoint import Shape
from elasticmoe.cli.settings import importing_environment
from elasticmoe.cli.terminal import say
from elasticmoe.common.config import environment_of

PREFILL = "prefill"
WRONG_LENGTH = "wrong_length"  # an answer that is whole, and has other than the tokens that were asked for
PREFILL_TOKENS, PREFILL_REQUESTS = 1024, 3
_WARM_TOKENS = 8
_TOKENS_UNIT = 256  # engines take their sequences' length in such steps at the least


class Plan(msgspec.Struct, frozen=True):
    """What is measured of each engine. `requests_per_client`: of a client in a round."""

    concurrency: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    requests_per_client: int
    rounds: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the loads, in the order of their measuring."""
        return (*map(str, self.concurrency), PREFILL)

    def demand(self) -> Demand:
        """What a server has to hold for it."""
        tokens = max(self.prompt_tokens + self.output_tokens, PREFILL_TOKENS + 1)
        rounded = -(-(tokens + 1) // _TOKENS_UNIT) * _TOKENS_UNIT  # one more: some end one short of their limit
        return Demand(rounded, max(self.concurrency), tuple(sorted(os.sched_getaffinity(0))))


class Contestant(msgspec.Struct, frozen=True):
    """One row of the tables. `is_ours`: compared with the best of the others. `launch(port, folder)`: the
    server's command, and all of its variables; the empty `folder` is its own until it has ended."""

    title: str
    is_ours: bool
    launch: Callable[[int, Path], tuple[Launch, dict[str, str]]]


class Cell(msgspec.Struct, frozen=True):
    """One load on one engine in one round. `tokens_per_s`: made, or for PREFILL read."""

    tokens_per_s: float
    figures: Figures
    interference: Interference


class Visit(msgspec.Struct, frozen=True):
    """One engine in one round. `argv`: its command. `start_s`: from its start to a first token. `memory_bytes`: after
    all loads."""

    title: str
    is_ours: bool
    round: int
    argv: tuple[str, ...]
    start_s: float
    memory_bytes: int
    cells: dict[str, Cell]


class Failure(msgspec.Struct, frozen=True):
    """One engine that could not be measured in one round, and why."""

    title: str
    round: int
    error: str


def compare(
    checkpoint: Path, engines: Sequence[Engine], ours: Sequence[Recipe], plan: Plan, home: Path
) -> Iterator[Visit | Failure]:
    """Measure them all, `ours` first; each visit is told as soon as it is over.
    Environments are kept under `home`. An engine that cannot be installed has failed in the first round."""
    with ExitStack() as stack:
        contestants = [_ours(checkpoint, recipe) for recipe in ours]
        for engine in engines:
            say(f"{engine.title}: installing it unless it is there, in {home}")
            try:
                environment = stack.enter_context(made(engine, home))
                model = converted(engine, environment, checkpoint)
            except ValueError as error:
                say(str(error))
                yield Failure(engine.title, 0, str(error))
                continue
            contestants.append(_theirs(engine, environment, model, plan.demand()))
        yield from visits(contestants, plan, home)


def _ours(checkpoint: Path, recipe: Recipe) -> Contestant:
    def launch(port: int, folder: Path) -> tuple[Launch, dict[str, str]]:
        size = ("--replicas", str(recipe.replicas), "--tp", str(recipe.tp), "--devices", recipe.devices)
        where = ("--port", str(port), "--admin-port", "0", "--run-dir", str(folder / "run"))
        argv = (*COMMAND, "up", "--model", str(checkpoint), *size, *where)
        return Launch(argv, ready_path="/ready"), importing_environment() | environment_of(dict(recipe.settings))

    return Contestant(f"ElasticMoE, {recipe.name}", True, launch)


def _theirs(engine: Engine, environment: Environment, model: Path, demand: Demand) -> Contestant:
    def launch(port: int, folder: Path) -> tuple[Launch, dict[str, str]]:
        variables = own_variables(environment) | {"TMPDIR": str(folder)}
        return engine.launch(environment, model, port, demand), variables

    return Contestant(engine.title, False, launch)


def visits(contestants: Sequence[Contestant], plan: Plan, logs: Path) -> Iterator[Visit | Failure]:
    """Measure each contestant in each round. One that fails is left out from then on. `logs`: a folder that keeps each
    one's last output."""
    left = list(contestants)
    for number in range(plan.rounds):
        for contestant in left[:] if number % 2 == 0 else left[::-1]:
            try:
                visit = _visit(contestant, plan, number, logs)
            except ValueError as error:
                say(f"round {number + 1} of {plan.rounds}, {error}")
                left.remove(contestant)
                yield Failure(contestant.title, number, str(error))
                continue
            told = ", ".join(f"{column}: {cell.tokens_per_s:.1f}" for column, cell in visit.cells.items())
            say(f"round {number + 1} of {plan.rounds}, {visit.title}: tokens/s {told}")
            yield visit


def _visit(contestant: Contestant, plan: Plan, number: int, logs: Path) -> Visit:
    name = "".join(char if char.isalnum() else "-" for char in contestant.title.lower())
    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        port = free_port()
        launch, variables = contestant.launch(port, Path(folder))
        server = PeerServer(contestant.title, launch, variables, port, logs / f"{name}.log")
        try:
            model, start_s = server.first_token(plan.prompt_tokens)
            shape = Shape(model, plan.prompt_tokens, plan.output_tokens)
            for clients in (2, max(plan.concurrency)):
                warm = server.load(msgspec.structs.replace(shape, output_tokens=_WARM_TOKENS), clients, clients, 0)
                if bad := next((sample.error for sample in warm if sample.error), ""):
                    raise ValueError(f"{server.title}: a first request failed: {bad}")
            cells = {column: _cell(server, shape, column, plan, number) for column in plan.columns}
            memory_bytes = server.memory_bytes()
        finally:
            server.close()
    return Visit(contestant.title, contestant.is_ours, number, launch.argv, start_s, memory_bytes, cells)


def _cell(server: PeerServer, shape: Shape, column: str, plan: Plan, number: int) -> Cell:
    clients, num = (1, PREFILL_REQUESTS) if column == PREFILL else (int(column), int(column) * plan.requests_per_client)
    if column == PREFILL:
        shape = Shape(shape.model, PREFILL_TOKENS, 1)
    own = psutil.Process()
    meter = Meter(lambda: {own, *server.processes()})
    samples = server.load(shape, clients, num, 1 + number * 1_000 + plan.columns.index(column))
    for sample in samples:
        if not sample.error and sample.tokens != shape.output_tokens:
            sample.error = WRONG_LENGTH
    try:
        found = figures(samples, clients)
    except ValueError as error:
        raise ValueError(f"{server.title}, {column}: {error}") from None
    rate = PREFILL_TOKENS * 1e3 / found.ttft_p50_ms if column == PREFILL else found.tokens_per_s
    return Cell(rate, found, meter.read())


def load_rows(found: Sequence[Visit]) -> list[dict[str, Any]]:
    """A row for each load and engine: medians over the rounds, the most that others took of the machine, and the tokens
    per second beside those of the best peer in the same round, where there is one and no request failed."""
    rows = []
    for column in found[0].cells:
        for title in dict.fromkeys(visit.title for visit in found):
            mine = [visit for visit in found if visit.title == title]
            cells = [visit.cells[column] for visit in mine]
            ratios = [ratio for visit in mine if (ratio := _beside(visit, column, found)) is not None]
            rows.append(
                {
                    "load": column,
                    "engine": title,
                    "tokens/s": statistics.median(cell.tokens_per_s for cell in cells),
                    "TTFT p50 ms": statistics.median(cell.figures.ttft_p50_ms for cell in cells),
                    "TPOT p50 ms": statistics.median(cell.figures.tpot_p50_ms for cell in cells),
                    "beside the best peer": f"{statistics.median(ratios):.2f}" if ratios else "",
                    "others' cores": f"{max(cell.interference.others_cores for cell in cells):.2f}",
                    "stolen": f"{max(cell.interference.stolen_cores for cell in cells):.2f}",
                    "failed": sum(cell.figures.failed for cell in cells),
                }
            )
    return rows


def _beside(visit: Visit, column: str, found: Sequence[Visit]) -> float | None:
    peers = [other for other in found if not other.is_ours and other.round == visit.round]
    cells = [other.cells[column] for other in peers if not other.cells[column].figures.failed]
    best = max((cell.tokens_per_s for cell in cells), default=0.0)
    return visit.cells[column].tokens_per_s / best if best and not visit.cells[column].figures.failed else None


def server_rows(found: Sequence[Visit]) -> list[dict[str, Any]]:
    """A row for each engine: medians of its start and its memory."""
    rows = []
    for title in dict.fromkeys(visit.title for visit in found):
        mine = [visit for visit in found if visit.title == title]
        start_s = statistics.median(visit.start_s for visit in mine)
        memory = statistics.median(visit.memory_bytes for visit in mine)
        rows.append({"engine": title, "start to first token s": start_s, "memory GiB (PSS)": memory / 2**30})
    return rows
