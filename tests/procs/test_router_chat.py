"""What a conversation becomes on its way to a rank: options of the chat template, and checkpoints that lack a part."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.procs.router_fakes import FakeRank
from tests.procs.router_harness import RouterProcess, StartRouter, configure, error_of, serving, write_model
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.reasoning_content }}{{ m.content }}.{% endfor %}"
    "{% if documents %}{{ documents[0].text }}{% endif %}"
    "{% if add_generation_prompt %}>{% if enable_thinking is false %}!{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes, "}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    model = write_model(tmp_path_factory.mktemp("templates") / "model")
    configure(model / "tokenizer_config.json", chat_template=TEMPLATE, pad_token="<|pad|>", eos_token="<|assistant|>")
    return start_router(model=model)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    """A router whose model's template does not compile."""
    model = write_model(tmp_path_factory.mktemp("broken") / "model")
    configure(model / "tokenizer_config.json", chat_template="{% if %}")
    return start_router(model=model)


def chat(router: RouterProcess, **body: Any) -> httpx.Response:
    return router.http.post("/v1/chat/completions", json={"max_tokens": 1, **body})


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"messages": [USER]}, "u:Hi.>"),
        ({"messages": [USER], "add_generation_prompt": False}, "u:Hi."),
        ({"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}, "u:Hi.>!"),
        ({"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}}, "u:Hi.>"),
        ({"messages": [USER, ANSWER], "continue_final_message": True}, "u:Hi.a:Yes, "),
        ({"messages": [USER, {**ANSWER, "reasoning": "r"}]}, "u:Hi.a:rYes, .>"),
        (
            {"messages": [USER, {**ANSWER, "thinking": "so"}], "continue_final_message": "thinking"},
            "u:Hi.a:so",
        ),
        ({"messages": [USER], "documents": [{"text": "D"}]}, "u:Hi.D>"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]}, "u:a\nb.>"),
    ],
)
def test_the_prompt_that_a_rank_gets(
    rank: FakeRank, router: RouterProcess, fields: dict[str, Any], prompt: str
) -> None:
    assert chat(router, **fields).status_code == 200
    assert bytes(rank.seen.submit().prompt).decode() == prompt
    tokenized = router.http.post("/tokenize", json=fields).json()
    assert bytes(tokenized["tokens"]).decode() == prompt


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_request", "exclude one another"),
        ({"continue_final_message": "reasoning"}, "invalid_request", "has no 'reasoning' to continue"),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_request", "cannot set messages: it is reserved"),
        ({"chat_template": "x"}, "unsupported", "a template comes with the model only"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_refusals(rank: FakeRank, router: RouterProcess, path: str, fields: Any, code: str, text: str) -> None:
    status, got, message = error_of(router.http.post(path, json={"messages": [USER], **fields}))
    assert (status, got) == (400, code)
    assert text in message


def test_reasoning_effort_is_not_ignored(rank: FakeRank, router: RouterProcess) -> None:
    answer = chat(router, messages=[USER], reasoning_effort="low")
    assert error_of(answer)[:2] == (400, "unsupported")


def test_an_end_that_only_the_tokenizer_names(rank: FakeRank, router: RouterProcess) -> None:
    assert chat(router, messages=[USER]).status_code == 200
    assert rank.seen.submit().stop_token_ids == (257, 259)


def test_a_padding_token_without_embedding(rank: FakeRank, router: RouterProcess) -> None:
    """The deployment serves; only the prompt that holds it is refused, and tokenizing it is no harm."""
    for answer in (
        router.http.post("/v1/completions", json={"prompt": ["a", "b<|pad|>"]}),
        router.http.post("/v1/completions", json={"prompt": [97, 260]}),
        chat(router, messages=[{"role": "user", "content": "<|pad|>"}]),
    ):
        assert answer.status_code == 400, answer.text
    assert "'<|pad|>' of id 260" in error_of(answer)[2]
    assert router.http.post("/tokenize", json={"prompt": "a<|pad|>"}).json()["tokens"] == [97, 260]
    assert chat(router, messages=[USER]).status_code == 200
    assert router.log_text.count("added tokens have no embedding") == 1


def test_special_tokens_of_completions(rank: FakeRank, router: RouterProcess) -> None:
    for given in (True, False, None):
        answer = router.http.post("/v1/completions", json={"prompt": "a", "add_special_tokens": given})
        assert answer.status_code == 200
        assert rank.seen.submit().prompt == (97,)


def test_a_broken_template_costs_chat_only(broken: RouterProcess) -> None:
    with serving(broken):
        for path in ("/v1/chat/completions", "/tokenize"):
            status, code, text = error_of(broken.http.post(path, json={"messages": [USER]}))
            assert (status, code) == (400, "bad_chat_template")
            assert "does not compile" in text
            assert "/v1/completions" in text
        assert broken.http.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        assert broken.http.post("/tokenize", json={"prompt": "a"}).json()["tokens"] == [97]
        wait_until(lambda: broken.log_text.count("does not compile") == 1, "it is logged, once")
