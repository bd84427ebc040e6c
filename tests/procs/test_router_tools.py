"""Tools: what the model is told of them, and its calls as OpenAI's own client reads them, streamed and not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.procs.router_fakes import FakeRank, Reply
from tests.procs.router_harness import (
    MODEL,
    RouterProcess,
    StartRouter,
    configure,
    error_of,
    running_router,
    serving,
    write_model,
)
from tests.procs.tool_clients import HELLO, TOOLS, Read, by_anthropic, by_langchain, by_litellm

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]
TEMPLATE = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}.{% endfor %}"
)
CALLS = b'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "\xc3\x85"}}\n</tool_call>\n'
CALLS += b'<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
WANTED = [("weather", '{"city": "Å"}'), ("now", "{}")]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    model = write_model(tmp_path_factory.mktemp("tools") / "model")
    configure(model / "tokenizer_config.json", chat_template=TEMPLATE)
    return start_router(model=model)


def test_what_the_model_is_told(rank: FakeRank, router: RouterProcess, client: openai.OpenAI) -> None:
    arguments = '{"city": "Rome"}'
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "dry"},
    ]
    client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    prompt = bytes(rank.seen.submit().prompt).decode()
    called = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    assert prompt == f"T{json.dumps(TOOLS)}u:Hi.a:<tool_call>{called}</tool_call>.t:dry."
    tokenized = router.http.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()
    assert bytes(tokenized["tokens"]).decode() == prompt
    client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS, tool_choice="none")
    assert bytes(rank.seen.submit().prompt).decode() == "u:Hi."


@pytest.mark.parametrize("per_step", [1, 3, 1000])
@pytest.mark.parametrize("num", [1, 2])
def test_calls(rank: FakeRank, client: openai.OpenAI, per_step: int, num: int) -> None:
    rank.answer = Reply(CALLS, per_step=per_step)
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "n": num}
    whole = client.chat.completions.create(**asked)
    assert len(whole.choices) == num
    ids = set()
    for choice in whole.choices:
        calls: list[Any] = list(choice.message.tool_calls or ())
        assert [(call.function.name, call.function.arguments) for call in calls] == WANTED
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        ids |= {call.id for call in calls}
    assert len(ids) == 2 * num
    with client.chat.completions.stream(**asked) as stream:  # checks the chunks and puts them together
        streamed = stream.get_final_completion()
    for choice in streamed.choices:
        calls = list(choice.message.tool_calls or ())
        assert [(call.function.name, call.function.arguments, call.type) for call in calls] == [
            (*wanted, "function") for wanted in WANTED
        ]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")


@pytest.mark.parametrize("manner", ["whole", "streamed"])
def test_several_calls_by_the_client_for_node(rank: FakeRank, router: RouterProcess, node: Path, manner: str) -> None:
    rank.answer = Reply(CALLS, per_step=3)
    asked = json.dumps({"model": MODEL, "messages": HELLO, "tools": TOOLS})
    argv = ["node", str(Path(__file__).with_name("several_calls.mjs")), router.url, asked, manner]
    done = subprocess.run(argv, cwd=node, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [[name, json.loads(arguments)] for name, arguments in WANTED]
    assert json.loads(done.stdout) == ["Let me see.", calls, "tool_calls"]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("by", [by_anthropic, by_langchain, by_litellm])
def test_several_calls_that_the_model_has_chosen_by_other_clients(
    rank: FakeRank, router: RouterProcess, by: Callable[..., Read], is_streamed: bool
) -> None:
    """Nobody forces a call, and none is too many: text, then two calls, one of them without arguments."""
    rank.answer = Reply(CALLS, per_step=3)
    said, calls = by(router.url, is_streamed=is_streamed)
    assert said.strip() == "Let me see."
    assert calls == [(name, json.loads(arguments)) for name, arguments in WANTED]


def test_only_one_call(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply(CALLS)
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**asked).choices[0]
    assert [call.function.name for call in answer.message.tool_calls or ()] == ["weather"]  # type: ignore[union-attr]
    assert answer.finish_reason == "tool_calls"
    with client.chat.completions.stream(**asked) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == WANTED[0]


@pytest.mark.parametrize(
    ("data", "finish", "content", "calls", "reason"),
    [
        (b"No tool is needed. ", "stop", "No tool is needed. ", [], "stop"),
        (b"<tool_call> is a tag.", "stop", "<tool_call> is a tag.", [], "stop"),
        (CALLS[: CALLS.index(b'": "\xc3')], "length", "Let me see.", [("weather", '{"city')], "length"),
        (CALLS[12:-12], "stop", None, WANTED, "tool_calls"),
        (b"<tool_call>{", "length", "<tool_call>{", [], "length"),
    ],
)
def test_what_models_do(
    rank: FakeRank, client: openai.OpenAI, data: bytes, finish: str, content: str | None, calls: Any, reason: str
) -> None:
    rank.answer = Reply(data, finish)
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": TOOLS}
    answer = client.chat.completions.create(**asked).choices[0]
    got: list[Any] = list(answer.message.tool_calls or ())
    assert (answer.message.content, answer.finish_reason) == (content, reason)
    assert [(call.function.name, call.function.arguments) for call in got] == calls
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == (content or "")
    pieces = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    texts = ["".join(piece.function.arguments for piece in pieces if piece.index == n) for n in range(len(calls))]  # type: ignore[union-attr,misc]
    assert texts == [text for _, text in calls]
    assert chunks[-1].finish_reason == reason


def test_without_tools_the_text_stays_as_it_is(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply(CALLS)
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, **more}
        assert client.chat.completions.create(**asked).choices[0].message.content == CALLS.decode()


def test_log_probabilities_of_all_tokens(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply(CALLS, per_step=7)
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    chunks = client.chat.completions.create(**asked, stream=True)
    told = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [entry for logprobs in told if logprobs for entry in logprobs.content or ()]
    for entries in (whole.content if whole else [], streamed):
        assert b"".join(bytes(entry.bytes or []) for entry in entries or ()) == CALLS


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    """A router whose model thinks: by its template the answer begins inside, unless it is told not to think."""
    model = write_model(tmp_path_factory.mktemp("thinker") / "model")
    template = (
        TEMPLATE
        + "{% if enable_thinking is false %}<think></think>{% elif add_generation_prompt %}<think>\n{% endif %}"
    )
    configure(model / "tokenizer_config.json", chat_template=template)
    return start_router(model=model)


@pytest.mark.parametrize("per_step", [1, 1000])
@pytest.mark.parametrize(
    ("asked", "data", "thought", "said", "num_calls"),
    [
        ({}, b"Hm.\n</think>\n\nYes.", "Hm.", "Yes.", 0),
        ({"tools": TOOLS}, b"Hm <tool_call>.\n</think>\n\n" + CALLS, "Hm <tool_call>.", "Let me see.", 2),
        ({"chat_template_kwargs": {"enable_thinking": False}}, b"Yes.", None, "Yes.", 0),
        ({"n": 2}, b"Hm.\n</think>\n\nYes.", "Hm.", "Yes.", 0),
        ({"include_reasoning": False}, b"Hm.\n</think>\n\nYes.", None, "Yes.", 0),
        ({"separate_reasoning": False}, b"Hm.\n</think>\n\nYes.", None, "Hm.\n</think>\n\nYes.", 0),
        ({}, b"Hm. Hm.", "Hm. Hm.", "", 0),
    ],
)
def test_reasoning(
    thinker: RouterProcess, per_step: int, asked: Any, data: bytes, thought: str | None, said: str, num_calls: int
) -> None:
    body = {"messages": HELLO, **asked}
    with serving(thinker) as rank:
        rank.answer = Reply(data, per_step=per_step)
        whole = thinker.http.post("/v1/chat/completions", json=body).json()
        choice = whole["choices"][0]
        message = choice["message"]
        assert (message.get("reasoning_content"), message["content"]) == (thought, said)
        assert len(message.get("tool_calls", [])) == num_calls
        assert choice["finish_reason"] == ("tool_calls" if num_calls else "stop")
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        lines = thinker.http.post("/v1/chat/completions", json=streamed).text.split("\n\n")
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    chunks = [chunk for chunk in chunks if chunk["choices"][0]["index"] == 0]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (thought or "")
    assert "".join(delta.get("content", "") for delta in deltas) == said
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    num_thought = data.index(b"</think>") if b"</think>" in data else len(data) if thought else 0
    num_choices = asked.get("n", 1)
    for usage, num in ((whole["usage"], num_choices), (last["usage"], num_choices), (chunks[-1]["usage"], 1)):
        assert usage["completion_tokens_details"] == {"reasoning_tokens": num * num_thought}
        assert usage["completion_tokens"] == num * len(data)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content }}<tool_call>", "the model's chat template does not read it"),
        ("{{ tools }}{{ messages[0].content }}", "the setting tool_call_parser says it"),
    ],
)
def test_models_that_cannot(tmp_path: Path, template: str, text: str) -> None:
    model = write_model(tmp_path / "model")
    configure(model / "tokenizer_config.json", chat_template=template)
    with running_router(tmp_path, model=model) as router, serving(router):
        body = {"messages": HELLO, "tools": TOOLS}
        status, code, message = error_of(router.http.post("/v1/chat/completions", json=body))
        assert (status, code) == (400, "unsupported")
        assert text in message
