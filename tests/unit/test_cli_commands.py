"""The small commands: errors are one line, `chat` reads streams, `status` shows what it finds, `doctor` tells."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from elasticmoe.cli import chat, doctor, status
from elasticmoe.cli.console import PipeConsole, PlainConsole, TerminalConsole, make_console
from elasticmoe.cli.main import COMMANDS, main
from elasticmoe.cli.probes import Probe, Progress
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.record import ProcessRecord, start_ticks, write_record
from tests.procs.waiting import free_port
from tests.unit.deployment_records import record_of


def test_a_wrong_command_line_is_two(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["nonsense"], ["up", "--replicas", "many"], ["up", "--device-memory", "4GB"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
    assert "not a size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (ElasticMoEError("too much", code="limit"), "elasticmoe: limit: too much\n", 1),
        (ZeroDivisionError("a\nb"), "elasticmoe: internal_error: ZeroDivisionError: a b\n", 1),
        (KeyboardInterrupt(), "elasticmoe: interrupted\n", 130),
    ],
)
def test_errors_are_one_line_and_never_a_stack(
    error: BaseException, line: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("elasticmoe.cli.version.run", fail)
    assert main(["version"]) == code
    assert capsys.readouterr().err == line


def test_debug_shows_the_stack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("elasticmoe.cli.version.run", lambda _: 1 // 0)
    assert main(["--debug", "version"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
    assert main(["version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("elasticmoe ")


# ---- chat ------------------------------------------------------------------------------------------------------------


def sse(*events: Any) -> bytes:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def session(handler: Callable[[httpx.Request], httpx.Response], system: str | None = None) -> chat.Session:
    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(handler))
    return chat.Session(client, "m", {"max_tokens": 9}, system)


def test_an_answer_streams_and_the_conversation_grows() -> None:
    bodies = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        content = sse(
            {"choices": [{"delta": {"role": "assistant"}}]}, delta("Hel"), delta("lo"), {"choices": []}, "[DONE]"
        )
        return httpx.Response(200, content=b": comment\n\n" + content)

    talk = session(handler, "be brief")
    assert list(talk.answer("Hi")) == ["Hel", "lo"]
    assert bodies[0]["separate_reasoning"] is False, "thinking is shown"
    assert list(talk.answer("Again")) == ["Hel", "lo"]
    assert bodies[1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Again"},
    ]
    assert (bodies[1]["stream"], bodies[1]["max_tokens"]) == (True, 9)
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be brief"}]


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (httpx.Response(429, json={"error": {"message": "full", "code": "overloaded"}}), "overloaded"),
        (httpx.Response(502, text="<html>"), "http_502"),
        (httpx.Response(200, content=sse({"error": {"message": "gone", "code": "unavailable"}})), "unavailable"),
        (httpx.Response(200, content=sse("{")), "bad_stream"),
        (httpx.Response(200, content=sse(delta("x"))), "bad_stream"),
    ],
)
def test_failures_of_an_answer_have_a_code(response: httpx.Response, code: str) -> None:
    talk = session(lambda _: response)
    with pytest.raises(ElasticMoEError) as failed:
        list(talk.answer("Hi"))
    assert failed.value.code == code


def test_a_question_without_any_answer_is_forgotten_and_a_cut_one_is_kept() -> None:
    talk = session(lambda _: httpx.Response(503, json={"error": {"message": "x"}}))
    with pytest.raises(ElasticMoEError):
        list(talk.answer("Hi"))
    assert talk.messages == []
    talk = session(lambda _: httpx.Response(200, content=sse(delta("one"), delta("two"), "[DONE]")))
    answer = talk.answer("Hi")
    assert next(answer) == "one"
    answer.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": "one"}


def test_the_first_model_is_asked_for() -> None:
    def client(body: Any) -> httpx.Client:
        return httpx.Client(
            base_url="http://s", transport=httpx.MockTransport(lambda _: httpx.Response(200, json=body))
        )

    assert chat.first_model(client({"data": [{"id": "a"}, {"id": "b"}]})) == "a"
    with pytest.raises(ElasticMoEError, match="lists no model"):
        chat.first_model(client({"data": []}))


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["chat", "--url", f"{url}/v1/", "--once", "Hi"]) == 1
    assert capsys.readouterr().err.strip() == (
        f"elasticmoe: unreachable: nothing answers at {url}; start a deployment with `elasticmoe up`"
    )


def test_commands_of_a_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[Any] = ["Hi", "", KeyboardInterrupt(), "/reset", "/what", "Again", "/quit", "never"]

    def read(_: str) -> str:
        line = said.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    talk = session(lambda _: httpx.Response(200, content=sse(delta("a\x1b[31mb"), "[DONE]")))
    assert chat._converse(talk) == 0
    assert said == ["never"]
    assert len(talk.messages) == 2
    out = capsys.readouterr().out
    assert "a[31mb\n" in out  # a model's control characters do not reach the terminal


# ---- status and probes -----------------------------------------------------------------------------------------------

MEMORY = {"budget": 4 << 30, "weights": 1 << 30, "kv": 1 << 20, "other": 4096, "free": 3 << 30}


def running(**parts: Any) -> dict[str, Any]:
    record = record_of(processes=(ProcessRecord("hmm", 2, 2, 3),))
    import msgspec

    deployment = msgspec.to_builtins(record)
    deployment["processes"][0]["alive"] = True
    return {"run_dir": "/r", "running": True, "uptime_s": 61.0, "deployment": deployment, **parts}


def shown(value: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(status.render(value))
    return file.getvalue()


def test_status_shows_all_memory_of_a_device_beside_its_budget_where_a_driver_tells_it() -> None:
    def devices(**more: Any) -> str:
        device = {"device": "cuda:0", "state": "used", "memory": MEMORY | more}
        return shown(running(layout={"error": "-"}, devices={"devices": [device]}, load={"error": "-"}))

    told = devices(total=5 << 30)
    assert "5.00 GiB" in told
    assert "total" in told
    assert "total" not in devices(total=None)


def test_status_shows_what_lies_in_large_pages_where_pages_are_small() -> None:
    def devices(*large: int) -> str:
        listed = [
            {"device": f"host:{n}", "state": "used", "memory": MEMORY, "large_pages": one}
            for n, one in enumerate(large)
        ]
        return shown(running(layout={"error": "-"}, devices={"devices": listed}, load={"error": "-"}))

    told = devices(768 << 20, 0)
    assert "large pages" in told
    assert "768 MiB" in told
    assert "large pages" not in devices(0, 0)


def test_status_names_devices_that_cannot_be_used() -> None:
    def devices(*states: str) -> str:
        listed = [
            {"device": f"cuda:{n}", "state": state, "memory": MEMORY, "failure": "it is lost" if n else ""}
            for n, state in enumerate(states)
        ]
        return shown(running(layout={"error": "-"}, devices={"devices": listed}, load={"error": "-"}))

    told = devices("used", "used", "failed")
    assert "used, failed" in told
    assert "cuda:1 cannot be used: it is lost\ncuda:2 cannot be used: it is lost" in told
    assert "cannot be used" not in devices("used")


def test_status_shows_what_ranks_have_mapped_large_and_compute_by() -> None:
    def ranks(*large: int | None, **more: Any) -> str:
        listed = [{"replica": n, "tp": 0, "slot": n, "mapped_large": one} for n, one in enumerate(large)]
        layout = {"epoch": 1, "phase": "serving", "ranks": listed, **more}
        return shown(running(layout=layout, devices={"error": "-"}, load={"error": "-"}))

    told = ranks(768 << 20, None, computes_by=["host avx2, 1 thread", "host avx512, 1 thread"])
    assert "mapped large" in told
    assert "768 MiB" in told
    assert "computes by host avx2, 1 thread; host avx512, 1 thread" in told
    without = ranks(0, None, computes_by=[])
    assert "mapped large" not in without
    assert "computes by" not in without


def test_status_shows_processes_devices_ranks_and_load() -> None:
    rank = {
        "replica": 0,
        "tp": 0,
        "slot": 0,
        "device": "host:0",
        "pid": 77,
        "ready": True,
        "experts": 12,
        "kv_blocks": 9,
    }
    text = shown(
        running(
            layout={"epoch": 5, "phase": "serving", "ranks": [rank, {**rank, "pid": None, "ready": False}]},
            devices={"standby_processes": 2, "devices": [{"device": "host:0", "state": "used", "memory": MEMORY}]},
            load={"server_load": 4, "limit": 256, "replicas": []},
        )
    )
    for part in (
        "hmm",
        "1 min 1 s",
        "epoch 5",
        "r0t0",
        "ready",
        "empty",
        "4.00 GiB",
        "2 standby",
        "4 in progress, 256 at most",
    ):
        assert part in text, part


def test_status_shows_what_does_not_answer() -> None:
    error = {"error": "does not answer: ConnectError"}
    text = shown(running(layout=error, devices=error, load=error))
    assert text.count("does not answer: ConnectError") == 3


def test_status_of_nothing_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--run-dir", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"run_dir": str(tmp_path), "running": False}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/failure.txt").write_text("child_failed: hmm\n")
    assert main(["status", "--run-dir", str(tmp_path)]) == 1
    assert "the last run failed: child_failed: hmm" in capsys.readouterr().out


def test_status_of_a_living_launcher_survives_dead_listeners(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    me = ProcessRecord("launcher", os.getpid(), start_ticks(os.getpid()) or 0)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    processes = (ProcessRecord("hmm", me.pid, me.start_ticks - 1),)
    ports = {"url": url, "admin_url": url, "port": port, "admin_port": port}
    record = record_of(state="starting", launcher=me, processes=processes, **ports)
    write_record(tmp_path, record)
    assert main(["status", "--run-dir", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["launcher"] == {"pid": os.getpid(), "state": "starting", "since": 0.0}
    assert found["deployment"]["processes"][0]["alive"] is False
    assert found["load"] == {"error": "does not answer: nobody listens there"}
    assert "has no sockets" in found["layout"]["error"]


def test_no_line_of_a_status_that_goes_into_a_pipe_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes no terminal of a pipe
    run_dir = tmp_path / ("a folder with spaces " * 5) / ("x" * 200)
    run_dir.mkdir(parents=True, mode=0o700)
    value = running(layout={"error": "e" * 300}, devices={"devices": []}, load={}) | {"run_dir": str(run_dir)}
    monkeypatch.setattr(status, "collect", lambda _: value)
    assert main(["status", "--run-dir", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(f"run directory {run_dir}") for line in lines) == 1
    assert f"Ranks: {'e' * 300}" in lines
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["status", "--run-dir", str(run_dir)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100, "who says how wide it is gets that"


def probe_of(scaler: httpx.Response | None, router: httpx.Response | None) -> Iterator[Probe]:
    def handler(request: httpx.Request) -> httpx.Response:
        answer = scaler if request.url.port == 2 else router
        if answer is None:
            raise httpx.ConnectError("no")
        return answer

    probe = Probe("http://h:1", "http://h:2")
    probe.close()
    probe._client = httpx.Client(transport=httpx.MockTransport(handler))
    yield probe
    probe.close()


@pytest.mark.parametrize(
    ("scaler", "router", "progress"),
    [
        (None, None, Progress("starting")),
        (httpx.Response(503, text="?"), None, Progress("starting")),
        (
            httpx.Response(503, json={"phase": "loading", "bytes_done": 5, "bytes_total": 9}),
            None,
            Progress("loading", 5, 9),
        ),
        (httpx.Response(200, json={}), None, Progress("waiting for the router")),
        (httpx.Response(200, json={}), httpx.Response(503), Progress("waiting for the router")),
        (httpx.Response(200, json={}), httpx.Response(200), None),
    ],
)
def test_readiness_is_what_both_listeners_say(
    scaler: httpx.Response | None, router: httpx.Response | None, progress: Progress | None
) -> None:
    for probe in probe_of(scaler, router):
        assert probe.progress() == progress


def test_a_scaler_that_gave_up_is_an_error() -> None:
    error = {"code": "rank_crash_loop", "message": "ranks died too often", "retryable": False}
    for probe in probe_of(httpx.Response(503, json={"phase": "failed", "reason": "x", "error": error}), None):
        with pytest.raises(ElasticMoEError, match="too often") as failed:
            probe.progress()
        assert failed.value.code == "rank_crash_loop"


# ---- console ---------------------------------------------------------------------------------------------------------


def test_plain_progress_is_a_line_per_phase_and_quarter() -> None:
    file = io.StringIO()
    console = PlainConsole(file)
    for done in range(0, 1025, 8):
        console.progress("loading", done, 1024)
    console.progress("attaching")
    console.progress("attaching")
    lines = file.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[-1] == "attaching…"


def test_a_terminal_shows_a_bar_and_keeps_the_lines() -> None:
    file = io.StringIO()
    with TerminalConsole(file) as console:
        console.progress("loading", 1, 4)
        console.line("a [bold] line")
        console.progress("loading", 4, 4)
        console.progress("attaching")
    assert "a [bold] line" in file.getvalue()
    assert isinstance(make_console(file), PlainConsole)


def test_a_detached_launcher_reports_until_its_parent_leaves() -> None:
    reader, writer = os.pipe()
    log = io.StringIO()
    console = PipeConsole(writer, log)
    console.line("one")
    console.progress("loading", 1, 2)
    console.finish()
    console.line("two")
    console.finish("not again")
    with open(reader, encoding="utf-8") as pipe:
        entries = [json.loads(line) for line in pipe]
    assert entries == [
        {"line": "one"},
        {"phase": "loading", "done": 1, "total": 2},
        {"ready": True, "error": None},
    ]
    assert "two" in log.getvalue()


def test_a_parent_that_is_gone_does_not_matter() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    console = PipeConsole(writer, io.StringIO())
    console.line("one")
    console.line("two")
    console.finish()


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    for name in ("python", "torch", "native modules", "memfd", "embedded store", "run directory"):
        assert findings[name]["level"] == "ok", findings[name]
    assert all(finding["fix"] for finding in findings.values() if finding["level"] != "ok")


def test_a_failed_check_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(doctor, "CHECKS", (lambda: doctor.Finding("memfd", "fail", "no", "another kernel"),))
    assert main(["doctor"]) == 1
    assert "another kernel" in capsys.readouterr().out


def test_the_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_NATIVE", ("elasticmoe.no_such_module",))
    assert doctor.check_native().level == "fail"
    monkeypatch.setattr(doctor, "_TORCH_BELOW", (2, 12))
    assert doctor.check_torch().fix == "install torch>=2.12,<2.12"

    def missing() -> Path:
        raise Unavailable("no server")

    monkeypatch.setattr(doctor, "server_binary", missing)
    assert (doctor.check_store().level, doctor.check_store().text) == ("warn", "no server")
    monkeypatch.setenv("ELASTICMOE_RUN_DIR", "/" + "x" * 120)
    assert doctor.check_run_dir().level == "fail"


def test_chat_with_a_run_directory_where_nothing_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--run-dir", str(tmp_path), "--once", "Hi"]) == 1
    assert capsys.readouterr().err.startswith(f"elasticmoe: not_running: no deployment runs in {tmp_path}; start one")
