"""Answers that have to look like something, through the whole system: they do, streamed and not, whatever happens to
the ranks meanwhile; and what cannot be asked is refused."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import anthropic
import httpx
import jsonschema
import openai
import pytest

from tests.procs.deployment import Deployment
from tests.procs.router_harness import configure
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs

MODEL = "tiny-qwen3-moe"
HELLO: Any = [{"role": "user", "content": "Tell me of somebody."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee", "rain"]}, "minItems": 1, "maxItems": 3},
        "home": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
    },
    "required": ["name", "age", "likes", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}},
            "required": ["city"],
            "additionalProperties": False,
        }
    },
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "somebody", "schema": SCHEMA, "strict": True}}


TEMPLATE = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %}"
    "{# <tool_call> #}"
)
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NAMES = {"weather": WEATHER, "now": {"type": "object", "properties": {}, "additionalProperties": False}}


@pytest.fixture(scope="module")
def deployment(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("grammars") / MODEL
    shutil.copytree(model_folder(MODEL), folder)
    configure(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    deployed = Deployment(folder, replicas=2, devices=3, standbys=2, max_model_len=1_024).wait_ready()
    try:
        yield deployed
        deployed.stop()
    finally:
        deployed.discard()


@pytest.fixture
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(completion: Any) -> str:
    choice = completion.choices[0]
    assert choice.finish_reason == "stop", completion
    return str(choice.message.content)


def test_json_of_a_schema_streamed_and_not(client: openai.OpenAI) -> None:
    for seed in range(3):
        asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "seed": seed, "response_format": FORMAT}
        whole = said(client.chat.completions.create(**asked))
        jsonschema.validate(json.loads(whole), SCHEMA)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_json_of_a_schema_by_the_newer_interface(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "somebody", "schema": SCHEMA, "strict": True}}
    response = client.responses.create(model=MODEL, input="Tell me of somebody.", text=form)
    jsonschema.validate(json.loads(response.output_text), SCHEMA)


def test_json_of_a_schema_as_anthropics_client_asks(deployment: Deployment) -> None:
    form: Any = {"type": "json_schema", "schema": SCHEMA}
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 900, "messages": HELLO}
    with anthropic.Anthropic(base_url=deployment.base_url, api_key="none", max_retries=0) as claude:
        config: Any = {"format": form, "effort": "low"}
        whole = claude.messages.create(**asked, output_config=config)
        former = claude.messages.create(**asked, extra_body={"output_format": form})
        with claude.messages.stream(**asked, output_config=config) as stream:
            streamed = stream.get_final_message()
        for message in (whole, former, streamed):
            (block,) = message.content
            jsonschema.validate(json.loads(cast(Any, block).text), SCHEMA)
        with pytest.raises(anthropic.BadRequestError, match="exclude one another"):
            claude.messages.create(**asked, output_config=config, extra_body={"output_format": form})
        xml = form | {"type": "xml"}
        for name, body in (("output_format", xml), ("output_config", {"format": xml})):
            with pytest.raises(anthropic.BadRequestError, match=f"{name}.* is not supported: type 'xml'"):
                claude.messages.create(**asked, extra_body={name: body})


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": r"(ab|cd){2,5}-\d{3}"}, r"(ab|cd){2,5}-\d{3}"),
        ({"choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
        ({"grammar": 'start: word ("," word)~3\nword: /[a-f]{2}/'}, "[a-f]{2}(,[a-f]{2}){3}"),
        ({"grammar": 'root ::= "x" digit digit\ndigit ::= [0-9]'}, r"x\d\d"),
        ({"json": json.dumps({"enum": [1, 22, 333]})}, "1|22|333"),
    ],
)
def test_other_structures_are_kept_to(client: openai.OpenAI, asked: Any, pattern: str) -> None:
    body: Any = {"structured_outputs": asked}
    chat = client.chat.completions.create(model=MODEL, messages=HELLO, n=3, max_tokens=200, extra_body=body)
    assert all(re.fullmatch(pattern, choice.message.content or "") for choice in chat.choices), chat
    plain = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=200, temperature=0, extra_body=body)
    assert all(re.fullmatch(pattern, choice.text) for choice in plain.choices), plain


def test_beside_other_options(client: openai.OpenAI) -> None:
    """The end of the grammar is the answer's end, whatever else is asked; before it nothing else ends it."""

    def text(**more: Any) -> str:
        body = {"structured_outputs": {"regex": "a{3}b{0,2}"}, **more}
        asked = client.completions.create(model=MODEL, prompt="x", max_tokens=20, extra_body=body)
        assert asked.choices[0].finish_reason == "stop"
        return asked.choices[0].text

    assert re.fullmatch("a{3}b{0,2}", text(temperature=0))
    assert text(ignore_eos=True) == "aaabb"
    assert text(min_tokens=5) == "aaabb"
    assert text(min_tokens=19) == "aaabb"
    assert text(logit_bias={ord("b"): -100.0, ord("z"): 100.0}, temperature=0) == "aaa"
    assert text(stop="b", logit_bias={ord("b"): 100.0}) == "aaa"
    assert text(repetition_penalty=10.0, presence_penalty=2.0).startswith("aaa")


