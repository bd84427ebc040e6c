"""`bench serve --peers`: environments, servers, the one in front of OpenVINO, interference and ratios. A toy engine
takes the place of those that are too large to be installed here."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from elasticmoe.cli.arguments import WrongUsage
from elasticmoe.cli.bench import serve
from elasticmoe.cli.bench.peers import interference, llama_cpp, llama_cpp_convert, openvino, vllm
from elasticmoe.cli.bench.peers.compare import (
    PREFILL,
    PREFILL_TOKENS,
    Cell,
    Contestant,
    Failure,
    Plan,
    Visit,
    compare,
    load_rows,
    server_rows,
    visits,
)
from elasticmoe.cli.bench.peers.engine import Demand, Engine, Launch
from elasticmoe.cli.bench.peers.engines import ENGINES, engines
from elasticmoe.cli.bench.peers.environment import Environment, last_line, own_variables
from elasticmoe.cli.bench.peers.installation import converted, made
from elasticmoe.cli.bench.peers.interference import Interference, Meter
from elasticmoe.cli.bench.peers.openvino_server import server as peer_server
from elasticmoe.cli.bench.peers.server import PeerServer
from elasticmoe.cli.bench.peers.shared_memory import FOLDER
from elasticmoe.cli.bench.steady import Figures
from elasticmoe.cli.load.client import run_clients
from elasticmoe.cli.load.endpoint import Shape, endpoint_of
from elasticmoe.cli.load.sample import Sample
from elasticmoe.cli.load.stream import complete
from tests.procs.waiting import free_port, wait_until
from tests.unit.toy_peer import ToyPipeline, batcher_of

PLAN = Plan((1, 3), prompt_tokens=16, output_tokens=5, requests_per_client=2, rounds=2)
ROOT = Path(__file__).parents[2]


def nowhere(*_: Any) -> Launch:
    raise AssertionError("this engine is never started")


# ---- environments


def test_an_engine_is_installed_once_and_anew_where_that_failed(tmp_path: Path) -> None:
    calls: list[str] = []

    def install(environment: Environment) -> None:
        calls.append("install")
        if len(calls) == 1:
            environment.run(environment.python, "-c", "import sys; print('\\x1b[1mno room'); sys.exit(3)")
        environment.run(environment.python, "-c", "import sys; sys.exit(sys.prefix == sys.base_prefix)")
        (environment.packages / "its_own").mkdir()

    engine = Engine("toy", "Toy 1", (), nowhere, install=install)
    with pytest.raises(ValueError, match=r"^Toy 1: .*python: .*no room \(exit status 3; see .*install.log\)") as caught:
        with made(engine, tmp_path):
            pass
    assert "\x1b" not in str(caught.value)
    for _ in range(2):
        with made(engine, tmp_path) as environment:
            environment.run(environment.python, "-c", "import its_own")
    assert calls == ["install"] * 2
    with open(tmp_path / "toy.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Toy 1: another process uses "), made(engine, tmp_path):
            pass


def test_a_checkpoint_is_converted_once_as_long_as_it_stays_as_it_is(tmp_path: Path) -> None:
    checkpoint, environment = tmp_path / "model", Environment(tmp_path / "environment")
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    calls: list[Path] = []

    def convert(of: Environment, source: Path, folder: Path) -> None:
        calls.append(folder)
        assert (of, source, list(folder.iterdir())) == (environment, checkpoint, [])
        (folder / "its.own").write_text("1")
        if len(calls) == 1:
            raise ValueError("no room")

    engine = Engine("toy", "Toy 1", (), nowhere, convert=convert)
    with pytest.raises(ValueError, match="no room"):
        converted(engine, environment, checkpoint)
    first = converted(engine, environment, checkpoint)
    assert converted(engine, environment, checkpoint) == first
    assert ((first / "its.own").read_text(), len(calls)) == ("1", 2)
    (checkpoint / "config.json").write_text("{ }")
    assert converted(engine, environment, checkpoint) != first
    assert converted(msgspec.structs.replace(engine, convert=None), environment, checkpoint) == checkpoint


def test_a_program_of_an_environment_sees_none_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    variables = own_variables(Environment(tmp_path))
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(variables)
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["PATH"].split(":")[0] == str(tmp_path / "bin")


def test_a_command_that_takes_too_long_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ToldFirst(subprocess.Popen[bytes]):
        """Its time begins when it has told of the process that is to be ended with it."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                log = tmp_path / "install.log"
                wait_until(lambda: len(log.read_text().splitlines()) > 1, "it has told", 60.0)
            return super().wait(timeout)

    monkeypatch.setattr("elasticmoe.cli.bench.peers.environment.subprocess.Popen", ToldFirst)
    monkeypatch.setattr("elasticmoe.cli.bench.peers.environment.INSTALL_S_MAX", 0.2)
    code = "import subprocess, sys; print(p := subprocess.Popen(['sleep', '600']), p.pid, flush=True); p.wait()"
    with pytest.raises(ValueError, match=rf"{sys.executable}: took over 0.2 s; see {tmp_path}/install.log"):
        Environment(tmp_path).run(sys.executable, "-c", code)
    left = int((tmp_path / "install.log").read_text().split()[-1])
    stat = Path(f"/proc/{left}/stat")
    wait_until(lambda: ") Z " in read_or_nothing(stat), "it has ended")


