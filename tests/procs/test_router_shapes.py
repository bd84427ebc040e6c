"""What clients and evaluation harnesses look for in answers, read by OpenAI's own client: log probabilities, prompts
that are only rated, many choices, defaults, and the words of errors."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import httpx
import openai
import pytest

from tests.procs.router_fakes import WAIT_S, FakeRank, Reply
from tests.procs.router_harness import MODEL, RouterProcess, StartRouter, configure, post, write_model

pytestmark = pytest.mark.procs
HELLO: Any = [{"role": "user", "content": "Hi"}]
# The chosen tokens are not among the best three, or are the third.
TOP = ((ord("x"), -0.5), (ord("y"), -1.5), (ord("o"), -2.5))


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    model = write_model(tmp_path_factory.mktemp("recommended") / "model")
    recommended = {"eos_token_id": 257, "temperature": 0.2, "top_p": 0.9, "max_new_tokens": 40}
    configure(model / "generation_config.json", **recommended)
    return start_router(model=model, requests_max=256, allow_priority="true")


# ---- log probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_chosen_token_is_always_in_top_logprobs(rank: FakeRank, client: openai.OpenAI, is_stream: bool) -> None:
    rank.answer = Reply(b"Hello", top=TOP)
    for num_top in (0, 1, 2, 3):
        asked: dict[str, Any] = {"model": MODEL, "prompt": "ab", "logprobs": num_top, "echo": True}
        if is_stream:
            parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
        else:
            parts = [client.completions.create(**asked).choices[0].logprobs]
        tokens = [token for part in parts if part for token in part.tokens or ()]
        values = [value for part in parts if part for value in part.token_logprobs or ()]
        tops: list[Any] = [top for part in parts if part for top in part.top_logprobs or ()]
        assert tokens == list("abHello")
        assert tops[0] is None
        for token, value, top in zip(tokens[1:], values[1:], tops[1:], strict=True):
            assert top[token] == value == (-2.5 if token == "o" else -7.5)
            best = {chr(token_id): logprob for token_id, logprob in TOP[:num_top]}
            assert top == best | {token: value}


def test_two_tokens_of_one_name_do_not_hide_the_chosen_one(rank: FakeRank, client: openai.OpenAI) -> None:
    # Ids beyond the tokenizer's have no text at all, so they are called the same.
    rank.answer = Reply(b"Q", top=((259, -0.1), (258, -0.2), (257, -0.3)))
    answer = client.completions.create(model=MODEL, prompt="x", logprobs=3)
    assert answer.choices[0].logprobs is not None
    (top,) = answer.choices[0].logprobs.top_logprobs or ()
    assert top["Q"] == -7.5
    assert max(top.values()) == -0.1


@pytest.mark.parametrize("num_top", [0, 1, 2, 3])
def test_chat_has_the_chosen_token_too(rank: FakeRank, client: openai.OpenAI, num_top: int) -> None:
    rank.answer = Reply(b"Ho", top=TOP)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=num_top)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert [(entry.token, entry.logprob, entry.bytes) for entry in entries] == [("H", -7.5, [72]), ("o", -2.5, [111])]
    for entry in entries:
        told = [(top.token, top.logprob) for top in entry.top_logprobs]
        best = [(chr(token_id), logprob) for token_id, logprob in TOP[:num_top]]
        is_among = (entry.token, entry.logprob) in best
        assert told == (best if not num_top or is_among else [*best, (entry.token, entry.logprob)])


def test_tokens_may_be_called_by_their_ids(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply("é".encode())
    answer = post(router, prompt="x", logprobs=1, echo=True, return_tokens_as_token_ids=True).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:120", "token_id:195", "token_id:169"]
    assert logprobs["top_logprobs"][1] == {"token_id:195": -0.25}
    asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    entries = post(router, "/v1/chat/completions", **asked).json()["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"], entry["top_logprobs"][0]["token"]) for entry in entries] == [
        ("token_id:195", [195], "token_id:195"),
        ("token_id:169", [169], "token_id:169"),
    ]


# ---- prompts that are only rated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_prompt_is_rated_and_nothing_generated(rank: FakeRank, client: openai.OpenAI, is_stream: bool) -> None:
    rank.answer = Reply(b"never told", top=TOP)
    asked: dict[str, Any] = {"model": MODEL, "prompt": ["foo", "by"], "max_tokens": 0, "echo": True, "logprobs": 1}
    if is_stream:
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        usage = chunks[-1].usage
    else:
        answer = client.completions.create(**asked)
        choices, usage = list(answer.choices), answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 0)
    for index, prompt in enumerate(("foo", "by")):
        mine = [choice for choice in choices if choice.index == index]
        assert "".join(choice.text for choice in mine) == prompt
        assert mine[-1].finish_reason == "length"
        columns = [choice.logprobs for choice in mine if choice.logprobs is not None]
        assert [token for part in columns for token in part.tokens or ()] == list(prompt)
        values = [value for part in columns for value in part.token_logprobs or ()]
        assert values == [None, *(dict(TOP).get(ord(char), -7.5) for char in prompt[1:])]
        tops: list[Any] = [top for part in columns for top in part.top_logprobs or ()]
        assert [top is None for top in tops] == [True, *[False] * (len(prompt) - 1)]
    submits = [rank.seen.submit() for _ in range(2)]
    assert all(submit.prompt_logprobs and submit.max_tokens == 1 for submit in submits)


def test_a_prompt_is_repeated_without_any_work(rank: FakeRank, router: RouterProcess) -> None:
    answer = post(router, prompt="foo", max_tokens=0.0, echo=True, n=2).json()
    assert [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == [("foo", "length")] * 2
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert rank.seen.submits.empty()


def test_a_rating_that_is_lost_with_a_rank_is_made_anew(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(b"never", after=threading.Event())
    answers: list[httpx.Response] = []
    asked = {"prompt": "foo", "max_tokens": 0, "echo": True, "logprobs": 0}
    thread = threading.Thread(target=lambda: answers.append(post(router, **asked)))
    thread.start()
    first = rank.seen.submit()
    rank.stop()
    rank.answer = Reply(b"!", top=TOP)
    rank.start()
    thread.join(WAIT_S)
    assert rank.seen.submit().request_id != first.request_id
    logprobs = answers[0].json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [None, {"o": -2.5}, {"o": -2.5}]


# ---- choices, defaults, tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
def test_128_choices(rank: FakeRank, client: openai.OpenAI, is_stream: bool) -> None:
    rank.answer = lambda submit: Reply(f"seed {submit.sampling.seed}".encode(), per_step=4)
    texts = [""] * 128
    if is_stream:
        for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, n=128, seed=0, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=128, seed=0)
        texts = [choice.message.content or "" for choice in answer.choices]
    assert texts == [f"seed {number}" for number in range(128)]


def test_choices_of_a_batch_count_together(rank: FakeRank, router: RouterProcess) -> None:
    assert len(post(router, prompt=["a", "b"], n=128).json()["choices"]) == 256
    refused = post(router, prompt=["a", "b", "c"], n=128)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "384 choices in one request exceed the limit of 256" in refused.json()["error"]["message"]


def test_the_models_defaults_are_in_force_and_shown(rank: FakeRank, router: RouterProcess) -> None:
    card = router.get("/v1/models").json()["data"][0]
    assert card["default_sampling_params"] == {"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 40}
    post(router, "/v1/chat/completions", messages=HELLO)
    submit = rank.seen.submit()
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.max_tokens) == (0.2, 0.9, 40)
    post(router, "/v1/chat/completions", messages=HELLO, temperature=1, max_tokens=50)
    submit = rank.seen.submit()
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.max_tokens) == (1.0, 0.9, 50)
    post(router, prompt="x")
    assert rank.seen.submit().max_tokens == 16
    # A default is cut to what the context has room for; what is asked for is not.
    post(router, prompt=[97] * 505)
    assert rank.seen.submit().max_tokens == 7
    assert post(router, prompt=[97] * 505, max_tokens=16).status_code == 400


def test_a_priority_reaches_the_rank_where_it_is_allowed(rank: FakeRank, router: RouterProcess) -> None:
    for priority in (-3, 7.0, None):
        assert post(router, prompt="x", priority=priority).status_code == 200
        assert post(router, "/v1/chat/completions", messages=HELLO, priority=priority).status_code == 200
        assert [rank.seen.submit().priority for _ in range(2)] == [priority or 0] * 2


def test_usage_in_every_chunk(rank: FakeRank, router: RouterProcess) -> None:
    for path, asked in (("/v1/completions", {"prompt": "ab"}), ("/v1/chat/completions", {"messages": HELLO})):
        body = asked | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        lines = [line[6:] for line in post(router, path, **body).text.splitlines() if line.startswith("data: {")]
        usages = [json.loads(line)["usage"] for line in lines]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert counts[-1] == len("Hello!")
        assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
        assert {usage["prompt_tokens"] for usage in usages} == {2 if "prompt" in asked else 5}


def test_special_tokens_may_be_left_out(rank: FakeRank, router: RouterProcess) -> None:
    post(router, prompt="ab", add_special_tokens=False)
    assert rank.seen.submit().prompt == tuple(b"ab")
    post(router, prompt=["ab", "c"], add_special_tokens=None)
    assert [len(rank.seen.submit().prompt) for _ in range(2)] == [2, 1]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_the_context_error_has_the_words_that_clients_look_for(rank: FakeRank, client: openai.OpenAI) -> None:
    asked: Any
    for asked in (
        {"max_tokens": 600, "prompt": "x"},
        {"prompt": [97] * 512},
        {"prompt": [97] * 9_000, "max_tokens": 5},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, **asked)
        assert caught.value.code == "context_length_exceeded"
        assert "this model's maximum context length is 512 tokens" in str(caught.value).lower()
    with pytest.raises(openai.BadRequestError) as chat:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=600)
    figures = re.search(r"requested (\d+) tokens \((\d+) in the messages, (\d+) in the completion\)", str(chat.value))
    assert figures is not None
    assert figures.groups() == ("605", "5", "600")
    assert chat.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a" * 600}])
    assert "your messages resulted in 603 tokens" in str(long.value)
    assert long.value.param == "messages"


def test_what_is_not_supported_is_refused_by_name(rank: FakeRank, client: openai.OpenAI) -> None:
    for word, value in (
        ("guided_choice", ["yes", "no"]),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "high"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={word: value})
        assert (caught.value.code, caught.value.param) == ("unsupported", word)
    assert rank.seen.submits.empty()
    extra = {"functions": [{"name": "f"}], "function_call": "none", "guided_choice": None, "use_beam_search": False}
    client.chat.completions.create(model=MODEL, messages=HELLO, extra_body=extra)
