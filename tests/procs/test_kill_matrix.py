"""kill -9 of any process at any step of a scale operation: afterwards the old layout is in force or the new one, never
something between, within CONVERGE_S (promise P3).

A cell is an operation (`up`: 2 -> 3 replicas, in two legs; `down`: 3 -> 2), a point (common/failpoint.py) at which it
is held, and who is killed meanwhile. `hmm.staged.before/2` is a point in the second leg. Clients stream throughout;
what they get must be exact, and nobody may get an error but where the router is killed, whose own clients' connections
end with it. The ranks of a killed pool serve on, each of them.

By default every third point is taken, once, with victims in turn (some three minutes on two cores); with replicas of
two ranks, points at which their ranks are killed, and one for each service. Every point once, and the whole product
(`-n 2`: an hour on two cores):

    pytest -m "soak or procs" tests/procs/test_kill_matrix.py -k each_point
    pytest -m soak tests/procs/test_kill_matrix.py
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.procs.deployment import Deployment
from tests.procs.elastic import (
    DEVICES,
    STANDBYS,
    Elastic,
    Expected,
    TolerantLoad,
    event_descriptors,
    in_thread,
    start_elastic,
)
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(240)]

MAILBOX_BYTES = 2 << 20  # of a rank on an accelerator: a page there
CONVERGE_S = 30.0
SERVICES = ("scaler", "hmm", "router", "pool")
STAYS, COMES_OR_GOES = "r1t0", "r2t0"
VICTIMS = ("scaler", "hmm", STAYS, "router", COMES_OR_GOES, "pool")
KILLS_MAX, KILLS_WINDOW_S = 4, 60.0  # of one service: the launcher gives a deployment up after five
BODIES: dict[str, dict[str, Any]] = {"up": {"replicas": 3}, "down": {"remove": [2]}}
BACK: dict[str, dict[str, Any]] = {"up": {"remove": [2]}, "down": {"replicas": 3}}
ATTEMPTS = 5
CLIENTS = 6
SHARE = 3  # of the points, one in so many is taken by default
SHARE_OF_TWO = 10  # the same, of those with replicas of two ranks at which a service is killed
LAYOUTS = {"up": ([0, 1], [0, 1, 2]), "down": ([0, 1, 2], [0, 1])}  # before and after
MAY_FAIL = {  # what a request may get that is under way when this victim dies, or comes before it is back
    "router": frozenset({"connection", "not_ready", "shutting_down"}),
}

JOURNAL = [
    f"scaler.leg1.{phase}.{when}"
    for phase in ("prepare", "commit", "migrate", "release")
    for when in ("before", "after")
]
JOURNAL_2 = [
    f"scaler.leg2.{phase}.{when}"
    for phase in ("prepare", "commit", "migrate", "release")
    for when in ("before", "after")
]
ENDED = ["scaler.done.before", "scaler.done.after"]
COMMANDS = [
    f"scaler.{what}.{when}" for what in ("stage", "send_commit", "send_release") for when in ("before", "after")
]
MOVES = ["scaler.move.before", "scaler.move.after"]
JOINS = ["scaler.start_joiner.before", "scaler.start_joiner.after"]
HMM = ["hmm.stage", "hmm.claim"] + [
    f"hmm.{phase}.{when}"
    for phase in ("vacating", "copying", "staged", "committed", "releasing", "released")
    for when in ("before", "after")
]
COMING = ["hmm.copy", "hmm.give_back.before", "hmm.give_back.after"]
EXPERTS = [*COMING, "hmm.kv_grown.before", "hmm.kv_grown.after"]  # where experts leave, KV takes their place
RANK = ["rank.apply@r1t0", "rank.applied@r1t0", "rank.flip.before", "rank.flip.after"]
JOINER = ["rank.attach@r2t0", "rank.warm_up@r2t0", "rank.ready@r2t0"]
HAND_OVER = ["rank.hand_over", "rank.take.before", "rank.take.after"]
MAY_BE_PASSED = ("scaler.leg", *HAND_OVER)

OF_KV = ("hmm.kv_grown", "hmm.vacate")
OF_TWO = {  # points at which ranks of replicas of two are killed
    "up": {
        "r1t1": ["hmm.copying.before", "rank.apply@r1t1", "rank.applied@r1t1", "rank.flip.before", "rank.flip.after"],
        "r2t1": ["rank.attach@r2t1", "rank.warm_up@r2t1", "rank.ready@r2t1", "rank.take.before"],
        "r0t1": ["rank.hand_over", "hmm.kv_grown.before/2", "hmm.releasing.before/2"],
    },
    "down": {
        "r1t1": ["hmm.vacate", "rank.applied@r1t1", "hmm.committed.after"],
        "r1t0": ["hmm.vacate", "rank.take.after"],
        "r2t1": ["rank.hand_over", "rank.flip.before"],
    },
}
AFTER_FLIP = ("scaler.leg1.migrate", "scaler.leg1.release", "scaler.send_release", "scaler.done")
AFTER_FLIP += ("hmm.releas", "hmm.give_back", "hmm.kv_grown")
POINTS = {
    "up": [
        *JOURNAL, *JOURNAL_2, *ENDED, *COMMANDS, *JOINS, *MOVES, *HMM, "hmm.copy", *RANK, *JOINER, *HAND_OVER,
        *(f"{point}/2" for point in (*COMMANDS, *HMM, *EXPERTS, *RANK)),
    ],
    "down": [*JOURNAL, *ENDED, *COMMANDS, *MOVES, *HMM, "hmm.vacate", *COMING, *RANK, *HAND_OVER],
}  # fmt: skip


class Cell(NamedTuple):
    """One entry of the matrix."""

    kind: str
    point: str
    victim: str

    def __str__(self) -> str:
        return "-".join(self)


def applies(cell: Cell) -> bool:
    """Whether the victim is there when the point is reached: who joins, not before; who leaves, until the flip."""
    if cell.victim != COMES_OR_GOES:
        return True
    after_flip = cell.point.startswith(AFTER_FLIP)
    if cell.kind == "down":
        return not after_flip
    return after_flip or cell.point.startswith(("hmm.committed", "rank.flip", "rank.take")) or "2" in cell.point


def all_cells() -> list[Cell]:
    cells = [Cell(kind, point, victim) for kind, points in POINTS.items() for point in points for victim in VICTIMS]
    return [cell for cell in cells if applies(cell)]


def chosen_cells() -> list[Cell]:
    """Each point once, where it is reached in several ways: in turn growing, shrinking, in the second leg of growing;
    victims in turn."""
    victims, ways = cycle(VICTIMS), cycle((("up", ""), ("down", ""), ("up", "/2"), ("down", "")))
    cells: dict[str, Cell] = {}
    for kind in POINTS:
        for point in POINTS[kind]:
            name = point.partition("@")[0].removesuffix("/2").replace("leg2", "leg1")
            if name in cells:
                continue
            way, leg = next(ways)
            place = (way, point + leg) if point + leg in POINTS[way] else (kind, point)
            cells[name] = next(cell for victim in victims if applies(cell := Cell(*place, victim)))
    ups = [cell for cell in cells.values() if cell.kind == "up"]
    downs = [cell for cell in cells.values() if cell.kind == "down"]
    return [cell for pair in zip_longest(ups, downs) for cell in pair if cell is not None]


def cells_of_services() -> list[Cell]:
    """Of the chosen ones those whose victim is a service, each service's together."""
    return [cell for service in SERVICES for cell in chosen_cells() if cell.victim == service]


