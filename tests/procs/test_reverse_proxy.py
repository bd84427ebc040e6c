"""The two configurations of docs/reverse-proxy.md, run for real: streams come as they are made, silence ends no stream,
bodies and headers arrive, who leaves is noticed, and what the router says is what the client gets."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from elasticmoe.common.config import defaults
from tests.certificate import NAME
from tests.procs.proxies import PAGE, Proxy, start_proxy, text_of
from tests.procs.raw_http import hear_until
from tests.procs.router_fakes import WAIT_S, FakeRank, Reply
from tests.procs.router_harness import RouterProcess, StartRouter

pytestmark = pytest.mark.procs

KEEPALIVE_S = 0.2
COMMENT = b": keep-alive\n\n"
BODY_MAX = int(defaults()["body_bytes_max"])
# What the page says about buffering has to do without the router's header that asks for it, and the other way round.
UNBUFFERED = {"nginx": "proxy_buffering off;", "caddy": "flush_interval -1"}
PROXIES = list(UNBUFFERED)


@pytest.fixture(scope="module")
def router(start_router: StartRouter) -> RouterProcess:
    """Without a key: it serves the name that the proxy passes on, and no other."""
    return start_router(stream_keepalive_s=KEEPALIVE_S, allowed_hosts=NAME)


@pytest.fixture(scope="module", params=PROXIES)
def proxy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, router: RouterProcess
) -> Iterator[Proxy]:
    changes = [(UNBUFFERED["nginx"], f"{UNBUFFERED['nginx']} proxy_ignore_headers X-Accel-Buffering;")]
    folder = tmp_path_factory.mktemp(request.param)
    found = start_proxy(request.param, folder, router.port, *(changes if request.param == "nginx" else ()))
    yield found
    found.stop()


@contextmanager
def connection_to(proxy: Proxy) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=str(proxy.certificate))
    with (
        socket.create_connection(("127.0.0.1", proxy.port), WAIT_S) as connection,
        context.wrap_socket(connection, server_hostname=NAME) as secured,
    ):
        yield secured


def ask(connection: ssl.SSLSocket, body: bytes, size: int = 0) -> None:
    """`size`: of the whole body, of which only this is sent."""
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {NAME}", "Content-Type: application/json"]
    connection.sendall("\r\n".join([*lines, f"Content-Length: {size or len(body)}", "", ""]).encode() + body)


def client_of(proxy: Proxy) -> httpx.Client:
    """A client of https://127.0.0.1 that asks for the name."""
    context = ssl.create_default_context(cafile=str(proxy.certificate))
    url = f"https://127.0.0.1:{proxy.port}"
    return httpx.Client(base_url=url, verify=context, trust_env=False, timeout=WAIT_S, headers={"host": NAME})


def post(http: httpx.Client, body: bytes, **headers: str) -> httpx.Response:
    extra = {"content-type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    request = http.build_request("POST", "/v1/completions", content=body, headers=extra)
    request.extensions["sni_hostname"] = NAME
    return http.send(request)


STREAM = json.dumps({"prompt": "x", "stream": True, "max_tokens": 20}).encode()
WHOLE = json.dumps({"prompt": "x", "max_tokens": 20}).encode()


def test_a_stream_comes_as_it_is_made(proxy: Proxy, rank: FakeRank) -> None:
    """Each part is heard before the next one is let come: whatever is held back would hold up the test."""
    release = threading.Event()
    rank.answer = Reply(b"Hello!", after=release)
    with connection_to(proxy) as connection:
        ask(connection, STREAM)
        assert hear_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        hear_until(connection, COMMENT, times=2)
        release.set()
        hear_until(connection, b"[DONE]")
    rank.answer = Reply(finish=None)
    with connection_to(proxy) as connection:
        ask(connection, STREAM.replace(b"20", b"400"))
        hear_until(connection, b"data: {", times=3)
        rank.is_muted.set()
        hear_until(connection, COMMENT, times=2)
        rank.is_muted.clear()
        hear_until(connection, b"data: {", times=3)
    assert rank.seen.cancel(), "the client has left, and the proxy lets the router know"


@pytest.mark.parametrize("name", PROXIES)
def test_silence_ends_whole_answers_and_no_streams(
    name: str, tmp_path: Path, router: RouterProcess, rank: FakeRank
) -> None:
    """With a limit of four seconds in place of the page's, which is longer than any request may take."""
    proxy = start_proxy(name, tmp_path, router.port, ("610s", "4s"), (UNBUFFERED[name], ""))
    try:
        release = threading.Event()
        rank.answer = Reply(b"Hello!", after=release)
        with connection_to(proxy) as connection:
            ask(connection, STREAM)
            hear_until(connection, COMMENT, times=int(6 / KEEPALIVE_S))
            release.set()
            hear_until(connection, b"[DONE]")
        rank.answer = Reply(b"Hello!", after=threading.Event())
        with client_of(proxy) as http:
            assert post(http, WHOLE).status_code == 504
        assert rank.seen.cancel()
    finally:
        proxy.stop()


def test_what_arrives_and_what_comes_back(proxy: Proxy, rank: FakeRank) -> None:
    rank.answer = Reply(b"Hello!")
    with client_of(proxy) as http:
        answer = post(http, WHOLE, x_request_id="grow-monday-7")
        assert answer.json()["choices"][0]["text"] == "Hello!"
        assert answer.headers["x-request-id"] == "grow-monday-7"
        refused = post(http, WHOLE.replace(b"20", b"9999"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert post(http, b"{").json()["error"]["code"] == "invalid_json"
        for path, status in (("/ready", 200), ("/health", 200), ("/v1/models", 200), ("/metrics", 403)):
            request = http.build_request("GET", path)
            request.extensions["sni_hostname"] = NAME
            assert http.send(request).status_code == status, path


def test_bodies_up_to_the_routers_limit_arrive_and_larger_ones_get_its_error(proxy: Proxy, rank: FakeRank) -> None:
    rank.answer = Reply(b"H")
    with client_of(proxy) as http:
        assert post(http, WHOLE + b" " * (BODY_MAX - len(WHOLE))).status_code == 200
    with connection_to(proxy) as connection:  # it is refused before all is sent; Caddy waits for its first kilobytes
        ask(connection, WHOLE + b" " * 65_536, BODY_MAX + 1)
        told = hear_until(connection, b"}}")
    assert told.startswith(b"HTTP/1.1 413")
    assert b'"code":"payload_too_large"' in told.replace(b" ", b"")


def test_the_pages_figures_fit_the_routers() -> None:
    known = defaults()
    for name in PROXIES:
        text = text_of(name)
        (silence,) = {int(number) for number in re.findall(r"(\d+)s\b", text) if int(number) > 100}
        assert silence > known["request_seconds_max"]
        assert re.search(r"keepalive(?:_timeout)? 60s", text)
        assert known["keep_alive_seconds"] > 60
        (size,) = re.findall(r"(?:client_max_body_size|max_size) (\d+)(?:m;|MiB)", text)
        assert int(size) << 20 > BODY_MAX
    assert f"({known['request_seconds_max']:g} s)" in PAGE.read_text()
    assert f"({known['keep_alive_seconds']:g} s)" in PAGE.read_text()
    assert f"({BODY_MAX >> 20} MiB)" in PAGE.read_text()