def read_or_nothing(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ") Z "  # it has ended, and its parent knows


def test_engines_are_named_each_once() -> None:
    assert engines("openvino, vllm,openvino") == (ENGINES["openvino"], ENGINES["vllm"])
    with pytest.raises(argparse.ArgumentTypeError, match=r"'sglang' is none of vllm, llama.cpp, openvino"):
        engines("vllm,sglang")


def test_each_engine_gets_the_port_the_length_and_the_cores(tmp_path: Path) -> None:
    demand = Demand(2048, 32, (0, 3))
    for engine in (vllm.ENGINE, llama_cpp.ENGINE, openvino.ENGINE):
        launch = engine.launch(Environment(tmp_path), tmp_path / "model", 4321, demand)
        assert Path(launch.argv[0]).is_absolute()
        assert {"4321", "32"} <= set(launch.argv), engine.title
        assert any(word.startswith(str(tmp_path / "model")) for word in launch.argv), engine.title
        assert all("==" in requirement for requirement in engine.requirements), "a version may not change by itself"
    assert vllm.launch(Environment(tmp_path), tmp_path, 1, demand).environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,3"


def test_other_flags_have_no_effect_beside_it() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert parser.parse_args(["--peers"]).peers == tuple(ENGINES.values())
    for word in ("--structured", "--traces", "--devices=npu:0"):
        with pytest.raises(WrongUsage, match=rf"{word.partition('=')[0]}: it has no effect beside --peers"):
            serve.run(parser.parse_args(["--peers", "vllm", word]))


def test_an_unknown_pre_tokenizer_is_another_one_s() -> None:
    class Known:
        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            if tokenizer is None:
                raise NotImplementedError
            return "llama-bpe"

        def get_vocab_base(self) -> tuple[list[str], list[int], str]:
            return ["a", "ÃŃ", "Ã", "[c3]", "Ġ", "<|end|>", "日"], [1] * 7, "llama-bpe"

    llama_cpp_convert.tolerate(Known)
    llama_cpp_convert.name_parts(Known)
    names, types, _ = Known().get_vocab_base()
    assert (names, types) == (["a", "ÃŃ", "[c3]]", "[c3]", "Ġ", "<|end|>", "日"], [1] * 7), "parts of characters"
    assert (Known().get_vocab_base_pre(1), Known().get_vocab_base_pre(None)) == ("llama-bpe", "qwen2")


# ---- the server in front of OpenVINO


@pytest.fixture
def toy() -> Iterator[tuple[str, ToyPipeline]]:
    pipeline = ToyPipeline()
    batcher = batcher_of(pipeline)
    listener = peer_server(batcher, 0)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listener.server_address[1]}", pipeline
    listener.shutdown()
    thread.join()
    listener.server_close()
    batcher.close()