class Stage:
    """The deployment that cells share, until one breaks it or its launcher would give it up. `settings`: its own."""

    def __init__(self, model: Path, folder: Path, **settings: Any) -> None:
        self._settings = {"rank_restarts_window_s": 0.1, **settings}
        self.expected = Expected(model)
        self._model = model
        self._folder = folder
        self._open = ExitStack()
        self._elastic: Elastic | None = None
        self._kills: list[tuple[str, float]] = []
        self._killed: set[str] = set()  # of this deployment

    def get(self, victim: str, point: str) -> Elastic:
        """A deployment in which `victim` may be killed once more, and that passes by `point`.

        KV grows where experts leave, up to what a device had at the load. An HMM that nobody takes the memory over
        from is followed by one that loads anew: where that was with three replicas, KV has nowhere to grow to.
        """
        recent = [name for name, at in self._kills if time.monotonic() - at < KILLS_WINDOW_S]
        is_loaded_anew = self._elastic is not None and not self._elastic.deployment.takes_over and "hmm" in self._killed
        is_spent = recent.count(victim) >= KILLS_MAX or (is_loaded_anew and point.startswith(OF_KV))
        if self._elastic is None or is_spent:
            self.close()
            started = start_elastic(self._model, self._folder, replicas=2, **self._settings)
            self._elastic = self._open.enter_context(started)
        return self._elastic

    def note_kill(self, victim: str) -> None:
        self._killed.add(victim)
        if victim in SERVICES:
            self._kills.append((victim, time.monotonic()))

    def explain(self) -> str:
        """The logs' ends, for a cell that failed."""
        return self._elastic.deployment.explain() if self._elastic is not None else ""

    def discard(self) -> None:
        """What a failed cell leaves is of no use."""
        elastic, self._elastic, self._open = self._elastic, None, ExitStack()
        self._kills.clear()
        self._killed.clear()
        if elastic is not None:
            elastic.points.forget()  # who is held there could not end
            elastic.deployment.discard()

    def close(self) -> None:
        self._elastic = None
        self._kills.clear()
        self._killed.clear()
        self._open.close()


