"""A real router process in front of ranks that are scripted, with OpenAI's own client."""

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

from cli.models.byte_tokenizer import EOS_ID
from common.layout import RankId
from common.protocol.rank import Submit
from tests.procs.router_fakes import WAIT_S, FakeRank, Reply, layout_of
from tests.procs.router_harness import MODEL, RouterProcess, plain_client, write_model
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    base = tmp_path_factory.mktemp("router")
    process = RouterProcess(base / "run", write_model(base / "model"), layout_of(0), requests_max=32)
    yield process
    process.stop()


@pytest.fixture
def rank(router: RouterProcess) -> Iterator[FakeRank]:
    rank = FakeRank(router.sockets).start()
    router.wait_ready()
    try:
        yield rank
        router.wait_idle()
        router.history(is_running=True)
    finally:
        rank.stop()


@pytest.fixture
def client(router: RouterProcess) -> Iterator[openai.OpenAI]:
    with plain_client("") as http:
        yield openai.OpenAI(
            base_url=router.url + "/v1", api_key="none", max_retries=0, timeout=WAIT_S, http_client=http
        )


def post(router: RouterProcess, path: str = "/v1/completions", **body: object) -> httpx.Response:
    return router.http.post(path, json=body)


# ---- what clients get ------------------------------------------------------------------------------------------------


def test_chat(rank: FakeRank, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50)
    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 6, 11)
    submit = rank.seen.submit()
    assert submit.prompt == (256, 258, *b"Hi", 259)  # one bos: the template's
    assert submit.stop_token_ids == (EOS_ID,)
    assert submit.max_tokens == 50


