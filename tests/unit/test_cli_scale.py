"""The commands that scale: what they ask for, what they show, how they end."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from rich.console import Console

from elasticmoe.cli import events, plan, rebalance, scale, status, status_view
from elasticmoe.cli.admin import Admin
from elasticmoe.cli.console import PlainConsole
from elasticmoe.cli.main import main
from elasticmoe.common.capacity import Sizes
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.scaler.api.requests import parse_scale
from elasticmoe.services.scaler.api.snapshot import operation_view, plan_view
from elasticmoe.services.scaler.control.admission import accept
from elasticmoe.services.scaler.operation.operation import planned_of
from tests.unit.transitions import SIZES, UP, World

Answers = list[tuple[str, str, Any]]


def accepted(op_id: str = "op") -> Any:
    return accept(parse_scale(b'{"replicas": 3}', 600.0), op_id, UP, planned_of(UP, Sizes(100, (10,), (7,))), 5.0)


def as_json(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value))


def views() -> list[dict[str, Any]]:
    """The operation as it is shown in each state, until it is done."""
    world, operation = World(UP.before), accepted()
    found = []
    while not operation.is_finished:
        operation = world.step(operation)
        found.append(as_json(operation_view(operation, world.seen().cluster)))
        world.progress()
    return found


def admin_with(transport: httpx.BaseTransport) -> Admin:
    return Admin(httpx.Client(base_url="http://scaler", transport=transport), "secret", "the socket")


class Server:
    """An admin listener that answers in order, and remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: httpx.Response | Exception) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self._answers = list(answers)
        for module in (scale, plan, rebalance, events):
            monkeypatch.setattr(module, "admin_of", lambda _: self.admin())
        monkeypatch.setattr(scale, "_POLL_S", 0.0)

    def admin(self) -> Admin:
        return admin_with(httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        self.asked.append((request.method, request.url.path, body))
        self.headers.append(request.headers)
        assert request.headers["authorization"] == "Bearer secret"
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def refusal(status_code: int, code: str, message: str) -> httpx.Response:
    detail = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return httpx.Response(status_code, json={"error": detail})


@pytest.mark.parametrize(
    "argv",
    [
        ["plan"],
        ["plan", "--replicas", "2", "--remove", "r1"],
        ["plan", "--replicas", "two"],
        ["scale", "--replicas", "2", "--devices", "host:0"],
    ],
)
def test_a_wrong_command_line_is_two(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


def test_without_a_deployment_there_is_one_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["scale", "--replicas", "2"], ["plan", "--replicas", "2"], ["rebalance"], ["events"]):
        assert main([*argv, "--run-dir", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("elasticmoe: not_running: no deployment runs in ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "target"),
    [
        (["--replicas", "3"], {"replicas": 3}),
        (["--devices", "host:0,host:2", "host:3"], {"devices": ["host:0", "host:2", "host:3"]}),
        (["--remove", "r1"], {"remove": ["r1"]}),
    ],
)
def test_flags_become_the_body(
    flags: list[str], target: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    view = as_json(operation_view(accepted("mine")))
    server = Server(monkeypatch, httpx.Response(202, json=view))
    assert main(["scale", *flags, "--op-id", "mine", "--deadline", "9", "--reason", "more load"]) == 0
    body = target | {"op_id": "mine", "deadline_s": 9.0, "reason": "more load"}
    assert server.asked == [("POST", "/v1/scale", body)]
    assert "operation mine is accepted" in capsys.readouterr().out


def test_every_operation_gets_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    view = as_json(operation_view(accepted()))
    server = Server(monkeypatch, httpx.Response(202, json=view), httpx.Response(202, json=view))
    assert main(["scale", "--replicas", "3"]) == 0
    assert main(["rebalance"]) == 0
    assert all(body["op_id"].startswith("op-") for _, _, body in server.asked)
    assert server.asked[1][:2] == ("POST", "/v1/rebalance")


def test_waiting_shows_the_phases_and_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [httpx.Response(200, json=view) for view in views()]
    # The scaler may restart meanwhile: the operation goes on when it is back.
    server = Server(monkeypatch, answers[0], answers[1], httpx.ConnectError("no"), *answers[2:])
    assert main(["scale", "--replicas", "3", "--wait"]) == 0
    out = capsys.readouterr().out
    for part in ("prepare (1 of 2): 0.98 KiB of 0.98 KiB", "commit (1 of 2)", "release (2 of 2)", "is done after"):
        assert part in out, part
    for part in ("capacity    joined after", "copied      1.95 KiB", "KV blocks   32 → 32", "sequences   1 moved"):
        assert part in out, part
    assert server.asked[1][:2] == ("GET", "/v1/operations/op")


def test_what_an_operation_waits_for_is_told_once_it_takes_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    view = as_json(operation_view(accepted())) | {"phase": "commit", "reason": "the store does not take the journal"}
    waits = [httpx.Response(200, json=view) for _ in range(4)]
    aborted = view | {"outcome": "aborted", "phase": "aborted", "error": {"code": "storage_full", "message": "no room"}}
    Server(monkeypatch, *waits, httpx.Response(200, json=aborted))
    times = iter((0.0, 0.5, 0.5, 1.0, 2.6, 3.0))  # when it was first seen to wait for this, and at each look
    monkeypatch.setattr(scale.time, "monotonic", lambda: next(times))
    assert main(["scale", "--replicas", "3", "--wait"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "commit (1 of 2)…\ncommit (1 of 2): the store does not take the journal…\n"
    assert captured.err == "elasticmoe: storage_full: operation op was undone: no room\n"


def test_an_operation_that_was_undone_is_one_line_and_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"code": "joiner_exited", "message": "rank r2t0 ended", "retryable": True}
    view = as_json(operation_view(accepted())) | {"outcome": "aborted", "phase": "aborted", "error": error}
    Server(monkeypatch, httpx.Response(202, json=view), httpx.Response(202, json=view))
    assert main(["scale", "--replicas", "3", "--wait"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "elasticmoe: joiner_exited: operation op was undone: rank r2t0 ended\n"
    assert main(["scale", "--replicas", "3", "--wait", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "joiner_exited"


def test_ctrl_c_leaves_the_operation_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Server(monkeypatch, httpx.Response(202, json=as_json(operation_view(accepted()))), KeyboardInterrupt())  # type: ignore[arg-type]
    monkeypatch.setattr(scale.time, "sleep", interrupt)
    assert main(["scale", "--replicas", "3", "--wait"]) == 130
    assert "operation op goes on" in capsys.readouterr().err


def interrupt(_: float) -> None:
    raise KeyboardInterrupt


def test_refusals_keep_their_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Server(
        monkeypatch,
        refusal(409, "operation_running", "operation a is in progress"),
        refusal(409, "committed", "too late"),
        httpx.Response(502, text="<html>"),
        httpx.ConnectError("no"),
    )
    for argv, line in (
        (["scale", "--replicas", "3"], "operation_running: operation a is in progress"),
        (["scale", "--cancel", "op"], "committed: too late"),
        (["plan", "--replicas", "3"], "http_502: answered 502"),
        (["rebalance"], "unreachable: the admin listener at the socket does not answer: nobody listens there"),
    ):
        assert main(argv) == 1
        assert capsys.readouterr().err == f"elasticmoe: {line}\n"


def test_a_refusal_that_says_when_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    view = as_json(operation_view(accepted())) | {"outcome": "done", "phase": "done"}
    later = refusal(503, "not_ready", "the journal has not been read")
    later.headers["retry-after"] = "2"
    server = Server(monkeypatch, later, httpx.Response(200, json=view))
    monkeypatch.setattr(scale.time, "sleep", slept.append)
    with PlainConsole(io.StringIO()) as console:
        assert scale._watch(server.admin(), as_json(operation_view(accepted())), console)["outcome"] == "done"
    assert slept == [0.0, 2.0, 0.0]
    final = Server(monkeypatch, refusal(409, "operation_ended", "it has ended"))
    with PlainConsole(io.StringIO()) as console, pytest.raises(ElasticMoEError) as failed:
        scale._watch(final.admin(), as_json(operation_view(accepted())), console)
    assert (failed.value.code, failed.value.retryable) == ("operation_ended", False)


def test_a_plan_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    view = as_json(plan_view(UP, accepted(), SIZES))
    server = Server(monkeypatch, httpx.Response(200, json=view), httpx.Response(200, json=view))
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", "--replicas", "3"]) == 0
    assert server.asked == [("POST", "/v1/scale", {"replicas": 3, "dry_run": True})]
    out = capsys.readouterr().out
    for part in ("scale up: 2 → 3 replicas; r2t0 joins", "host:2", "joins", "0 → 1", "0.50 s in 2 steps", "20 ms"):
        assert part in out, part
    assert main(["plan", "--replicas", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == view
    file = io.StringIO()
    Console(file=file, width=100).print(plan.render({"kind": "none", "legs": []}))
    assert "nothing to do" in file.getvalue()


@pytest.mark.parametrize("wait", [(), ("--wait",)])
def test_a_scale_to_the_same_size_says_so(
    wait: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = {"host:0": {}, "host:1": {}}
    view = {"op_id": "op", "kind": "none", "outcome": None, "planned": {"replicas_after": 2, "devices": devices}}
    server = Server(monkeypatch, httpx.Response(202, json=view))
    assert main(["scale", "--replicas", "2", *wait]) == 0
    assert capsys.readouterr().out == "nothing to do: 2 replicas serve already, on host:0, host:1\n"
    assert len(server.asked) == 1


def test_events_are_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"op_id": "op-1", "phase": "commit", "before": "prepare", "before_s": "0.421", "leg": "1"}
    event = {"kind": "operation_phase", "reason": "copied", "epoch": 2, "time_unix": 0.0, "facts": facts}
    stream = f": events\n\nid: 1-1\nevent: x\ndata: {json.dumps(event)}\n\n: heartbeat\n\ndata: {{\n\n".encode()
    server = Server(
        monkeypatch,
        httpx.Response(200, content=stream),
        httpx.Response(200, content=stream),
        httpx.Response(200, content=stream + b"data: {}\n\n"),
        refusal(429, "too_many_listeners", "16 listeners"),
    )
    assert main(["events"]) == 0
    told = capsys.readouterr().out
    assert told.endswith("  epoch 2  operation op-1: prepare took 0.421 s; now commit, leg 1: copied\n")
    assert server.headers[0]["last-event-id"] == "0", "what has happened comes first"
    assert main(["events", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == event
    assert main(["events", "--no-follow"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1, "it ends where there is nothing more for now"
    assert main(["events"]) == 1
    assert capsys.readouterr().err == "elasticmoe: too_many_listeners: 16 listeners\n"


def rendered(operations: dict[str, Any]) -> str:
    file = io.StringIO()
    console = Console(file=file, width=200)
    for part in status_view._operations(operations):
        if part is not None:
            console.print(part)
    return file.getvalue()


def test_status_shows_the_operation_and_the_last_one() -> None:
    shown = [rendered({"operations": [view]}) for view in views()]
    assert "Operation: op (scale up) prepare (1 of 2)" in shown[0]
    assert any("0.98 KiB of 0.98 KiB" in text for text in shown)
    assert shown[-1].startswith("Last operation: op (scale up) done after")
    assert "1.95 KiB copied, 1 sequence moved" in shown[-1]
    nothing = {**views()[-1], "op_id": "same", "kind": "none"}
    assert rendered({"operations": [nothing, views()[-1]]}) == shown[-1]
    assert rendered({"operations": [nothing]}) == ""
    assert rendered({"operations": []}) == ""
    assert "does not answer" in rendered({"error": "does not answer"})
    assert status._is_scaling({"operations": {"operations": [{"outcome": None}]}})
    assert not status._is_scaling({"operations": {"error": "x"}})


def test_a_lost_scaler_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    Server(monkeypatch)
    monkeypatch.setattr(scale, "_UNREACHABLE_S_MAX", 0.0)

    def lost(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no")

    admin = admin_with(httpx.MockTransport(lost))
    with PlainConsole(io.StringIO()) as console, pytest.raises(ElasticMoEError) as failed:
        scale._watch(admin, as_json(operation_view(accepted())), console)
    assert failed.value.code == "unreachable"


def test_all_have_the_parts_of_a_command() -> None:
    for module in (scale, plan, rebalance, events):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        run: Callable[[argparse.Namespace], int] = module.run
        assert module.HELP
        assert callable(run)