@pytest.fixture
def _no_leak() -> None:
    """Cells share a deployment, whose `stop` looks for what is left."""


@pytest.fixture(scope="module")
def stage(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(model_folder("oracle"), tmp_path_factory.mktemp("points"))
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def stage_of_two(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """With replicas of two ranks."""
    stage = Stage(model_folder("oracle"), tmp_path_factory.mktemp("points"), tp=2, devices=2 * DEVICES)
    yield stage
    stage.close()


def pid_of(elastic: Elastic, victim: str, held_pid: int, point: str, before: dict[str, int]) -> int:
    """The victim's process id. `before`: of the ranks before the operation; who leaves is in no layout any more once
    that has been committed."""
    if victim in SERVICES:
        return elastic.deployment.pids[victim]
    if point.endswith(f"@{victim}"):
        return held_pid
    if victim in before:
        return before[victim]

    def pid() -> int | None:
        ranks = elastic.deployment.admin("/v1/layout")["ranks"]
        return next((rank["pid"] for rank in ranks if f"r{rank['replica']}t{rank['tp']}" == victim), None)

    found = wait_until(pid, f"{victim} lives", 60.0)
    assert found is not None
    return found


def hold_and_kill(elastic: Elastic, cell: Cell) -> tuple[str, int, dict[str, int]]:
    """Begin the operation, hold it at the cell's point, kill, let go. The op_id, the process id that was killed, and
    those of ranks that lived then."""
    point = cell.point.partition("/")[0]
    for _ in range(ATTEMPTS):
        before = elastic.deployment.rank_pids()
        op_id, held_pid = hold(elastic, cell)
        if held_pid:
            break
        elastic.points.disarm(point)  # the way back passes it too
        elastic.resize(**BACK[cell.kind])
    else:
        raise AssertionError(f"{ATTEMPTS} operations passed {point} by")
    pid = pid_of(elastic, cell.victim, held_pid, point, before)
    os.kill(pid, signal.SIGKILL)
    elastic.points.disarm(point)
    living = before | ({COMES_OR_GOES: held_pid} if point in JOINER else {})
    return op_id, pid, {name: other for name, other in living.items() if other != pid}


def hold(elastic: Elastic, cell: Cell) -> tuple[str, int]:
    """Begin the operation and wait until a process is at the cell's point: its process id. 0 where the operation passed
    by: the journal writes the newest state, and so may leave out one that lasted for a moment only; and streams of a
    rank that leaves may have ended of themselves."""
    points = elastic.points
    point, _, leg = cell.point.partition("/")
    gate = "scaler.leg2.prepare.before"
    points.arm(gate if leg else point)
    op_id = elastic.scale(**BODIES[cell.kind])
    if leg:
        points.wait_hit(gate)
        points.arm(point)
        points.release(gate)

    def is_over() -> bool:
        return elastic.operation(op_id)["phase"] in ("done", "aborted")

    if point.startswith(MAY_BE_PASSED):
        return op_id, points.wait_hit_unless(point, is_over)
    return op_id, points.wait_hit(point)


def unsettled(elastic: Elastic, cell: Cell, op_id: str, killed: int) -> str:
    """What is not yet as it has to be at last; empty when all is."""
    deployment = elastic.deployment
    assert deployment.launcher.poll() is None, "the launcher gave the deployment up"
    if killed in deployment.pids.values():
        return f"{cell.victim} was not started again"
    try:
        status, operation = deployment.admin_call("GET", f"/v1/operations/{op_id}")
        layout, devices = deployment.admin("/v1/layout"), deployment.admin("/v1/devices")
        urls = (f"{deployment.admin_url}/ready", f"{deployment.base_url}/ready")
        ready = [httpx.get(url, timeout=5, trust_env=False).status_code for url in urls]
    except httpx.HTTPError as error:
        return repr(error)
    if status == 503:
        return f"operation: {operation}"
    if status == 404:
        # Nothing had been commanded when the operation's first state was about to be written.
        assert (cell.victim, cell.point) == ("scaler", "scaler.leg1.prepare.before"), "the journal lost the operation"
    elif operation["phase"] not in ("done", "aborted"):
        return f"operation: {operation['phase']}: {operation['reason']}"
    if ready != [200, 200]:
        return f"ready: {ready}"
    ranks = layout["ranks"]
    if killed in {rank["pid"] for rank in ranks}:
        return f"{cell.victim} is not seen to be dead"
    if layout["phase"] != "serving" or layout["operation"] or not all(rank["ready"] for rank in ranks):
        return f"layout: {layout['phase']}: {layout['reason']}"
    replicas = sorted({rank["replica"] for rank in ranks})
    before, after = LAYOUTS[cell.kind]
    assert replicas in (before, after), f"between the layouts: {replicas}"
    if status == 200:
        assert replicas == (after if operation["phase"] == "done" else before), operation
    return _extra(elastic, ranks, devices)


def _extra(elastic: Elastic, ranks: list[dict[str, Any]], devices: dict[str, Any]) -> str:
    """What is held beyond the layout; this goes within moments."""
    used = {rank["device"] for rank in ranks}
    for entry in devices["devices"]:
        memory = entry["memory"]
        counted = memory["weights"] + memory["kv"]  # the ledger is memory of the host
        counted += MAILBOX_BYTES * (entry["device"] in used and not entry["device"].startswith("host:"))
        if bool(entry["attached"]) != (entry["device"] in used):
            return f"{entry['device']}: attached: {entry['attached']}; used: {sorted(used)}"
        if entry["pages"] != counted or bool(counted) != (entry["device"] in used):
            return f"{entry['device']}: {entry['pages']} bytes of pages, {counted} counted, used: {sorted(used)}"
    if devices["standby_processes"] != STANDBYS:
        return f"{devices['standby_processes']} standbys"
    doorbells = event_descriptors(elastic.deployment.pids["keeper"])
    return "" if doorbells == len(ranks) else f"{doorbells} doorbells of {len(ranks)} ranks"


def converge(elastic: Elastic, cell: Cell, op_id: str, killed: int) -> None:
    try:
        wait_until(lambda: not unsettled(elastic, cell, op_id, killed), "converged", CONVERGE_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {unsettled(elastic, cell, op_id, killed)}") from None


async def run_cell(stage: Stage, cell: Cell) -> None:
    elastic = await in_thread(stage.get, cell.victim, cell.point)
    deployment: Deployment = elastic.deployment
    before, _ = LAYOUTS[cell.kind]
    if await in_thread(elastic.replicas) != before:
        await in_thread(elastic.resize, **BACK[cell.kind])
    async with TolerantLoad(deployment.base_url, clients=CLIENTS, seed=7, prompts=12, shortest=60, longest=120) as load:
        await load.wait_begun(CLIENTS)
        stage.note_kill(cell.victim)
        op_id, killed, living = await in_thread(hold_and_kill, elastic, cell)
        await in_thread(converge, elastic, cell, op_id, killed)
        after = await in_thread(deployment.rank_pids)
        if cell.victim != "hmm" or deployment.takes_over:
            kept = {name: after[name] for name in living.keys() & after.keys()}
            assert kept.items() <= living.items(), (living, after)
        await in_thread(elastic.points.clear)
        await in_thread(check_integrity, deployment)
    stage.expected.check(load.streams, MAY_FAIL.get(cell.victim, frozenset()))
    further = {"remove": [2]} if len(await in_thread(elastic.replicas)) == 3 else {"replicas": 3}
    await in_thread(elastic.resize, **further)
    async with TolerantLoad(deployment.base_url, clients=4, seed=7, prompts=12, longest=20) as load:
        await asyncio.sleep(0)  # one request of each client
    assert stage.expected.check(load.streams) > 0
    await in_thread(check_integrity, deployment)


async def check_cell(stage: Stage, cell: Cell) -> None:
    try:
        await run_cell(stage, cell)
    except BaseException:
        print(stage.explain())
        await in_thread(stage.discard)
        raise


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=[pytest.mark.soak] if at % SHARE else []) for at, cell in enumerate(chosen_cells())],
    ids=str,
)
async def test_killed_at_each_point(stage: Stage, cell: Cell) -> None:
    await check_cell(stage, cell)


