"""/v1/messages by Anthropic's own client, which checks shapes and puts streamed events together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.procs.router_fakes import WAIT_S, FakeRank, Reply
from tests.procs.router_harness import (
    MODEL,
    RouterProcess,
    StartRouter,
    configure,
    error_of,
    running_router,
    write_model,
)

pytestmark = pytest.mark.procs
TEMPLATE = (
    "{% if tools %}T{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.reasoning_content }}|{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}.{% endfor %}"
    "{% if enable_thinking is false %}<think></think>{% endif %}"
)
HELLO: Any = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [{"name": "weather", "description": "d", "input_schema": {"type": "object", "properties": {}}}]
LONE: Any = {"type": "json_schema", "schema": {"not": {}}}
THOUGHT = b"<think>\nHm.\n</think>\n\n"
CALL = b'<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CALLED = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    model = write_model(tmp_path_factory.mktemp("messages") / "model")
    configure(model / "tokenizer_config.json", chat_template=TEMPLATE)
    return start_router(model=model)


@pytest.fixture
def claude(router: RouterProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=router.url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


@pytest.mark.parametrize(
    ("data", "finish", "kinds", "reason"),
    [
        (b"Hello!", "stop", ["text"], "end_turn"),
        (b"Hel", "length", ["text"], "max_tokens"),
        (b"Hello END!", "stop", ["text"], "stop_sequence"),
        (THOUGHT + b"Yes.", "stop", ["thinking", "text"], "end_turn"),
        (THOUGHT + b"See.\n" + CALL + CALL, "stop", ["thinking", "text", "tool_use", "tool_use"], "tool_use"),
        (CALL, "stop", ["tool_use"], "tool_use"),
        (b"", "stop", [], "end_turn"),
    ],
)
@pytest.mark.parametrize("per_step", [1, 1000])
def test_streamed_and_whole_are_the_same(
    rank: FakeRank, claude: anthropic.Anthropic, data: bytes, finish: str, kinds: list[str], reason: str, per_step: int
) -> None:
    rank.answer = Reply(data, finish, per_step=per_step)
    asked: Any = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": 300, "stop_sequences": ["END", "D!"]}
    whole: Any = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        streamed: Any = stream.get_final_message()
    for message in (whole, streamed):
        assert [block.type for block in message.content] == kinds
        assert message.stop_reason == reason
        assert message.stop_sequence == ("END" if reason == "stop_sequence" else None)
        assert message.usage.input_tokens == len("Tu:|Hi.")
        assert message.usage.output_tokens == (len("Hello END") if reason == "stop_sequence" else len(data))
        assert all(block.input == {"city": "Rome"} for block in message.content if block.type == "tool_use")
        texts = [block.text for block in message.content if block.type == "text"]
        said = data.decode().split("</think>\n\n")[-1].split("<tool")[0].split("END")[0]
        assert "".join(texts) == (said if reason == "stop_sequence" else said.rstrip())


@pytest.mark.parametrize("number", ["123456789012345678901234567890", "1e999", "0.10", '"\\ud800"'])
def test_arguments_stay_as_the_model_wrote_them(rank: FakeRank, router: RouterProcess, number: str) -> None:
    rank.answer = Reply(b'<tool_call>{"name": "weather", "arguments": {"a": %b}}</tool_call>' % number.encode())
    answer = router.http.post("/v1/messages", json={"messages": HELLO, "tools": TOOLS, "max_tokens": 300})
    assert answer.status_code == 200
    assert f'"input":{{"a": {number}}}' in answer.text


@pytest.mark.parametrize("content", ["The answer is", [{"type": "text", "text": "The answer is"}]])
def test_a_final_message_of_the_assistant_is_continued(
    rank: FakeRank, claude: anthropic.Anthropic, content: Any
) -> None:
    begun: Any = [*HELLO, {"role": "assistant", "content": content}]
    claude.messages.create(model=MODEL, messages=begun, max_tokens=5)
    assert bytes(rank.seen.submit().prompt).decode() == "u:|Hi.a:|The answer is"
    assert claude.messages.count_tokens(model=MODEL, messages=begun).input_tokens == len("u:|Hi.a:|The answer is")


@pytest.mark.parametrize(
    ("arguments", "finish"),
    [("[1]", "stop"), ('{"city": Rome}', "stop"), ('{"city": "a\nb"}', "stop"), ('{"ci', "length")],
)
def test_arguments_that_are_no_object(rank: FakeRank, claude: anthropic.Anthropic, arguments: str, finish: str) -> None:
    """A stream of them ended Anthropic's client with an error of its own."""
    end = "}</tool_call>" if finish == "stop" else ""
    rank.answer = Reply(f'<tool_call>{{"name": "weather", "arguments": {arguments}{end}'.encode(), finish, per_step=2)
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": 200}
    answer: Any = claude.messages.create(**asked)
    assert answer.content[0].input == {"INVALID_JSON": arguments}
    with claude.messages.stream(**asked) as stream:
        streamed: Any = stream.get_final_message()
    assert streamed.content[0].input == {"INVALID_JSON": arguments}
    assert streamed.stop_reason == answer.stop_reason