def test_streams_come_whole_and_together(toy: tuple[str, ToyPipeline]) -> None:
    url, pipeline = toy
    samples = asyncio.run(run_clients(url, Shape("model", 16, 20), 8, 24, seed=3))
    assert [(sample.error, sample.tokens, len(sample.arrivals)) for sample in samples] == [("", 20, 21)] * 24
    pipeline.together = 2  # else the first could be over before the second one comes
    samples = asyncio.run(run_clients(url, Shape("model", 16, 20), 2, 2, seed=3))
    assert ([sample.tokens for sample in samples], pipeline.most > 1) == ([20, 20], True)
    assert httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] == "model"
    assert [httpx.get(f"{url}{path}", timeout=60).status_code for path in ("/health", "/nothing")] == [200, 404]


def test_what_fails_is_told_to_its_clients_and_the_next_are_served(toy: tuple[str, ToyPipeline]) -> None:
    url, _ = toy

    def ask(*prompt: int) -> Sample:
        endpoint, sample = endpoint_of(url), Sample()
        asyncio.run(complete(endpoint, endpoint.request(Shape("model", 1, 3), prompt), sample))
        return sample

    for first in (1, 2, 3):
        assert ask(first, 20).error == "engine_failed"
        assert (ask(20).error, ask(20).tokens) == ("", 3)
    for body in (b"", b"{}", b'{"prompt": "text", "max_tokens": 1}', b'{"prompt": [], "max_tokens": 1}', b"[]"):
        answer = httpx.post(f"{url}/v1/completions", content=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request"), body


# ---- servers


def toy_contestant(title: str, seen: list[str] | None = None) -> Contestant:
    def launch(port: int, folder: Path) -> tuple[Launch, dict[str, str]]:
        assert not list(folder.iterdir())
        if seen is not None:
            seen.append(title)
        argv = (sys.executable, "-m", "tests.unit.toy_peer", str(port))
        return Launch(argv, {"MARK": title}), dict(os.environ) | {"PYTHONPATH": str(ROOT)}

    return Contestant(title, False, launch)


@pytest.fixture(autouse=True)
def on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other test takes the port that a server is given, and a server may stand still."""
    monkeypatch.setattr("elasticmoe.cli.bench.peers.compare.free_port", free_port)
    monkeypatch.setattr("elasticmoe.cli.bench.peers.server._ANSWER_S", 60.0)


@contextmanager
def started(tmp_path: Path, launch: Launch, port: int) -> Iterator[PeerServer]:
    variables = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    with closing(PeerServer("Toy 1", launch, variables, port, tmp_path / "output")) as server:
        yield server


def test_a_server_is_measured_and_leaves_no_process(tmp_path: Path) -> None:
    port = free_port()
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"import runpy; sys.argv[1:] = ['{port}']; runpy.run_module('tests.unit.toy_peer', run_name='__main__')"
    )
    with started(tmp_path, Launch((sys.executable, "-c", code)), port) as server:
        model, start_s = server.first_token(16)
        processes = server.processes()
        assert (model, len(processes)) == ("model", 2)
        assert 0 < start_s < 60
        assert server.memory_bytes() > 2 << 20
    server.close()  # again
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_a_server_that_ends_or_refuses_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "import sys; print('loading', flush=True); print('no such instruction', file=sys.stderr); sys.exit(7)"
    with started(tmp_path, Launch((sys.executable, "-c", words)), free_port()) as server:
        with pytest.raises(ValueError, match=r"Toy 1: it ended: no such instruction \(see .*output\)"):
            server.first_token(16)
        with pytest.raises(ValueError, match=r"Toy 1: it takes no connection \(.*\): no such instruction"):
            server.load(Shape("model", 16, 1), 1, 1, 0)
    monkeypatch.setattr("elasticmoe.cli.bench.peers.server.START_S_MAX", 0.2)
    code = "import time; time.sleep(600)"
    with started(tmp_path, Launch((sys.executable, "-c", code)), free_port()) as silent:
        with pytest.raises(ValueError, match=r"Toy 1: it was not ready within 0.2 s: it printed nothing"):
            silent.first_token(16)


def test_last_words_are_fit_for_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"first\n\x1b[31mred \xff\n\n")
    assert "\x1b" not in last_line(tmp_path / "log")
    assert "red" in last_line(tmp_path / "log")


def test_rounds_go_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    found = list(visits([toy_contestant(title, seen) for title in ("A", "B")], PLAN, tmp_path))
    assert seen == ["A", "B", "B", "A"] == [visit.title for visit in found]
    for visit in found:
        assert isinstance(visit, Visit)
        assert list(visit.cells) == ["1", "3", PREFILL]
        assert [(cell.figures.requests, cell.figures.failed) for cell in visit.cells.values()] == [
            (2, 0),
            (6, 0),
            (3, 0),
        ]
        prefill = visit.cells[PREFILL]
        assert prefill.tokens_per_s == pytest.approx(PREFILL_TOKENS * 1e3 / prefill.figures.ttft_p50_ms)
        assert visit.memory_bytes > 2 << 20
    assert "round 2 of 2, A: tokens/s 1: " in capsys.readouterr().out


def test_a_contestant_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    def ends(port: int, _: Path) -> tuple[Launch, dict[str, str]]:
        code = "import sys; print('no such instruction'); sys.exit(1)"
        return Launch((sys.executable, "-c", code)), dict(os.environ)

    found = list(visits([Contestant("Bad/1", False, ends), toy_contestant("A")], PLAN, tmp_path))
    assert [(one.title, one.round) for one in found] == [("Bad/1", 0), ("A", 0), ("A", 1)]
    assert isinstance(found[0], Failure)
    assert found[0].error == f"Bad/1: it ended: no such instruction (see {tmp_path / 'bad-1.log'})"


def test_an_engine_that_cannot_be_installed_has_failed_and_the_next_is_tried(tmp_path: Path) -> None:
    def no_room(_: Environment) -> None:
        raise OSError(28, "No space left on device")

    bad = Engine("bad", "Bad 1", (), nowhere, install=no_room)
    found = list(compare(tmp_path, [bad, msgspec.structs.replace(bad, title="Bad 2")], (), PLAN, tmp_path / "home"))
    assert [(one.title, one.round) for one in found] == [("Bad 1", 0), ("Bad 2", 0)]
    assert isinstance(found[0], Failure)
    assert found[0].error == "Bad 1: [Errno 28] No space left on device"


def test_an_answer_of_another_length_has_failed(tmp_path: Path) -> None:
    short = toy_contestant("A")
    plan = msgspec.structs.replace(PLAN, rounds=1)

    def launch(port: int, folder: Path) -> tuple[Launch, dict[str, str]]:
        found, variables = short.launch(port, folder)
        return found, variables | {"TOY_SHORT": "5"}  # answers of 5 tokens have 4

    (visit,) = visits([msgspec.structs.replace(short, launch=launch)], plan, tmp_path)
    assert isinstance(visit, Failure)
    assert visit.error.startswith("A, 1: 2 requests sent, all failed; the first with: wrong_length")


def test_processes_whose_parents_have_gone_are_ended_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c',"
        ' \'import subprocess, sys; subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])\'])'
        ".wait(); print('gone')"
    )
    with started(tmp_path, Launch((sys.executable, "-c", code)), free_port()) as server:
        with pytest.raises(ValueError, match="Toy 1: it ended: gone"):
            server.first_token(16)
        (orphan,) = server._session() - {server._root}
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("is_mapped", [False, True])
def test_shared_memory_that_a_server_leaves_is_removed_and_no_other(tmp_path: Path, is_mapped: bool) -> None:
    code = (
        "import time; from multiprocessing import resource_tracker, shared_memory;"
        "made = shared_memory.SharedMemory(create=True, size=4096);"
        "resource_tracker.unregister(made._name, 'shared_memory');"  # as where that is killed, too
        "print(made.name, flush=True); time.sleep(600)"
    )
    with ExitStack() as others:
        before, during = (others.enter_context(segment()) for _ in range(2))
        os.unlink(during)
        with started(tmp_path, Launch((sys.executable, "-c", code)), free_port()):
            during.write_bytes(b"1")  # of another program, which is about to map it
            wait_until(lambda: (tmp_path / "output").read_text().endswith("\n"), "the segment", 60.0)
            left = FOLDER / (tmp_path / "output").read_text().strip()
            others.callback(left.unlink, missing_ok=True)
            if is_mapped:
                with left.open("r+b") as file:
                    others.enter_context(mmap.mmap(file.fileno(), 4096))
        assert [path.exists() for path in (left, before, during)] == [is_mapped, True, True]


@contextmanager
def segment() -> Iterator[Path]:
    """One that no process has mapped."""
    path = FOLDER / f"psm_{os.urandom(4).hex()}"
    path.write_bytes(b"1")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def test_processes_of_others_are_told_from_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time\ninput()\nwhile time.process_time() < 0.6: pass\nprint('done', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as spinning:
        assert spinning.stdin is not None
        assert spinning.stdout is not None
        as_others, as_own = Meter(lambda: set()), Meter(lambda: {psutil.Process(spinning.pid)})
        spinning.stdin.write(b"\n")
        spinning.stdin.flush()
        assert spinning.stdout.readline() == b"done\n"
        busy, now = interference._machine(), time.monotonic()
        monkeypatch.setattr(interference, "_machine", lambda: busy)  # both look at the same time
        monkeypatch.setattr(interference, "time", SimpleNamespace(monotonic=lambda: now))
        others, own = as_others.read(), as_own.read()
        spinning.stdin.write(b"\n")
    assert others.others_cores > own.others_cores


# ---- tables


def visit_of(title: str, is_ours: bool, number: int, rate: float, others: float = 0.0) -> Visit:
    figures = Figures(1, 2, 0, rate, 10.0 * rate, 0.0, 1000 / rate, 0.0, 0.0)
    cells = {"1": Cell(rate, figures, Interference(others, others / 2))}
    return Visit(title, is_ours, number, (), 1.0 + number, (1 + number) << 30, cells)


def test_ratios_are_those_of_a_round() -> None:
    found = [
        visit_of("ours", True, 0, 20.0, 0.5),
        visit_of("A", False, 0, 10.0),
        visit_of("B", False, 0, 8.0),
        visit_of("ours", True, 1, 40.0),
        visit_of("A", False, 1, 20.0),
        visit_of("B", False, 1, 40.0),
    ]
    rows = {row["engine"]: row for row in load_rows(found)}
    assert {name: row["beside the best peer"] for name, row in rows.items()} == {
        "ours": "1.50",
        "A": "0.75",
        "B": "0.90",
    }
    assert (rows["ours"]["tokens/s"], rows["ours"]["others' cores"], rows["ours"]["stolen"]) == (30.0, "0.50", "0.25")
    assert [row["beside the best peer"] for row in load_rows(found[:1])] == [""]
    assert server_rows(found)[0] == {"engine": "ours", "start to first token s": 1.5, "memory GiB (PSS)": 1.5}
    assert json.loads(msgspec.json.encode(found))[0]["cells"]["1"]["tokens_per_s"] == 20.0


def test_a_server_has_room_for_all_that_is_asked() -> None:
    demand = PLAN.demand()
    assert (demand.tokens, demand.sequences) == (1280, 3)
    assert set(demand.cores) == os.sched_getaffinity(0)
    assert msgspec.structs.replace(PLAN, prompt_tokens=2000, output_tokens=49).demand().tokens == 2304