@pytest.mark.parametrize(
    "cell",
    [
        *(Cell("up", point, "pool") for point in JOINER),
        Cell("up", "rank.take.before", "pool"),
        Cell("down", "hmm.releasing.before", "pool"),
    ],
    ids=str,
)
async def test_the_pool_is_killed_while_a_rank_comes_or_goes(stage: Stage, cell: Cell) -> None:
    await check_cell(stage, cell)


@pytest.mark.parametrize(
    "cell",
    [
        Cell(kind, point, victim)
        for kind, victims in OF_TWO.items()
        for victim, points in victims.items()
        for point in points
    ],
    ids=str,
)
async def test_a_rank_of_two_is_killed(stage_of_two: Stage, cell: Cell) -> None:
    await check_cell(stage_of_two, cell)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=[] if at % SHARE_OF_TWO == 4 else [pytest.mark.soak])  # each service once
        for at, cell in enumerate(cells_of_services())
    ],
    ids=str,
)
async def test_a_service_is_killed_beside_ranks_of_two(stage_of_two: Stage, cell: Cell) -> None:
    await check_cell(stage_of_two, cell)


@pytest.mark.soak
@pytest.mark.parametrize("cell", all_cells(), ids=str)
async def test_whole_matrix(stage: Stage, cell: Cell) -> None:
    await check_cell(stage, cell)
