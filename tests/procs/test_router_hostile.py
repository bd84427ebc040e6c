"""What strangers send: no bytes on the socket may crash the router or keep others from being served (promise P15)."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.common.config import environment_of
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.hmm import GetHmmStatus
from elasticmoe.common.protocol.router import Delta, Failed, RankStatus, Tokens
from tests.procs.router_fakes import WAIT_S, FakeRank, Reply
from tests.procs.router_harness import ROOT, RouterProcess, StartRouter, post, serving
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs
BODY_MAX = 4_096
BODY_S = 2.0


@pytest.fixture(scope="module")
def router(start_router: StartRouter) -> RouterProcess:
    return start_router(requests_max=4, body_bytes_max=BODY_MAX, body_seconds_max=BODY_S)


@pytest.fixture(scope="module")
def hasty(start_router: StartRouter) -> RouterProcess:
    return start_router(requests_max=4, request_seconds_max=1.0)


@pytest.fixture
def rank(router: RouterProcess) -> Iterator[FakeRank]:
    with serving(router) as rank:
        yield rank
        assert post(router, prompt="x").status_code == 200, "still serves"


def talk(router: RouterProcess, raw: bytes, *, until: bytes = b"") -> bytes:
    """Send bytes; everything that comes back until the connection ends or `until` was seen."""
    with socket.create_connection(("127.0.0.1", router.port), WAIT_S) as connection:
        try:
            connection.sendall(raw)
        except (ConnectionResetError, BrokenPipeError):
            pass  # the router closes before it has read everything
        return hear(connection, until)


def hear(connection: socket.socket, until: bytes) -> bytes:
    """Everything that comes until the connection ends or `until` was seen."""
    answer = b""
    try:
        while chunk := connection.recv(65_536):
            answer += chunk
            if until and until in answer:
                break
    except ConnectionResetError:
        pass  # it ended that way
    return answer


def head(*lines: str, path: str = "/v1/completions", host: str = "localhost") -> bytes:
    """A POST's head."""
    return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


JSON = "Content-Type: application/json"


def error_of(answer: bytes) -> tuple[int, str]:
    """Status and code of an answer."""
    status = int(answer.split(b" ", 2)[1])
    return status, json.loads(answer[answer.index(b"\r\n\r\n") + 4 :])["error"]["code"]


def test_a_declared_length_is_refused_before_the_body(rank: FakeRank, router: RouterProcess) -> None:
    answer = talk(router, head(JSON, f"Content-Length: {BODY_MAX + 1}"), until=b"}}")
    assert error_of(answer) == (413, "payload_too_large")
    assert b"4097 bytes, which exceeds the limit of 4096" in answer


def test_a_body_without_end_is_cut_off(rank: FakeRank, router: RouterProcess) -> None:
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    answer = talk(router, head(JSON, "Transfer-Encoding: chunked") + chunk * 5, until=b"}}")
    assert error_of(answer) == (413, "payload_too_large")


def test_a_body_of_the_largest_size_is_taken(rank: FakeRank, router: RouterProcess) -> None:
    body = b'{"prompt": "x"' + b" " * (BODY_MAX - 15) + b"}"
    assert len(body) == BODY_MAX
    answer = router.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200


def test_slow_bodies_keep_nobody_out(rank: FakeRank, router: RouterProcess) -> None:
    slow = [socket.create_connection(("127.0.0.1", router.port), WAIT_S) for _ in range(20)]
    try:
        for connection in slow:
            connection.sendall(head(JSON, "Content-Length: 100") + b"{")
        for _ in range(5):
            assert router.http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        answer = hear(slow[0], b"}}")  # when its time is up
        assert error_of(answer) == (408, "request_timeout")
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize("path", ["//v1/completions", "/v1/completions/..", "/%2e%2e/etc/passwd", "/v1/%00", "*", "/é"])
def test_strange_paths(rank: FakeRank, router: RouterProcess, path: str) -> None:
    body = b'{"prompt":"x"}'
    answer = talk(router, head(JSON, f"Content-Length: {len(body)}", path=path) + body, until=b"}}")
    assert error_of(answer)[0] in (400, 404)


def test_an_expected_body_is_refused_unsent(rank: FakeRank, router: RouterProcess) -> None:
    answer = talk(router, head(JSON, "Expect: 100-continue", f"Content-Length: {BODY_MAX * 2}"), until=b"}}")
    assert error_of(answer)[0] == 413


def test_the_deadline_ends_a_request(hasty: RouterProcess) -> None:
    with serving(hasty) as rank:
        rank.answer = Reply(b"never", after=threading.Event())
        answer = hasty.http.post("/v1/completions", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert rank.seen.cancel() == rank.seen.submit().request_id
        rank.answer = Reply(finish=None)
        rank.max_model_len = 100_000
        rank.say(rank.status())
        wait_until(lambda: hasty.get("/v1/models").json()["data"][0]["max_model_len"] == 100_000, "the new length")
        body = {"prompt": "x", "stream": True, "max_tokens": 90_000}
        text = hasty.http.post("/v1/completions", json=body).text
        assert '"code":"deadline_exceeded"' in text
        assert text.endswith("data: [DONE]\n\n")


def test_no_message_of_a_rank_harms_the_router(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(b"slow", after=threading.Event())
    assert rank.is_watched.wait(WAIT_S)
    bad_before = router.metric("elasticmoe:bad_messages_total")
    for bad in (
        {"index": -1, "ids": (1,)},
        {"index": 0, "ids": (-5,)},
        {"index": 0, "ids": (1 << 40,)},
        {"index": 0, "ids": (1,), "finish": "because"},
        {"index": 0, "ids": (1,), "logprobs": ()},
    ):
        rank.say(Tokens((Delta("nobody", **bad),)))
        answers: list[int] = []
        thread = threading.Thread(
            target=lambda: answers.append(router.http.post("/v1/completions", json={"prompt": "x"}).status_code)  # noqa: B023
        )
        thread.start()
        rank.say(Tokens((Delta(rank.seen.submit().request_id, **bad),)))
        thread.join(WAIT_S)
        assert answers == [500]
    rank.say(Failed("nobody", "x" * 10_000, "", False))
    rank.say(RankStatus(rank.rank, "", 1, -1, 0, 0, 0, 0, 100))
    rank.say(RankStatus(rank.rank, "", 1, 0, 0, 0, 0, 0, 0))
    rank.say(RankStatus(RankId(7, 0), "", 1, 0, 0, 0, 0, 0, 100))
    rank.say(GetHmmStatus())  # not a router's message
    wait_until(lambda: router.metric("elasticmoe:bad_messages_total") - bad_before == 9, "all are counted")
    rank.answer = Reply(b"ok")


def test_an_occupied_port_is_told_in_a_line(router: RouterProcess, tmp_path: Path) -> None:
    settings = {"run_dir": tmp_path / "run", "model": router.run_dir.parent / "model", "port": router.port}
    done = subprocess.run(
        [sys.executable, "-m", "elasticmoe.services.router"],
        cwd=ROOT,
        env={"PATH": "/usr/bin", **environment_of(settings)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == f"elasticmoe-router: port_in_use: port {router.port} on 127.0.0.1 is in use\n"
    assert router.get("/health").status_code == 200
