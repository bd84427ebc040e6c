"""A real router process in front of ranks that are scripted, with OpenAI's own client."""

from __future__ import annotations

import httpx
import openai
import pytest

from elasticmoe.cli.models.byte_tokenizer import EOS_ID
from elasticmoe.common.protocol.rank import Submit
from tests.procs.router_fakes import FakeRank, Reply
from tests.procs.router_harness import MODEL, RouterProcess, StartRouter, post

pytestmark = pytest.mark.procs
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def router(start_router: StartRouter) -> RouterProcess:
    return start_router(requests_max=32)


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
        "priority": 0,
        "user": "me",
        "something_new": {"deep": [1]},
    }
    assert post(router, **body).status_code == 200
    submit = rank.seen.submit()
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-1.0, 1.5, 1.1)
    assert dict(sampling.logit_bias) == {97: -100.0, 98: 5.0}
    assert (submit.min_tokens, submit.stop_token_ids, submit.priority) == (2, (99,), 0)


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
    assert ask({"X-Request-Id": "abc-1"}, request_id="mine").json()["id"] == "cmpl-abc-1"
    for unusable in ({}, {"X-Request-Id": "/trace#1="}, {"X-Request-Id": "a" * 129}):
        answer = ask(unusable, request_id="mine")
        assert (answer.json()["id"], answer.headers["x-request-id"]) == ("cmpl-mine", "mine")
        drawn = ask(unusable)
        assert len(drawn.headers["x-request-id"]) == 24
        assert drawn.json()["id"] == f"cmpl-{drawn.headers['x-request-id']}"
    for bad in ("/trace#1=", "a" * 129):
        refused = ask({}, request_id=bad)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id")


def test_submit_is_what_the_protocol_says(rank: FakeRank, router: RouterProcess) -> None:
    post(router, prompt="x", n=2)
    first, second = rank.seen.submit(), rank.seen.submit()
    assert isinstance(first, Submit)
    assert first.request_id != second.request_id
    assert second.sampling.seed == (first.sampling.seed + 1) & ((1 << 63) - 1)
