"""What follows one another on a connection, older clients, HEAD and identity, at both listeners: RFC 9110, RFC 9112
section 9."""

from __future__ import annotations

import re

import pytest

from tests.procs.raw_http import HEALTH, SMUGGLED, Listener, ask, ask_open, chunked, connect, hear, wait_unread

pytestmark = pytest.mark.procs


# ---- Expect, pipelining, persistence (RFC 9110 section 10.1.1, RFC 9112 section 9) -----------------------------------


def test_rfc9110_10_1_1_a_body_that_waits_for_100_is_asked_for(listener: Listener) -> None:
    body = listener.body()
    with connect(listener) as connection:
        connection.sendall(listener.head("Expect: 100-continue", f"Content-Length: {len(body)}"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body + HEALTH)
        answers, _ = hear(connection, until=2)
    assert listener.is_proof(answers[0])
    assert answers[1].status == 200


def test_rfc9110_10_1_1_an_old_client_hears_no_100(listener: Listener) -> None:
    head = listener.head("Expect: 100-continue", f"Content-Length: {len(listener.body())}", version="1.0")
    with connect(listener) as connection:
        connection.sendall(head)
        wait_unread(connection)
        connection.sendall(listener.body())
        raw = b""
        while chunk := connection.recv(65_536):
            raw += chunk
    assert raw.startswith(b"HTTP/1.1 %d" % listener.status)
    assert raw.count(b"HTTP/1.1") == 1


def test_rfc9110_10_1_1_a_body_that_is_not_wanted_is_not_asked_for_and_the_connection_ends(listener: Listener) -> None:
    """Nobody knows whether what follows is the body or a request. Where the body came along there is no doubt."""
    head = listener.head("Expect: 100-continue", f"Content-Length: {len(SMUGGLED)}", "Content-Encoding: gzip")
    for answers in (ask(listener, head), ask(listener, head, SMUGGLED), ask_open(listener, head + SMUGGLED)):
        assert [(answer.status, answer.code) for answer in answers] == [(415, "unsupported_content_encoding")]
        assert answers[0].headers["accept-encoding"] == "identity"


def test_rfc9112_9_3_2_pipelined_requests_are_answered_in_order(listener: Listener) -> None:
    one = listener.request()
    answers = ask_open(listener, one + HEALTH + one + HEALTH, count=4)
    assert [answer.status for answer in answers] == [listener.status, 200, listener.status, 200]
    assert [listener.is_proof(answer) for answer in answers] == [True, False, True, False]


def test_rfc9112_9_3_2_a_refusal_waits_for_the_answers_before_it(listener: Listener) -> None:
    one = listener.request()
    for bad in (b"GET /x HTTP/1.1\r\nHost : x\r\n\r\n", listener.head("Content-Length: 1", "Content-Length: 2")):
        answers = ask(listener, one + HEALTH + bad + SMUGGLED)
        assert [answer.status for answer in answers] == [listener.status, 200, 400]
        assert [answer.headers.get("connection") for answer in answers] == [None, None, "close"]
    in_chunks = listener.head("Transfer-Encoding: chunked")
    answers = ask(listener, one + in_chunks + b"5\r\nabcde\r\nxyz\r\n" + SMUGGLED)
    assert [answer.status for answer in answers] == [listener.status, 400]


def test_rfc9112_9_3_2_only_so_many_requests_may_wait(listener: Listener) -> None:
    answers = ask(listener, HEALTH * 200)
    assert {answer.status for answer in answers[:-1]} == {200}
    assert (answers[-1].status, answers[-1].code) == (503, "too_many_connections")
    assert answers[-1].headers["retry-after"] == "1"
    assert 2 <= len(answers) < 200


def test_rfc9112_9_6_nothing_after_close_is_a_request(listener: Listener) -> None:
    last = listener.request("Connection: close")
    for pieces in ((last,), (last + SMUGGLED,), (last, SMUGGLED)):
        answers = ask(listener, *pieces)
        assert [listener.is_proof(answer) for answer in answers] == [True]
        assert answers[0].headers["connection"] == "close"


def test_rfc9112_9_3_a_body_that_nobody_reads_is_no_request(listener: Listener) -> None:
    """A short one is passed over; behind a long one, or one in chunks, the connection ends."""
    fields = [line for line in listener.fields if "Type" not in line]
    refused = ["POST /v1/nothing HTTP/1.1", "Host: localhost", *fields, "Content-Encoding: gzip"]
    short = "\r\n".join([*refused, f"Content-Length: {len(SMUGGLED)}", "", ""]).encode()
    for pieces in ((short + SMUGGLED,), (short, SMUGGLED)):
        assert [answer.status for answer in ask_open(listener, *pieces)] == [415]
    long = "\r\n".join([*refused, "Content-Length: 100000", "", ""]).encode()
    in_chunks = "\r\n".join([*refused, "Transfer-Encoding: chunked", "", ""]).encode()
    for pieces in (
        (long, SMUGGLED),
        (in_chunks, b"5\r\nabcde\r\n", SMUGGLED),
        (in_chunks, chunked(SMUGGLED) + SMUGGLED),
    ):
        answers = ask(listener, *pieces)
        assert [answer.status for answer in answers] == [415]
        assert answers[0].headers["connection"] == "close"


# ---- HTTP/1.0 and HEAD (RFC 9112 section 9.3, RFC 9110 section 9.3.2) ------------------------------------------------


@pytest.mark.parametrize("more", [(), ("Connection: keep-alive",), ("Connection: close",)])
def test_rfc9112_9_3_http_1_0_gets_an_answer_without_chunks_and_a_close(
    listener: Listener, more: tuple[str, ...]
) -> None:
    for raw in (
        "\r\n".join(["GET /health HTTP/1.0", *more, "", ""]).encode(),
        "\r\n".join(["GET /health HTTP/1.0", "Host: localhost", *more, "", ""]).encode(),
        listener.request(*more, version="1.0"),
    ):
        answers = ask(listener, raw + SMUGGLED)
        assert len(answers) == 1
        assert answers[0].status == (200 if raw.startswith(b"GET") else listener.status)
        assert "transfer-encoding" not in answers[0].headers
        assert answers[0].headers["connection"] == "close"


def test_rfc9110_9_3_2_head_is_get_without_a_body(listener: Listener) -> None:
    for path in ("/health", "/ready", "/metrics", "/openapi.json", "/v1/models", "/v1/scale", "/version", "/nothing"):
        heard = []
        for method in ("GET", "HEAD"):
            raw = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *listener.fields, "", ""]).encode()
            with connect(listener) as connection:
                connection.sendall(raw)
                answers, _ = hear(connection, until=1, is_head=method == "HEAD")
                connection.sendall(HEALTH)  # the answer had no body: the next one follows at once
                assert hear(connection, until=1)[0][0].body == b'{"status":"ok"}'
            answer = answers[0]
            del answer.headers["x-request-id"], answer.headers["date"]
            if path == "/metrics":
                del answer.headers["content-length"]  # counters go on
            heard.append((answer.status, answer.headers))
        assert heard[0] == heard[1], path


