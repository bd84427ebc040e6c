"""HTTP/1.1 messages as both listeners take them, byte by byte: RFC 9112, and upgrades (RFC 9110 section 7.8).

Each case runs against a real router and a real scaler. The proof that a body arrived whole is an answer that depends on
its last byte; the proof that nothing is smuggled is the number of answers on the connection.
"""

from __future__ import annotations

import pytest

from tests.procs.raw_http import SMUGGLED, Listener, ask, ask_open, chunked, connect, hear, hear_anyhow, send

pytestmark = pytest.mark.procs


# ---- upgrades (RFC 9110 section 7.8) ---------------------------------------------------------------------------------

H2C = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)
OFFERS = {
    "h2c": H2C,
    "h2c in small letters": ("connection: upgrade,http2-settings", "upgrade: H2C", "http2-settings: AA"),
    "websocket": ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13"),
    "tls": ("Connection: keep-alive, Upgrade", "Upgrade: TLS/1.0"),
    "several": ("Connection: Upgrade", "Upgrade: h2c, HTTP/3.0, IRC/6.9"),
    "two fields": ("Connection: Upgrade", "Connection: keep-alive", "Upgrade: foo", "Upgrade: bar"),
    "not named by Connection": ("Upgrade: h2c",),
    "named but not there": ("Connection: Upgrade",),
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_rfc9110_7_8_an_offer_to_upgrade_is_ignored_and_the_body_arrives(
    listener: Listener, offer: tuple[str, ...]
) -> None:
    body = listener.body()
    whole = listener.head(f"Content-Length: {len(body)}", *offer)
    in_chunks = listener.head("Transfer-Encoding: chunked", *offer)
    for pieces in (
        (whole + body,),
        (whole, body),
        (whole, body[:40], body[40:]),
        (whole[:30], whole[30:] + body),
        (in_chunks + chunked(body),),
        (in_chunks, chunked(body)),
    ):
        answers = ask_open(listener, *pieces)
        assert [listener.is_proof(answer) for answer in answers] == [True], (pieces, answers)


def test_rfc9110_7_8_bytes_after_an_upgrade_are_requests_only_where_the_framing_says_so(listener: Listener) -> None:
    inner = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    pad = listener.body(200 - len(inner))
    body = inner + pad  # what a body is, whatever it looks like
    offered = listener.head(f"Content-Length: {len(body)}", *H2C)
    for pieces in ((offered + body,), (offered, body), (offered, inner, pad)):
        answers = ask_open(listener, *pieces)
        assert [answer.status for answer in answers] == [400]
        assert answers[0].code in ("invalid_json", "invalid_request")
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert [answer.status for answer in ask_open(listener, get * 3, count=3)] == [200] * 3
    assert [answer.status for answer in ask_open(listener, get, get, count=2)] == [200] * 2


def test_rfc9110_7_8_floods_of_upgrades_fill_no_log(listener: Listener) -> None:
    before = len(listener.process.log_text)
    offered = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with connect(listener) as connection:
        for _ in range(20):
            connection.sendall(offered * 10)
            assert len(hear(connection, until=10)[0]) == 10
        send(connection, b"garbage\r\n\r\n")
        hear(connection)
    added = listener.process.log_text[before:].splitlines()
    assert [line for line in added if "stood still" not in line] == []  # which a busy machine makes it do


def test_rfc9110_9_3_6_connect_is_refused_and_nothing_after_it_is_heard(listener: Listener) -> None:
    for head in (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n",):
        for pieces in ((head + SMUGGLED,), (head, SMUGGLED)):
            answers = ask(listener, *pieces)
            assert [(answer.status, answer.code) for answer in answers] == [(501, "method_not_implemented")]


# ---- framing (RFC 9112 sections 6 and 7) -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [120, 5_000, 70_000, 300_000])
def test_rfc9112_6_2_a_body_of_a_length_arrives_in_any_packets(listener: Listener, size: int) -> None:
    body = listener.body(size)
    head = listener.head(f"Content-Length: {size}")
    third = size // 3
    for pieces in ((head + body,), (head, body), (head + body[:third], body[third:-1], body[-1:])):
        answers = ask_open(listener, *pieces)
        assert [listener.is_proof(answer) for answer in answers] == [True]


@pytest.mark.parametrize("coding", ["chunked", "Chunked", "CHUNKED", "chunked  "])
def test_rfc9112_7_1_chunks_of_any_size_and_with_extensions_and_trailers(listener: Listener, coding: str) -> None:
    head = listener.head(f"Transfer-Encoding: {coding}")
    body = listener.body()
    for sent in (
        chunked(body),
        chunked(body, 1),
        chunked(body, 1_000),
        chunked(body, extension=b";a=b"),
        chunked(body, extension=b';a="b c;d";e'),
        chunked(body, end=b"0\r\nX-Trailer: value\r\n\r\n"),
        chunked(body, end=b"000\r\nAuthorization: other\r\nHost: evil\r\nX-Request-Id: z\r\n\r\n"),
        b"0000000000000078\r\n" + body + b"\r\n0\r\n\r\n",
    ):
        answers = ask_open(listener, head + sent)
        assert [listener.is_proof(answer) for answer in answers] == [True], sent
        assert answers[0].headers["x-request-id"] != "z"
        assert ask_open(listener, head, sent[:7], sent[7:-3], sent[-3:])[0].status == listener.status


BAD_FRAMING = {
    "two lengths, different": (("Content-Length: 120", "Content-Length: 121"), 400),
    "two lengths, the same": (("Content-Length: 120", "Content-Length: 120"), 400),
    "a list of lengths": (("Content-Length: 120, 120",), 400),
    "a negative length": (("Content-Length: -120",), 400),
    "a length with a sign": (("Content-Length: +120",), 400),
    "a hexadecimal length": (("Content-Length: 0x78",), 400),
    "a fraction": (("Content-Length: 120.0",), 400),
    "a length with spaces in it": (("Content-Length: 1 20",), 400),
    "a length with an underscore": (("Content-Length: 1_20",), 400),
    "no length": (("Content-Length:",), 400),
    "a huge length": (("Content-Length: 99999999999999999999999999",), 400),
    "length and coding": (("Content-Length: 120", "Transfer-Encoding: chunked"), 400),
    "coding and length": (("Transfer-Encoding: chunked", "Content-Length: 120"), 400),
    "identity, chunked": (("Transfer-Encoding: identity, chunked",), 501),
    "gzip, chunked": (("Transfer-Encoding: gzip, chunked",), 501),
    "gzip": (("Transfer-Encoding: gzip",), 501),
    "identity": (("Transfer-Encoding: identity",), 501),
    "xchunked": (("Transfer-Encoding: xchunked",), 501),
    "chunked in quotes": (('Transfer-Encoding: "chunked"',), 501),
    "chunked with a parameter": (("Transfer-Encoding: chunked;q=1",), 501),
    "chunked twice": (("Transfer-Encoding: chunked, chunked",), 400),
    "chunked twice, two fields": (("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
    "chunked not last": (("Transfer-Encoding: chunked, gzip",), 400),
    "chunked, then identity": (("Transfer-Encoding: chunked", "Transfer-Encoding: identity"), 400),
    "an empty coding": (("Transfer-Encoding:",), 400),
    "a vertical tab before chunked": (("Transfer-Encoding: \x0bchunked",), 400),
    "a name with a space before the colon": (("Content-Length : 120",), 400),
    "a coding with a space before the colon": (("Transfer-Encoding : chunked",), 400),
    "a coding on a folded line": (("Transfer-Encoding:\r\n chunked",), 400),
    "a length on a folded line": (("Content-Length:\r\n 120",), 400),
    "a length behind a bare line feed": (("X: y\nContent-Length: 120",), 400),
    "a length behind a bare carriage return": (("X: y\rContent-Length: 120",), 400),
}


@pytest.mark.parametrize(("lines", "status"), BAD_FRAMING.values(), ids=BAD_FRAMING)
def test_rfc9112_6_3_a_body_without_a_sure_end_is_refused_and_the_connection_ends(
    listener: Listener, lines: tuple[str, ...], status: int
) -> None:
    body = b"0\r\n\r\n" + SMUGGLED
    for pieces in ((listener.head(*lines) + body,), (listener.head(*lines), body)):
        answers = ask(listener, *pieces)
        assert [answer.status for answer in answers] == [status]
        assert answers[0].headers["connection"] == "close"
        assert answers[0].code in ("bad_http", "transfer_coding_not_implemented")


def test_rfc9112_6_3_a_length_beyond_the_limit_is_refused_unread(listener: Listener) -> None:
    for length in (8 * 1024 * 1024 + 1, 2**63, 2**64 - 1):
        answers = ask(listener, listener.head(f"Content-Length: {length}") + b"{")
        assert [(answer.status, answer.code) for answer in answers] == [(413, "payload_too_large")]


def test_rfc9112_6_1_chunks_in_http_1_0_are_refused(listener: Listener) -> None:
    raw = listener.head("Transfer-Encoding: chunked", version="1.0") + chunked(listener.body()) + SMUGGLED
    assert [answer.status for answer in ask(listener, raw)] == [400]


BAD_CHUNKS = {
    "not hexadecimal": b"zz\r\n",
    "a prefix": b"0x5\r\nabcde\r\n",
    "a sign": b"+5\r\nabcde\r\n",
    "negative": b"-5\r\nabcde\r\n",
    "a space before": b" 5\r\nabcde\r\n",
    "a space behind": b"5 \r\nabcde\r\n",
    "no size": b"\r\nabcde\r\n",
    "a huge size": b"ffffffffffffffffff\r\n",
    "a bare line feed behind the size": b"5\nabcde\r\n",
    "a bare line feed behind the data": b"5\r\nabcde\n0\r\n\r\n",
    "a bare line feed in an extension": b"5;a\nabcde\r\n",
    "a line feed in a quoted extension": b'5;a="\n"\r\nabcde\r\n',
    "data longer than said": b"5\r\nabcdefgh\r\n",
    "no line end behind the data": b"5\r\nabcde5\r\nabcde\r\n",
    "a length among the trailers": b"0\r\nContent-Length: 5\r\n\r\n",
    "a coding among the trailers": b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a bad trailer": b"0\r\nno colon\r\n\r\n",
}


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_rfc9112_7_1_broken_chunks_are_refused_and_the_connection_ends(listener: Listener, chunks: bytes) -> None:
    head = listener.head("Transfer-Encoding: chunked")
    for pieces in ((head + chunks + SMUGGLED,), (head, chunks, SMUGGLED)):
        answers = ask(listener, *pieces)
        assert [(answer.status, answer.code) for answer in answers] == [(400, "bad_http")]


def test_rfc9112_7_1_chunks_and_trailers_are_bounded(listener: Listener) -> None:
    head = listener.head("Transfer-Encoding: chunked")
    for endless in (b"1\r\n \r\n" * 200_000, b"0\r\n" + b"a: b\r\n" * 20_000, b"1;" + b"a" * 10_000_000):
        with connect(listener) as connection:
            try:
                connection.sendall(head + endless)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has heard enough
            answers = hear_anyhow(connection)
        assert [answer.status for answer in answers] in ([413], [431], [400], [])


# ---- heads (RFC 9112 sections 2 to 5) --------------------------------------------------------------------------------

BAD_HEADS = {
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
    "two Hosts in HTTP/1.0": (b"GET /health HTTP/1.0\r\nHost: localhost\r\nHost: other\r\n\r\n", 400),
    "a Host with a space": (b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "a Host with a path": (b"GET /health HTTP/1.1\r\nHost: localhost/health?\r\n\r\n", 400),
    "a Host with a user": (b"GET /health HTTP/1.1\r\nHost: user@localhost\r\n\r\n", 400),
    "a Host that is no address": (b"GET /health HTTP/1.1\r\nHost: [::\r\n\r\n", 400),
    "a Host with too large a port": (b"GET /health HTTP/1.1\r\nHost: localhost:99999\r\n\r\n", 400),
    "a Host that is not ASCII": (b"GET /health HTTP/1.1\r\nHost: \xff\r\n\r\n", 400),
    "a list of Hosts": (b"GET /health HTTP/1.1\r\nHost: localhost localhost\r\n\r\n", 400),
    "a folded line": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n", 400),
    "a line that begins with a space": (b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n", 400),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    "no colon": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA\r\n\r\n", 400),
    "an empty name": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n: b\r\n\r\n", 400),
    "a name that is no token": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA(b): c\r\n\r\n", 400),
    "NUL in a value": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\0c\r\n\r\n", 400),
    "a control character in a value": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\x01c\r\n\r\n", 400),
    "a bare carriage return in a value": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\rc\r\n\r\n", 400),
    "bare line feeds": (b"GET /health HTTP/1.1\nHost: localhost\n\n", 400),
    "a bare line feed behind a field": (b"GET /health HTTP/1.1\r\nHost: localhost\nA: b\r\n\r\n", 400),
    "NUL in the target": (b"GET /health\0 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a target that is not ASCII": (b"GET /h\xc3\xa9alth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a control character in the target": (b"GET /he\x01alth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a space in the target": (b"GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a tab in the target": (b"GET /he\talth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a fragment": (b"GET /health#there HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a relative target": (b"GET health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "an authority as target": (b"GET localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a star without OPTIONS": (b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "an absolute target with a user": (b"GET http://u:p@localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "an absolute target without a host": (b"GET http:///health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "another scheme": (b"GET ftp://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a broken address": (b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "no target": (b"GET HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a small method": (b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "an unknown method": (b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "a small version": (b"GET /health http/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a version with a zero": (b"GET /health HTTP/01.1\r\nHost: localhost\r\n\r\n", 400),
    "a later version": (b"GET /health HTTP/1.2\r\nHost: localhost\r\n\r\n", 505),
    "HTTP/2 in words": (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
    "HTTP/0.9 in words": (b"GET /health HTTP/0.9\r\nHost: localhost\r\n\r\n", 505),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "NULs": (b"\0" * 100, 400),
    "a reply": (b"HTTP/1.1 200 OK\r\n\r\n", 400),
}


@pytest.mark.parametrize(("raw", "status"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_rfc9112_bad_heads_are_refused_and_the_connection_ends(listener: Listener, raw: bytes, status: int) -> None:
    for pieces in ((raw + SMUGGLED,), (raw, SMUGGLED)):
        answers = ask(listener, *pieces)
        assert [answer.status for answer in answers] == [status]
        assert answers[0].headers["connection"] == "close"
        assert answers[0].headers["x-request-id"]
        assert answers[0].code


GOOD_HEADS = {
    "empty lines before it (9112 2.2)": b"\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space around values (9112 5.1)": b"GET /health HTTP/1.1\r\nHost:localhost \t\r\nA:\t b \r\n\r\n",
    "an empty value": b"GET /health HTTP/1.1\r\nHost: localhost\r\nA:\r\n\r\n",
    "letters beyond ASCII in a value": b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: \xc3\xa9\r\n\r\n",
    "a query": b"GET /health?a=b&c=%20 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path in percents": b"GET /%68ealth HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an absolute target (9112 3.2.2)": b"GET http://localhost:8000/health?q HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an absolute target of another host": b"GET http://localhost/health HTTP/1.1\r\nHost: ignored.example\r\n\r\n",
    "a Host with a port": b"GET /health HTTP/1.1\r\nHost: LOCALHOST.:8000\r\n\r\n",
    "an IPv6 Host": b"GET /health HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n",
    "a body that nobody reads": b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nabcde",
    "an expectation that nobody knows": b"GET /health HTTP/1.1\r\nHost: localhost\r\nExpect: the-worst\r\n\r\n",
}


@pytest.mark.parametrize("raw", GOOD_HEADS.values(), ids=GOOD_HEADS)
def test_rfc9112_good_heads_are_served_in_any_packets(listener: Listener, raw: bytes) -> None:
    for pieces in ((raw,), (raw[:20], raw[20:50], raw[50:])):
        assert [answer.status for answer in ask_open(listener, *pieces)] == [200]


def test_rfc9110_9_unknown_paths_and_methods(listener: Listener) -> None:
    for first, status in (
        ("GET /v1/nothing", 404),
        ("GET //health", 404),
        ("GET /health/", 404),
        ("GET /health/..", 404),
        ("GET /%2e%2e/etc/passwd", 404),
        ("GET /v1/%00", 404),
        ("OPTIONS *", 404),
        ("TRACE /health", 405),
        ("PUT /health", 405),
        ("M-SEARCH /health", 405),
    ):
        lines = [f"{first} HTTP/1.1", "Host: localhost", *listener.fields, "", ""]
        answers = ask_open(listener, "\r\n".join(lines).encode())
        assert [answer.status for answer in answers] == [status], first
        assert "location" not in answers[0].headers, "no redirects: a client would take its key elsewhere"
        if status == 405:
            assert answers[0].headers["allow"] == "GET, HEAD"


def test_rfc9112_3_long_targets_and_heads_are_refused(listener: Listener) -> None:
    for raw, statuses in (
        (b"GET /" + b"b" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", ([414], [])),
        (b"GET /" + b"b" * 400_000, ([414], [])),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 200 + b"\r\n", ([431], [])),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 60_000, ([431], [])),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 400_000, ([431], [])),
        (b"\r\n" * 200_000, ([431], [])),
    ):
        with connect(listener) as connection:
            try:
                connection.sendall(raw)
            except (BrokenPipeError, ConnectionResetError):
                pass
            assert [answer.status for answer in hear_anyhow(connection)] in statuses