def test_what_the_model_is_told(rank: FakeRank, router: RouterProcess, claude: anthropic.Anthropic) -> None:
    conversation: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "See."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "dry"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    asked: Any = {"model": MODEL, "messages": conversation, "system": "Be brief.", "tools": TOOLS}
    claude.messages.create(
        **asked, max_tokens=5, tool_choice={"type": "none"}, extra_body={"top_k": 3, "temperature": 0.5}
    )
    submit = rank.seen.submit()
    expected = f"s:|Be brief..u:|Hi.a:hm|See.<tool_call>{CALLED}</tool_call>.t:|dry.u:|And?."
    assert bytes(submit.prompt).decode() == expected
    assert (submit.max_tokens, submit.sampling.top_k, submit.sampling.temperature) == (5, 3, 0.5)
    counted = claude.messages.count_tokens(**asked)
    assert counted.input_tokens == len("T" + expected)


def test_a_system_s_message_stands_where_it_was_said(rank: FakeRank, claude: anthropic.Anthropic) -> None:
    said: Any = [*HELLO, {"role": "system", "content": [{"type": "text", "text": "Short."}]}, *HELLO]
    claude.messages.create(model=MODEL, messages=said, max_tokens=5)
    assert bytes(rank.seen.submit().prompt).decode() == "u:|Hi.s:|Short..u:|Hi."


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"thinking": {"type": "between_tools"}}, "unsupported", "thinking.type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "invalid_request",
            "messages[0].content[0]",
        ),
        ({"messages": [*HELLO, {"role": "system", "content": [{"type": "thinking"}]}]}, "unsupported", None),
        ({"stop": ["a"]}, "unsupported", "stop"),
        ({"seed": 1}, "unsupported", "seed"),
        ({"max_tokens": 1_000_000}, "context_length_exceeded", "max_tokens"),
        ({"output_format": LONE}, "unsupported_schema", "output_format.schema"),
        ({"output_config": {"format": LONE}}, "unsupported_schema", "output_config.format.schema"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    router: RouterProcess, fields: dict[str, Any], code: str, param: str | None
) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 5, **fields}
    answer = router.http.post("/v1/messages", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert param in (None, error["param"])


def test_thinking_is_switched_by_the_template(rank: FakeRank, claude: anthropic.Anthropic) -> None:
    claude.messages.create(model=MODEL, messages=HELLO, max_tokens=5, thinking={"type": "disabled"})
    assert bytes(rank.seen.submit().prompt).decode() == "u:|Hi.<think></think>"
    claude.messages.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert bytes(rank.seen.submit().prompt).decode() == "u:|Hi."


def test_only_one_call(rank: FakeRank, claude: anthropic.Anthropic) -> None:
    rank.answer = Reply(CALL + CALL)
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    answer = claude.messages.create(model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=300, tool_choice=choice)
    assert [block.type for block in answer.content] == ["tool_use"]


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"max_tokens": None}, "invalid_request", "max_tokens"),
        ({"max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_request", "role"),
        (
            {"messages": [*HELLO, {"role": "user", "content": []}]},
            "invalid_request",
            "messages[1].content has no blocks",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "unsupported", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking"}]}]}, "unsupported", "of role user"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]},
            "invalid_request",
            "no name",
        ),
        ({"system": [{"type": "image"}]}, "unsupported", "system[0]"),
        (
            {"tools": [*TOOLS, {"type": "web_search_20250305", "name": "web_search"}]},
            "unsupported",
            "tools[1] is not supported: type 'web_search_20250305'; supported: custom",
        ),
        ({"tools": [{"name": "weather"}]}, "invalid_request", "tools[0] has no input_schema"),
        ({"tools": [{"input_schema": {}}]}, "invalid_request", "tools[0] has no name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nobody"}}, "invalid_request", "is no tool"),
        ({"tool_choice": {"type": "any"}}, "unsupported", "there are no tools"),
        ({"model": "other"}, "model_not_found", "not served here"),
    ],
)
def test_refusals(rank: FakeRank, router: RouterProcess, fields: Any, code: str, text: str) -> None:
    body = {"messages": HELLO, "max_tokens": 5, **fields}
    status, got, message = error_of(router.http.post("/v1/messages", json=body))
    assert (status, got) == (404 if code == "model_not_found" else 400, code)
    assert text in message


def test_the_key_as_anthropics_clients_send_it(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    body = {"messages": HELLO, "max_tokens": 5}
    with running_router(tmp_path, api_key_file=str(key)) as router:  # without a rank
        for given, status in (("secret", 503), ("wrong", 401), ("", 401)):
            assert router.http.post("/v1/messages", json=body, headers={"x-api-key": given}).status_code == status
