"""Calls as models write them, in each form that is read, and in the ways that differ within one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]
"""A tool's name and its arguments."""

DEEP_CALL = "<｜tool▁call▁begin｜>"
DEEP_SEP = "<｜tool▁sep｜>"
DEEP_END = "<｜tool▁call▁end｜>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _keyed(arguments: dict[str, Any], key: str, value: str, end: str) -> str:
    texts = {k: v if isinstance(v, str) else _json(v) for k, v in arguments.items()}
    return "".join(key.format(k) + value + text + end for k, text in texts.items())


def glm(name: str, arguments: dict[str, Any]) -> str:
    inner = _keyed(arguments, "<arg_key>{}</arg_key>", "\n<arg_value>", "</arg_value>\n")
    return f"<tool_call>{name}\n{inner}</tool_call>"


def bare_coder(name: str, arguments: dict[str, Any]) -> str:
    inner = _keyed(arguments, "<parameter={}>", "\n", "\n</parameter>\n")
    return f"<function={name}>\n{inner}</function>\n</tool_call>"


def coder(name: str, arguments: dict[str, Any]) -> str:
    return "<tool_call>\n" + bare_coder(name, arguments)


def _objects(calls: Sequence[Call]) -> list[str]:
    return [f'{{"name": "{name}", "arguments": {_json(arguments)}}}' for name, arguments in calls]


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in _objects(calls))


def _array(mark: str) -> Callable[[Sequence[Call]], str]:
    return lambda calls: f"{mark}[{', '.join(_objects(calls))}]"


def _named(between: str) -> Callable[[Sequence[Call]], str]:
    return lambda calls: "".join(f"[TOOL_CALLS]{name}{between}{_json(arguments)}" for name, arguments in calls)


def _deepseek(body: Callable[[str, str], str]) -> Callable[[Sequence[Call]], str]:
    def written(calls: Sequence[Call]) -> str:
        bodies = [f"{DEEP_CALL}{body(name, _json(arguments))}{DEEP_END}" for name, arguments in calls]
        return "<｜tool▁calls▁begin｜>" + "\n".join(bodies) + "<｜tool▁calls▁end｜>"

    return written


def _lines(write: Callable[[str, dict[str, Any]], str]) -> Callable[[Sequence[Call]], str]:
    return lambda calls: "\n".join(write(name, arguments) for name, arguments in calls)


# By the form's name, and a word for the way.
WAYS: dict[str, Callable[[Sequence[Call]], str]] = {
    "hermes": _hermes,
    "granite": _array("<|tool_call|>"),
    "granite older": _array("<tool_call>"),
    "mistral": _array("[TOOL_CALLS] "),
    "mistral named": _named("[ARGS]"),
    "mistral bare": _named(""),
    "mistral ids": _named("[CALL_ID]abcdef123[ARGS]"),
    "deepseek": _deepseek(lambda name, text: f"{name}{DEEP_SEP}{text}"),
    "deepseek fenced": _deepseek(lambda name, text: f"function{DEEP_SEP}{name}\n```json\n{text}\n```"),
    "glm": _lines(glm),
    "qwen_coder": _lines(coder),
    "qwen_coder bare": _lines(bare_coder),
}
