"""Both APIs with bad bodies, paths, methods and headers: every error has a code, and its text is in words of ours."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.procs.router_harness import RouterProcess
from tests.procs.scaler_harness import ScalerProcess
from tests.wording import faults_of

pytestmark = pytest.mark.procs

NO_JSON = [
    b"",
    b" \n",
    b"{",
    b"nonsense",
    b'{"a" 1}',
    b"{'a': 1}",
    b'{"a": 1,}',
    b'{"a": 1} trailing',
    b"\xff\xfe",
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\x"}',
    b'{"prompt": 01}',
    b'{"prompt": NaN}',
    b'{"prompt": 1e999}',
    b"[" * 5_000,
    b'{"a":' * 5_000,
    b"\x00",
    b"\xef\xbb\xbf{}",
]
NO_OBJECT = [b"[]", b"null", b"1", b'"text"', b"true", b"{}"]
VALUES: list[Any] = [
    -1,
    0,
    1.5,
    1e30,
    10**40,
    True,
    "x",
    "",
    "x" * 1_000,
    [],
    [[]],
    [None],
    [-1],
    {},
    {"a": 1},
    {"": ""},
]
ROUTER = {
    "/v1/completions": ({"prompt": "x"}, ("prompt", "n", "max_tokens", "temperature", "top_k", "stop", "logit_bias")),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "x"}]},
        ("messages", "stream", "stream_options", "tools", "tool_choice", "response_format", "reasoning_effort"),
    ),
    "/tokenize": ({"prompt": "x"}, ("prompt", "messages", "chat_template_kwargs", "documents")),
    "/detokenize": ({"tokens": [1]}, ("tokens", "model")),
}
SCALER = {
    "/v1/scale": (
        {"replicas": 2},
        ("replicas", "devices", "remove", "lost", "op_id", "deadline_s", "reason", "dry_run"),
    ),
    "/v1/rebalance": ({}, ("op_id", "deadline_s", "reason", "replicas")),
}
ROLES = [{"role": "boss", "content": "x"}, {"content": "x"}, {"role": "user", "content": 3}]
Api = tuple[httpx.Client, dict[str, tuple[dict[str, Any], tuple[str, ...]]]]


def check(answer: httpx.Response, what: object) -> dict[str, Any]:
    assert answer.status_code >= 400, (what, answer.text)
    error: dict[str, Any] = answer.json()["error"]
    assert faults_of(error["code"], error["message"]) == [], (what, error)
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.fixture(params=["router", "scaler"])
def api(request: pytest.FixtureRequest, router: RouterProcess, scaler: ScalerProcess) -> tuple[httpx.Client, Any]:
    return (router.http, ROUTER) if request.param == "router" else (scaler.http, SCALER)


def post(client: httpx.Client, path: str, raw: bytes) -> httpx.Response:
    return client.post(path, content=raw, headers={"content-type": "application/json"})


def test_bodies_that_are_none(api: Api) -> None:
    client, paths = api
    for path in paths:
        for raw in NO_JSON:
            if path == "/v1/rebalance" and not raw:
                continue  # it may be empty
            assert check(post(client, path, raw), (path, raw[:40]))["code"] in ("invalid_json", "invalid_request"), raw[
                :40
            ]
        for raw in NO_OBJECT:
            if not (path == "/v1/rebalance" and raw == b"{}"):
                check(post(client, path, raw), (path, raw))


def test_fields_of_another_kind_or_size(api: Api) -> None:
    """Whatever is not refused for its form is refused because nothing serves here: also an error of ours."""
    client, paths = api
    seen: set[str] = set()
    for path, (base, fields) in paths.items():
        for field in (*fields, "unknwon"):
            for value in VALUES:
                body = json.dumps({**base, field: value}).encode()
                answer = post(client, path, body)
                if answer.status_code < 400:
                    continue  # it may be so
                error = check(answer, (path, field, value))
                seen.add(error["code"])
                if error["code"] == "invalid_request" and error["param"] is not None:
                    assert error["param"].partition("[")[0] in error["message"], error
    assert "invalid_request" in seen


def test_what_a_text_says(router: RouterProcess, scaler: ScalerProcess) -> None:
    def told(process: RouterProcess | ScalerProcess, path: str, body: Any) -> str:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return str(check(post(process.http, path, raw), body)["message"])

    assert told(scaler, "/v1/scale", {"replicas": 0}) == "replicas: has to be a whole number of at least 1; it is 0"
    assert told(scaler, "/v1/scale", {"replica": 3}) == "the body has no field 'replica'; did you mean 'replicas'?"
    assert told(scaler, "/v1/scale", {"replicas": 2, "op_id": "a b"}) == (
        'op_id: has to be 1 to 64 of the characters A-Z a-z 0-9 _ . : -; it is "a b"'
    )
    assert told(scaler, "/v1/scale", b"") == "the body is empty; it has to be a JSON object"
    assert told(scaler, "/v1/scale", b"[1]") == "the body has to be an object; it is a list"
    completions = "/v1/completions"
    assert told(router, completions, b"") == "the body is empty; it has to be a JSON object"
    assert told(router, completions, b'{"prompt": ') == (
        "the body is not valid JSON: it ends after 11 bytes, before it is complete"
    )
    assert told(router, completions, {}) == "the body needs a field 'prompt'"
    chat = "/v1/chat/completions"
    told_roles = [told(router, chat, {"messages": [message]}) for message in ROLES]
    assert told_roles[0] == (
        'messages[0].role: has to be one of assistant, developer, function, system, tool, user; it is "boss"'
    )
    assert told_roles[1] == "messages[0]: needs a field 'role'"
    assert told_roles[2] == "messages[0].content: has to be a text or a list; it is 3"


def test_paths_methods_and_credentials(router: RouterProcess, scaler: ScalerProcess) -> None:
    for client in (router.http, scaler.http):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            check(client.request(method, "/nowhere"), method)
        check(client.request("PATCH", "/health"), "PATCH /health")
        check(client.post("/v1/scale", content=b"x", headers={"content-encoding": "gzip"}), "gzip")
        check(client.get("/v1/models", headers={"host": "evil.example"}), "host")
        check(client.get("/v1/layout", headers={"origin": "https://evil.example"}), "origin")
    check(scaler.http.get("/v1/layout", headers={"authorization": "Bearer no"}), "token")
    check(scaler.http.get("/v1/operations/nothing"), "operation")
    check(scaler.http.delete("/v1/operations/%20"), "cancel")
    check(scaler.http.get("/v1/devices"), "devices")