def test_rfc9110_9_3_2_head_of_what_cannot_be_got(listener: Listener) -> None:
    path = "/v1/rebalance" if listener.path == "/v1/scale" else listener.path  # a GET of /v1/scale tells the size
    raw = "\r\n".join([f"HEAD {path} HTTP/1.1", "Host: localhost", *listener.fields, "", ""]).encode()
    with connect(listener) as connection:
        connection.sendall(raw)
        answers, _ = hear(connection, until=1, is_head=True)
    assert (answers[0].status, answers[0].headers["allow"]) == (405, "POST")


# ---- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a/b#c=d", "x" * 129, "a b", "é", "", "{7}", "a,b", "a;b=c"])
def test_an_id_that_cannot_be_used_is_replaced(listener: Listener, given: str) -> None:
    health = f"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {given}\r\n\r\n".encode()
    request = listener.request(f"X-Request-Id: {given}")
    for raw, status in ((health, 200), (request, listener.status)):
        answer = ask_open(listener, raw)[0]
        assert answer.status == status
        assert re.fullmatch(r"[0-9a-f]{24}", answer.headers["x-request-id"])


def test_an_id_that_can_be_used_is_kept(listener: Listener) -> None:
    assert ask_open(listener, listener.request("X-Request-Id: A.b_c:d-9"))[0].headers["x-request-id"] == "A.b_c:d-9"
    twice = listener.request("X-Request-Id: a", "X-Request-Id: b")
    assert ask_open(listener, twice)[0].headers["x-request-id"] not in ("a", "b", "a, b")


def test_refusals_are_counted(listener: Listener) -> None:
    before = listener.process.metric("elasticmoe:requests_refused_total")
    ask(listener, b"GET /health HTTP/1.1\r\n\r\n")
    assert listener.process.metric("elasticmoe:requests_refused_total") == before + 1
