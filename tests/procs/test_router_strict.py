"""Strict tools where the model calls by itself: each interface has ranks keep to their schemas, and says so."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from elasticmoe.cli.models.byte_tokenizer import VOCAB_SIZE
from elasticmoe.common.grammar import GrammarError, GrammarMatcher, GrammarTokens
from elasticmoe.common.grammar_text import unpack_grammar
from elasticmoe.common.protocol.rank import Submit
from tests.procs.router_fakes import FakeRank, Reply
from tests.procs.router_harness import MODEL, RouterProcess, StartRouter, configure, error_of, write_model

pytestmark = pytest.mark.procs

TEMPLATE = "{% if tools %}T{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL = b'Hm. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
BREACH = b'<tool_call>{"name": "weather", "arguments": {"town"'
TOKENS = GrammarTokens([bytes([n]) if n < 256 else b"" for n in range(VOCAB_SIZE)], ())
HELLO: Any = [{"role": "user", "content": "Hi"}]
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": HELLO}),
    "responses": ("/v1/responses", {"input": "Hi"}),
    "messages": ("/v1/messages", {"messages": HELLO, "max_tokens": 200}),
}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    model = write_model(tmp_path_factory.mktemp("strict") / "model")
    configure(model / "tokenizer_config.json", chat_template=TEMPLATE)
    return start_router(model=model)


def tool(way: str, schema: dict[str, Any], strict: Any = "absent", name: str = "weather") -> dict[str, Any]:
    said = {} if strict == "absent" else {"strict": strict}
    match way:
        case "chat":
            return {"type": "function", "function": {"name": name, "parameters": schema, **said}}
        case "responses":
            return {"type": "function", "name": name, "parameters": schema, **said}
        case _:
            return {"name": name, "input_schema": schema, **said}


def is_kept(submit: Submit) -> bool:
    """Whether the answer may be what the rank says, and no call that breaks the schema."""
    grammar = submit.sampling.grammar
    if grammar is None:
        return False
    text = unpack_grammar(grammar.packed)
    GrammarMatcher(TOKENS, text).consume(list(CALL))
    with pytest.raises(GrammarError):
        GrammarMatcher(TOKENS, text).consume(list(BREACH))
    return True


@pytest.mark.parametrize(
    ("way", "strict", "kept"),
    [
        ("chat", True, True),
        ("chat", False, False),
        ("chat", "absent", False),
        ("responses", True, True),
        ("responses", False, False),
        ("responses", None, True),
        ("responses", "absent", True),
        ("messages", True, True),
        ("messages", "absent", False),
    ],
)
def test_who_keeps_to_schemas(rank: FakeRank, router: RouterProcess, way: str, strict: Any, kept: bool) -> None:
    rank.answer = Reply(CALL)
    path, body = WAYS[way]
    answer = router.http.post(path, json={**body, "tools": [tool(way, SCHEMA, strict)]})
    assert answer.status_code == 200, answer.text
    assert is_kept(rank.seen.submit()) is kept
    if way == "responses":
        assert answer.json()["tools"][0]["strict"] is kept


@pytest.mark.parametrize("way", WAYS)
def test_a_strict_tool_whose_schema_cannot_be_kept_to_is_refused(router: RouterProcess, way: str) -> None:
    path, body = WAYS[way]
    tools = [tool(way, SCHEMA), tool(way, {"not": {}}, True, "other")]
    status, code, message = error_of(router.http.post(path, json={**body, "tools": tools}))
    assert (status, code) == (400, "unsupported_schema")
    assert message.startswith("tools: parameters of other")


def test_who_does_not_say_strict_is_served_all_the_same(rank: FakeRank, router: RouterProcess) -> None:
    """As OpenAI's interface does, whose answer says then that the tools are not strict."""
    path, body = WAYS["responses"]
    tools = [tool("responses", SCHEMA), tool("responses", {"not": {}}, name="other")]
    answer = router.http.post(path, json={**body, "tools": tools})
    assert [told["strict"] for told in answer.json()["tools"]] == [False, False]
    assert rank.seen.submit().sampling.grammar is None
    tools[0]["strict"] = True
    answer = router.http.post(path, json={**body, "tools": tools})
    assert [told["strict"] for told in answer.json()["tools"]] == [True, False]
    assert is_kept(rank.seen.submit())


class Weather(BaseModel):
    """Of a city."""

    city: str


def test_openais_client_parses_what_it_had_made_strict(rank: FakeRank, client: openai.OpenAI) -> None:
    rank.answer = Reply(CALL, per_step=3)
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    completion = client.chat.completions.parse(model=MODEL, messages=HELLO, tools=tools)
    assert is_kept(rank.seen.submit())
    (call,) = completion.choices[0].message.tool_calls or ()
    assert call.function.parsed_arguments == Weather(city="Rome")
