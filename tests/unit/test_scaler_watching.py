"""What is told to who looks again and again: rows over time, and what has changed since the last look."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.scaler import RankLoad
from elasticmoe.common.record import FILE_NAME, DeploymentRecord, DownRecord, ProcessRecord, start_ticks, write_record
from elasticmoe.services.scaler.api import views
from elasticmoe.services.scaler.api.now import Board
from elasticmoe.services.scaler.api.series import ROWS_MAX, STEPS_S, Series, row_of
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot, operation_view
from elasticmoe.services.scaler.control.autoscaler import Decided
from elasticmoe.services.scaler.policy.figures import MISSING, UNKNOWN, Signals, Throughput
from elasticmoe.services.scaler.policy.saturation import Saturation
from elasticmoe.services.scaler.policy.state import Evidence, Reason
from tests.unit.deployment_records import record_of
from tests.unit.test_scaler_admin import Listener, snapshot_of
from tests.unit.transitions import DOWN, UP, World, operation_of

PROGRESS_BYTES_MAX = 250  # of each look while an operation is in progress
SIGNALS = Signals(at_s=0.0, admitted_per_s=6.21987, running=4.0, queued=3, ttft_s=MISSING, kv_share_most=UNKNOWN)


def seen(now: float = 0.0, **changes: Any) -> StatusSnapshot:
    signals = msgspec.structs.replace(SIGNALS, at_s=now)
    facts = {"signals": signals, "throughput": Throughput(900.0, UNKNOWN), "saturation": Saturation(ttft=1.25)}
    return snapshot_of(World(UP.before), **{**facts, **changes})


def column(view: views.SeriesView, name: str) -> list[float | None]:
    found: list[float | None] = getattr(view.columns, name)
    return found


def test_a_row_has_every_figure_and_none_that_is_not_known() -> None:
    row = dict(zip(views.SeriesColumns.__struct_fields__[1:], row_of(seen(), 0.0), strict=True))
    assert (row["requests_per_s"], row["running"], row["queued"], row["generated_per_s"]) == (6.22, 4.0, 3.0, 900.0)
    assert (row["serving"], row["replicas"], row["target"], row["ttft_saturation"]) == (1.0, 2.0, 2.0, 1.25)
    assert [row[name] for name in ("ttft_s", "kv_share", "prompt_per_s", "itl_saturation")] == [None] * 4
    old = dict(zip(views.SeriesColumns.__struct_fields__[1:], row_of(seen(), 60.0), strict=True))
    assert (old["running"], old["queued"], old["replicas"]) == (None, None, 2.0)


def test_a_second_has_one_row_and_a_place_goes_on_after_it() -> None:
    series = Series("s")
    for n in range(40):
        series.note(seen(n / 4), n / 4, 1_000 + n / 4)
    first = series.read(1, "")
    assert first.columns.at == list(range(1_000, 1_010))
    assert (first.is_whole, first.is_more) == (True, False)
    assert column(first, "running") == [4] * 10
    assert msgspec.json.encode(first.columns).count(b".0") == 0  # whole numbers are short
    assert series.read(1, first.cursor).columns.at == []
    series.note(seen(20.0), 20.0, 1_020.0)
    later = series.read(1, first.cursor)
    assert (later.columns.at, later.is_whole) == ([1_020], False)  # seconds without anybody have no rows


def test_rows_of_15_seconds_are_means_of_what_was_known() -> None:
    series = Series("s")
    for n in range(46):
        queued = msgspec.structs.replace(SIGNALS, at_s=float(n), queued=n, ttft_s=0.5 if n % 2 else MISSING)
        series.note(seen(signals=queued), float(n), 1_000.0 + n)
    rows = series.read(15, "")
    assert rows.columns.at == [1_015, 1_030, 1_045]
    assert column(rows, "queued") == [7, 22, 37]
    assert column(rows, "ttft_s") == [0.5] * 3


@pytest.mark.parametrize(("step_s", "span_s"), [(60, 4 * 3_600), (360, 86_400)])
def test_a_page_reads_hours_and_a_day_in_one_answer_of_few_rows(step_s: int, span_s: int) -> None:
    series = Series("s")
    for second in range(0, 86_400 + 600, 60):
        series.note(seen(float(second)), float(second), float(second))
    rows = series.read(step_s, "")
    assert (rows.is_more, len(rows.columns.at)) == (False, STEPS_S[step_s])
    assert rows.columns.at[-1] - rows.columns.at[0] == span_s - step_s


def test_it_is_bounded_and_answers_in_parts() -> None:
    series = Series("s")
    snapshot = seen(signals=None)
    for n in range(15 * (ROWS_MAX + 300)):
        series.note(snapshot, float(n), float(n))
    seconds = series.read(1, "s.1.17")  # has fallen out
    assert seconds.is_whole
    assert len(seconds.columns.at) == STEPS_S[1]
    assert seconds.columns.at[-1] == 15 * (ROWS_MAX + 300) - 1
    part = series.read(15, "")
    assert (len(part.columns.at), part.is_more) == (ROWS_MAX, True)
    rest = series.read(15, part.cursor)
    assert (len(rest.columns.at), rest.is_more, rest.is_whole) == (299, False, False)


@pytest.mark.parametrize(
    "place", ["other.1.3", "s.1.", "s.1.-3", "s.1.9e9", "s.1." + "9" * 30, "s.1.٣", "s.15.3", "1", "."]
)
def test_a_place_that_means_nothing_here_is_answered_with_everything(place: str) -> None:
    series = Series("s")
    for n in range(5):
        series.note(seen(n), float(n), float(n))
    view = series.read(1, place)
    assert view.is_whole
    assert len(view.columns.at) == 5
    assert series.read(1, "s.1.99").columns.at == []  # none that has been given out; there is nothing after it


# ---- the board -------------------------------------------------------------------------------------------------------


def load(slot: int, free: int, running: int = 1) -> RankLoad:
    return RankLoad(RankId(slot, 0), "r", running, 0, 0, 0, 0, free, 9, False, None, 1, 1)


def test_only_what_has_changed_is_told_again() -> None:
    board = Board("b")
    world = World(UP.before)
    first = board.read(snapshot_of(world, loads={0: load(0, 3), 1: load(1, 4)}), "")
    assert first.is_whole
    assert [row.device for row in first.devices] == ["host:0", "host:1", "host:2", "host:3"]
    assert [(row.state, row.rank) for row in first.devices[1:3]] == [("used", "r1t0"), ("free", None)]
    assert first.devices[0].experts == 2
    assert [row.slot for row in first.ranks] == [0, 1]
    snapshot = snapshot_of(world, loads={0: load(0, 3), 1: load(1, 5)})
    again = board.read(snapshot, first.cursor)
    assert (again.is_whole, again.devices) == (False, [])
    assert [(row.slot, row.blocks_free) for row in again.ranks] == [(1, 5)]
    assert board.read(snapshot, again.cursor).ranks == []
    other = board.read(snapshot, first.cursor)  # somebody else, who has not seen it yet
    assert [row.slot for row in other.ranks] == [1]


def test_who_does_not_know_what_has_gone_is_told_everything() -> None:
    board = Board("b")
    world = World(UP.before)
    first = board.read(snapshot_of(world, loads={0: load(0, 3), 1: load(1, 4)}), "")
    gone = board.read(snapshot_of(world, loads={0: load(0, 3)}), first.cursor)
    assert gone.is_whole
    assert [row.slot for row in gone.ranks] == [0]
    silent = board.read(StatusSnapshot("starting", "", None, None, None, 0, {}), gone.cursor)
    assert (silent.is_whole, silent.devices, silent.hmm_answers, silent.epoch) == (True, [], None, None)
    assert (silent.pool_answers, silent.replicas, silent.num_devices) == (None, None, None)


@pytest.mark.parametrize("place", ["", "c.1", "b.x", "b.-1", "b." + "9" * 30])
def test_a_place_of_another_board_is_answered_with_everything(place: str) -> None:
    board = Board("b")
    assert board.read(snapshot_of(World(UP.before)), place).is_whole


@pytest.mark.parametrize(("plan", "slot", "state"), [(UP, 2, "joining"), (DOWN, 1, "leaving")])
def test_it_tells_who_joins_and_leaves_as_the_layout_does(plan: Any, slot: int, state: str) -> None:
    world = World(plan.before)
    operation = world.run_to(operation_of(plan), "prepare")
    now = Board("b").read(snapshot_of(world, operation=operation), "")
    assert (now.devices[slot].state, now.operation) == (state, "op")
    assert now.devices[slot].rank == f"r{slot}t0"


def test_how_far_an_operation_is_each_look_tells_in_small() -> None:
    """The same as the operation itself tells, without what it plans."""
    world = World(UP.before)
    operation = world.step(world.run_to(operation_of(UP), "prepare"))
    snapshot = snapshot_of(world, operation=operation)
    told = Board("b").read(snapshot, "").progress
    assert told is not None
    whole = operation_view(operation, snapshot.cluster)
    assert whole.progress is not None
    assert (told.phase, told.leg, told.elapsed_s) == ("prepare", 1, whole.elapsed_s)
    assert (told.hmm_phase, told.bytes_done, told.bytes_total) == (
        whole.progress.hmm_phase,
        whole.progress.bytes_done,
        whole.progress.bytes_total,
    )
    assert told.bytes_total == 1000
    assert (told.bytes_copied, told.sequences_moved) == (whole.figures.bytes_copied, whole.figures.sequences_moved)
    assert len(msgspec.json.encode(told)) < PROGRESS_BYTES_MAX
    level = msgspec.structs.replace(operation_of(None), op_id="level")
    rebalance = Board("b").read(snapshot_of(world, operation=level), "").progress
    assert rebalance is not None
    assert (rebalance.leg, rebalance.hmm_phase, rebalance.bytes_total) == (0, None, 0)  # the HMM's is another one's
    assert Board("b").read(snapshot_of(world), "").progress is None


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    return made


# ---- the routes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[Listener]:
    with closing(Listener(seen())) as listener:
        yield listener


async def test_both_are_read_in_small_answers(listener: Listener) -> None:
    listener.series.note(listener.status_cache.snapshot, 0.0, 1_000.0)
    rows = (await listener.call("GET", "/v1/series")).json()
    assert rows["columns"]["at"] == [1_000]
    assert (await listener.call("GET", f"/v1/series?since={rows['cursor']}")).json()["columns"]["at"] == []
    assert (await listener.call("GET", "/v1/series?step_s=15")).json()["columns"]["at"] == []
    now = (await listener.call("GET", "/v1/now")).json()
    assert (now["replicas"], now["num_devices"], len(now["devices"])) == (2, 4, 4)
    assert (await listener.call("GET", f"/v1/now?since={now['cursor']}")).json()["devices"] == []


# ---- processes -------------------------------------------------------------------------------------------------------


def launched(pid: int) -> DeploymentRecord:
    """By a launcher with that process id."""

    def process(name: str, restarts: int) -> ProcessRecord:
        return ProcessRecord(name, pid, start_ticks(pid) or 1, restarts)

    return record_of(
        launcher=process("launcher", 0),
        processes=(process("hmm", 3), ProcessRecord("pool", pid, 1, 0)),
        down=(DownRecord("router", 1, "it ended", 7.5), DownRecord("scaler", 9, "it ended again", 8.5, True)),
    )


async def test_what_the_launcher_keeps_running_is_told(run_dir: Path) -> None:
    write_record(run_dir, launched(os.getpid()))
    with closing(Listener(seen(), run_dir)) as listener:
        told = (await listener.call("GET", "/v1/processes")).json()
    rows = [
        (one["name"], one["state"], one["restarts"], one["reason"], one["starts_unix"]) for one in told["processes"]
    ]
    assert told["is_known"]
    assert rows == [
        ("launcher", "running", 0, None, None),
        ("hmm", "running", 3, None, None),
        ("pool", "ended", 0, None, None),  # that id is another process's
        ("router", "restarting", 1, "it ended", 7.5),
        ("scaler", "failing", 9, "it ended again", 8.5),
    ]


@pytest.mark.parametrize("written", ["nothing", "of a launcher that has ended", "damaged"])
async def test_where_no_launcher_runs_it_says_so(run_dir: Path, written: str) -> None:
    if written == "damaged":
        (run_dir / FILE_NAME).write_text("{")
    elif written != "nothing":
        write_record(
            run_dir, msgspec.structs.replace(launched(os.getpid()), launcher=ProcessRecord("launcher", os.getpid(), 1))
        )
    with closing(Listener(seen(), run_dir)) as listener:
        told = (await listener.call("GET", "/v1/processes")).json()
    assert (told["is_known"], told["processes"]) == (False, [])
    assert ("damaged" if written == "damaged" else "no launcher runs here") in told["reason"]


@pytest.mark.parametrize(
    "query",
    ["step_s=2", "step_s=", "step_s=1&step_s=1", "since=" + "x" * 201, "from=1", "step_s=1%20"],
)
async def test_a_query_that_means_nothing_is_refused(listener: Listener, query: str) -> None:
    answer = await listener.call("GET", f"/v1/series?{query}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("path", ["/v1/operations", "/v1/decisions"])
async def test_lists_are_as_long_as_they_are_asked_for(listener: Listener, path: str) -> None:
    world = World(UP.before)
    ended = tuple(msgspec.structs.replace(operation_of(None), op_id=f"op-{n}", phase="done") for n in range(5))
    decided = decided_of(5)
    listener.status_cache.snapshot = snapshot_of(world, ended=ended, decided=decided)
    (name,) = (await listener.call("GET", path)).json()
    for query, num in (("", 5), ("?limit=2", 2), ("?limit=200", 5)):
        assert len((await listener.call("GET", path + query)).json()[name]) == num
    for query in ("?limit=0", "?limit=201", "?limit=-1", "?limit=x", "?limit=", "?limit=1&limit=2", "?last=1"):
        assert (await listener.call("GET", path + query)).status_code == 400


def decided_of(num: int) -> tuple[Decided, ...]:
    facts = dict(mode="advise", reason=Reason.STEADY, replicas=2, target=None, op_id=None, supersedes=None, acts=False)
    return tuple(Decided(time_unix=float(n), evidence=Evidence(), **facts) for n in range(num))  # type: ignore[arg-type]
