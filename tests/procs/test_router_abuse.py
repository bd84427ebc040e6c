"""Requests whose bounded factors make a large product, and bodies that cost most where they are wrong: each costs the
one who sends it, and beside it others are answered in time and memory is bounded."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.procs.health_watch import health_watched
from tests.procs.router_fakes import FakeRank, Reply
from tests.procs.router_harness import RouterProcess, serving
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs
HEALTH_S = 0.5  # of the router itself: 0.05 s as it is; some of these took 6.4 s
ROUTER_BYTES = 512 << 20
TOP = tuple((number, -0.5 - number / 7.3) for number in range(20))
PROMPT = [97] * 1_800
CHAT: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def rank(router: RouterProcess) -> Iterator[FakeRank]:
    rank = FakeRank(router.sockets)
    rank.max_model_len = 2_048
    rank.answer = Reply(finish=None, top=TOP)
    with serving(router, rank):
        yield rank


def many(before: bytes, part: bytes, after: bytes, count: int) -> bytes:
    return before + b",".join([part] * count) + after


def encoded(**body: Any) -> bytes:
    return json.dumps(body).encode()


PARTS = many(b'{"role":"user","content":[', b'{"type":"text","text":""}', b"]}", 250)
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
MEMBERS: dict[str, tuple[str, bytes, int]] = {
    # What a 32 kB body asked for, which was a 156 MB answer; and what is just within the bounds.
    "16 x 8 rated prompts": (
        COMPLETIONS,
        encoded(prompt=[PROMPT] * 16, n=8, echo=True, logprobs=20, max_tokens=4),
        400,
    ),
    "the same as a stream": (
        COMPLETIONS,
        encoded(prompt=[PROMPT] * 16, n=8, echo=True, logprobs=20, max_tokens=4, stream=True),
        400,
    ),
    "3 x 8 rated prompts": (COMPLETIONS, encoded(prompt=[PROMPT] * 3, n=8, echo=True, logprobs=20, max_tokens=2), 200),
    "rated in a stream": (
        COMPLETIONS,
        encoded(prompt=[PROMPT] * 3, n=8, echo=True, logprobs=20, max_tokens=2, stream=True),
        200,
    ),
    "an evaluation": (COMPLETIONS, encoded(prompt=[PROMPT] * 48, echo=True, logprobs=1, max_tokens=0), 200),
    "100 rated chats": (CHATS, encoded(messages=CHAT, n=100, logprobs=True, top_logprobs=20, max_tokens=150), 200),
    "128 choices": (COMPLETIONS, encoded(prompt=PROMPT, n=128, max_tokens=100), 200),
    # What is wrong at the end of a large body.
    "a wrong number after a text": (COMPLETIONS, encoded(prompt="{[,]}" * 1_500_000, n=999), 400),
    "a wrong number after tokens": (COMPLETIONS, many(b'{"prompt":[', b"12345", b'],"n":999}', 380_000), 400),
    "a wrong token at the end": ("/detokenize", many(b'{"tokens":[', b"97.0", b",999]}", 380_000), 400),
    "not JSON at the end": (COMPLETIONS, many(b'{"prompt":[', b"12345", b"],}", 380_000), 400),
    # What is much in memory.
    "lists": (COMPLETIONS, many(b'{"prompt":[', b"[1]", b"]}", 2_000_000), 400),
    "messages": (CHATS, many(b'{"messages":[', b'{"role":"user"}', b"]}", 500_000), 400),
    "brackets in a text": (COMPLETIONS, encoded(prompt="[{" * 3_900_000, n=999), 400),
    "escapes": (COMPLETIONS, b'{"prompt":"' + b'\\\\\\"[' * 1_300_000 + b'","n":999}', 400),
    "whole floats": (COMPLETIONS, many(b'{"prompt":[', b"97.0", b"]}", 200_000), 400),
    "long integers": (COMPLETIONS, many(b'{"prompt":[', b"1" * 300, b"]}", 20_000), 400),
    "empty parts": (CHATS, many(b'{"messages":[', PARTS, b'],"max_tokens":1}', 60), 400),
    "names": (CHATS, many(b'{"messages":[],', b'"k":1', b"}", 120_000), 400),
    "values for the template": (
        CHATS,
        many(b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"a":[', b'"k"', b"]}}", 120_000),
        400,
    ),
    # Answers that are much longer than what was asked.
    "the texts of tokens": ("/tokenize", encoded(prompt="a b " * 6_000, return_token_strs=True), 200),
    "a long text": ("/detokenize", many(b'{"tokens":[', b"97.0", b"]}", 380_000), 200),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_beside_each_the_router_is_alive(rank: FakeRank, router: RouterProcess, name: str) -> None:
    path, raw, status = MEMBERS[name]

    def send(_: int) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return httpx.post(router.url + path, content=raw, headers=headers, timeout=60.0, trust_env=False)

    with health_watched(router.port, router.process.pid) as watch, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(send, range(2)))
    print(f"\n{name}: {len(raw) / 1e6:.2f} MB, answered with {len(answers[0].content) / 1e6:.2f} MB, ", end="")
    print(f"health within {watch.longest_s * 1e3:.0f} ms, {peak_bytes(router) >> 20} MiB at most so far")
    assert {answer.status_code for answer in answers} <= {status, 429}
    assert status in {answer.status_code for answer in answers}
    assert watch.longest_s < HEALTH_S
    assert peak_bytes(router) < ROUTER_BYTES
    router.wait_idle()


def peak_bytes(router: RouterProcess) -> int:
    """The most memory that the router has had."""
    with open(f"/proc/{router.process.pid}/status", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) * 1024


def test_answers_that_nobody_reads_keep_no_place(router: RouterProcess, rank: FakeRank) -> None:
    """Four clients ask for all places and do not read what they get: others are served once it is computed."""
    body = encoded(prompt="x", n=64, max_tokens=100, logprobs=20, ignore_eos=True)
    stream = encoded(prompt="x", n=64, max_tokens=100, logprobs=20, ignore_eos=True, stream=True)
    silent = []
    try:
        for raw in (body, stream, body, stream):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
            connection.connect(("127.0.0.1", router.port))
            lines = ("Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(raw)}", "", "")
            connection.sendall("\r\n".join([f"POST {COMPLETIONS} HTTP/1.1", *lines]).encode() + raw)
            silent.append(connection)
        wait_until(lambda: router.http.get("/load").json()["server_load"] == 0, "all were computed", 90.0)
        answer = router.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 2, "n": 128})
        assert answer.status_code == 200
    finally:
        for connection in silent:
            connection.close()
    wait_until(lambda: router.http.get("/load").json()["server_load"] == 0, "nothing is left", 90.0)