def test_chat_stream_with_usage(rank: FakeRank, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello!"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert rank.seen.submit().max_tokens == 512 - 5  # the rest of the context


def test_completion_defaults_and_echo(rank: FakeRank, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="ab", echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == "abHello!"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("abHello!")
    assert choice.logprobs.token_logprobs == [None, *[-0.25] * 7]
    assert choice.logprobs.text_offset == list(range(8))
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[2] == {"H": -0.25, "x": -2.0}
    submit = rank.seen.submit()
    assert submit.max_tokens == 16
    assert submit.prompt_logprobs


def test_stream_has_the_same_text_and_logprobs(rank: FakeRank, client: openai.OpenAI) -> None:
    chunks = client.completions.create(model=MODEL, prompt=[97, 98], echo=True, logprobs=0, stream=True)
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == "abHello!"
    assert [token for c in choices if c.logprobs for token in c.logprobs.tokens or ()] == list("abHello!")
    assert [offset for c in choices if c.logprobs for offset in c.logprobs.text_offset or ()] == list(range(8))
    assert choices[-1].finish_reason == "stop"


def test_logprobs_of_partial_characters(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply("€!".encode())
    answer = client.completions.create(model=MODEL, prompt=[256, *"é".encode()], echo=True, logprobs=1)
    assert answer.choices[0].text == "é€!"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[1:4] == ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2"]
    assert logprobs.text_offset == [0, 0, 0, 1, 1, 1, 2]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[3] == {"bytes:\\xe2": -0.25}


def test_chat_logprobs(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply("é".encode())
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.bytes for token in logprobs.content] == [[0xC3], [0xA9]]
    assert logprobs.content[0].top_logprobs[2].logprob == -9999.0
    assert answer.choices[0].message.content == "é"


def test_choices_have_seeds_of_their_own(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = lambda submit: Reply(f"seed {submit.sampling.seed}".encode(), per_step=3)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=7)
    assert [choice.message.content for choice in answer.choices] == ["seed 7", "seed 8", "seed 9"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 18)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=-1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [f"seed {(1 << 63) - 1}", "seed 0", "seed 1"]


def test_batch_of_prompts(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = lambda submit: Reply(bytes(submit.prompt))
    answer = client.completions.create(model=MODEL, prompt=["one", "two"], n=2)
    assert [choice.text for choice in answer.choices] == ["one", "one", "two", "two"]
    answer = client.completions.create(model=MODEL, prompt=[[97], [98, 99]])
    assert [choice.text for choice in answer.choices] == ["a", "bc"]


@pytest.mark.parametrize("per_step", [1, 2, 5])
def test_characters_are_never_split(rank: FakeRank, client: openai.OpenAI, per_step: int) -> None:
    text = "a🌍é你好👩‍👩‍👧z"
    rank.answer = Reply(text.encode(), per_step=per_step)
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_bytes_that_stay_incomplete_are_told_at_the_end(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply("a🌍".encode()[:3])
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "a\ufffd"


@pytest.mark.parametrize("per_step", [1, 3, 40])
def test_stop_string_across_tokens(rank: FakeRank, client: openai.OpenAI, per_step: int) -> None:
    rank.answer = Reply(b"one STtwo STOP three", finish="length", per_step=per_step)
    answer = client.completions.create(model=MODEL, prompt="x", stop=["STOP", "nothing"], max_tokens=100)
    assert answer.choices[0].text == "one STtwo "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("one STtwo STOP")
    stream = client.completions.create(model=MODEL, prompt="x", stop="STOP", stream=True, max_tokens=100)
    assert "".join(chunk.choices[0].text for chunk in stream) == "one STtwo "


def test_stop_string_frees_the_rank(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply(finish=None)  # abcdef... without end
    answer = client.completions.create(model=MODEL, prompt="x", stop="fgh", max_tokens=500)
    assert answer.choices[0].text == "abcde"
    assert rank.seen.cancel() == rank.seen.submit().request_id


def test_sampling_reaches_the_rank(rank: FakeRank, router: RouterProcess) -> None:
    body = {
        "prompt": "x",
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"97": -100, "98": 5},
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [99],
        "priority": -3,
        "user": "me",
        "something_new": {"deep": [1]},
    }
    assert post(router, **body).status_code == 200
    submit = rank.seen.submit()
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-1.0, 1.5, 1.1)
    assert dict(sampling.logit_bias) == {97: -100.0, 98: 5.0}
    assert (submit.min_tokens, submit.stop_token_ids, submit.priority) == (2, (99,), -3)


def test_models_tokens_and_versions(rank: FakeRank, router: RouterProcess, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    tokens = post(router, "/tokenize", prompt="é!", return_token_strs=True).json()
    assert tokens == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [0xC3, 0xA9, 33],
        "token_strs": ["\ufffd", "\ufffd", "!"],
    }
    assert post(router, "/tokenize", messages=HELLO).json()["tokens"] == [256, 258, *b"Hi", 259]
    assert post(router, "/detokenize", tokens=[0xC3, 0xA9]).json() == {"prompt": "é"}
    assert router.get("/version").json()["version"]
    assert router.get("/ready").json()["phase"] == "serving"


def test_metrics(rank: FakeRank, router: RouterProcess, client: openai.OpenAI) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
    names += ("vllm:time_to_first_token_seconds_count", "vllm:e2e_request_latency_seconds_count")
    before = [router.metric(name) for name in names]
    client.completions.create(model=MODEL, prompt="abc")
    after = [router.metric(name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [3, 6, 1, 1, 1]
    assert router.metric("elasticmoe:epoch") == 1
    assert router.metric("elasticmoe:experts_per_rank") == 4
    assert router.metric("elasticmoe:kv_blocks") == 100
    assert "vllm:num_requests_running{" in router.get("/metrics").text
    assert router.metric("vllm:kv_cache_usage_perc") == 0


def test_request_ids(rank: FakeRank, router: RouterProcess) -> None:
    def ask(headers: dict[str, str], **body: str) -> httpx.Response:
        return router.http.post("/v1/completions", json={"prompt": "x", **body}, headers=headers)

    answer = ask({"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.json()["id"] == "cmpl-abc-1"
    assert ask({}, request_id="mine").json()["id"] == "cmpl-mine"
    assert len(ask({}).headers["x-request-id"]) == 24
    refused = ask({"X-Request-Id": "a" * 129})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_request"


# ---- what does not go well -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_everything(rank: FakeRank, router: RouterProcess, is_stream: bool) -> None:
    rank.answer = Reply(finish=None)
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
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw))
        yield


def test_overload_is_refused_early(rank: FakeRank, router: RouterProcess) -> None:
    release = threading.Event()
    rank.answer = Reply(b"x", after=release)
    thread = threading.Thread(target=lambda: post(router, prompt=["a", "b"], n=16))  # 32 permits
    thread.start()
    wait_until(lambda: router.get("/load").json()["server_load"] == 32, "all permits are held")
    started = time.monotonic()
    refused = post(router, prompt="x")
    took_s = time.monotonic() - started
    release.set()
    thread.join()
    assert took_s < 0.5  # the promise is 50 ms; the machine may be busy
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
    answer = post(router, prompt="x", stream=True)
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
    (b'{"prompt":"x","max_tokens":1.0}', "invalid_request", "max_tokens"),
    (b'{"prompt":"x","max_tokens":"5"}', "invalid_request", "max_tokens"),
    (b'{"prompt":"x","max_tokens":600}', "context_length_exceeded", "max_tokens"),
    (b'{"prompt":"x","n":17}', "invalid_request", "n"),
    (b'{"prompt":"x","n":1000000000}', "invalid_request", "n"),
    (b'{"prompt":"x","stop":["a","","b"]}', "invalid_request", "stop[1]"),
    (b'{"prompt":"x","stop_token_ids":[260]}', "invalid_request", "stop_token_ids"),
    (b'{"prompt":"x","logit_bias":{"260":1}}', "invalid_request", "logit_bias"),
    (b'{"prompt":"x","logit_bias":{"1":101}}', "invalid_request", "logit_bias[...]"),
    (b'{"prompt":"x","best_of":2}', "unsupported", "best_of"),
    (b'{"prompt":"x","suffix":"y"}', "unsupported", "suffix"),
    (b'{"prompt":"x","response_format":{"type":"json_object"}}', "unsupported", "response_format"),
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
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "unsupported"),
    ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported"),
    ({"messages": HELLO, "top_logprobs": 3}, "invalid_request"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "invalid_request"),
    ({"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {}}}, "unsupported"),
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
    assert (limits["minimum"], limits["maximum"]) == (1, 16)
    references = {part.split('"')[0] for part in router.get("/openapi.json").text.split("#/components/schemas/")[1:]}
    assert references <= set(schemas)


# ---- ranks that come, go and die -------------------------------------------------------------------------------------


def test_a_dead_rank_ends_its_streams_with_an_error(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(finish=None)
    body = {"prompt": "x", "max_tokens": 500, "stream": True}
    with router.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        rank.stop()
        rank.answer = Reply(b"again")
        rank.start()
        rest = [line for line in lines if line]
    assert '"code":"rank_lost"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
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
    router = RouterProcess(tmp_path / "run", write_model(tmp_path / "model"), layout_of(0, 1))
    ranks = [FakeRank(router.sockets, RankId(replica, 0)).start() for replica in (0, 1)]
    try:
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
    finally:
        for rank in ranks:
            rank.stop()
        report = router.stop()
    assert report.count("finish", "stop") == 9


def test_an_overloaded_replica_passes_on_to_the_other(tmp_path: Path) -> None:
    router = RouterProcess(tmp_path / "run", write_model(tmp_path / "model"), layout_of(0, 1))
    ranks = [FakeRank(router.sockets, RankId(replica, 0)).start() for replica in (0, 1)]
    ranks[0].answer = Reply(fail=("queue_full", "full", True))
    try:
        router.wait_ready(2)
        for _ in range(4):
            assert post(router, prompt="x").json()["choices"][0]["text"] == "Hello!"
        assert router.metric("elasticmoe:requests_resubmitted_total") >= 1
    finally:
        for rank in ranks:
            rank.stop()
        router.stop()


# ---- start and stop --------------------------------------------------------------------------------------------------


def test_before_any_rank_it_is_not_ready(tmp_path: Path) -> None:
    router = RouterProcess(tmp_path / "run", write_model(tmp_path / "model"), layout_of(0))
    answer = post(router, prompt="x")
    ready = router.get("/ready")
    router.stop()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.headers["retry-after"] == "1"
    assert (ready.status_code, ready.json()["phase"]) == (503, "waiting")


def test_stop_lets_requests_end(tmp_path: Path) -> None:
    router = RouterProcess(tmp_path / "run", write_model(tmp_path / "model"), layout_of(0))
    rank = FakeRank(router.sockets).start()
    release = threading.Event()
    rank.answer = Reply(b"in time", after=release)
    answers: list[httpx.Response] = []
    try:
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
    finally:
        rank.stop()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert answers[0].json()["choices"][0]["text"] == "in time"
    assert report.count("finish") == 1


def test_keys(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    model = write_model(tmp_path / "model")
    router = RouterProcess(tmp_path / "run", model, layout_of(0), api_key_file=tmp_path / "key")
    try:
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert router.get(path).status_code in (200, 503)
        for path in ("/v1/models", "/load", "/openapi.json", "/nothing", "//health"):
            assert router.get(path).status_code == 401
        for value in ("Bearer wrong", "Basic s3cret", "s3cret", "Bearer", ""):
            answer = router.http.get("/v1/models", headers={"authorization": value})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        good = router.http.get("/v1/models", headers={"authorization": "Bearer s3cret"})
        assert good.status_code == 200
        host = {"host": "127.0.0.1:8000/health?"}  # decides nothing
        assert router.http.get("/v1/models", headers=host).status_code == 401
    finally:
        router.stop()
        assert "s3cret" not in router.log_text


def test_submit_is_what_the_protocol_says(rank: FakeRank, router: RouterProcess) -> None:
    post(router, prompt="x", n=2)
    first, second = rank.seen.submit(), rank.seen.submit()
    assert isinstance(first, Submit)
    assert first.request_id != second.request_id
    assert second.sampling.seed == (first.sampling.seed + 1) & ((1 << 63) - 1)