def test_log_probabilities_are_those_of_what_is_allowed(client: openai.OpenAI) -> None:
    body: Any = {"structured_outputs": {"regex": "[ab][cd]"}}
    chat = client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3, extra_body=body, temperature=1.0
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    for entry, allowed in zip(content.content, ("ab", "cd"), strict=True):
        told = {top.token: top.logprob for top in entry.top_logprobs}
        assert set(allowed) < set(told)
        assert sum(2.718281828 ** told[char] for char in allowed) == pytest.approx(1.0, abs=1e-3)
        assert [told[token] for token in told if token not in allowed] == [-9999.0]


def openai_tools() -> Any:
    return [{"type": "function", "function": {"name": name, "parameters": given}} for name, given in NAMES.items()]


def check_calls(calls: list[tuple[str, Any]], *, named: str | None = None) -> None:
    assert calls
    for name, arguments in calls:
        assert named in (None, name)
        jsonschema.validate(arguments, NAMES[name])


@pytest.mark.parametrize("named", [None, "weather"])
def test_tools_that_have_to_be_called(client: openai.OpenAI, named: str | None) -> None:
    choice: Any = "required" if named is None else {"type": "function", "function": {"name": named}}
    for seed in range(3):
        asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": openai_tools(), "tool_choice": choice}
        asked |= {"seed": seed, "parallel_tool_calls": False, "max_tokens": 400}
        answer = client.chat.completions.create(**asked).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or ()]
        assert (answer.finish_reason, answer.message.content, len(calls)) == ("tool_calls", None, 1)
        check_calls([(name, json.loads(arguments)) for name, arguments in calls], named=named)
        name, arguments = "", ""
        for chunk in client.chat.completions.create(**asked, stream=True):
            for call in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
        assert [(name, arguments)] == calls


def test_a_model_that_may_call_tools_calls_some_or_answers_in_the_form(client: openai.OpenAI) -> None:
    kinds = set()
    for seed in range(40):
        asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": openai_tools(), "response_format": FORMAT}
        asked |= {"seed": seed, "parallel_tool_calls": False, "max_tokens": 500}
        answer = client.chat.completions.create(**asked).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or ()]
        if calls:
            assert (answer.finish_reason, answer.message.content, len(calls)) == ("tool_calls", None, 1)
            check_calls([(name, json.loads(arguments)) for name, arguments in calls])
        else:
            assert answer.finish_reason == "stop"
            jsonschema.validate(json.loads(answer.message.content or ""), SCHEMA)
        if bool(calls) in kinds:
            continue
        kinds.add(bool(calls))
        with client.chat.completions.stream(**asked) as stream:
            streamed: Any = stream.get_final_completion().choices[0].message
        assert (streamed.content or None) == answer.message.content
        assert [(call.function.name, call.function.arguments) for call in streamed.tool_calls or ()] == calls
        if len(kinds) == 2:
            return
    raise AssertionError(f"forty answers, all {'calls' if True in kinds else 'in the form'}")


def test_tools_that_have_to_be_called_by_other_interfaces(deployment: Deployment, client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "name": name, "parameters": given} for name, given in NAMES.items()]
    one: Any = {"parallel_tool_calls": False}  # several may be cut off
    response = client.responses.create(model=MODEL, input="Hi", tools=tools, tool_choice="required", **one)
    items = [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]
    check_calls(items)
    given: Any = [{"name": name, "input_schema": schema} for name, schema in NAMES.items()]
    with anthropic.Anthropic(base_url=deployment.base_url, api_key="none", max_retries=0) as claude:
        for wanted in ({"type": "any"}, {"type": "tool", "name": "now"}):
            choice = wanted | {"disable_parallel_tool_use": True}
            message = claude.messages.create(
                model=MODEL, max_tokens=400, messages=HELLO, tools=given, tool_choice=cast(Any, choice)
            )
            blocks = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
            check_calls(blocks, named=wanted.get("name"))
            assert message.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"response_format": {"type": "xml"}}, "unsupported", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "invalid_request", "response_format"),
        ({"structured_outputs": {}}, "invalid_request", "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "invalid_request", "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "unsupported", "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "(a"}}, "invalid_grammar", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "unsupported_schema", "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "grammar_too_large", "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: nobody"}}, "invalid_grammar", "structured_outputs.grammar"),
        ({"structured_outputs": {"json": '{"not": {}}'}}, "unsupported_schema", "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"type": "integer", "minimum": 2, "maximum": 1}'}}, "invalid_grammar", None),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "invalid_request", "structured_outputs"),
        ({"guided_json": {}, "guided_regex": "a"}, "unsupported", "guided_regex"),
    ],
)
def test_what_cannot_be_asked_is_refused(deployment: Deployment, body: Any, code: str, param: str | None) -> None:
    answer = httpx.post(
        f"{deployment.base_url}/v1/completions",
        json={"model": MODEL, "prompt": "x", "max_tokens": 5, **body},
        timeout=60,
        trust_env=False,
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code), error
    assert param is None or error["param"] == param


