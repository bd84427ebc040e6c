"""A stream that has nothing to say yet: its head comes at once, then a comment from time to time, and what fails later
is an event. What can be refused at once still has a status. (That who speaks has no comments, whatever the machine's
speed: tests/unit/test_router_silence.py.)"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from tests.procs.raw_http import hear_until
from tests.procs.router_fakes import WAIT_S, FakeRank, Reply
from tests.procs.router_harness import (
    MODEL,
    RouterProcess,
    StartRouter,
    plain_client,
    running_router,
    serving,
)
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs
KEEPALIVE_S = 0.3
COMMENT = b": keep-alive\n\n"


@pytest.fixture(scope="module")
def router(start_router: StartRouter) -> RouterProcess:
    return start_router(requests_max=32, stream_keepalive_s=KEEPALIVE_S)


@contextmanager
def stream(router: RouterProcess, path: str = "/v1/completions", **body: object) -> Iterator[socket.socket]:
    """A raw connection on which a streaming request was sent: nothing of HTTP hides what comes when."""
    raw = json.dumps({"stream": True, "prompt": "x", **body}).encode()
    lines = ("Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(raw)}", "", "")
    head = "\r\n".join([f"POST {path} HTTP/1.1", *lines])
    with socket.create_connection(("127.0.0.1", router.port), WAIT_S) as connection:
        connection.sendall(head.encode() + raw)
        yield connection


def test_the_head_comes_at_once_and_comments_while_it_waits(rank: FakeRank, router: RouterProcess) -> None:
    release = threading.Event()
    rank.answer = Reply(b"Hello!", after=release)
    started = time.monotonic()
    with stream(router, max_tokens=20) as connection:
        head = hear_until(connection, b"\r\n\r\n")  # which waits for nothing that the rank, held up until then, does
        assert head.startswith(b"HTTP/1.1 200")
        assert b"text/event-stream" in head
        assert b"data:" not in head
        hear_until(connection, COMMENT, times=3)
        assert time.monotonic() - started >= 3 * KEEPALIVE_S
        release.set()
        rest = hear_until(connection, b"[DONE]")
    events = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith(b"data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello!"


def test_a_stream_that_stalls_in_its_midst_says_so(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(finish=None, slow_after=20)
    with stream(router, max_tokens=400) as connection:
        hear_until(connection, b"data: {", times=3)
        rank.is_muted.set()
        hear_until(connection, COMMENT, times=2)
        rank.is_muted.clear()
        hear_until(connection, b"data: {", times=3)
    assert rank.seen.cancel()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_openais_client_skips_comments(rank: FakeRank, router: RouterProcess, path: str) -> None:
    release = threading.Event()
    rank.answer = Reply(b"Hello!", after=release)
    threading.Timer(0.5 + 2.5 * KEEPALIVE_S, release.set).start()
    with plain_client("") as http:
        client = openai.OpenAI(
            base_url=router.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_S, http_client=http
        )
        if path == "/v1/completions":
            text = "".join(c.choices[0].text for c in client.completions.create(model=MODEL, prompt="x", stream=True))
        else:
            chunks = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Hello!"


def test_what_fails_after_the_head_is_an_event(rank: FakeRank, router: RouterProcess) -> None:
    release = threading.Event()
    rank.answer = Reply(fail=("queue_full", "4 requests wait; the limit is 4", True), after=release)
    with stream(router) as connection:
        assert hear_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        hear_until(connection, COMMENT)
        release.set()
        rest = hear_until(connection, b"[DONE]")
    (error,) = [json.loads(line[6:])["error"] for line in rest.splitlines() if line.startswith(b"data: {")]
    assert error == {
        "message": "4 requests wait; the limit is 4",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }


def test_what_fails_at_once_has_a_status(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(fail=("queue_full", "4 requests wait; the limit is 4", True))
    for body, status in (({}, 429), ({"max_tokens": 9_999}, 400), ({"model": "other"}, 404)):

        def is_told(body: dict[str, object] = body, status: int = status) -> bool:
            """Not where the rank took so long that the stream had begun: its error is an event then."""
            answer = router.http.post("/v1/completions", json={"prompt": "x", "stream": True, **body})
            if answer.status_code == 200:
                assert '"error"' in answer.text
                return False
            assert answer.status_code == status
            assert answer.json()["error"]["code"]
            return True

        wait_until(is_told, f"{status}")


def test_the_deadline_of_a_silent_stream_is_an_event(tmp_path: Path) -> None:
    with (
        running_router(tmp_path, stream_keepalive_s=KEEPALIVE_S, request_seconds_max=5.0) as router,
        serving(router) as rank,
    ):
        rank.answer = Reply(b"never", after=threading.Event())
        with stream(router) as connection:
            rest = hear_until(connection, b"[DONE]")
    assert b'"code":"deadline_exceeded"' in rest


def test_an_answer_that_is_no_stream_waits_for_its_end(rank: FakeRank, router: RouterProcess) -> None:
    release = threading.Event()
    rank.answer = Reply(b"Hello!", after=release)
    threading.Timer(1.0, release.set).start()
    answer: httpx.Response = router.http.post("/v1/completions", json={"prompt": "x"})
    assert answer.json()["choices"][0]["text"] == "Hello!"


def test_without_the_setting_there_are_no_comments(tmp_path: Path) -> None:
    release = threading.Event()
    with running_router(tmp_path, stream_keepalive_s=0) as router, serving(router) as rank:
        rank.answer = Reply(b"Hello!", after=release)
        with stream(router) as connection:
            hear_until(connection, b"\r\n\r\n")
            threading.Timer(0.5, release.set).start()
            assert b": " not in hear_until(connection, b"[DONE]").replace(b"data: ", b"")
