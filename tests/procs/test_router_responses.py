"""/v1/responses by OpenAI's own client, which checks shapes and puts streamed events together."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.procs.router_fakes import FakeRank, Reply
from tests.procs.router_harness import MODEL, RouterProcess, StartRouter, configure, error_of, serving, write_model

pytestmark = pytest.mark.procs
TEMPLATE = (
    "{% if tools %}T{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.reasoning_content }}|{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}.{% endfor %}"
    "{% if false %}</think>{% endif %}"
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "name": "weather", "description": "d", "parameters": PARAMETERS, "strict": True}]
CALLED = {"type": "function_call", "call_id": "c1", "name": "weather"}
TURN: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"role": "assistant", "content": "See."},
]
THOUGHT = b"<think>\nHm.\n</think>\n\n"
CALL = b'<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    model = write_model(tmp_path_factory.mktemp("responses") / "model")
    configure(model / "tokenizer_config.json", chat_template=TEMPLATE)
    return start_router(model=model)


@pytest.mark.parametrize(
    ("data", "finish", "kinds"),
    [
        (b"Hello!", "stop", ["message"]),
        (b"Hel", "length", ["message"]),
        (THOUGHT + b"Yes.", "stop", ["reasoning", "message"]),
        (
            THOUGHT + b"Let me see.\n" + CALL + b"\n" + CALL,
            "stop",
            ["reasoning", "message", "function_call", "function_call"],
        ),
        (CALL, "stop", ["function_call"]),
        (b"", "stop", []),
    ],
)
@pytest.mark.parametrize("per_step", [1, 1000])
def test_streamed_and_whole_are_the_same(
    rank: FakeRank, client: openai.OpenAI, data: bytes, finish: str, kinds: list[str], per_step: int
) -> None:
    rank.answer = Reply(data, finish, per_step=per_step)
    asked: Any = {"model": MODEL, "input": "Hi", "tools": TOOLS, "max_output_tokens": 300}
    whole: Any = client.responses.create(**asked)
    *_, last = client.responses.create(**asked, stream=True)
    streamed: Any = last.response
    assert [item.status for item in whole.output] == [item.status for item in streamed.output]
    if finish == "stop":  # its helper knows no other end, and puts the events together
        with client.responses.stream(**asked) as stream:
            assert stream.get_final_response().output_text == whole.output_text
    for response in (whole, streamed):
        assert [item.type for item in response.output] == kinds
        assert response.status == ("incomplete" if finish == "length" else "completed")
        assert response.usage is not None
        assert (response.usage.output_tokens, response.usage.input_tokens) == (len(data), len("Tu:|Hi."))
        num_thought = data.find(b"</think>") if b"</think>" in data else 0
        assert response.usage.output_tokens_details.reasoning_tokens == num_thought
        calls = [item for item in response.output if item.type == "function_call"]
        assert all((call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"}) for call in calls)
    assert (
        whole.output_text == streamed.output_text == data.decode().split("</think>\n\n")[-1].split("<tool")[0].rstrip()
    )
    if finish == "length":
        assert whole.incomplete_details is not None
        assert whole.incomplete_details.reason == "max_output_tokens"


def test_events_in_their_order(rank: FakeRank, router: RouterProcess) -> None:
    rank.answer = Reply(THOUGHT + b"So." + CALL, per_step=1000)
    body = {"input": "Hi", "stream": True, "tools": TOOLS}
    events = router.http.post("/v1/responses", json=body).text.strip().split("\n\n")
    names = [event.split("\n")[0].removeprefix("event: ") for event in events]
    bodies = [json.loads(event.split("\ndata: ")[1]) for event in events]
    assert [body["type"] for body in bodies] == names
    assert [body["sequence_number"] for body in bodies] == list(range(len(bodies)))
    assert [name.removeprefix("response.") for name in names] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    items = {body["output_index"]: body["item"] for body in bodies if body["type"] == "response.output_item.done"}
    assert [items[index] for index in range(3)] == bodies[-1]["response"]["output"]
    assert {item["status"] for item in items.values()} == {"completed"}


def test_an_item_that_is_cut_off_says_so_when_it_ends(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply(THOUGHT + b"So", "length", per_step=1)
    events: Any = list(client.responses.create(model=MODEL, input="Hi", stream=True))
    done = [event.item.status for event in events if event.type == "response.output_item.done"]
    assert done == [item.status for item in events[-1].response.output] == ["completed", "incomplete"]


def test_all_tokens_of_an_answer_that_is_cut_off_while_it_thinks_are_reasoning(
    rank: FakeRank, client: openai.OpenAI
) -> None:
    rank.answer = Reply(b"<think>\nHm", "length")
    response = client.responses.create(model=MODEL, input="Hi")
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == response.usage.output_tokens == 10


def test_what_is_too_long_is_told_by_the_names_of_this_endpoint(router: RouterProcess) -> None:
    body = {"input": "Hi", "max_output_tokens": 1_000_000}
    error = router.http.post("/v1/responses", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_output_tokens")
    assert "in the input" in error["message"]


@pytest.mark.parametrize(
    ("fields", "code", "param", "text"),
    [
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "unsupported_schema",
            "text.format.schema",
            "text.format.schema",
        ),
        (
            {"input": [{"role": "user", "content": "Hi"}, {**CALLED, "arguments": "[1]"}]},
            "invalid_request",
            "input",
            "input[1]: the arguments",
        ),
        (
            {"input": [*TURN, {**CALLED, "arguments": "{}"}, {**CALLED, "call_id": "c2", "arguments": "[1]"}]},
            "invalid_request",
            "input",
            "input[4]: the arguments",
        ),
        ({"reasoning": {"effort": "low"}}, "unsupported", "reasoning.effort", "reasoning.effort is not supported"),
        ({"input": "x" * 100_000}, "context_length_exceeded", "input", "characters in your input"),
    ],
)
def test_what_chat_refuses_is_told_by_the_names_of_this_endpoint(
    router: RouterProcess, fields: dict[str, Any], code: str, param: str, text: str
) -> None:
    error = router.http.post("/v1/responses", json={"input": "Hi", "instructions": "Be brief.", **fields}).json()[
        "error"
    ]
    assert (error["code"], error["param"]) == (code, param)
    assert text in error["message"]


def test_what_the_model_is_told(rank: FakeRank, client: openai.OpenAI) -> None:
    conversation: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "See."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "dry"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "wet"}]},
        {"role": "assistant", "content": "Dry and wet."},
        {"role": "assistant", "content": "Good?"},
    ]
    client.responses.create(model=MODEL, input=conversation, instructions="Be brief.", tools=TOOLS, tool_choice="none")
    calls = "".join(
        "<tool_call>" + json.dumps({"name": "weather", "arguments": {"city": city}}) + "</tool_call>"
        for city in ("Rome", "Oslo")
    )
    told = bytes(rank.seen.submit().prompt).decode()
    assert told == f"s:|Be brief..u:|Hi.a:hm|See.{calls}.t:|dry.t:|wet.a:|Dry and wet..a:|Good?."


def test_the_whole_of_a_turn_goes_back_as_it_came(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply(THOUGHT + b"So." + CALL)
    first: Any = client.responses.create(model=MODEL, input="Hi", tools=TOOLS)
    rank.seen.submit()
    (call,) = (item for item in first.output if item.type == "function_call")
    given: Any = [{"role": "user", "content": "Hi"}, *first.output]
    given.append({"type": "function_call_output", "call_id": call.call_id, "output": "dry"})
    client.responses.create(model=MODEL, input=given, tools=TOOLS)
    told = bytes(rank.seen.submit().prompt).decode()
    called = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    assert told == f"Tu:|Hi.a:Hm.|So.<tool_call>{called}</tool_call>.t:|dry."


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"previous_response_id": "resp_1"}, "unsupported", "send the conversation whole"),
        ({"conversation": "conv_1"}, "unsupported", "send the conversation whole"),
        ({"background": True}, "unsupported", "no answer and no conversation is kept"),
        ({"prompt": {"id": "p"}}, "unsupported", "no prompts are kept"),
        ({"truncation": "auto"}, "unsupported", "send what is to be read"),
        ({"top_logprobs": 3}, "unsupported", "/v1/chat/completions"),
        ({"max_tool_calls": 3}, "unsupported", "runs no tools"),
        ({"tools": [*TOOLS, {"type": "web_search"}]}, "unsupported", "tools[1] is not supported: type 'web_search'"),
        ({"tools": [{"type": "function"}]}, "invalid_request", "tools[0] has no name"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "unsupported", "tool_choice is not supported: type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "invalid_request", "tool_choice has no name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nobody"}}, "invalid_request", "is no tool"),
        ({"text": {"format": {"type": "grammar"}}}, "unsupported", "json_schema"),
        ({"text": {"verbosity": "low"}}, "unsupported", "say it in a message"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": [{"content": "x"}]}, "invalid_request", "input[0] has no role"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "invalid_request", "input[0] has no call_id"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "invalid_request", "input[0] has no name"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported", "input[0] is not supported: type 'item_"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported", "supported: texts"),
        ({"max_output_tokens": 0}, "invalid_request", "max_output_tokens"),
        ({"reasoning": {"effort": "low"}}, "unsupported", "does not read it"),
        ({"model": "other"}, "model_not_found", "not served here"),
    ],
)
def test_refusals(rank: FakeRank, router: RouterProcess, fields: Any, code: str, text: str) -> None:
    status, got, message = error_of(router.http.post("/v1/responses", json={"input": "Hi", **fields}))
    assert (status, got) == (404 if code == "model_not_found" else 400, code)
    assert text in message


@pytest.mark.parametrize(
    "asked",
    [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "name": "place", "schema": PARAMETERS, "strict": True, "description": "where"},
    ],
)
def test_an_answer_says_what_it_was_asked_to_be(rank: FakeRank, client: openai.OpenAI, asked: dict[str, Any]) -> None:
    rank.answer = Reply(b'{"city": "Rome"}', "stop")
    given: Any = {"format": asked, "verbosity": "medium"}
    answer: Any = client.responses.create(model=MODEL, input="Hi", text=given)
    assert answer.text.to_dict() == {"format": asked, "verbosity": "medium"}


def test_nothing_is_asked_by_what_is_empty(rank: FakeRank, client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input="Hi", previous_response_id=None, background=False, truncation="disabled", metadata={"a": "b"}
    )
    assert answer.metadata == {"a": "b"}
    assert answer.output_text == "Hello!"


def test_a_stream_that_fails_says_so(router: RouterProcess) -> None:
    with serving(router) as rank:
        rank.answer = Reply(b"Hel", None, fail=("request_failed", "it broke", False))
        text = router.http.post("/v1/responses", json={"input": "Hi", "stream": True}).text
    assert "request_failed" in text
    assert "response.completed" not in text


def test_embeddings_are_refused_by_name(rank: FakeRank, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the model generates text"):
        client.embeddings.create(model=MODEL, input="x")
