"""`status` in terminals of several sizes: what one watches for is seen. `tests/procs/test_status_watch.py` watches."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from elasticmoe.cli.status_view import Fitted, render

SIZES = [(70, 24), (80, 24), (40, 12), (120, 40), (200, 60)]
MEMORY = {"budget": 4 << 30, "weights": 1 << 30, "kv": 256 << 20, "other": 4096, "free": 3 << 30}
SERVICES = ("store", "keeper", "hmm", "pool", "scaler", "router")


def rank(number: int, *, ready: bool = True, state: str = "used") -> dict[str, Any]:
    fields = {"replica": number, "tp": 0, "slot": number, "device": f"host:{number}", "pid": 70_000 + number}
    return fields | {"ready": ready, "state": state, "experts": 120, "kv_blocks": 900}


def status(ranks: int = 3, *, scaling: bool = True, **more: Any) -> dict[str, Any]:
    deployment = {
        "state": "serving",
        "launcher": {"name": "launcher", "pid": 1, "start_ticks": 1, "restarts": 0},
        "processes": [
            {"name": name, "pid": 100 + n, "start_ticks": 1, "restarts": 0, "alive": True}
            for n, name in enumerate(SERVICES)
        ],
        "down": [],
        "model": "/m",
        "served_name": "demo",
        "dtype": "bfloat16",
        "devices": "host:4",
        "url": "http://127.0.0.1:8000",
        "admin_url": "http://127.0.0.1:8100",
        "port": 8000,
        "admin_port": 8100,
        "started_at": 0.0,
    }
    operation = {
        "op_id": "op-0123456789ab",
        "kind": "scale_up",
        "phase": "prepare",
        "outcome": None if scaling else "done",
        "reason": "the HMM copies what the new layout needs",
        "leg": 1,
        "legs": 2,
        "elapsed_s": 0.5,
        "progress": {"bytes_done": 1 << 20, "bytes_total": 64 << 20},
        "figures": {"bytes_copied": 64 << 20, "sequences_moved": 3, "capacity_s": 0.4},
    }
    devices = [{"device": f"host:{n}", "state": "used", "memory": MEMORY} for n in range(ranks)]
    return {
        "run_dir": "/run/user/1000/elasticmoe-1000/default",
        "running": True,
        "uptime_s": 61.0,
        "deployment": deployment,
        "layout": {"epoch": 5, "phase": "serving", "ranks": [rank(n) for n in range(ranks)]},
        "devices": {"standby_processes": 2, "devices": devices},
        "operations": {"operations": [operation]},
        "policy": {
            "version": 1,
            "policy": {"mode": "act", "ttft_s": 2.0, "itl_s": 0.1, "attainment": 0.99},
            "replicas": 2,
            "target": 3,
            "load": {"attainment": 0.985},
        },
        "load": {"server_load": 7, "limit": 256, "epoch": 5, "replicas": []},
        **more,
    }


def fitted(value: dict[str, Any], columns: int, rows: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=columns, height=rows, force_terminal=False).print(Fitted(value))
    return file.getvalue().splitlines()


# ---- what is on the screen -------------------------------------------------------------------------------------------


def test_objectives_attainment_and_target_are_shown() -> None:
    told = "\n".join(fitted(status(), 160, 60))
    assert "Policy (act): 2 replicas, 3 wanted; first token in 2 s, then one in 0.1 s; kept by 98.5% lately" in told
    told = "\n".join(fitted(status(policy={"error": "x"}), 160, 60))
    assert "Policy: x" in told
    off = {"policy": {"mode": "off"}, "replicas": 2, "target": 2, "load": None}
    assert "Policy" not in "\n".join(fitted(status(policy=off), 160, 60))


@pytest.mark.parametrize(("columns", "rows"), SIZES)
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_the_operation_and_the_ranks_are_never_cut_off(columns: int, rows: int, ranks: int) -> None:
    lines = fitted(status(ranks), columns, rows)
    text = " ".join(" ".join(lines).split())
    assert len(lines) <= rows
    assert max(map(len, lines)) <= columns
    assert lines[0].startswith("demo ")
    assert "op-0123456789ab (scale up) prepare (1 of 2)" in text
    assert "1.00 MiB of 64.0 MiB" in text
    assert all(f"r{n}t0" in text for n in range(ranks)) or f"{ranks} ready" in text
    assert "…" not in text, "a cell was cut"


def test_ranks_are_rows_where_there_is_room() -> None:
    text = "\n".join(fitted(status(4), 70, 24))
    assert all(f"r{n}t0" in text for n in range(4))
    assert "Processes: 7 running" in text


def test_many_ranks_are_counted_and_the_odd_ones_named() -> None:
    many = status(62)
    many["layout"]["ranks"] += [rank(62, ready=False, state="joining"), rank(63, ready=False) | {"pid": None}]
    lines = fitted(many, 70, 24)
    assert len(lines) <= 24
    assert "62 ready, 1 joining, 1 empty; r62t0 joining, r63t0 empty" in " ".join(lines)


def test_everything_is_shown_where_there_is_room() -> None:
    text = "\n".join(fitted(status(), 200, 60))
    for part in (
        "router",
        "2 standby processes",
        "7 in progress, 256 at most",
        "/run/user/1000",
        "KV blocks",
        "q leaves",
    ):
        assert part in text, part
    file = io.StringIO()
    Console(file=file, width=80).print(render(status()))
    assert "q leaves" not in file.getvalue()


def test_a_process_that_does_not_stay_up_is_seen_when_folded() -> None:
    value = status()
    value["deployment"]["processes"] = value["deployment"]["processes"][:5]
    down = {"name": "router", "restarts": 4, "reason": "it ended with code 1", "at": 0.0, "is_failing": True}
    value["deployment"]["down"] = [down]
    text = " ".join(fitted(value, 70, 24))
    assert "router does not stay up" in text
    assert "Processes: 6 running, router failing" in text


@pytest.mark.parametrize("part", ["layout", "devices", "operations", "policy", "load"])
def test_a_part_that_does_not_answer_leaves_the_others(part: str) -> None:
    text = " ".join(fitted(status(**{part: {"error": "does not answer: ReadTimeout"}}), 70, 24))
    assert "does not answer: ReadTimeout" in text
    assert "demo" in text


def test_a_finished_operation_is_one_line() -> None:
    text = " ".join(fitted(status(scaling=False), 120, 60))
    assert "Last operation: op-0123456789ab (scale up) done after 0.50 s, capacity after 0.40 s" in text
