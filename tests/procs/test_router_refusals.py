"""A real router process: what it refuses, what it does when ranks come, go and die, and how it starts and stops."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.procs.router_fakes import WAIT_S, FakeRank, Reply, layout_of
from tests.procs.router_harness import RouterProcess, StartRouter, post, ranks_of, running_router
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def router(start_router: StartRouter) -> RouterProcess:
    return start_router(requests_max=32)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_everything(rank: FakeRank, router: RouterProcess, is_stream: bool) -> None:
    rank.answer = Reply(finish=None, slow_after=20)
    body = {"prompt": "x", "max_tokens": 500, "stream": is_stream}
    with router.http.stream("POST", "/v1/completions", json=body) if is_stream else sent(router, body) as response:
        submit = rank.seen.submit()
        if response is not None:
            next(response.iter_bytes())
    assert rank.seen.cancel() == submit.request_id
    router.wait_idle()
    wait_until(lambda: router.history(is_running=True).count("cancelled"), "its end is on record")


@contextmanager
def sent(router: RouterProcess, body: dict[str, object]) -> Iterator[None]:
    """A request whose answer is not waited for."""
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", router.port), WAIT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw))
        yield


def test_overload_is_refused_early(rank: FakeRank, router: RouterProcess) -> None:
    release = threading.Event()
    rank.answer = Reply(b"x", after=release)
    thread = threading.Thread(target=lambda: post(router, prompt=["a", "b"], n=16))  # 32 permits
    thread.start()
    wait_until(lambda: router.get("/load").json()["server_load"] == 32, "all permits are held")
    refused = post(router, prompt="x")  # it waits for no permit: all are held until it is there
    release.set()
    thread.join()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"] == {
        "message": "32 requests are being served; the limit is 32",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
    }
    router.wait_idle()
    never = post(router, prompt=["a", "b", "c"], n=16)
    assert never.status_code == 400


def test_a_full_rank_is_overload_too(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(fail=("queue_full", "4 requests wait; the limit is 4", True))
    answer = post(router, prompt="x")
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full"
    assert answer.headers["retry-after"]


def test_an_internal_error_keeps_its_text(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(fail=("device_error", "cuMemMap at /secret/path failed", False))
    answer = post(router, prompt="x")
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


BAD = [
    (b'{"prompt":"x","temperature":NaN}', "invalid_json", None),
    (b'{"prompt":"x","temperature":1e999}', "invalid_request", "temperature"),
    (b'{"prompt":"x","temperature":-1}', "invalid_request", "temperature"),
    (b'{"prompt":"x","temperature":"1"}', "invalid_request", "temperature"),
    (b'{"prompt":"x","max_tokens":0}', "invalid_request", "max_tokens"),
    (b'{"prompt":"x","max_tokens":1.5}', "invalid_request", "max_tokens"),
    (b'{"prompt":"x","max_tokens":true}', "invalid_request", "max_tokens"),
    (b'{"prompt":"x","max_tokens":1e400}', "invalid_request", "max_tokens"),
    (b'{"prompt":"x","max_tokens":-1,"echo":true}', "invalid_request", "max_tokens"),
    (b'{"prompt":"x","max_tokens":"5"}', "invalid_request", "max_tokens"),
    (b'{"prompt":"x","max_tokens":600}', "context_length_exceeded", "max_tokens"),
    (b'{"prompt":"x","n":129}', "invalid_request", "n"),
    (b'{"prompt":"x","n":33}', "invalid_request", "n"),  # requests_max is 32
    (b'{"prompt":"x","n":1000000000}', "invalid_request", "n"),
    (b'{"prompt":"x","stop":["a","","b"]}', "invalid_request", "stop[1]"),
    (b'{"prompt":"x","stop_token_ids":[260]}', "invalid_request", "stop_token_ids"),
    (b'{"prompt":"x","logit_bias":{"260":1}}', "invalid_request", "logit_bias"),
    (b'{"prompt":"x","logit_bias":{"1":101}}', "invalid_request", "logit_bias[...]"),
    (b'{"prompt":"x","best_of":2}', "unsupported", "best_of"),
    (b'{"prompt":"x","best_of":1,"n":2}', "unsupported", "best_of"),
    (b'{"prompt":"x","suffix":"y"}', "unsupported", "suffix"),
    (b'{"prompt":"x","priority":-1}', "unsupported", "priority"),
    (b'{"prompt":"x","priority":1000}', "unsupported", "priority"),
    (b'{"prompt":"x","priority":-1001}', "invalid_request", "priority"),
    (b'{"prompt":"x","response_format":{"type":"ebnf"}}', "unsupported", "response_format"),
    (b'{"prompt":"x","stream_options":{"include_usage":true}}', "invalid_request", "stream_options"),
    (b'{"prompt":"x","min_tokens":5,"max_tokens":4}', "invalid_request", "min_tokens"),
    (b'{"prompt":"x","request_id":"a b"}', "invalid_request", "request_id"),
    (b'{"prompt":""}', "invalid_request", "prompt"),
    (b'{"prompt":[]}', "invalid_request", "prompt"),
    (b'{"prompt":[[]]}', "invalid_request", "prompt"),
    (b'{"prompt":[-1]}', "invalid_request", "prompt"),
    (b'{"prompt":[260]}', "invalid_request", "prompt"),
    (b'{"prompt":[1,"a"]}', "invalid_request", "prompt"),
    (b'{"prompt":[[1,-1]]}', "invalid_request", "prompt"),
    (b'{"prompt":[99999999999999999999999999]}', "invalid_request", "prompt"),
    (b'{"prompt":[' + b'"a",' * 64 + b'"a"]}', "invalid_request", "prompt"),
    (b'{"prompt":' + b"[" * 50_000, "invalid_request", "prompt[0][0]"),
    (b'{"x":' + b"[" * 50_000, "invalid_json", None),
    (b'{"prompt":"x"', "invalid_json", None),
    (b"", "invalid_json", None),
    (b"null", "invalid_request", None),
    (b"\xff\xfe", "invalid_json", None),
    (b'{"prompt":"\xff"}', "invalid_json", None),
    (b"{}", "invalid_request", None),
]


@pytest.mark.parametrize(("raw", "code", "param"), BAD, ids=[str(raw[:40]) for raw, _, _ in BAD])
def test_bad_completions_are_refused(
    rank: FakeRank, router: RouterProcess, raw: bytes, code: str, param: str | None
) -> None:
    answer = router.http.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert len(error["message"]) < 400
    assert rank.seen.submits.empty()


BAD_CHAT = [
    ({"messages": []}, "invalid_request"),
    ({"messages": [{"role": "king", "content": "x"}]}, "invalid_request"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "unsupported"),
    ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "unsupported"),
    ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported"),
    ({"messages": HELLO, "top_logprobs": 3}, "invalid_request"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "invalid_request"),
    ({"messages": HELLO, "response_format": {"type": "ebnf"}}, "unsupported"),
]


@pytest.mark.parametrize(("body", "code"), BAD_CHAT)
def test_bad_chats_are_refused(rank: FakeRank, router: RouterProcess, body: dict[str, object], code: str) -> None:
    answer = post(router, "/v1/chat/completions", **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == code


def test_tools_may_be_switched_off(rank: FakeRank, router: RouterProcess) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = post(router, "/v1/chat/completions", messages=HELLO, tools=tools, tool_choice="none")
    assert answer.status_code == 200


def test_unknown_model_route_and_method(rank: FakeRank, router: RouterProcess) -> None:
    for answer, status, code in (
        (post(router, model="other", prompt="x"), 404, "model_not_found"),
        (router.get("/v1/models/other"), 404, "model_not_found"),
        (router.get("/v1/nothing"), 404, "not_found"),
        (router.get("/v1/completions/"), 404, "not_found"),
        (router.get("/v1/completions"), 405, "method_not_allowed"),
        (router.http.post("/v1/completions", content=b"x"), 415, "unsupported_media_type"),
    ):
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == code
        assert answer.headers["x-request-id"]


def test_the_document_describes_the_bodies(router: RouterProcess) -> None:
    document = router.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    schemas = document["components"]["schemas"]
    limits = schemas["ChatRequest"]["properties"]["n"]["anyOf"][0]
    assert (limits["minimum"], limits["maximum"]) == (1, 128)
    references = {part.split('"')[0] for part in router.get("/openapi.json").text.split("#/components/schemas/")[1:]}
    assert references <= set(schemas)


# ---- ranks that come, go and die -------------------------------------------------------------------------------------


def test_a_dead_rank_s_streams_go_on(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(finish=None, slow_after=20)
    body = {"prompt": "x", "max_tokens": 500, "stream": True}
    with router.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        first = next(lines)
        rank.seen.submit()
        rank.stop()
        rank.answer = lambda submit: Reply(bytes(submit.output) + b" and again")  # an earlier one cannot have said it
        rank.start()
        rest = [line for line in lines if line]
    again = rank.seen.submit()
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in [first, *rest[:-1]]]
    assert again.output
    assert "".join(texts).encode() == bytes(again.output) + b" and again"
    assert rest[-1] == "data: [DONE]"
    rank.answer = Reply(b"again")
    assert post(router, prompt="x").json()["choices"][0]["text"] == "again"


def test_a_request_without_tokens_is_submitted_anew(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(b"never", after=threading.Event())
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(router, prompt="x")))
    thread.start()
    first = rank.seen.submit()
    rank.stop()
    rank.answer = Reply(b"second try")
    rank.start()
    thread.join(WAIT_S)
    assert answers[0].json()["choices"][0]["text"] == "second try"
    second = rank.seen.submit()
    assert second.request_id != first.request_id
    assert (second.prompt, second.sampling) == (first.prompt, first.sampling)


def test_two_replicas_share_and_one_may_leave(tmp_path: Path) -> None:
    with running_router(tmp_path, 0, 1) as router, ranks_of(router, 0, 1) as ranks:
        router.wait_ready(2)
        release = threading.Event()
        for rank in ranks:
            rank.answer = lambda submit: Reply(bytes(submit.prompt), after=release)
        threads = [threading.Thread(target=lambda: post(router, prompt="x", n=2)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for rank in ranks:
            for _ in range(4):
                rank.seen.submit()  # eight choices, four each
        router.set_layout(layout_of(1, epoch=2))
        wait_until(lambda: router.metric("elasticmoe:epoch") == 2, "the new layout is in force")
        release.set()
        for thread in threads:
            thread.join(WAIT_S)  # those on the replica that left end as well
        assert post(router, prompt="last").json()["choices"][0]["text"] == "last"
        assert ranks[1].seen.submit().prompt == tuple(b"last")
        assert ranks[0].seen.submits.empty()
        report = router.stop()
    assert report.count("finish", "stop") == 9


def test_an_overloaded_replica_passes_on_to_the_other(tmp_path: Path) -> None:
    with running_router(tmp_path, 0, 1) as router, ranks_of(router, 0, 1) as ranks:
        ranks[0].answer = Reply(fail=("queue_full", "full", True))
        router.wait_ready(2)
        for _ in range(4):
            assert post(router, prompt="x").json()["choices"][0]["text"] == "Hello!"
        assert router.metric("elasticmoe:requests_resubmitted_total") >= 1


# ---- start and stop --------------------------------------------------------------------------------------------------


def test_before_any_rank_it_is_not_ready(tmp_path: Path) -> None:
    with running_router(tmp_path) as router:
        answer = post(router, prompt="x")
        ready = router.get("/ready")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.headers["retry-after"] == "1"
    assert (ready.status_code, ready.json()["phase"]) == (503, "waiting")


def test_stop_lets_requests_end(tmp_path: Path) -> None:
    release = threading.Event()
    answers: list[httpx.Response] = []
    with running_router(tmp_path) as router, ranks_of(router, 0) as (rank,):
        rank.answer = Reply(b"in time", after=release)
        router.wait_ready()
        thread = threading.Thread(target=lambda: answers.append(post(router, prompt="x")))
        thread.start()
        rank.seen.submit()
        router.process.terminate()
        wait_until(lambda: router.get("/ready").status_code == 503, "it drains")
        refused = post(router, prompt="x")
        release.set()
        thread.join(WAIT_S)
        report = router.stop()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert answers[0].json()["choices"][0]["text"] == "in time"
    assert report.count("finish") == 1


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    with running_router(tmp_path, api_key_file=tmp_path / "key") as router:
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert router.get(path).status_code in (200, 503)
        for path in ("/v1/models", "/load", "/openapi.json", "/nothing", "//health"):
            assert router.get(path).status_code == 401
        for value in ("Bearer wrong", "Basic s3cret", "s3cret", "Bearer", ""):
            answer = router.http.get("/v1/models", headers={"authorization": value})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        good = router.http.get("/v1/models", headers={"authorization": "Bearer s3cret"})
        assert good.status_code == 200
        for host in ("evil.example", "127.0.0.1"):  # decides nothing
            assert router.http.get("/v1/models", headers={"host": host}).status_code == 401
            answer = router.http.get("/v1/models", headers={"host": host, "authorization": "bearer  s3cret"})
            assert answer.status_code == 200
        for others in ("Bearer wrong", "Bearer s3cret"):
            twice = [("authorization", "Bearer s3cret"), ("authorization", others)]
            answer = router.http.get("/v1/models", headers=twice)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "duplicate_header")
        refused = router.get("/v1/models")
        assert refused.headers["www-authenticate"] == "Bearer"
    assert "s3cret" not in router.log_text
