"""Who may ask a listener: hosts and origins without a key, cross-origin pages by a setting, operators by one token."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from elasticmoe.services.scaler.api.event_stream import LISTENERS_MAX
from tests.procs.router_harness import RouterProcess, StartRouter, running_router, serving, write_model
from tests.procs.scaler_harness import ScalerProcess

pytestmark = pytest.mark.procs

CHAT_PAGE = "https://chat.example.org"
KEEP_ALIVE_S = 0.5
BODY = {"tokens": [88, 89]}


@pytest.fixture(scope="module")
def widened(start_router: StartRouter) -> RouterProcess:
    hosts = "llm.example.org, *.svc"
    return start_router(allowed_hosts=hosts, cors_origins=CHAT_PAGE, keep_alive_seconds=KEEP_ALIVE_S)


@pytest.fixture(scope="module")
def scaler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScalerProcess]:
    base = tmp_path_factory.mktemp("scaler")
    process = ScalerProcess(base / "run", write_model(base / "model"), keep_alive_seconds=KEEP_ALIVE_S)
    yield process
    process.stop()


def error_of(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


# ---- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "192.0.2.1", "llm.example.org", ""])
def test_without_a_key_other_hosts_are_refused(router: RouterProcess, host: str) -> None:
    for path in ("/v1/models", "/load", "/openapi.json", "/v1/nothing"):
        assert error_of(router.http.get(path, headers={"host": host})) == (403, "host_refused")
    answer = router.http.post("/detokenize", json=BODY, headers={"host": host})
    assert error_of(answer) == (403, "host_refused")
    assert "allowed_hosts" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics"])
def test_probes_name_a_listener_in_their_own_way(router: RouterProcess, path: str) -> None:
    """A kubelet sends the address of the pod, Prometheus the name of a service."""
    assert router.http.get(path, headers={"host": "10.244.1.7:8000"}).status_code == 200
    assert router.http.get("/ready", headers={"host": "router.default.svc"}).status_code == 503


def test_this_machine_s_names_and_allowed_ones_are_served(router: RouterProcess, widened: RouterProcess) -> None:
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", "app.localhost"):
        assert router.http.post("/detokenize", json=BODY, headers={"host": host}).status_code == 200
    for host in ("llm.example.org", "llm.example.org:443", "router.svc", "localhost"):
        assert widened.http.post("/detokenize", json=BODY, headers={"host": host}).status_code == 200
    for host in ("example.org", "svc", "evil.example"):
        assert error_of(widened.http.get("/v1/models", headers={"host": host})) == (403, "host_refused")


def test_a_target_s_host_counts_not_the_field(router: RouterProcess) -> None:
    """RFC 9112 section 3.2.2."""

    for target, field, status in (("evil.example", "localhost", b"403"), ("localhost", "evil.example", b"200")):
        with socket.create_connection(("127.0.0.1", router.port), 10) as connection:
            lines = [f"GET http://{target}/v1/models HTTP/1.1", f"Host: {field}", "Connection: close", "", ""]
            connection.sendall("\r\n".join(lines).encode())
            assert connection.recv(100).split(b" ")[1] == status


# ---- origins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", CHAT_PAGE, ""])
def test_without_a_key_other_pages_are_refused(router: RouterProcess, origin: str) -> None:
    for path in ("/v1/models", "/health", "/metrics"):
        answer = router.http.get(path, headers={"origin": origin})
        assert error_of(answer) == (403, "origin_refused")
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert error_of(router.http.post("/detokenize", json=BODY, headers={"origin": origin})) == (403, "origin_refused")
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    assert error_of(router.http.request("OPTIONS", "/detokenize", headers=preflight)) == (403, "origin_refused")


def test_a_page_of_the_listener_s_own_may_ask(router: RouterProcess) -> None:
    own = {"host": f"localhost:{router.port}", "origin": f"http://localhost:{router.port}"}
    assert router.http.post("/detokenize", json=BODY, headers=own).status_code == 200


def test_an_allowed_page_may_ask_and_read(widened: RouterProcess) -> None:
    preflight = {
        "origin": CHAT_PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    answer = widened.http.request("OPTIONS", "/v1/chat/completions", headers=preflight)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == CHAT_PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == preflight["access-control-request-headers"]
    assert "origin" in answer.headers.get_list("vary")
    for answer, status in (
        (widened.http.post("/detokenize", json=BODY, headers={"origin": CHAT_PAGE}), 200),
        (widened.http.post("/detokenize", json={}, headers={"origin": CHAT_PAGE}), 400),
        (widened.http.get("/nothing", headers={"origin": CHAT_PAGE}), 404),
    ):
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == CHAT_PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    other = widened.http.post("/detokenize", json=BODY, headers={"origin": "https://evil.example"})
    assert error_of(other) == (403, "origin_refused")
    plain = widened.http.post("/detokenize", json=BODY)
    assert "access-control-allow-origin" not in plain.headers


def test_with_a_key_pages_may_ask_but_read_only_by_the_setting(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret")
    settings = {"api_key_file": tmp_path / "key", "cors_origins": CHAT_PAGE}
    with running_router(tmp_path, **settings) as router:
        preflight = {"origin": CHAT_PAGE, "access-control-request-method": "POST"}
        answer = router.http.request("OPTIONS", "/detokenize", headers=preflight)
        assert answer.status_code == 204, "a preflight has no key"
        keyless = router.http.post("/detokenize", json=BODY, headers={"origin": CHAT_PAGE})
        assert error_of(keyless) == (401, "invalid_api_key")
        assert keyless.headers["access-control-allow-origin"] == CHAT_PAGE, "the page learns why"
        other = {"origin": "https://evil.example", "host": "evil.example", "authorization": "Bearer s3cret"}
        answer = router.http.post("/detokenize", json=BODY, headers=other)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers
        assert error_of(router.http.request("OPTIONS", "/detokenize", headers=other)) == (405, "method_not_allowed")


def test_an_answer_in_pieces_has_the_headers_too(widened: RouterProcess) -> None:
    with serving(widened):
        body = {"prompt": "x", "stream": True}
        answer = widened.http.post("/v1/completions", json=body, headers={"origin": CHAT_PAGE})
        assert answer.headers["access-control-allow-origin"] == CHAT_PAGE
        assert answer.text.endswith("data: [DONE]\n\n")


def test_an_idle_connection_ends_after_the_setting(widened: RouterProcess, scaler: ScalerProcess) -> None:
    for process in (widened, scaler):
        with socket.create_connection(("127.0.0.1", process.port), 10) as connection:
            begun = time.monotonic()
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while connection.recv(4_096):
                pass
            assert KEEP_ALIVE_S - 0.1 < time.monotonic() - begun < 10


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1", "null", ""])
def test_no_page_may_ask_the_scaler(scaler: ScalerProcess, origin: str) -> None:
    for method, path in (("GET", "/health"), ("GET", "/v1/layout"), ("POST", "/v1/scale"), ("OPTIONS", "/v1/scale")):
        preflight = {"access-control-request-method": "POST"} if method == "OPTIONS" else {}
        answer = scaler.http.request(method, path, headers={"origin": origin, **preflight})
        assert error_of(answer) == (403, "origin_refused")
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_one_token_or_none(scaler: ScalerProcess) -> None:
    good = scaler.http.headers["authorization"]
    with httpx.Client(base_url=scaler.url, timeout=60, trust_env=False) as client:
        for headers in (
            [("authorization", good), ("authorization", good)],
            [("authorization", good), ("authorization", "Bearer wrong")],
            [("authorization", "Bearer wrong"), ("authorization", good)],
        ):
            assert error_of(client.get("/v1/layout", headers=headers)) == (400, "duplicate_header")
        for wrong in (
            "",
            "Bearer",
            "Bearer wrong",
            good.removeprefix("Bearer "),
            good + "x",
            f"{good}, {good}",
        ):
            answer = client.get("/v1/layout", headers={"authorization": wrong})
            assert error_of(answer) == (401, "invalid_admin_token")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/config", headers={"authorization": good.replace("Bearer", "bearer")}).status_code == 200


def test_what_is_denied_is_denied_whatever_is_asked(scaler: ScalerProcess) -> None:
    with httpx.Client(base_url=scaler.url, timeout=60, trust_env=False) as client:
        paths = [
            *client.get("/openapi.json", headers=scaler.http.headers).json()["paths"],
            "/openapi.json",
            "/docs",
            "/x",
        ]
        for path in set(paths) - {"/health", "/ready"}:
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
                answer = client.request(method, path)
                assert answer.status_code == 401, (method, path)


def test_no_redirect_takes_a_token_elsewhere(scaler: ScalerProcess, router: RouterProcess) -> None:
    for process in (scaler, router):
        for path in ("/health/", "/v1/layout/", "/v1/models/", "/v1/operations/"):
            answer = process.http.get(path, headers={"host": "localhost"})
            assert answer.status_code == 404
            assert "location" not in answer.headers


def test_the_head_of_a_stream_ends_and_frees_its_listener(scaler: ScalerProcess) -> None:
    with scaler.http.stream("GET", "/v1/events") as events:
        for _ in range(2 * LISTENERS_MAX):
            head = scaler.http.head("/v1/events")
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == events.headers["content-type"]
    with httpx.Client(base_url=scaler.url, headers=scaler.http.headers, trust_env=False) as client:
        for _ in range(2 * LISTENERS_MAX):  # on one connection
            assert client.head("/v1/events").status_code == 200
    assert scaler.http.get("/v1/config").status_code == 200


def test_orders_that_may_be_repeated_say_when(scaler: ScalerProcess) -> None:
    answer = scaler.http.get("/v1/layout")
    assert error_of(answer)[0] == 503
    assert answer.json()["error"]["type"] == "service_unavailable_error"
    assert answer.headers["retry-after"] == "1"
    final = scaler.http.post("/v1/scale", json={"replicas": 0})
    assert error_of(final) == (400, "invalid_request")
    assert "retry-after" not in final.headers
