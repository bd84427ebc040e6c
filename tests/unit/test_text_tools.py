"""Calls in chat templates: arguments as objects or texts, and messages without content, as each template takes them."""

from __future__ import annotations

from typing import Any

import pytest

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.text.template import ChatTemplate

# Of the kinds of GLM-4.5 (no message without content), Qwen3-Coder (plain `string`) and DeepSeek R1 (joined texts).
KEYED = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% set a = c.function.arguments or {} %}"
    "{% for k, v in a.items() %}<{{ k }}>{{ v | tojson if v is not string else v }}{% endfor %}{% endfor %}{% endfor %}"
)
PLAIN = (
    "{% if not tools is defined %}{% set tools = [] %}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v | string }}{% endfor %}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
JOINED = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<call>' + c['function']['name'] + '|' + c['function']['arguments'] }}{% endfor %}{% endif %}"
    "{% if m.content is not none %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}"
)
JSON = "{% for m in messages %}{{ m | tojson }}{% endfor %}"


def said(arguments: str, content: str | None = None) -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "a"},
    ]


@pytest.mark.parametrize(
    ("template", "arguments", "text"),
    [
        (KEYED, '{"x": "y", "z": true}', "<user>q<assistant><call>f<x>y<z>true<tool>r"),
        (PLAIN, '{"x": "y", "z": true}', "<user>q<assistant><call>f<x>y<z>True<tool>r"),
        (JOINED, '{"x":  1}', '<user>q<call>f|{"x":  1}<tool>r'),
        (JOINED, "no JSON", "<user>q<call>f|no JSON<tool>r"),
        (KEYED, "", "<user>q<assistant><call>f<tool>r"),
    ],
)
def test_calls_as_the_template_takes_them(template: str, arguments: str, text: str) -> None:
    assert ChatTemplate(template, {}).render(said(arguments)) == text


def test_no_content_is_not_printed() -> None:
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c }}{% endfor %};{% endfor %}"
    assert ChatTemplate(template, {}).render(said("{}")).startswith("q;{")


def test_a_template_that_prints_json_has_objects_and_null() -> None:
    text = ChatTemplate(JSON, {}).render(said('{"x": 1}'))
    assert '"content": null' in text
    assert '"arguments": {"x": 1}' in text


@pytest.mark.parametrize("arguments", ["no JSON", "[1]", "1", "[" * 100_000])
def test_arguments_that_a_template_cannot_take(arguments: str) -> None:
    where = r"messages\[1\]\.tool_calls\[0\]"
    with pytest.raises(InvalidRequest, match=f"{where}: the arguments of the call of 'f' are no JSON object"):
        ChatTemplate(KEYED, {}).render(said(arguments))


@pytest.mark.parametrize(("template", "takes"), [(KEYED, True), (PLAIN, True), (JOINED, False)])
def test_templates_that_read_tools(template: str, takes: bool) -> None:
    assert ChatTemplate(template, {}).takes("tools") is takes


def test_tools_are_what_the_template_gets() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    text = ChatTemplate(KEYED, {}).render([{"role": "user", "content": "q"}], tools=tools)
    assert text == '[{"type": "function", "function": {"name": "f", "parameters": {}}}]<user>q'