def words_of(num: int) -> dict[str, Any]:
    """A schema of so many words, so that a stream lasts."""
    array = {"type": "array", "items": {"enum": ["tea", "mud", "sky"]}, "minItems": num, "maxItems": num}
    return {"type": "object", "properties": {"words": array}, "required": ["words"], "additionalProperties": False}


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "regex": ("completions", {"prompt": "x", "structured_outputs": {"regex": "([a-z]{3}, ){140}[a-z]{3}"}}),
    "schema": (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "words", "schema": words_of(35)}}},
    ),
    "call": (
        "chat/completions",
        {
            "tools": [{"type": "function", "function": {"name": "say", "parameters": words_of(35)}}],
            "tool_choice": {"type": "function", "function": {"name": "say"}},
        },
    ),
    "responses": (
        "responses",
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "words", "schema": words_of(35)}}},
    ),
    "messages": ("messages", {"output_config": {"format": {"type": "json_schema", "schema": words_of(35)}}}),
}
# The newer interfaces have no seeds.
SAMPLED: dict[str, dict[str, Any]] = {
    "responses": {"temperature": 0, "max_output_tokens": 750},
    "messages": {"temperature": 0, "max_tokens": 750},
}


ATTEMPTS = 5  # a machine with other work may be late with a resize, and not with the streams


def piece_of(event: dict[str, Any]) -> str:
    """The part of the answer that an event has, of whichever interface."""
    if event.get("type") in ("response.output_text.delta", "content_block_delta"):
        return str(event["delta"] if isinstance(event["delta"], str) else event["delta"].get("text", ""))
    if "choices" not in event:
        return ""  # of the newer interfaces: what begins and what ends
    choice = event["choices"][0]
    if "text" in choice:
        return str(choice["text"])
    calls = choice["delta"].get("tool_calls") or []
    return (choice["delta"].get("content") or "") + "".join(call["function"].get("arguments", "") for call in calls)


async def test_streams_are_the_same_through_a_kill_and_a_resize(deployment: Deployment) -> None:
    """Every rank begins anew with nothing but the tokens: the one that is seated, and the one that comes in."""
    chunks = [0]

    async def stream(http: httpx.AsyncClient, kind: str) -> str:
        path, form = LONG[kind]
        is_chat = path in ("chat/completions", "messages")
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if is_chat else {}
        sampled = SAMPLED.get(path, {"temperature": 1.0, "seed": 7, "max_tokens": 750})
        body = {"model": MODEL, "stream": True, **sampled, **asked, **form}
        text = ""
        async with http.stream("POST", f"/v1/{path}", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunks[0] += 1
                    event = json.loads(line[6:])
                    assert not event.get("error"), event
                    assert event.get("type") != "error", event
                    text += piece_of(event)
        return text

    def kill_one() -> None:
        victim = deployment.kill("r0t0", signal.SIGKILL)
        wait_until(lambda: deployment.rank_pids().get("r0t0", victim) != victim, "the rank is replaced", 60.0)

    async with httpx.AsyncClient(base_url=deployment.base_url, timeout=300, trust_env=False) as http:
        wanted = await asyncio.gather(*(stream(http, kind) for kind in LONG))
        assert re.fullmatch("([a-z]{3}, ){140}[a-z]{3}", wanted[0])
        # Nobody has taught the model when to stop writing spaces, so these end at their last token, not at a bracket.
        assert all(re.match(r'\s*\{\s*"words"\s*:\s*\[\s*"(tea|mud|sky)"', text) for text in wanted[1:])
        for _ in range(ATTEMPTS):
            chunks[0] = 0
            running = [asyncio.create_task(stream(http, kind)) for kind in LONG]
            while chunks[0] < 20:
                await asyncio.sleep(0.01)
            assert (await asyncio.to_thread(deployment.scale, replicas=3))["phase"] == "done"
            is_told = not any(task.done() for task in running)  # all of them went through the resize
            await asyncio.to_thread(kill_one)
            is_told = is_told and not all(task.done() for task in running)  # and some through the kill
            assert await asyncio.gather(*running) == wanted
            if is_told:
                return
            assert (await asyncio.to_thread(deployment.scale, replicas=2))["phase"] == "done"
    raise AssertionError("the streams were over before the resize or the kill, every time")
